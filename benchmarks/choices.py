"""What single choices do: one thing changed at a time from a baseline, on SmolLM2-135M and the quickstart's rows.

    python benchmarks/choices.py [--choices NAME...] [--seeds 3] [--runs FOLDER] [--tiny] [--json FILE]

A run is 24 updates of 4 rows, evaluated on 16 held-out rows every 6. Printed are, for each choice, the held-out loss
where it was best and at the end, over the mean of the baseline's seeds (the baseline's own rows show what seeds alone
do), the step of the best, and both curves. With --runs the runs are kept, for `mlx-lora report`, and those that are
there already are not computed again. Nothing here is a measure of speed.
"""

import argparse
import gc
import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from cases import CASES, ROOT, smollm2, tiny, write_model, write_rows  # imports mlx_lora before MLX

# isort: split
import mlx.core as mx
from rich.console import Console
from rich.table import Table

from mlx_lora import config_file, finetune, metrics, model
from mlx_lora.display import sparkline
from mlx_lora.errors import exit_code

ROWS, HELD_OUT, UPDATES, EVERY = 96, 16, 24, 6
BASELINE = "baseline"
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Choice:
    """What differs from the baseline: options, how many rows there are to train on (the updates are as many), whether
    it is judged by these instead of held-out ones, and whether only the upper half of the blocks is adapted."""

    options: dict[str, Any] = field(default_factory=dict)
    rows: int = ROWS
    leak: bool = False
    last_half: bool = False


def _rank(rank: int, alpha: float) -> Choice:
    return Choice({"lora.rank": rank, "lora.alpha": alpha})


CHOICES = {
    "learning rate 1e-5": Choice({"train.learning_rate": 1e-5}),
    "learning rate 1e-4": Choice({"train.learning_rate": 1e-4}),
    "learning rate 3e-4": Choice({"train.learning_rate": 3e-4}),
    "learning rate 3e-3": Choice({"train.learning_rate": 3e-3}),
    "learning rate 1e-2": Choice({"train.learning_rate": 1e-2}),
    "rank 1, alpha 2": _rank(1, 2),
    "rank 1, rate 3e-3": Choice({"lora.rank": 1, "lora.alpha": 2, "train.learning_rate": 3e-3}),
    "rank 4, alpha 8": _rank(4, 8),
    "rank 64, alpha 128": _rank(64, 128),
    "rank 64, alpha 32": Choice({"lora.rank": 64}),
    "q and v only": Choice({"lora.target_modules": ["q_proj", "v_proj"]}),
    "attention only": Choice({"lora.target_modules": ATTENTION}),
    "attention only, rank 42": Choice({"lora.target_modules": ATTENTION, "lora.rank": 42, "lora.alpha": 84}),
    "MLP only": Choice({"lora.target_modules": MLP}),
    "last half of the blocks": Choice(last_half=True),
    "8 rows, 12 epochs": Choice(rows=8),
    "8 rows, judged by themselves": Choice(rows=8, leak=True),
}


@dataclass(frozen=True)
class Setting:
    """What all runs share: the base, its blocks, the files of rows, and how long a run is."""

    base: Path
    blocks: int
    train: list[str]
    held_out: list[str]
    updates: int


