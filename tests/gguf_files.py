"""GGUF model files that tests need, written with gguf's own writer and llama.cpp's own table of tensor names."""

from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import dequantize
from mlx.utils import tree_flatten

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}


def write_base(path: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """The weights of an mlx-lm model (no adapter, no scaling of RoPE) as an F32 file without a tokenizer.

    `config` is the model's config.json, complete: `dataclasses.asdict(model.args)` will do.
    """
    assert not config.get("rope_scaling")
    architecture = ARCHITECTURES[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    with closing(_writer(path, architecture, config, head_dim)) as writer:
        for name, array in tree_flatten(model.parameters()):
            values = np.array(array, np.float32)
            if architecture == MODEL_ARCH.LLAMA and "q_proj" in name:
                values = _permuted(values, heads)
            if architecture == MODEL_ARCH.LLAMA and "k_proj" in name:
                values = _permuted(values, kv_heads)
            if "shared_expert_gate" in name:
                values = values[0]  # of one row, which llama.cpp's converter makes a vector
            # mlx-lm stacks the experts, as llama.cpp does, but names them differently.
            stored = names.get_name(name.replace("switch_mlp", "experts"), try_suffixes=(".weight", ".bias"))
            assert stored, f"llama.cpp knows no {name}"
            writer.add_tensor(stored, np.ascontiguousarray(values))
        _write(writer)
    return path


def as_float32(source: Path, target: Path) -> Path:
    """Another model file with all tensors dequantised; the metadata stays, but for the type of the file."""
    reader = GGUFReader(source)
    with closing(GGUFWriter(target, reader.fields["general.architecture"].contents())) as writer:
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                value = int(LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
                sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, value, field.types[0], sub_type)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        _write(writer)
    return target


def _writer(path: Path, architecture: MODEL_ARCH, config: dict[str, Any], head_dim: int) -> GGUFWriter:
    writer = GGUFWriter(path, architecture.name.lower())
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings") or 256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_tokenizer_model("none")
    return writer


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter for q_proj and k_proj of its architecture llama (weights and biases)."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
