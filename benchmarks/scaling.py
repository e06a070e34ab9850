"""How a training step's time and memory grow with sequence length, vocabulary, adapted blocks, rank and rows.

    python benchmarks/scaling.py [--tokens 256 ... 8192] [--vocabulary 8192 ... 131072] [--layers 1 2 3 4]
        [--rank 8 32 128] [--rows 1 2 4 8] [--hidden 256] [--repeats 5] [--json FILE]

The model is Qwen2's: 4 blocks, heads of 64 (at hidden 256 four of them, and two key-value heads), feed-forward of 4 x
hidden, tied output; float32 on a CPU, bfloat16 elsewhere; random weights. Rows are random tokens, of one length and all
supervised; adapters are on every linear layer of the uppermost `layers` blocks; AdamW. One size varies at a time; the
others stay at the first of their values, and all blocks are adapted.

Seconds are medians; the points of a sweep are timed in turn, after one untimed step each. Memory is MLX's peak in a
step less the base's weights: activations, gradients, adapter and optimizer state. An exponent p is the slope of the
least-squares line through (log size, log figure): figure ~ size^p. The second one is that of the two largest sizes
alone, where what does not grow counts least.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cases import QWEN, Case, build, examples  # imports mlx_lora before MLX
from our_step import default_dtype, start

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora import memory, model

BLOCKS = 4


@dataclass(frozen=True)
class Point:
    """The sizes of a step."""

    tokens: int
    vocabulary: int
    layers: int
    rank: int
    rows: int


SWEEPS = {
    "tokens": [256, 512, 1024, 2048, 4096, 8192],
    "vocabulary": [8192, 16384, 32768, 65536, 131072],
    "layers": [1, 2, 3, 4],
    "rank": [8, 32, 128],
    "rows": [1, 2, 4, 8],
}


def prepare(point: Point, hidden: int) -> tuple[Callable[[], object], int]:
    """One update as a call, and the bytes of the adapter and the optimizer's state."""
    heads = max(2, hidden // 64)
    shape = QWEN | {
        "hidden_size": hidden,
        "num_hidden_layers": BLOCKS,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": point.vocabulary,
    }
    length = point.tokens + 1  # the first token is no target
    case = Case("", "scaling", shape, point.layers, point.rows, point.rows, length, length, rank=point.rank)
    network = build(shape)
    network.set_dtype(getattr(mx, default_dtype()))
    training = start(case, network, examples(case))
    [update] = training.updates(1)
    mx.eval(training.state.adapter, training.state.optimizer)
    held = tree_flatten([training.state.adapter, training.state.optimizer])
    return lambda: training.update(update), sum(array.nbytes for _, array in held if isinstance(array, mx.array))


def sweep(points: list[Point], hidden: int, repeats: int) -> list[dict[str, Any]]:
    """Each point with its seconds, and its memory above the base's weights in bytes."""
    calls, memory = [], []
    for point in points:
        call, state = prepare(point, hidden)
        gc.collect()  # models of earlier sweeps, which must not go away during the step
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        call()
        memory.append(mx.get_peak_memory() - before + state)
        mx.clear_cache()
        calls.append(call)
    times: list[list[float]] = [[] for _ in points]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
            mx.clear_cache()
    return [
        {**asdict(point), "seconds": statistics.median(own), "memory": peak}
        for point, own, peak in zip(points, times, memory, strict=True)
    ]


def exponent(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """p of the figure ~ size^p that fits best, by least squares of the logarithms."""
    x, y = np.log(sizes), np.log(figures)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def measure(sizes: dict[str, list[int]], hidden: int, repeats: int) -> dict[str, Any]:
    """Of each sweep its points, and the exponents of its time and memory."""
    elsewhere = {name: values[0] for name, values in sizes.items()} | {"layers": BLOCKS}
    sweeps = {}
    for name, values in sizes.items():
        rows = sweep([Point(**elsewhere | {name: value}) for value in values], hidden, repeats)
        exponents = {}
        for figure in ("seconds", "memory"):
            figures = [row[figure] for row in rows]
            exponents[figure] = [exponent(values, figures), exponent(values[-2:], figures[-2:])]
        sweeps[name] = {"points": rows, "exponents": exponents}
    return {
        "device": model.device(),
        "mlx": mx.__version__,
        "hidden": hidden,
        "repeats": repeats,
        "compiled": model.can_compile(),
        "elsewhere": elsewhere,
        "sweeps": sweeps,
    }


def table(figures: dict[str, Any]) -> str:
    """One table a sweep, under the names of the device and of MLX's version."""
    compiled = "compiled" if figures["compiled"] else "not compiled"
    lines = [
        f"{figures['device']}, mlx {figures['mlx']}; hidden {figures['hidden']}, {BLOCKS} blocks, {compiled}",
        "elsewhere " + ", ".join(f"{value} {name}" for name, value in figures["elsewhere"].items()),
    ]
    for name, swept in figures["sweeps"].items():
        lines += ["", f"{name:>16} {'seconds':>10} {'MiB':>10}"]
        for point in swept["points"]:
            lines.append(f"{point[name]:16,} {point['seconds']:10.4f} {point['memory'] / 2**20:10.1f}")
        for place, what in enumerate(("exponent", "of the last two")):
            seconds, memory = (swept["exponents"][figure][place] for figure in ("seconds", "memory"))
            lines.append(f"{what:>16} {seconds:10.2f} {memory:10.2f}")
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Fit how a step's time and memory grow with each of its sizes.")
    for name, values in SWEEPS.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help=f"rising; default: {values}")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median is taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    sizes = {name: getattr(options, name) for name in SWEEPS}
    for name, values in sizes.items():
        if len(values) < 2 or values != sorted(set(values)):
            parser.error(f"--{name}: at least two rising sizes are needed, got {values}")
    with memory.limits(memory.available()):  # as in training
        figures = measure(sizes, options.hidden, options.repeats)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
