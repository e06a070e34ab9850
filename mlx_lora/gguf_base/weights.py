"""A GGUF file's tensors as the safetensors files of a Hugging Face model folder, a few rows at a time."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from mlx_lora import files
from mlx_lora.errors import InputError
from mlx_lora.gguf_base.reader import KEPT_TYPES, TensorInfo, Tensors
from mlx_lora.gguf_layout import ATTENTION, INTERLEAVED, MLP, QK_NORMS, deinterleave, tensor_name

SHARD_BYTES = 4_000_000_000


def tensor_names(config: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face name, after checking that the file has these tensors, of the right shapes."""
    hidden, width, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    kind = config["model_type"]
    if kind == "qwen3":
        block |= dict.fromkeys(QK_NORMS, (config["head_dim"],))
    biased: set[str] = set()
    if kind == "qwen2":  # always, so that config.json has no key for it
        biased |= ATTENTION.keys() - {"self_attn.o_proj"}
    if config.get("attention_bias"):
        biased |= ATTENTION.keys()
    if config.get("mlp_bias"):
        biased |= MLP.keys()
    expected = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocabulary, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = ("lm_head.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for path, shape in block.items():
            target = f"model.layers.{layer}.{path}"
            name = tensor_name(target)
            expected[f"{name}.weight"] = (f"{target}.weight", shape)
            if path in biased:
                expected[f"{name}.bias"] = (f"{target}.bias", shape[:1])
        if f"blk.{layer}.attn_q.weight" not in tensors:
            break  # a damaged layer count must not make the list endless
    for name, (_, shape) in expected.items():
        if name not in tensors:
            raise InputError(f"tensor {name} is missing; give a complete model file")
        if tensors[name].shape != shape:
            raise InputError(f"tensor {name} has shape {tensors[name].shape} instead of {shape}; convert it again")
    in_config = {"rope_freqs.weight"} if kind == "llama" else set()  # config.json's rope_scaling says the same
    if unknown := tensors.keys() - expected.keys() - in_config:
        raise InputError(f"tensor {min(unknown)} is not part of a supported {kind} model; use another model")
    return {name: target for name, (target, _) in expected.items()}


def write_weights(names: dict[str, str], tensors: Tensors, head_dim: int | None, folder: Path) -> None:
    """Writes the weights as safetensors files of at most SHARD_BYTES (or one tensor), reading little at a time.

    `head_dim` is that of a file whose query and key rows are interleaved, else None.
    """
    total = sum(tensors[name].stored_bytes for name in names)
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name in names:
        if shards[-1] and tensors[name].stored_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= tensors[name].stored_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / file, shard, names, tensors, head_dim)
        weight_map |= {names[name]: file for name in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(
    path: Path, shard: list[str], names: dict[str, str], tensors: Tensors, head_dim: int | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in shard:
        tensor = tensors[name]
        start, end = end, end + tensor.stored_bytes
        header[names[name]] = {"dtype": tensor.stored_dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shard:
            interleaved = name.split(".")[-2] in INTERLEAVED
            for values in _values(name, tensors[name], head_dim if interleaved else None):
                file.write(values.data)


def _values(name: str, tensor: TensorInfo, head_dim: int | None) -> Iterator[npt.NDArray[Any]]:
    """A tensor's values as stored, some rows at a time; with `head_dim`, rows that were interleaved are put back."""
    rows = tensor.data.reshape(tensor.shape[0] if len(tensor.shape) == 2 else 1, -1)
    step = 16 * (head_dim or 64)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        with np.errstate(all="ignore"):
            values = dequantize(part, tensor.type)
        if not np.isfinite(values).all():
            raise InputError(f"tensor {name} has values that are not finite; download or convert the file again")
        if tensor.type in KEPT_TYPES:
            values = part.view(KEPT_TYPES[tensor.type][1])
        if head_dim:
            values = deinterleave(values.reshape(-1, *tensor.shape[1:]), head_dim)
        yield np.ascontiguousarray(values)
