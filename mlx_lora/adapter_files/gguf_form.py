"""llama.cpp's form of an adapter: one GGUF file, used with the base as llama.cpp's converter writes it.

llama.cpp computes y = W x + user scale · alpha / rank · B (A x), where the rank is each pair's own, alpha is the file's
and the user scale is 1 unless said otherwise (src/llama-adapter.h, src/llama-graph.cpp). It checks little of this
itself: an adapter that does not fit can be ignored, or end the process in the middle of an answer.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.quants import dequantize, quantize

from mlx_lora import files, lora
from mlx_lora.errors import InputError
from mlx_lora.gguf_layout import (
    ARCHITECTURES,
    ATTENTION,
    EXPERTS,
    INTERLEAVED,
    MLP,
    Architecture,
    Dtype,
    interleave,
    tensor_name,
)
from mlx_lora.lora import Adapter, Pair

TABLE = "model.embed_tokens"  # rows are looked up in it
ENDS = (TABLE, "lm_head")
LARGEST_ALPHA = float(np.finfo(np.float32).max)
# Rounding changes a number by at most 0.5 % of its tensor's largest (BF16, Q8_0): more is lost where all are tiny.
NOTABLE_LOSS = 0.01


def write(path: Path, adapter: Adapter, config: dict[str, Any], dtype: Dtype = "f16") -> list[str]:
    """Writes the adapter for the base whose config.json is `config`, and returns what a person should know.

    The file is whole or absent, one of that name is replaced, and equal adapters give equal bytes. Raises InputError
    for what `check` refuses and for numbers that `dtype` cannot hold.
    """
    check(adapter, config)
    architecture, alpha = _architecture(config), _file_alpha(adapter)
    writer = GGUFWriter(path=None, arch=architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    contents, odd, lossy = [], [], []
    for module, pair in sorted(adapter.pairs.items()):
        name = tensor_name(module)
        factors = _factors(module, pair, alpha, architecture, config)
        for end, values in zip(("lora_a", "lora_b"), factors, strict=True):
            tensor = f"{name}.weight.{end}"
            kind = _type(values, dtype)
            data, loss = _stored(module, values, kind)
            writer.add_tensor_info(tensor, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
            contents.append(data)
            if kind.name != dtype.upper():
                odd.append(tensor)
            if loss > NOTABLE_LOSS:
                lossy.append(tensor)
    try:
        with files.new_file(path) as temporary:
            with closing(writer):
                writer.write_header_to_file(temporary)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            with temporary.open("ab") as file:
                # GGUFWriter's own way, ndarray.tofile, does not notice when the disk is full.
                for data in contents:
                    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
                    file.write(data.data)
                file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    return _notes(adapter, float(alpha), dtype, odd, lossy)


def check(adapter: Adapter, config: dict[str, Any]) -> None:
    """Raises InputError for an adapter that llama.cpp does not compute on the base whose config.json is `config`."""
    architecture = _architecture(config)
    if not adapter.pairs:
        raise InputError("the adapter is empty: it adapts no module")
    if unknown := [path for path in sorted(adapter.pairs) if not _has_place(path, architecture)]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"llama.cpp applies no update to {', '.join(unknown[:3])}{more} in a model of type {config['model_type']};"
            " export it as merged-gguf instead"
        )
    # transformers' default for all of these types; mlx-lm's differs.
    if config.get("tie_word_embeddings", False) and (ends := [path for path in ENDS if path in adapter.pairs]):
        raise InputError(
            f"{' and '.join(ends)}: the base's input and output embeddings are one matrix, for which llama.cpp has no"
            " LoRA (it stops at the first token); export it as merged-gguf instead"
        )
    experts = config.get("num_experts", config.get("num_local_experts"))
    for path, pair in adapter.pairs.items():
        _check_pair(path, pair, experts)
        if _interleaved(path, architecture):
            size = _head_dim(config)
            if size % 2 or pair.outputs % size:
                raise InputError(f"{path} has {pair.outputs} outputs, which are no heads of size {size}")
    lora.check_finite(adapter.pairs.items())


def _check_pair(path: str, pair: Pair, experts: int | None) -> None:
    if pair.experts != (".switch_mlp." in path):
        raise InputError(f"{path} has arrays of {pair.lora_a.ndim} dimensions, which do not fit it")
    if pair.experts and len(pair.lora_a) != experts:
        raise InputError(f"{path} has {len(pair.lora_a)} experts, the base has {experts}: llama.cpp needs all of them")
    if not abs(pair.alpha) <= LARGEST_ALPHA:
        raise InputError(f"{path} has alpha {pair.alpha}, which is no float32 number")


def _architecture(config: dict[str, Any]) -> Architecture:
    kind = config.get("model_type")
    for known in ARCHITECTURES:
        if known.model_type == kind:
            return known
    types = ", ".join(known.model_type for known in ARCHITECTURES)
    raise InputError(f"a GGUF LoRA file cannot be written for a model of type {kind}; known: {types}")


def _has_place(path: str, architecture: Architecture) -> bool:
    """Whether llama.cpp adds updates to the module: not to norms, whose pairs it reads and never uses."""
    blocks = ATTENTION | (EXPERTS if architecture.name.endswith("moe") else MLP)
    name = tensor_name(path)
    return path in ENDS or (name is not None and name.rpartition(".")[2] in blocks.values())


def _interleaved(path: str, architecture: Architecture) -> bool:
    return architecture.interleaved and str(tensor_name(path)).rpartition(".")[2] in INTERLEAVED


def _head_dim(config: dict[str, Any]) -> int:
    try:
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (KeyError, TypeError, ZeroDivisionError):
        raise InputError("config.json: head_dim, or hidden_size and num_attention_heads, are missing") from None


def _file_alpha(adapter: Adapter) -> np.float32:
    """The one alpha of the file: the largest, so that no lora_b grows; never 0, which llama.cpp takes for "none"."""
    return max((np.float32(pair.alpha) for pair in adapter.pairs.values()), key=abs) or np.float32(1)


def _factors(
    path: str, pair: Pair, alpha: np.float32, architecture: Architecture, config: dict[str, Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A (rank, in) and B (out, rank) in llama.cpp's order of rows, with what alpha leaves of the scale in B.

    Experts have E in front; the A of the embeddings, whose rows are looked up, is (vocabulary, rank).
    """
    a, b = (np.array(factor) for factor in pair.factors())
    if path == TABLE:
        a = a.T
    if _interleaved(path, architecture):
        b = interleave(b, _head_dim(config))
    return np.ascontiguousarray(a), np.ascontiguousarray(b * (np.float32(pair.alpha) / alpha))


