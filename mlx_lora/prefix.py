"""The frozen prefix: what the blocks below the lowest adapted one give is computed once per row and kept.

Where only upper blocks are adapted, what the blocks below them give for a row never changes. Kept in memory or in a
file, it lets every step run the upper blocks alone. The model itself stays as it is: both parts are its own forward
pass with stand-ins for some of its blocks, so masks, scales and the order of blocks remain the model's own affair.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import lora
from mlx_lora.batches import Batch, Batches
from mlx_lora.data import sizes
from mlx_lora.errors import InputError
from mlx_lora.head import output_of


class PrefixCache:
    """What the blocks below the lowest adapted one give for every row, of a model that is not `unusable`.

    Rows are kept at their true length, bit for bit and in the type of the model's activations, as unsigned integers:
    numpy has no bfloat16. They are computed in the batches of ``in_order``, so a resumed run finds the same numbers
    again; on a CPU, a step in a batch of the same shape gives what it would give without, bit for bit. (But dropout on
    experts draws its noise by the order in which tokens reach them, padding included, and padding is another.) The file
    has no name and is gone with the process, however that ends. All of it holds as long as the base, the rows and the
    choice of adapted blocks stay what they were.

    Args:
        model: with its adapter attached, whose numbers may change.
        batches: their examples are what the rows of a batch are indices into.
        folder: where the file is put; None keeps everything in memory. Raises InputError where that fails.
    """

    def __init__(self, model: nn.Module, batches: Batches, folder: Path | None = None) -> None:
        self._model = model
        self._lengths = _lengths(batches)
        self._starts = np.zeros_like(self._lengths)
        form = _below(model, mx.array([[0]]))
        self._dtype = form.dtype
        shape, kind = (int(self._lengths.sum()), form.shape[-1]), np.dtype(f"u{form.dtype.size}")
        if folder is None:
            self._kept = np.empty(shape, kind)
            for start, bits in self._rows(batches):
                self._kept[start : start + len(bits)] = bits
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for _, bits in self._rows(batches):
                    file.write(bits.data)
                file.flush()
                self._kept = np.memmap(file, kind, "r", shape=shape)
        except OSError as error:
            raise InputError(
                f"{folder}: the prefix cache of {size(model, batches) / 1e9:.2f} GB cannot be written "
                f"({error.strerror or error}); make room, or set train.prefix_cache to never"
            ) from None

    def _rows(self, batches: Batches) -> Iterator[tuple[int, np.ndarray]]:
        """Every row's start in the cache, which is noted, and its content (length, hidden), one after the other."""
        if batches.packing:  # here each row has a line of its own: the attention of packed rows is the step's affair
            batches = Batches(
                batches.examples, batches.batch_size, batches.seed, batches.accumulate, batches.batch_tokens
            )
        start = 0
        for batch in batches.in_order():
            hidden = _below(self._model, mx.array(batch.inputs))
            bits = np.array(hidden.view(mx.uint16 if self._dtype.size == 2 else mx.uint32))
            for row, (line, column) in zip(batch.rows, batch.places, strict=True):
                self._starts[row] = start
                yield start, bits[line, column : column + self._lengths[row]]
                start += self._lengths[row]

    def inputs(self, batch: Batch) -> np.ndarray:
        """The kept rows of a batch laid out as its inputs are, (B, T, hidden), zeros elsewhere. Uses no MLX, so any
        thread can do it ahead of the step."""
        laid_out = np.zeros((*batch.inputs.shape, self._kept.shape[-1]), self._kept.dtype)
        for row, (line, column) in zip(batch.rows, batch.places, strict=True):
            start, length = self._starts[row], self._lengths[row]
            laid_out[line, column : column + length] = self._kept[start : start + length]
        return laid_out

    def rest(self, ids: mx.array, inputs: mx.array) -> mx.array:
        """What ``model.model(ids)`` gives, from `inputs` as an MLX array; differentiable in the adapter."""
        return _above(self._model, ids, inputs.view(self._dtype))


