"""`train.plan: auto`: the first way to compute an update that fits in memory, found by trying.

What is chosen (`batch_tokens`, `loss_chunk`, `gradient_checkpointing`) changes how an update is computed, never which
rows it holds. The order is fixed, what usually costs least time first: smaller batches, then recomputing the MLPs, then
whole blocks, then fewer logits at a time.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import lora
from mlx_lora.batches import Batch, train_batches
from mlx_lora.config import PLANNED, Config, Train
from mlx_lora.data import Example
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import MLP_NAMES
from mlx_lora.head import output_of
from mlx_lora.optim import make_optimizer
from mlx_lora.step import Step, prepared

SHARE = 0.8  # of the memory that is available: the rest is for the buffer cache and for other programs
TOKENS = (64, 128)  # in the small batches from which the memory of larger ones is estimated, about


@dataclass(frozen=True)
class Need:
    """Of two steps: the most bytes above what is always there, and the seconds of the second."""

    memory: int
    seconds: float


def choose(
    config: Config, model: nn.Module, rows: list[Example], available: int, compiled: bool
) -> tuple[Train, list[str]]:
    """The training options with `PLANNED` filled in, and lines that say what was chosen and why.

    Short rows are tried first, and longer ones only where these let it be expected that they fit: running out of
    memory ends a process. The choice is then tried on the largest batch of the run, and given up for the next one if
    that takes more than was estimated.

    Args:
        model: with its adapter attached; it is left as it was.
        available: bytes that a step may take beyond what is in memory already.

    Raises:
        InputError: where nothing fits.
    """
    limit = int(SHARE * available)
    lines = [f"plan: {limit / 1e9:.2f} GB for a step ({SHARE:.0%} of the {available / 1e9:.2f} GB available)"]
    estimates: dict[Any, tuple[float, float]] = {}
    if config.data.packing:
        with prepared(model, config.train) as attention:
            length = train_batches(config, rows).largest().inputs.shape[1]
            attention.require_packed(config.model.path, length)
    for options, batch in _candidates(config, model, rows):
        key = options.gradient_checkpointing, options.loss_chunk
        if key not in estimates:
            estimates[key] = _line(options, model, batch, compiled)
        fixed, each = estimates[key]
        estimate = fixed + each * batch.mask.size
        shape = f"{batch.mask.shape[0]} x {batch.mask.shape[1]} tokens, {_words(options)}"
        if estimate > limit:
            lines.append(f"plan: {shape}: about {estimate / 1e9:.2f} GB, too much")
            continue
        need = _try(options, model, batch, compiled)
        if need.memory > limit:
            lines.append(f"plan: {shape}: {need.memory / 1e9:.2f} GB, too much")
            continue
        lines.append(
            f"plan: {shape}: {need.memory / 1e9:.2f} GB and {need.seconds:.2f} s for the largest batch: chosen; "
            f"{', '.join(f'train.{name}={_yaml(getattr(options, name))}' for name in PLANNED)}"
        )
        return options, lines
    raise InputError(
        "\n       ".join(
            [
                *lines,
                "train.plan: not even one row with gradient checkpointing fits; lower data.max_seq_length, adapt fewer "
                "lora.layers, or quantize the base (model.quantize)",
            ]
        )
    )


def _candidates(config: Config, model: nn.Module, rows: list[Example]) -> Iterator[tuple[Train, Batch]]:
    """Options in the order in which they are tried, each with its largest batch: `batch_size` rows, then half as many
    tokens, down to the longest row alone; then the same with more that is recomputed."""
    longest = max(example.tokens.size - 1 for example in rows)
    sizes: list[tuple[int | None, Batch]] = []
    tokens: int | None = None
    while True:
        batch = train_batches(_with(config, batch_tokens=tokens), rows).largest()
        if not sizes or batch.mask.shape != sizes[-1][1].mask.shape:
            sizes.append((tokens, batch))
            yield _with(config, batch_tokens=tokens).train, batch
        if tokens == longest or batch.mask.size <= longest:
            break
        tokens = max(longest, batch.mask.size // 2)
    has_mlps = any(name in block for block in model.layers for name in MLP_NAMES)
    for level in ["mlp", True] if has_mlps else [True]:
        for tokens, batch in sizes:
            yield _with(config, batch_tokens=tokens, gradient_checkpointing=level).train, batch
    tokens, batch = sizes[-1]
    yield _with(config, batch_tokens=tokens, loss_chunk=16, gradient_checkpointing=True).train, batch


def _with(config: Config, **chosen: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})


def _line(options: Train, model: nn.Module, batch: Batch, compiled: bool) -> tuple[float, float]:
    """Bytes that a step takes whatever it holds, and bytes per token, from two small batches: one line cut short, or a
    few lines where they are shorter than that.

    These have as many supervised positions as the batch: its logits come in chunks, whose memory does not grow. Where
    all logits exist at once it does, and they have their share.
    """
    lines, width = batch.mask.shape
    small, larger = TOKENS
    few, more = (1, small), (1, larger)
    if width < larger:
        few, more = (max(1, small // width), width), (-(-larger // width), width)
    if more[0] > lines:  # the batch itself is as small
        return float(_try(options, model, batch, compiled).memory), 0.0
    share = output_of(model).at_once is not None
    short, long = (_cut(batch, *shape, share) for shape in (few, more))
    first, second = (_try(options, model, part, compiled).memory for part in (short, long))
    each = max(0.0, (second - first) / (long.mask.size - short.mask.size))
    return max(0.0, first - each * short.mask.size), each


def _cut(batch: Batch, lines: int, width: int, share: bool) -> Batch:
    """The first columns of a batch's first lines, with all of the batch's positions (repeated ones) or its share."""
    cut = {name: getattr(batch, name)[:lines, :width] for name in ("inputs", "targets", "mask")}
    segments = None if batch.segments is None else batch.segments[:lines, :width]
    number = batch.mask.size if batch.positions is None else batch.positions.size
    if share:
        number = -(-number * lines * width // batch.mask.size)
    positions = np.zeros(number, np.int32)
    return replace(batch, **cut, segments=segments, positions=positions)


def _try(options: Train, model: nn.Module, batch: Batch, compiled: bool) -> Need:
    """Two steps of one batch; the first traces and compiles."""
    gc.collect()  # what an earlier step left in cycles would be freed meanwhile, and not counted
    with prepared(model, options) as attention:
        mx.eval(lora.parameters(model))
        mx.clear_cache()
        before = mx.get_active_memory()
        step = Step(model, make_optimizer(options), options, compiled, attention)
        state = step.initial_state()
        mx.eval(state.adapter, state.optimizer)
        mx.reset_peak_memory()
        for number in range(2):
            start = time.perf_counter()
            state, _ = step(state, [batch], options.learning_rate, number)
        need = Need(mx.get_peak_memory() - before, time.perf_counter() - start)
    mx.clear_cache()
    return need


def _words(options: Train) -> str:
    words = {"selective": "what is cheap recomputed", "mlp": "MLPs recomputed", True: "blocks recomputed"}
    chunk = f", {options.loss_chunk} logits at a time" if options.loss_chunk else ""
    return words[options.gradient_checkpointing] + chunk


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
