"""A whole model, base and adapter merged, as one GGUF file that llama.cpp runs.

Names, row order and keys are those of llama.cpp's converter (convert_hf_to_gguf.py). Vectors (norms, biases) are F32,
matrices of the chosen type. Weights are merged, converted and written one tensor at a time.

Of a base that was a GGUF file, everything that the adapter does not touch is copied as it stands, byte for byte: the
metadata (but for the type of the file) and the other tensors, quantised as they are.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from mlx_lora import files, gguf_layout, gguf_vocab, lora
from mlx_lora.errors import InputError
from mlx_lora.gguf_base import reader, settings
from mlx_lora.gguf_base.reader import SCALARS
from mlx_lora.gguf_layout import Architecture, Dtype
from mlx_lora.lora import LoRALayer, dense_weight
from mlx_lora.model import Base

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0
TYPES = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# The largest number that each type holds (Q8_0: 127 steps of an F16).
LARGEST = {F32: 3.4028234e38, BF16: 3.3895313e38, F16: 65504.0, Q8_0: 127 * 65504.0}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}  # llama.cpp reads no others
FILE_TYPE = "general.file_type"
ALIGNMENT = 32


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written: `data` gives its bytes, as they are stored."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Callable[[], npt.NDArray[Any]]

    @property
    def size(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def write(path: Path, base: Base, source: Path | None, dtype: Dtype) -> list[str]:
    """Writes the model of `base`, with the adapter that is attached to it, and returns what a person should know.

    `source` is the GGUF file that the base was made from, if it was one: then only adapted matrices are written anew,
    as `dtype`. The file is whole or absent, and one of that name is replaced. Raises InputError for a model that
    llama.cpp would not compute alike, and for weights that `dtype` cannot hold.
    """
    if any(layer.merged for layer in lora.layers(base.model).values()):
        raise ValueError("unmerge the adapter first")
    try:
        content = _from_folder(base, dtype) if source is None else _from_file(base, source, dtype)
    except InputError as error:
        raise InputError(f"{source or base.folder}: {error}") from None
    except OSError as error:
        raise InputError(f"{source or base.folder}: cannot be read ({error})") from None
    metadata, alignment, tensors, notes = content
    try:
        with files.new_file(path) as temporary:
            _write(temporary, list(metadata.values()), tensors, alignment)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    return notes


# ---- what is written -------------------------------------------------------------------------------------------------


def _from_file(base: Base, source: Path, dtype: Dtype) -> tuple[dict[str, bytes], int, list[_Tensor], list[str]]:
    """Metadata as packed, alignment, tensors and notes for a base that was a GGUF file."""
    values, stored = reader.read(source)
    architecture = settings.architecture(values)
    metadata = _packed_keys(np.memmap(source, np.uint8, "r").data)
    tensors = {
        name: _Tensor(name, info.type, info.shape, partial(np.asarray, info.data)) for name, info in stored.items()
    }
    adapted = [
        _tensors(path, layer, architecture, base.model.args, dtype)[0]  # without the bias, which stays
        for path, layer in lora.layers(base.model).items()
    ]
    for tensor in adapted:
        if tensor.name not in stored or stored[tensor.name].shape != tensor.shape:
            raise InputError(f"has no tensor {tensor.name} of shape {tensor.shape}; is it the base's own file?")
        tensors[tensor.name] = tensor
    if not adapted:
        return metadata, values.get("general.alignment", ALIGNMENT), list(tensors.values()), []
    for key, value in _file_keys(dtype).items():
        if key == FILE_TYPE or key not in metadata:
            metadata[key] = _packed(key, value)
    notes = [
        f"{len(adapted)} adapted matrices are {dtype.upper()}; the other {len(tensors) - len(adapted)} tensors are as "
        f"in the base's file, byte for byte, and so is the metadata, but for {FILE_TYPE}"
    ]
    notes += _fallen_back(adapted, dtype)
    return metadata, values.get("general.alignment", ALIGNMENT), list(tensors.values()), notes


def _from_folder(base: Base, dtype: Dtype) -> tuple[dict[str, bytes], int, list[_Tensor], list[str]]:
    """The same for a base that is a folder as Hugging Face's models are."""
    architecture = _architecture(base.config["model_type"])
    args = base.model.args
    tensors = [
        tensor for path, module in _layers(base.model) for tensor in _tensors(path, module, architecture, args, dtype)
    ]
    rope, divisors = _rope(args, architecture)
    if divisors is not None:
        tensors.append(_Tensor("rope_freqs.weight", F32, divisors.shape, partial(np.asarray, divisors)))
    vocabulary, notes = gguf_vocab.vocabulary(base.tokenizer, args.vocab_size)
    general = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": Path(base.identity["name"]).name,
    }
    own = {f"{architecture.name}.{key}": value for key, value in (_sizes(args) | rope).items()}
    keys = general | _file_keys(dtype) | own | vocabulary
    notes += _fallen_back(tensors, dtype)
    return {key: _packed(key, value) for key, value in keys.items()}, ALIGNMENT, tensors, notes