def _type(values: npt.NDArray[np.float32], dtype: Dtype) -> GGMLQuantizationType:
    """The type to store as: `dtype`, or F16 where its blocks do not divide the rows."""
    kind = GGMLQuantizationType[dtype.upper()]
    return kind if values.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _stored(path: str, values: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> tuple[npt.NDArray[Any], float]:
    """The values as stored, and the largest change of one, as a share of the largest value."""
    with np.errstate(all="ignore"):
        data = quantize(values, kind)
        back = dequantize(data, kind)
    if not np.isfinite(back).all():
        raise InputError(f"{path} has values up to {abs(values).max():.3g}, too large for {kind.name}; use f32 or bf16")
    largest = float(abs(values).max())
    return data, float(abs(back - values).max()) / largest if largest else 0.0


def _notes(adapter: Adapter, alpha: float, dtype: Dtype, odd: list[str], lossy: list[str]) -> list[str]:
    notes = []
    alphas = [pair.alpha for pair in adapter.pairs.values()]
    if folded := sum(np.float32(own) != np.float32(alpha) for own in alphas):
        notes.append(
            f"the file has one alpha, {alpha:g}: lora_b of {folded} of {len(alphas)} modules is multiplied by their own"
            f" alpha / {alpha:g}"
        )
    if odd:
        notes.append(
            f"{len(odd)} of {2 * len(alphas)} tensors are F16: {dtype} stores blocks of 32 numbers, which do not divide"
            f" their rows (those of lora_b are as long as the rank), such as {odd[0]}"
        )
    if lossy:
        notes.append(f"{len(lossy)} tensors, such as {lossy[0]}, hold numbers so small that they lose digits; use f32")
    return notes
