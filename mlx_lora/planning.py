"""`train.plan: auto`: the first way to compute an update that fits in memory, found by trying.

What is chosen (`batch_tokens`, `loss_chunk`, `gradient_checkpointing`) changes how an update is computed, never which
rows it holds. The order is fixed, what usually costs least time first: smaller batches, then recomputing the MLPs, then
whole blocks, then fewer logits at a time.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora import lora, memory
from mlx_lora.batches import Batch, Batches, train_batches
from mlx_lora.config import PLANNED, Config, Train
from mlx_lora.data import Example, sizes
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import MLP_NAMES
from mlx_lora.head import output_of
from mlx_lora.loss import arrays, batch_score
from mlx_lora.memory import NoFurtherAhead
from mlx_lora.optim import make_optimizer
from mlx_lora.step import Step, prepared

SHARE = 0.8  # of the memory that is available: the rest is for the buffer cache and for other programs
MOST_CUT = 10_000
TOKENS = (64, 128)  # in the small batches from which the memory of larger ones is estimated, about


@dataclass(frozen=True)
class Need:
    """Of two steps: the most bytes above what is always there, and the seconds of the second."""

    memory: int
    seconds: float


def choose(
    config: Config, model: nn.Module, rows: Sequence[Example], available: int, compiled: bool
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
    if config.data.packing:
        with prepared(model, config.train) as attention:
            length = train_batches(config, rows).largest().inputs.shape[1]
            attention.require_packed(config.model.path, length)
    options = _first_that_fits(candidates(config, model, rows), model, limit, compiled, lines)
    if options is None:
        raise InputError(
            "\n       ".join(
                [
                    *lines,
                    "train.plan: not even one row with gradient checkpointing fits; lower data.max_seq_length, adapt "
                    "fewer lora.layers, or quantize the base (model.quantize)",
                ]
            )
        )
    return options, lines


def require(
    config: Config,
    model: nn.Module,
    rows: Sequence[Example],
    valid: Sequence[Example],
    limit: int,
    compiled: bool,
) -> list[str]:
    """What was tried, for a run whose largest batches, those of evaluations too, take at most `limit` bytes beyond what
    is in memory already.

    Raises InputError where they take more, with the smallest change that fits: smaller batches, more that is
    recomputed, or shorter rows. Each of them has been tried, and leaves a twentieth of the limit.
    """
    lines: list[str] = []
    own = [(config.train, train_batches(config, rows).largest())]
    room = memory.available() - mx.get_active_memory()
    if _first_that_fits(iter(own), model, limit, compiled, lines, valid, room) is not None:
        return lines
    limit = int(0.95 * limit)  # what is measured varies a little, and what fits has to fit again
    plain = with_options(config, **{name: Train.model_fields[name].default for name in PLANNED})
    fitting = _first_that_fits(candidates(plain, model, rows), model, limit, compiled, lines, valid)
    cure = "adapt fewer lora.layers, or quantize the base (model.quantize)"
    if fitting is not None:
        cure = f"set {settings(fitting)}, which fits"
    else:
        least = with_options(config, batch_tokens=1, loss_chunk=16, gradient_checkpointing=True)
        length = (max(int(sizes(part)[0].max()) for part in (rows, valid) if len(part)) + 1) // 2
        while length >= min(TOKENS):
            shorter = iter([(least.train, train_batches(least, cut_rows(rows, length)).largest())])
            short = cut_rows(valid, length)
            if _first_that_fits(shorter, model, limit, compiled, lines, short) is not None:
                cure = f"set data.max_seq_length={length}, {settings(least.train)}, which fits"
                break
            length //= 2
    raise InputError("\n       ".join([*lines, f"train.memory_limit: too little for this run; {cure}"]))


def cut_rows(rows: Sequence[Example], length: int) -> list[Example]:
    """The longest rows, up to `MOST_CUT`, with their first `length` tokens: the others make no batch larger."""
    longest = [rows[int(row)] for row in np.argsort(-sizes(rows)[0], kind="stable")[:MOST_CUT]]
    return [replace(row, tokens=row.tokens[:length], supervised=row.supervised[:length]) for row in longest]


def _first_that_fits(
    candidates: Iterator[tuple[Train, Batch]],
    model: nn.Module,
    limit: int,
    compiled: bool,
    lines: list[str],
    valid: Sequence[Example] = (),
    hopeless: int | None = None,
) -> Train | None:
    """The first of the options whose batch takes at most `limit` bytes, and whose evaluation of the `valid` rows does;
    what was tried is added to `lines`. What is estimated to take more than `hopeless`, else `limit`, is not tried."""
    estimates: dict[Any, tuple[float, float]] = {}
    for options, batch in candidates:
        key = options.gradient_checkpointing, options.loss_chunk
        if key not in estimates:
            estimates[key] = _line(options, model, batch, compiled)
        fixed, each = estimates[key]
        estimate = fixed + each * batch.mask.size
        shape = f"{batch.mask.shape[0]} x {batch.mask.shape[1]} tokens, {_words(options)}"
        if estimate > (hopeless or limit):
            lines.append(f"plan: {shape}: about {estimate / 1e9:.2f} GB, too much")
            continue
        need = measured(options, model, batch, compiled)
        if need.memory > limit:
            lines.append(f"plan: {shape}: {need.memory / 1e9:.2f} GB, too much")
            continue
        if valid and (evaluation := _try_evaluation(options, model, valid)) > limit:
            lines.append(f"plan: {shape}: {evaluation / 1e9:.2f} GB for an evaluation, too much")
            continue
        lines.append(
            f"plan: {shape}: {need.memory / 1e9:.2f} GB and {need.seconds:.2f} s for the largest batch: chosen; "
            f"{settings(options)}"
        )
        return options
    return None


def settings(options: Train) -> str:
    """What was chosen, as `--set` takes it."""
    return ", ".join(f"train.{name}={_yaml(getattr(options, name))}" for name in PLANNED)


def candidates(config: Config, model: nn.Module, rows: Sequence[Example]) -> Iterator[tuple[Train, Batch]]:
    """Options in the order in which they are tried, each with its largest batch: `batch_size` rows, then half as many
    tokens, down to the longest row alone; then the same with more that is recomputed."""
    longest = int(sizes(rows)[0].max())
    shapes: list[tuple[int | None, Batch]] = []
    tokens: int | None = None
    while True:
        batch = train_batches(with_options(config, batch_tokens=tokens), rows).largest()
        if not shapes or batch.mask.shape != shapes[-1][1].mask.shape:
            shapes.append((tokens, batch))
            yield with_options(config, batch_tokens=tokens).train, batch
        if tokens == longest or batch.mask.size <= longest:
            break
        tokens = max(longest, batch.mask.size // 2)
    has_mlps = any(name in block for block in model.layers for name in MLP_NAMES)
    for level in ["mlp", True] if has_mlps else [True]:
        for tokens, batch in shapes:
            yield with_options(config, batch_tokens=tokens, gradient_checkpointing=level).train, batch
    tokens, batch = shapes[-1]
    yield with_options(config, batch_tokens=tokens, loss_chunk=16, gradient_checkpointing=True).train, batch


def with_options(config: Config, **chosen: Any) -> Config:
    """The config with other options of `train`."""
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
        return float(measured(options, model, batch, compiled).memory), 0.0
    share = output_of(model).at_once is not None
    short, long = (_cut(batch, *shape, share) for shape in (few, more))
    first, second = (measured(options, model, part, compiled).memory for part in (short, long))
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


def measured(options: Train, model: nn.Module, batch: Batch, compiled: bool) -> Need:
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


def _try_evaluation(options: Train, model: nn.Module, rows: Sequence[Example]) -> int:
    """The most bytes that the largest batch of an evaluation takes."""
    gc.collect()
    batches = Batches(rows, options.batch_size, 0, batch_tokens=options.batch_tokens)
    with prepared(model, options):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        ahead, batch = NoFurtherAhead(), arrays(batches.largest())
        for _ in range(2):
            with ahead.allowed():
                mx.eval(batch_score(output_of(model), batch))
        return mx.get_peak_memory() - before


def _words(options: Train) -> str:
    words: dict[Any, str] = {
        False: "nothing recomputed",
        "selective": "what is cheap recomputed",
        "mlp": "MLPs recomputed",
        True: "blocks recomputed",
    }
    chunk = f", {options.loss_chunk} logits at a time" if options.loss_chunk else ""
    level = options.gradient_checkpointing
    return words.get(level, f"one in {level} blocks recomputed") + chunk


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
