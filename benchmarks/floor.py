"""A training step against the matrix products in it, run alone, and against the same model's prefill.

    python benchmarks/floor.py [--cases a b c d e] [--rounds 5] [--updates 2] [--tiny] [--peak TFLOP/S] [--json FILE]

`step / products` is the time of an update over the time of its matrix products alone: the same shapes, weights and
type, one after the other in the same process. They are: each linear layer forward; backward to its input, where
something below is adapted (there is no product with a frozen weight's gradient); the adapters' own six; the two of
attention and their four backward; the head forward and backward at the positions where the step has it. Attention is
causal, so half of its square counts, and it is timed as half of the queries against all keys. A block's products are
evaluated together, the head's in the parts that the step has, from inputs that lie ready: in the time are the products
and the memory of their outputs. Padding is in both times; what a step computes again is in its own alone.

Floating-point operations per token, with N_b weights in L blocks of which the uppermost k are adapted, N_h = hidden x
vocabulary, f the share of positions at the head, T the row's length, d_a = heads x head_dim and rank r:

    F_fwd   = 2 N_b + 2 f N_h + 2 T d_a L
    F_train = F_fwd + (k / L)(2 N_b + 4 T d_a L) + 2 f N_h + 6 r sum(d_in + d_out)

The figures are the sums over the products themselves, which are a little below: the lowest adapted block needs no
gradient to its own input. Prefill is the same model without its adapter and without gradients (its attention and
SwiGLU are ours), on the same tokens, with the head at the same positions, and

    E_prefill = real tokens/s x (F_train / F_fwd) / prefill tokens/s

is 1 where training runs as efficiently as prefill. `TFLOP/s` is F_train over the step's time and stands beside the
peak, the best of a large square product's times in every round; what comes out above 100 % of it cannot be, and ends
the program with exit code 2 and without figures. Padded positions count in F and in TFLOP/s; `real` is the share of
the positions that hold tokens.

`host` is the time of the step outside `mx.eval` and its like: Python and the making of graphs. For models that are too
large to be run here it is measured on as many blocks of hidden size 64, and compared with the least time that an update
of 1 x 2,048 tokens can take: F_train at the measured peak.

Steps, products and prefill are run in turn on the first updates of the case; every figure is a median over rounds, each
of the sum over these updates, after one untimed round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from cases import CASES, QWEN, Case, build, examples, tiny  # imports mlx_lora before MLX
from matrix_products import Products, of_batch, products
from our_step import Training, default_dtype, load, start

# isort: split
import mlx.core as mx

from mlx_lora import lora, memory, model
from mlx_lora.batches import Batch
from mlx_lora.config import Lora
from mlx_lora.errors import InputError, exit_code
from mlx_lora.head import output_of
from mlx_lora.loss import POSITIONS, part_size

QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
PREFILL_ROWS = 256  # whose logits are computed at a time
LARGE = {"Qwen2.5-0.5B's 24 blocks": QWEN, "Qwen3-4B's 36 blocks": QWEN3_4B}


def prefill(training: Training, compiled: bool) -> Callable[[Batch], None]:
    """The model's forward pass on a batch; the adapters must be disabled when it is called."""
    output = output_of(training.network)
    hidden = mx.compile(output.hidden) if compiled else output.hidden

    def call(batch: Batch) -> None:
        states = hidden(mx.array(batch.inputs))
        states = states.reshape(-1, states.shape[-1])
        if batch.positions is not None:
            states = states[mx.array(batch.positions)]
        mx.eval(states)
        for first in range(0, states.shape[0], PREFILL_ROWS):
            mx.eval(output.head(states[first : first + PREFILL_ROWS]))

    return call


@contextmanager
def evaluation() -> Iterator[list[float]]:
    """The seconds of each of MLX's evaluations, asked for by `mx.eval` and its like, while the context lasts."""
    seconds: list[float] = []
    kept = {name: getattr(mx, name) for name in ("eval", "async_eval", "synchronize")}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - begin)

        return call

    for name, function in kept.items():
        setattr(mx, name, timed(function))
    try:
        yield seconds
    finally:
        for name, function in kept.items():
            setattr(mx, name, function)


