"""How llama.cpp lays a model out in a GGUF file: architectures, tensor names and the order of rows.

Facts from llama.cpp (gguf-py/gguf/tensor_mapping.py, convert_hf_to_gguf.py).
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["f16", "f32", "bf16", "q8_0"]  # types that files are written in


@dataclass(frozen=True)
class Architecture:
    """`name` is general.architecture; `model_type` and `hf_class` are those of config.json.

    With `interleaved`, the rows of q_proj and k_proj stand in another order than in Hugging Face's models; see
    `interleave`.
    """

    name: str
    model_type: str
    hf_class: str
    interleaved: bool = False


ARCHITECTURES = [
    Architecture("llama", "llama", "LlamaForCausalLM", interleaved=True),
    Architecture("llama", "mistral", "MistralForCausalLM", interleaved=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM"),
    Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
]

# Paths of modules in mlx-lm's models (Hugging Face's too, but for the experts) → names in a GGUF file.
OUTSIDE_BLOCKS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
IN_BLOCK = ATTENTION | MLP | NORMS | QK_NORMS | EXPERTS
INTERLEAVED = {"attn_q", "attn_k"}


def tensor_name(path: str) -> str | None:
    """``model.layers.3.self_attn.q_proj`` → ``blk.3.attn_q``; None for a module that llama.cpp does not have."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if found is None:
        return OUTSIDE_BLOCKS.get(path)
    name = IN_BLOCK.get(found[2])
    return name and f"blk.{found[1]}.{name}"


def interleave(rows: npt.NDArray[np.generic], head_dim: int) -> npt.NDArray[np.generic]:
    """Rows of q_proj or k_proj (heads · head_dim, …) from Hugging Face's order into llama.cpp's: the two halves of a
    head that RoPE rotates together stand interleaved."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: npt.NDArray[np.generic], head_dim: int) -> npt.NDArray[np.generic]:
    """The inverse of `interleave`."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