def setting(small: bool, folder: Path) -> Setting:
    """SmolLM2 and the quickstart's rows, or a tiny model and rows of letters."""
    if not small:
        lines = (ROOT / "configs" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()
        return Setting(smollm2(), 30, lines[:ROWS], lines[-HELD_OUT:], UPDATES)
    case = tiny(CASES["b"])
    files = write_rows(case, folder / "rows")
    train, held_out = (file.read_text(encoding="utf-8").splitlines() for file in files)
    return Setting(write_model(case, folder / "model"), 2, train, held_out, 2 * EVERY)


def config(choice: Choice, seed: int, common: Setting, folder: Path) -> dict[str, Any]:
    """The options of a run in `folder`, whose rows are written there."""
    folder.mkdir(parents=True, exist_ok=True)
    train = common.train[: choice.rows]
    held_out = train if choice.leak else common.held_out
    for name, lines in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    half = {"lora.layers": f"last:{common.blocks // 2}"} if choice.last_half else {}
    return config_file.nested(
        {
            "model.path": str(common.base),
            "data.train": str(folder / "train.jsonl"),
            "data.valid": str(folder / "held_out.jsonl"),
            "lora.rank": 16,
            "lora.alpha": 32,
            "train.learning_rate": 1e-3,
            "train.schedule.warmup": 0.1,
            "train.batch_size": 4,
            "train.max_steps": common.updates,
            "train.epochs": None,
            "train.seed": seed,
            "eval.every": EVERY,
            "checkpoint.every": common.updates,
            "log.every": 1,
            "output_dir": str(folder / "run"),
            **choice.options,
            **half,
        }
    )


def measure(name: str, choice: Choice, seed: int, common: Setting, folder: Path) -> dict[str, Any]:
    """Trains, or reads what was trained before: counts and curves. A loss that was not finite is None."""
    options, run = config(choice, seed, common, folder), folder / "run"
    if not any(event["event"] == "eval" and event["step"] == common.updates for event in _events(run)):
        with (folder / "console.txt").open("a", encoding="utf-8") as console, redirect_stdout(console):
            finetune(options, resume=run.exists())
        gc.collect()
        mx.clear_cache()
    events = _events(run)
    start = next(event for event in events if event["event"] == "start")
    evaluated = [(event["step"], event["loss"]) for event in events if event["event"] == "eval"]
    best_step, best = min((pair for pair in evaluated if pair[1] is not None), key=lambda pair: pair[1])
    return {
        "name": name,
        "seed": seed,
        "trainable": start["trainable"],
        "best": best,
        "best_step": best_step,
        "end": evaluated[-1][1],
        "held_out": evaluated,
        "train": [event["loss"] for event in events if event["event"] == "train"],
        "gradient_norm": [event["gradient_norm"] for event in events if event["event"] == "train"],
    }


def _events(run: Path) -> list[dict[str, Any]]:
    return [event for _, event in metrics.events(run / metrics.FILE)]


def table(figures: dict[str, Any]) -> Table:
    """Held-out losses over the baseline's, of what has been measured so far."""
    drawn = Table(box=None, pad_edge=False, collapse_padding=True, header_style="")
    for head in ("", "trains", "best", "/ base", "at step", "end", "/ base", "held out", "training"):
        drawn.add_column(head, justify="left" if head in ("", "held out", "training") else "right", no_wrap=True)
    base = figures["baseline"]
    for run in figures["runs"]:
        drawn.add_row(
            run["name"] + (f", seed {run['seed']}" if run["name"] == BASELINE else ""),
            f"{run['trainable'] / 1e6:.2f} M",
            f"{run['best']:.4f}",
            f"{run['best'] / base['best']:.2f}",
            str(run["best_step"]),
            "none" if run["end"] is None else f"{run['end']:.4f}",
            "" if run["end"] is None else f"{run['end'] / base['end']:.2f}",
            _curve([loss for _, loss in run["held_out"]]),
            _curve(run["train"]),
        )
    return drawn


def _curve(losses: list[float | None]) -> str:
    return sparkline([loss for loss in losses if loss is not None], 10)[0]


def _main() -> None:
    parser = argparse.ArgumentParser(description="What single choices do to the held-out loss.")
    names = list(CHOICES)
    parser.add_argument("--choices", nargs="*", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3, help="of the baseline")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where to keep the runs")
    parser.add_argument("--tiny", action="store_true", help="a narrow model and short rows: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    figures: dict[str, Any] = {"device": model.device(), "mlx": mx.__version__, "runs": []}
    print(f"{figures['device']}, mlx {figures['mlx']}", flush=True)
    todo = [(BASELINE, Choice(), seed) for seed in range(options.seeds)]
    todo += [(name, CHOICES[name], 0) for name in options.choices]
    with tempfile.TemporaryDirectory() as scratch:
        common = setting(options.tiny, Path(scratch))
        for name, choice, seed in todo:
            folder = (options.runs or Path(scratch)) / f"{name}, seed {seed}"
            figures["runs"].append(measure(name, choice, seed, common, folder))
            baselines = [run for run in figures["runs"] if run["name"] == BASELINE]
            figures["baseline"] = {key: mean(run[key] for run in baselines) for key in ("best", "end")}
            print(f"{len(figures['runs'])} of {len(todo)}: {name}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    Console(width=120, highlight=False).print(table(figures))


if __name__ == "__main__":
    sys.exit(exit_code(_main))
