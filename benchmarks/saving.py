"""What a run pays for not being lost: the share of its time in which it writes, with checkpoints as by default.

    python benchmarks/saving.py [--updates 150] [--tiny] [--json FILE]

Trains SmolLM2's shape with 8 blocks, 4 x 256 tokens, through `finetune`, and adds up the seconds in which it writes
checkpoints, the adapter itself and metrics.jsonl, flushed to the disk. Shares are of all seconds of the training loop,
evaluations included. Saves of the first minute and of the last step count too, and weigh less the longer a run is.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES, tiny, write_model, write_rows  # imports mlx_lora before MLX
from our_step import default_dtype

# isort: split
import mlx.core as mx

from mlx_lora import checkpoint, finetune, metrics, model
from mlx_lora.loop import Run

WRITING: dict[str, list[tuple[type, str]]] = {
    "checkpoints and the adapter": [(Run, "_save"), (Run, "_keep")],
    "metrics.jsonl": [(metrics.Log, "_write")],
}


def measure(updates: int, small: bool) -> dict[str, Any]:
    """Seconds and shares of what is written, and how often."""
    case = tiny(CASES["e"]) if small else CASES["e"]
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    inside: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:  # what a save writes of metrics is the save's
                    seconds[name] += time.perf_counter() - begin
                    times[name] += 1

        return call

    for name, places in WRITING.items():
        for owner, method in places:
            setattr(owner, method, timed(name, getattr(owner, method)))
    steps = Run._fit

    def whole(*args: Any) -> None:
        begin = time.perf_counter()
        steps(*args)
        seconds["all"] += time.perf_counter() - begin

    setattr(Run, "_fit", whole)  # noqa: B010  (mypy)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train, valid = write_rows(case, folder / "rows")
        options = {
            "model": {"path": str(write_model(case, folder / "model")), "dtype": default_dtype()},
            "data": {"train": str(train), "valid": str(valid), "loss_on": "all"},
            "train": {"batch_size": case.batch_size, "max_steps": updates, "epochs": None},
            "output_dir": str(folder / "run"),
        }
        finetune(options)
        size = sum(path.stat().st_size for path in checkpoint.complete(folder / "run")[-1].iterdir())
    return {
        "device": model.device(),
        "mlx": mx.__version__,
        "title": case.title,
        "updates": updates,
        "seconds": seconds["all"],
        "bytes of a checkpoint": size,
        "written": {
            name: {"times": times[name], "seconds": seconds[name], "share": seconds[name] / seconds["all"]}
            for name in WRITING
        },
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description="The share of a run's time in which it writes.")
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--tiny", action="store_true", help="a narrow model and short rows: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    figures = measure(options.updates, options.tiny)
    print(f"{figures['device']}, mlx {figures['mlx']}; {figures['title']}")
    print(
        f"{figures['updates']} updates in {figures['seconds']:.1f} s; a checkpoint has "
        f"{figures['bytes of a checkpoint'] / 1e6:.1f} MB\n\n{'':30}times  seconds  share of the time"
    )
    for name, row in figures["written"].items():
        print(f"{name:30}{row['times']:5}  {row['seconds']:7.3f}  {row['share']:8.3%}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
