"""The header of a GGUF file: its metadata, and its tensors mapped but not read.

The format is that of the GGUF specification (ggml-org/ggml, docs/gguf.md). The ``gguf`` package's own reader is not
used, because a damaged length keeps it busy nearly for ever; here every length is checked against the file.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from mlx_lora.errors import InputError

METADATA_BYTES = 2**28  # no model's metadata is larger; bounds the work that a damaged length can cause
SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.UINT16: "<u2", GGUFValueType.UINT32: "<u4", GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT8: "<i1", GGUFValueType.INT16: "<i2", GGUFValueType.INT32: "<i4", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip

# Tensor types stored as they are (numpy has no bfloat16: its bits travel as uint16); all others become F32.
KEPT_TYPES = {
    GGMLQuantizationType.F32: ("F32", "<f4"),
    GGMLQuantizationType.F16: ("F16", "<f2"),
    GGMLQuantizationType.BF16: ("BF16", "<u2"),
}

T = TypeVar("T")
Metadata = dict[str, Any]


class TensorInfo(NamedTuple):
    """One tensor of the file; ``shape`` in numpy's order, ``data`` its bytes (not read yet: mapped)."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @property
    def stored_dtype(self) -> str:
        return KEPT_TYPES.get(self.type, ("F32", ""))[0]

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.stored_dtype == "F32" else 2)


Tensors = dict[str, TensorInfo]


@dataclass
class _Cursor:
    """Reads a GGUF header from front to back; IndexError where the data ends before the header does."""

    data: memoryview
    position: int = 0

    def take(self, size: int) -> memoryview:
        self.position += size
        if self.position > len(self.data):
            raise IndexError
        return self.data[self.position - size : self.position]

    def scalar(self, kind: GGUFValueType) -> Any:
        dtype = np.dtype(SCALARS[kind])
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        # The shortest number that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(value)) if kind == GGUFValueType.FLOAT32 else value.item()

    def string(self) -> str:
        return str(self.take(self.scalar(GGUFValueType.UINT64)), "utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(kind)
        item = GGUFValueType(self.scalar(GGUFValueType.UINT32))
        length = self.scalar(GGUFValueType.UINT64)
        if item in SCALARS:
            dtype = np.dtype(SCALARS[item])
            return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
        return [self.value(item) for _ in range(length)]


def read(path: Path) -> tuple[Metadata, Tensors]:
    """The metadata and the tensors (mapped, not read) of a GGUF file."""
    if path.stat().st_size < 8 or (data := np.memmap(path, np.uint8, "r").view(np.ndarray))[:4].tobytes() != b"GGUF":
        raise InputError("not a GGUF file; give a model file ending in .gguf")
    version = struct.unpack("<I", data[4:8].tobytes())[0]
    if version not in (2, 3):
        big_endian = " (the file may be for a big-endian machine)" if version & 0xFFFF == 0 else ""
        raise InputError(f"GGUF version {version} is not supported{big_endian}; give a little-endian file of version 3")
    cursor = _Cursor(data[:METADATA_BYTES].data, 8)
    try:
        return _read_header(cursor, data)
    except IndexError:
        raise InputError("the file ends too early: it is truncated or damaged; download or convert it again") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"the header is damaged ({error}); download or convert it again") from None


def _read_header(cursor: _Cursor, data: npt.NDArray[np.uint8]) -> tuple[Metadata, Tensors]:
    tensor_count, key_count = cursor.scalar(GGUFValueType.UINT64), cursor.scalar(GGUFValueType.UINT64)
    metadata: Metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(GGUFValueType(cursor.scalar(GGUFValueType.UINT32)))
    infos = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.scalar(GGUFValueType.UINT32)
        shape = tuple(reversed([cursor.scalar(GGUFValueType.UINT64) for _ in range(dimensions)]))
        kind = GGMLQuantizationType(cursor.scalar(GGUFValueType.UINT32))
        infos[name] = (kind, shape, cursor.scalar(GGUFValueType.UINT64))
    if len(infos) != tensor_count:
        raise ValueError("two tensors have the same name")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return metadata, {name: _tensor(name, *info, data=data[start:]) for name, info in infos.items()}


def _tensor(
    name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int, data: npt.NDArray[np.uint8]
) -> TensorInfo:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if not 1 <= len(shape) <= 4 or min(shape) < 1 or shape[-1] % block_size:
        raise InputError(f"tensor {name} of type {kind.name} has the unsupported shape {shape}")
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"tensor {name} has the unsupported type {kind.name}; quantise the model otherwise") from None
    size = math.prod(shape) // block_size * block_bytes
    if offset + size > len(data):
        raise IndexError
    return TensorInfo(kind, shape, data[offset : offset + size])


def get(metadata: Metadata, key: str, kind: type[T], default: T | None = None) -> T:
    """The value of a key, checked to be of the type ``kind``; without a default the key is required."""
    value = metadata.get(key, default)
    if not isinstance(value, kind):
        problem = "is missing" if value is None else f"should be of type {kind.__name__}, not {type(value).__name__}"
        raise InputError(f"metadata key {key} {problem}; convert the model again")
    return value


def get_list(metadata: Metadata, key: str, kind: type[T], length: int | None = None) -> list[T]:
    values = get(metadata, key, list)
    if not all(isinstance(value, kind) for value in values) or length not in (None, len(values)):
        wanted = f"{kind.__name__} values" if length is None else f"{length} {kind.__name__} values"
        raise InputError(f"metadata key {key} should be a list of {wanted}; convert the model again")
    return values


def size(metadata: Metadata, key: str, default: int | None = None) -> int:
    """A positive integer; a list of one for each layer is accepted if all are the same."""
    value = metadata.get(key, default)
    if isinstance(value, list) and value == value[:1] * len(value):
        value = value[0] if value else None
    if value is None or not isinstance(value, int) or value < 1:
        raise InputError(f"metadata key {key} is {value} but must be one positive integer; use another model")
    return value
