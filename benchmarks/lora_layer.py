"""One LoRA layer against the linear layer under it: microseconds of a call and of a call with its gradients.

    python benchmarks/lora_layer.py [--sizes 512 1024 2048] [--tokens 1 128] [--repeats 200] [--json FILE]

The layer is square, rank 8, float32; the input is one row (metal-candle's table) or 128 tokens. The base's backward
pass is the gradient of its input, the adapted layer's that of its input, lora_a and lora_b. Every repeat times the two
layers one after the other, so that what else the machine does falls on both; a figure is the median, and the ratio is
adapted / base. Nothing is compiled: a call is what a model's forward pass queues, and the wait for its result.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import lora, model
from mlx_lora.config import Lora

RANK = 8


@dataclass(frozen=True)
class Row:
    """Medians, in microseconds."""

    size: int
    tokens: int
    base_forward: float
    adapted_forward: float
    forward_ratio: float
    base_backward: float
    adapted_backward: float
    backward_ratio: float


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


def measure(size: int, tokens: int, repeats: int) -> Row:
    """Times one size."""
    base, adapted = OneLayer(size), OneLayer(size)
    adapted.update(base.parameters())
    lora.attach(adapted, Lora(rank=RANK, alpha=2 * RANK, target_modules="linear"))
    parameters = {name: array + 0.01 for name, array in lora.parameters(adapted).items()}
    lora.set_parameters(adapted, parameters)
    x, weight = mx.random.normal((tokens, size)), mx.random.normal((tokens, size))
    mx.eval(base, adapted, x, weight)

    def adapted_loss(x: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        lora.set_parameters(adapted, parameters)
        return (adapted(x) * weight).sum()

    base_gradient = mx.value_and_grad(lambda x: (base(x) * weight).sum())
    adapted_gradient = mx.value_and_grad(adapted_loss, argnums=(0, 1))
    # The forward pass first: taking gradients leaves tracers in the adapted layer.
    base_forward, adapted_forward = _medians(repeats, lambda: base(x), lambda: adapted(x))
    base_backward, adapted_backward = _medians(
        repeats, lambda: base_gradient(x), lambda: adapted_gradient(x, parameters)
    )
    return Row(
        size,
        tokens,
        base_forward,
        adapted_forward,
        adapted_forward / base_forward,
        base_backward,
        adapted_backward,
        adapted_backward / base_backward,
    )


def _medians(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """The median microseconds of each call, taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            mx.eval(call())
            if repeat >= 3:  # the first ones warm up
                own.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(own) for own in times]


def table(rows: list[Row]) -> str:
    """Aligned columns under the names of the device and of MLX's version."""
    lines = [
        f"{model.device()}, mlx {mx.__version__}; rank {RANK}, float32, microseconds",
        f"{'':>6} {'':>6} | {'forward':^30} | {'forward and backward':^30}",
        f"{'size':>6} {'tokens':>6} | " + " | ".join([f"{'base':>10} {'adapted':>10} {'ratio':>8}"] * 2),
    ]
    for row in rows:
        forward = f"{row.base_forward:10.1f} {row.adapted_forward:10.1f} {row.forward_ratio:8.2f}"
        backward = f"{row.base_backward:10.1f} {row.adapted_backward:10.1f} {row.backward_ratio:8.2f}"
        lines.append(f"{row.size:6} {row.tokens:6} | {forward} | {backward}")
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Time one LoRA layer against the linear layer under it.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="inputs and outputs")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="rows of the input")
    parser.add_argument("--repeats", type=int, default=200, help="calls of which the median is taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    rows = [measure(size, tokens, options.repeats) for tokens in options.tokens for size in options.sizes]
    print(table(rows))
    if options.json:
        record = {"device": model.device(), "mlx": mx.__version__, "rank": RANK, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