def timed_update(training: Training, update: list[Batch]) -> tuple[float, float]:
    """Seconds of an update, and those outside evaluation."""
    with evaluation() as evaluating:
        begin = time.perf_counter()
        training.update(update)
        whole = time.perf_counter() - begin
    return whole, whole - sum(evaluating)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def square(size: int, dtype: str) -> Products:
    """One product of two square matrices."""
    made = Products(getattr(mx, dtype))
    made.new_group()
    made.add((size, size), (size, size))
    mx.eval(made.inputs())
    return made


def measure_case(case: Case, dtype: str, updates: int, rounds: int, peak_product: Products) -> dict[str, Any]:
    """The medians of one case; times are in seconds, rates per second."""
    compiled = model.can_compile()
    with tempfile.TemporaryDirectory() as folder:
        network, rows = load(case, Path(folder), dtype)
    training = start(case, network, rows)
    chosen = training.updates(updates)
    batches = [batch for update in chosen for batch in update]
    alone = [of_batch(training.network, batch) for batch in batches]
    mx.eval([made.inputs() for made in alone])
    forward = prefill(training, compiled)
    times: dict[str, list[float]] = {name: [] for name in ("step", "host", "products", "prefill", "peak_product")}
    for _ in range(rounds + 1):
        now = dict.fromkeys(times, 0.0)
        for update in chosen:
            whole, host = timed_update(training, update)
            now["step"] += whole
            now["host"] += host
        lora.disable(training.network)
        for batch, made in zip(batches, alone, strict=True):
            now["products"] += seconds(made.run)
            now["prefill"] += seconds(partial(forward, batch))
        lora.enable(training.network)
        now["peak_product"] = seconds(peak_product.run)
        for name, value in now.items():
            times[name].append(value)
    figures = {name: statistics.median(own[1:]) for name, own in times.items()}  # the first round traces
    figures["peak_product"] = min(times["peak_product"])
    places = sum(batch.inputs.size for batch in batches)
    return figures | {
        "case": case.name,
        "title": case.title,
        "shapes": [list(batch.inputs.shape) for batch in batches],
        "at_head": [batch.inputs.size if batch.positions is None else len(batch.positions) for batch in batches],
        "positions": places,
        "real": sum(rows[row].tokens.size - 1 for batch in batches for row in batch.rows),
        "forward_operations": sum(made.operations(forward_only=True) for made in alone),
        "operations": sum(made.operations() for made in alone),
    }