def _fallen_back(tensors: list[_Tensor], dtype: Dtype) -> list[str]:
    count = sum(tensor.type == F16 for tensor in tensors)
    odd = dtype == "q8_0" and count
    return [f"{count} matrices are F16, since Q8_0 needs rows of a multiple of 32 numbers"] if odd else []


def _file_keys(dtype: Dtype) -> dict[str, int]:
    keys = {FILE_TYPE: int(TYPES[dtype][1])}
    return keys | ({"general.quantization_version": GGML_QUANT_VERSION} if dtype == "q8_0" else {})


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every layer with weights, by path: those outside the blocks first."""
    adapted = lora.layers(model)
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if (path in adapted or "weight" in module) and path.rpartition(".")[0] not in adapted
    ]
    numbers = {path: lora.block_number(path) for path, _ in layers}
    return sorted(layers, key=lambda layer: -1 if (number := numbers[layer[0]]) is None else number)


def _tensors(path: str, module: nn.Module, architecture: Architecture, args: Any, dtype: Dtype) -> list[_Tensor]:
    """A layer's weight, and its bias if it has one."""
    name = gguf_layout.tensor_name(path)
    if name is None:
        raise InputError(f"{path} has no place in a GGUF file of the architecture {architecture.name}")
    base = module.base if isinstance(module, LoRALayer) else module
    interleaved = architecture.interleaved and name.rpartition(".")[2] in gguf_layout.INTERLEAVED
    head_dim = _head_dim(args) if interleaved else None
    shape = lora.weight_shape(base)
    kind = TYPES[dtype][0] if len(shape) > 1 else F32
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = F16  # as llama.cpp's converter does with rows that are no whole number of blocks
    tensors = [_Tensor(f"{name}.weight", kind, shape, partial(_data, path, partial(_weight, module), kind, head_dim))]
    if "bias" in base:
        data = partial(_data, path, partial(base.get, "bias"), F32, head_dim)
        tensors.append(_Tensor(f"{name}.bias", F32, base.bias.shape, data))
    return tensors


def _weight(module: nn.Module) -> mx.array:
    return module.merged_weight() if isinstance(module, LoRALayer) else dense_weight(module)


def _data(
    path: str, values: Callable[[], mx.array], kind: GGMLQuantizationType, head_dim: int | None
) -> npt.NDArray[Any]:
    """The values as they are stored; with `head_dim`, their rows in llama.cpp's order."""
    array = np.array(values().astype(mx.float32))
    largest = max(array.max(), -array.min())
    if not np.isfinite(largest):
        raise InputError(f"{path} has values that are not finite; the model or the adapter is damaged")
    if largest > LARGEST[kind]:
        raise InputError(f"{path}: {largest:g}, its largest number, does not fit into {kind.name}; write another type")
    if head_dim is not None:
        array = gguf_layout.interleave(array, head_dim)
    return np.ascontiguousarray(quantize(array, kind))


# ---- metadata --------------------------------------------------------------------------------------------------------


def _architecture(model_type: str) -> Architecture:
    for architecture in gguf_layout.ARCHITECTURES:
        if architecture.model_type == model_type and architecture.name in ARCHITECTURES:
            return architecture
    raise InputError(
        f"models of the type {model_type!r} are not written as GGUF files (llama, mistral, qwen2 and qwen3 are); "
        "write the merged folder instead and convert it with llama.cpp's convert_hf_to_gguf.py"
    )