def unusable(model: nn.Module) -> str | None:
    """Why a model's frozen prefix cannot be kept; None where it can. Found by running both parts on a few tokens:
    together they have to give what ``model.model`` gives, bit for bit."""
    first = first_adapted_block(model)
    if first == 0:
        return "the first block is adapted"
    for path in lora.layers(model):
        if lora.block_number(path) is None and not path.endswith("lm_head"):
            return f"{path} is adapted"
    if whole := output_of(model).whole:  # then the loss needs the whole model
        return whole
    ids = mx.arange(8)[None]
    try:
        below = _below(model, ids)
        same = below.ndim == 3 and mx.array_equal(_above(model, ids, below), model.model(ids), equal_nan=True).item()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        same = False
    return None if same else f"{type(model).__module__} does not simply run one block after the other"


def first_adapted_block(model: nn.Module) -> int:
    """The number of the lowest block with an adapted layer; the number of blocks where none has one."""
    numbers = [number for path in lora.layers(model) if (number := lora.block_number(path)) is not None]
    return min(numbers, default=len(model.layers))


def size(model: nn.Module, batches: Batches) -> int:
    """The bytes that a cache takes; computes nothing."""
    form = _below(model, mx.array([[0]]))
    return int(_lengths(batches).sum()) * form.shape[-1] * form.dtype.size


def choose(
    asked: str, against: str | None, epochs: float, needed: int, limit: float, memory: float
) -> tuple[str, str | None]:
    """Where the cache is kept, ``memory``, ``disk`` or ``never``, and the sentence that says so (None where it is off
    because that was asked).

    Whether there is one depends on the run alone, never on what happens to be free, so that a resumed run decides
    alike: a row computed in a batch of another shape can be rounded otherwise.

    Args:
        asked: ``auto``, ``memory``, ``disk`` or ``never``.
        against: what `unusable` says.
        epochs: of the whole run.
        needed: bytes, as `size` says.
        limit: bytes that it may take.
        memory: bytes of memory that it may take; with ``auto`` it goes to a file beyond that.
    """
    if asked == "never":
        return "never", None
    what = f"prefix cache ({needed / 1e9:.2f} GB)"
    if against is not None:
        return "never", f"prefix cache: off, since {against}"
    if asked == "auto" and epochs < 2:
        return "never", f"{what}: off, since there are fewer than two epochs"
    if needed > limit:
        return "never", f"{what}: off, since train.prefix_cache_limit is {limit / 1e9:.2f} GB"
    where = asked if asked != "auto" else "memory" if needed <= memory else "disk"
    place = "in memory" if where == "memory" else "in a file"
    return where, f"{what}: the frozen blocks run once per row, what they give is kept {place}"


def _lengths(batches: Batches) -> np.ndarray:
    return sizes(batches.examples)[0]


def _below(model: nn.Module, ids: mx.array) -> mx.array:
    """What the block below the lowest adapted one gives; the blocks above it are never evaluated."""
    last = first_adapted_block(model) - 1
    blocks, kept = list(model.model.layers), []

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(model.model.layers[last](*args, **kwargs))
        return kept[-1]

    blocks[last] = _StandIn(blocks[last], keep)
    _with_blocks(model.model, blocks)(ids)
    [hidden] = kept  # ValueError where a model runs its blocks several times
    return hidden


def _above(model: nn.Module, ids: mx.array, hidden: mx.array) -> mx.array:
    """What the model gives after its last norm, with `hidden` as what every block below the lowest adapted one gives;
    the embedding is never evaluated."""
    first = first_adapted_block(model)
    blocks = model.model.layers
    below: list[Any] = [_StandIn(block, lambda *_, **__: hidden) for block in blocks[:first]]
    return _with_blocks(model.model, below + blocks[first:])(ids)


def _with_blocks(inner: nn.Module, blocks: list[Any]) -> nn.Module:
    """A copy that shares everything with `inner` but its list of blocks."""
    other = copy.copy(inner)
    other.layers = blocks
    return other


class _StandIn:
    """Does `call` in the place of a block and has its attributes: by them a model chooses the block's mask."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self._block = block
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