def measure_host(shape: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of an update outside evaluation, of as many narrow blocks and parts of the loss, and the operations of
    one of the shape itself, both on 1 x 2,048 tokens."""
    whole, narrow = build(shape), shape | NARROW
    lora.attach(whole, Lora(rank=8))  # never evaluated
    case = Case("", "narrow", narrow, shape["num_hidden_layers"], batch_size=1, rows=1, longest=2049, shortest=2049)
    parts = ceil(2048 / POSITIONS) * ceil(shape["vocab_size"] / part_size(POSITIONS))
    training = start(case, build(narrow), examples(case), loss_chunk=ceil(2048 / parts))
    [update] = training.updates(1)
    hosts = [timed_update(training, update)[1] for _ in range(rounds + 1)]
    return {
        "blocks": shape["num_hidden_layers"],
        "host": statistics.median(hosts[1:]),
        "operations": products(whole, 1, 2048, 2048).operations(),
    }


def measure(cases: list[Case], updates: int, rounds: int, peak_size: int, stated_peak: float | None) -> dict[str, Any]:
    """All figures. Raises InputError where a rate is above the peak."""
    dtype = default_dtype()
    peak_product = square(peak_size, dtype)
    measured = [measure_case(case, dtype, updates, rounds, peak_product) for case in cases]
    peak = stated_peak or peak_product.operations() / min(figures["peak_product"] for figures in measured)
    for figures in measured:
        figures |= ratios(figures, peak)
    large = {name: measure_host(shape, rounds) for name, shape in LARGE.items()}
    for figures in large.values():
        figures["least_step"] = figures["operations"] / peak
        figures["host_share"] = figures["host"] / figures["least_step"]
    return {
        "device": model.device(),
        "mlx": mx.__version__,
        "dtype": dtype,
        "rounds": rounds,
        "compiled": model.can_compile(),
        "peak": peak,
        "cases": measured,
        "large": large,
    }


def ratios(figures: dict[str, Any], peak: float) -> dict[str, float]:
    """What follows from the times, the operations and the peak (in operations per second)."""
    rates = {
        "step": figures["operations"] / figures["step"],
        "products": figures["operations"] / figures["products"],
        "prefill": figures["forward_operations"] / figures["prefill"],
    }
    for name, rate in rates.items():
        if rate > peak:
            raise InputError(
                f"case {figures['case']}: {name} at {rate / 1e12:.4g} TFLOP/s would be {100 * rate / peak:.0f} % of "
                f"the peak, {peak / 1e12:.4g}: a time, a count or the peak is wrong, so nothing is printed; run again "
                "on an idle machine, or with a larger --peak-size"
            )
    training, prefill = figures["real"] / figures["step"], figures["real"] / figures["prefill"]
    return {
        "step_over_products": figures["step"] / figures["products"],
        "rate": rates["step"],
        "share_of_peak": rates["step"] / peak,
        "real_share": figures["real"] / figures["positions"],
        "training_tokens": training,
        "prefill_tokens": prefill,
        "e_prefill": training * figures["operations"] / figures["forward_operations"] / prefill,
        "host_share": figures["host"] / figures["step"],
    }


def table(figures: dict[str, Any]) -> str:
    """Aligned columns under the names of the device and of MLX's version."""
    compiled = "compiled" if figures["compiled"] else "not compiled"
    lines = [
        f"{figures['device']}, mlx {figures['mlx']}; {figures['dtype']}, {compiled}, peak of a square product "
        f"{figures['peak'] / 1e12:.4g} TFLOP/s",
        *(f"{case['case']}: {case['title']}" for case in figures["cases"]),
        "",
        f"{'':4} {'step':>9} {'products':>9} {'step /':>9} {'TFLOP/s':>9} {'of peak':>8} {'real':>6} "
        f"{'real tokens/s':>17} {'E_prefill':>9} {'host':>7}",
        f"{'':4} {'s':>9} {'s':>9} {'products':>9} {'':>9} {'':>8} {'':>6} {'train':>8} {'prefill':>8} {'':>9} {'':>7}",
    ]
    for case in figures["cases"]:
        lines.append(
            f"{case['case']:4} {case['step']:9.4f} {case['products']:9.4f} {case['step_over_products']:9.3f} "
            f"{case['rate'] / 1e12:9.4f} {case['share_of_peak']:8.1%} {case['real_share']:6.2f} "
            f"{case['training_tokens']:8.1f} {case['prefill_tokens']:8.1f} {case['e_prefill']:9.3f} "
            f"{case['host_share']:7.2%}"
        )
    lines += ["", f"{'':26} {'host ms':>8} {'of the least time of a step':>28}"]
    for name, large in figures["large"].items():
        share = f"{large['host_share']:.2%} of {large['least_step']:.3f} s"
        lines.append(f"{name:26} {1e3 * large['host']:8.1f} {share:>28}")
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps against their matrix products and prefill.")
    names = [name for name in CASES if name != "long"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help="of a b c d e")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--updates", type=int, default=2, help="first updates of a case that make up a round")
    parser.add_argument("--tiny", action="store_true", help="narrow models and short rows: to see that it runs")
    parser.add_argument("--peak-size", type=int, metavar="N", help="of the square product (CPU: 2048, else 8192)")
    parser.add_argument("--peak", type=float, metavar="TFLOP/S", help="this device's, instead of the measured one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    chosen = [tiny(CASES[name]) if options.tiny else CASES[name] for name in options.cases]
    size = options.peak_size or (2048 if mx.default_device() == mx.cpu else 8192)
    stated = None if options.peak is None else options.peak * 1e12
    with memory.limits(memory.available()):  # as in training
        figures = measure(chosen, options.updates, options.rounds, size, stated)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(_main))