def _head_dim(args: Any) -> int:
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def _sizes(args: Any) -> dict[str, Any]:
    if args.max_position_embeddings is None:
        raise InputError("config.json does not name max_position_embeddings; add it")
    if "sliding_attention" in (getattr(args, "layer_types", None) or []) or getattr(args, "rope_traditional", False):
        raise InputError("sliding attention and rope_traditional cannot be written to a GGUF file of this architecture")
    head_dim = _head_dim(args)
    return {
        "vocab_size": args.vocab_size,
        "context_length": args.max_position_embeddings,
        "embedding_length": args.hidden_size,
        "block_count": args.num_hidden_layers,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": args.num_attention_heads,
        "attention.head_count_kv": args.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(args.rope_theta),
    }


def _rope(args: Any, architecture: Architecture) -> tuple[dict[str, Any], npt.NDArray[np.float32] | None]:
    """Keys of the RoPE scaling, and what rope_freqs.weight divides each frequency by."""
    scaling = args.rope_scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if kind == "default":
        return {}, None
    if kind == "linear":
        return {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}, None
    if kind == "yarn" and all(scaling.get(name, value) == value for name, value in YARN_DEFAULTS.items()):
        return {
            "rope.scaling.type": kind,
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        }, None
    if kind == "llama3" and architecture.name == "llama":
        original = scaling["original_max_position_embeddings"]
        return {"rope.scaling.original_context_length": original}, _llama3_divisors(scaling, args)
    raise InputError(
        f"RoPE scaling {kind!r} with these settings is none that llama.cpp computes for {architecture.name}; known: "
        "linear, yarn with its usual betas and scale, and for llama llama3"
    )


def _llama3_divisors(scaling: dict[str, Any], args: Any) -> npt.NDArray[np.float32]:
    head_dim, factor = _head_dim(args), scaling["factor"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    wavelengths = 2 * np.pi * args.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---- the file --------------------------------------------------------------------------------------------------------


def _packed(key: str, value: Any) -> bytes:
    """A key with its value as the file holds them; the type follows from Python's."""
    return _string(key) + struct.pack("<I", _kind(value)) + _value(value)


def _kind(value: Any) -> GGUFValueType:
    if isinstance(value, list):
        return GGUFValueType.ARRAY
    if isinstance(value, int) and not isinstance(value, bool):
        return GGUFValueType.UINT32
    return {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32}[type(value)]


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        kind = GGUFValueType.INT32 if isinstance(value[0], int) else _kind(value[0])
        items = (
            b"".join(map(_string, value)) if kind == GGUFValueType.STRING else np.array(value, SCALARS[kind]).tobytes()
        )
        return struct.pack("<IQ", kind, len(value)) + items
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _packed_keys(data: memoryview) -> dict[str, bytes]:
    """The keys of a GGUF file that `reader.read` has found whole, each as `_packed` gives it."""
    keys, end = {}, 24
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        start = end
        name_end = _end(data, GGUFValueType.STRING, start)
        end = _end(data, struct.unpack_from("<I", data, name_end)[0], name_end + 4)
        keys[str(data[start + 8 : name_end], "utf-8")] = bytes(data[start:end])
    return keys


def _end(data: memoryview, kind: int, start: int) -> int:
    """Where a value ends."""
    if kind == GGUFValueType.STRING:
        return start + 8 + struct.unpack_from("<Q", data, start)[0]
    if kind != GGUFValueType.ARRAY:
        return start + np.dtype(SCALARS[GGUFValueType(kind)]).itemsize
    item, length = struct.unpack_from("<IQ", data, start)
    start += 12
    if item in SCALARS:
        return start + length * np.dtype(SCALARS[GGUFValueType(item)]).itemsize
    for _ in range(length):
        start = _end(data, item, start)
    return start


def _write(path: Path, metadata: list[bytes], tensors: list[_Tensor], alignment: int) -> None:
    """Writes the header, then one tensor at a time."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), *metadata]
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        header += [
            _string(tensor.name),
            struct.pack(f"<I{dimensions}QIQ", dimensions, *reversed(tensor.shape), tensor.type, offset),
        ]
        offset += tensor.size + -tensor.size % alignment
    start = b"".join(header)
    with path.open("wb") as file:
        file.write(start + bytes(-len(start) % alignment))
        for tensor in tensors:
            data = tensor.data()
            if data.nbytes != tensor.size:
                raise ValueError(f"{tensor.name} has {data.nbytes} bytes instead of {tensor.size}")
            file.write(data.data)
            file.write(bytes(-tensor.size % alignment))
