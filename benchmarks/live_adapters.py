"""Swapping adapters on one base against loading that base again: milliseconds, ratios, and the memory around them.

    python benchmarks/live_adapters.py MODEL [--rank 16] [--repeats 20] [--cycles 1000] [--json FILE]

MODEL is a folder or a .gguf file (converted before anything is timed). Two random adapters on all linear layers are
written, loaded, swapped, blended, merged and switched off and on. A figure is the median of the repeats, and its ratio
is to the median time of loading the base, its tokenizer included, in the same run: what every one of these would cost
without live adapters. `memory` is what MLX holds before and after the cycles.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx

from mlx_lora import lora, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Lora, Model
from mlx_lora.live import LiveAdapters


def measure(path: str, rank: int, repeats: int, cycles: int) -> dict[str, Any]:
    """Milliseconds of each operation, bytes before and after the cycles, and what was measured on."""
    options = Model(path=path)
    base = model.load(options)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [_save(base, rank, seed, Path(scratch) / name) for seed, name in enumerate("ab")]
        live = LiveAdapters(base.model, base.identity)
        numbers = itertools.count()
        loads = _median(repeats, lambda: live.load(str(next(numbers)), folders[0]))
        for name in live.names:
            live.unload(name)
        for folder in folders:
            live.load(folder.name, folder)
    names = itertools.cycle("ab")
    times = {"load an adapter": loads}
    times["swap"] = _median(repeats, lambda: live.use(next(names)))
    weights = itertools.cycle((0.25, 0.75))
    times["blend of two"] = _median(repeats, lambda: live.use({"a": next(weights), "b": 0.5}))
    times["merge"] = _median(repeats, live.merge, before=live.unmerge)
    times["unmerge"] = _median(repeats, live.unmerge, before=live.merge)
    live.unmerge()

    def cycle() -> None:
        live.disable()
        live.enable()

    memory = [mx.get_active_memory()]
    times["off and on"] = _median(cycles, cycle)
    memory.append(mx.get_active_memory())
    live.use(None)
    loading = _median(max(repeats // 10, 2), lambda: model.load(options))
    modules = len(lora.select(base.model, "all-linear", "all"))
    return {
        "model": path,
        "rank": rank,
        "modules": modules,
        "milliseconds": {"load the base": loading, **times},
        "cycles": cycles,
        "memory": memory,
    }


def _save(base: model.Base, rank: int, seed: int, folder: Path) -> Path:
    """Writes a random adapter of the base; the base stays as it is."""
    lora.attach(base.model, Lora(rank=rank, alpha=2 * rank), seed)
    adapter = lora.attached(base.model)
    lora.detach(base.model)
    folder.mkdir()
    arrays = {name: array + 0.01 for name, array in adapter.arrays().items()}
    mlx_form.save(folder, arrays, mlx_form.settings(adapter), {})
    return folder


def _median(repeats: int, call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """The median milliseconds of a call, each after an untimed one of `before`."""
    times = []
    for _ in range(repeats):
        if before:
            before()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def table(figures: dict[str, Any]) -> str:
    """Aligned columns under the names of the device and of MLX's version."""
    times = figures["milliseconds"]
    base = times["load the base"]
    before, after = (f"{count:,}" for count in figures["memory"])
    lines = [
        f"{model.device()}, mlx {mx.__version__}; {figures['model']}, {figures['modules']} modules of rank "
        f"{figures['rank']}",
        f"{'':16} {'milliseconds':>12} {'ratio':>9}",
        *(f"{name:16} {value:12.2f} {value / base:9.5f}" for name, value in times.items()),
        f"memory before and after {figures['cycles']:,} times off and on: {before} and {after} bytes",
    ]
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Time live adapters against loading the base again.")
    parser.add_argument("model", help="a model folder or a .gguf file")
    parser.add_argument("--rank", type=int, default=16, help="of both adapters")
    parser.add_argument("--repeats", type=int, default=20, help="calls of which the median is taken")
    parser.add_argument("--cycles", type=int, default=1000, help="times that the blend is switched off and on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    figures = measure(options.model, options.rank, options.repeats, options.cycles)
    print(table(figures))
    if options.json:
        record = {"device": model.device(), "mlx": mx.__version__, **figures}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
