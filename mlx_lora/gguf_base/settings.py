"""A GGUF file's metadata as the config.json of a Hugging Face model folder.

What the keys mean and which defaults hold follows llama.cpp (src/llama-model.cpp).
"""

import math
from typing import Any

import numpy as np
from gguf.quants import dequantize

from mlx_lora.errors import InputError
from mlx_lora.gguf_base.reader import Metadata, TensorInfo, Tensors, get, size
from mlx_lora.gguf_layout import ARCHITECTURES, ATTENTION, MLP, Architecture

# The architectures that a base may have. A file of architecture llama, a Mistral too, becomes a Llama.
BASES = {known.name: known for known in ARCHITECTURES if known.model_type in ("llama", "qwen2", "qwen3")}
# Keys that change what a model computes in ways the converted model cannot: only these values mean "no change".
NEUTRAL_VALUES = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def architecture(metadata: Metadata) -> Architecture:
    """The architecture of a file that is one whole model of a supported one."""
    kind = get(metadata, "general.type", str, "model")
    if kind != "model":
        raise InputError(f"the file is of type '{kind}', not a model; give the GGUF file of the base model")
    if get(metadata, "split.count", int, 1) > 1:
        raise InputError("the file is one part of a split model; join the parts with llama-gguf-split --merge")
    name = get(metadata, "general.architecture", str)
    if name not in BASES:
        raise InputError(
            f"architecture '{name}' is not supported in a GGUF file; supported: {', '.join(BASES)};"
            " give the model's Hugging Face folder instead"
        )
    return BASES[name]


def model_config(base: Architecture, metadata: Metadata, tensors: Tensors) -> dict[str, Any]:
    """The content of config.json, with nothing left to a reader's defaults but the architecture."""
    for key, neutral in NEUTRAL_VALUES.items():
        if metadata.get(key, neutral) != neutral:
            raise InputError(f"{key} = {metadata[key]} is not supported (only {neutral}); use another model")
    if "token_embd.weight" not in tensors:
        raise InputError("tensor token_embd.weight is missing; give a complete model file")
    hidden, heads = size(metadata, "embedding_length"), size(metadata, "attention.head_count")
    kv_heads = size(metadata, "attention.head_count_kv", heads)
    head_dim = size(metadata, "attention.key_length", hidden // heads)
    same = {head_dim, *(size(metadata, key, head_dim) for key in ("attention.value_length", "rope.dimension_count"))}
    if heads % kv_heads or head_dim % 2 or len(same) > 1:
        raise InputError(
            f"{heads} heads of size {head_dim} with {kv_heads} key heads, value size and RoPE size of {sorted(same)}"
            " are not supported; use another model"
        )
    if base.model_type == "qwen2" and heads * head_dim != hidden:  # neither mlx-lm nor llama.cpp has it
        raise InputError(f"{heads} heads of size {head_dim} do not make up the hidden size {hidden}; convert it again")
    matrix_dtypes = {tensor.stored_dtype for tensor in tensors.values() if len(tensor.shape) == 2}
    return {
        "model_type": base.model_type,
        "architectures": [base.hf_class],
        "hidden_size": hidden,
        "num_hidden_layers": size(metadata, "block_count"),
        "intermediate_size": size(metadata, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": get(metadata, "attention.layer_norm_rms_epsilon", float),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": size(metadata, "context_length"),
        "rope_theta": get(metadata, "rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(metadata, tensors, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_choices(base, tensors),
        "dtype": TORCH_DTYPES[matrix_dtypes.pop()] if len(matrix_dtypes) == 1 else "float32",
    }


def _choices(base: Architecture, tensors: Tensors) -> dict[str, bool]:
    """What only some of the architectures leave to config.json."""
    if base.model_type == "llama":
        return {
            "attention_bias": any(f"blk.0.{name}.bias" in tensors for name in ATTENTION.values()),
            "mlp_bias": any(f"blk.0.{name}.bias" in tensors for name in MLP.values()),
        }
    if base.model_type == "qwen3":  # mlx-lm's has no biases
        return {"attention_bias": False, "use_sliding_window": False}
    return {"use_sliding_window": False}


def _rope_scaling(metadata: Metadata, tensors: Tensors, head_dim: int) -> dict[str, Any] | None:
    """``rope_scaling`` as mlx-lm (models/rope_utils.py) and transformers (modeling_rope_utils.py) read it."""
    kind = get(metadata, "rope.scaling.type", str, "linear")
    factor = get(metadata, "rope.scaling.factor", float, get(metadata, "rope.scale_linear", float, 1.0)) or 1.0
    if kind not in ("none", "linear", "yarn") or not factor >= 1:
        raise InputError(f"RoPE scaling '{kind}' by {factor} is not supported; supported: none, linear, yarn")
    scaled = kind != "none" and factor != 1
    if "rope_freqs.weight" in tensors:
        if scaled:
            raise InputError(f"the model has both rope_freqs.weight and RoPE scaling '{kind}', which is not supported")
        return _llama3_scaling(metadata, tensors["rope_freqs.weight"], head_dim)
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    implied = 0.1 * math.log(factor) + 1
    if not math.isclose(get(metadata, "rope.scaling.yarn_attn_factor", float, implied), implied, rel_tol=1e-5):
        raise InputError(f"rope.scaling.yarn_attn_factor other than {implied:.6f} is not supported; use another model")
    original = size(metadata, "rope.scaling.original_context_length", size(metadata, "context_length"))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": get(metadata, "rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": get(metadata, "rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _llama3_scaling(metadata: Metadata, tensor: TensorInfo, head_dim: int) -> dict[str, Any] | None:
    """The llama3 scaling that ``rope_freqs.weight`` (what each RoPE frequency is divided by) was computed from."""
    divisors = dequantize(tensor.data, tensor.type)
    factor = float(divisors.max())
    original = size(metadata, "rope.scaling.original_context_length", 8192)
    theta = get(metadata, "rope.freq_base", float, 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - 1) / 3, 0, 1)  # 0 from the original context on, 1 up to a quarter of it
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise InputError("rope_freqs.weight is not the RoPE scaling of Llama 3, the only one supported")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
