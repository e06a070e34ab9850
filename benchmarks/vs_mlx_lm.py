"""The real mlx-lm trainer and ours on the same work: time, tokens per second, memory, padding and held-out loss.

    python benchmarks/vs_mlx_lm.py [--cases a b c d e long] [--repeats 5] [--rows N] [--set train.batch_tokens=2048]
        [--same-batches] [--dtype float32] [--tiny] [--json FILE]

Both sides run what their commands run (train_once.py) on the same files: model, rows, starting adapter, rows in a
batch, rank, alpha, adapted layers, epochs, constant learning rate, AdamW with bias correction, no clipping; float32 on
a CPU, bfloat16 elsewhere. All else is as each side's defaults have it. A measurement is a process of its own, the sides
take turns, and each repeat has its own seed (starting adapter, order of rows). A figure is the median over the repeats,
a ratio is ours / mlx-lm's of these medians. OpenBLAS is loaded for both. cases.py holds the cases; `long` is ours alone
and runs only when named. `--same-batches` adds a side: ours with mlx-lm's rows in a batch, in its order.

s/epoch: `process` is the process from start to exit (imports, loading, saving) over its epochs; `steady` is from the
    end of the first epoch, in which shapes are traced, to the end of the last, over the epochs between (of a single
    epoch: all of it), plus an epoch's part of filling the cache of the frozen blocks. MLX keeps the kernels that it
    builds on a CPU in a folder for temporary files: only the first run ever made waits for the compiler.
tokens/s: in the steady epochs; `real` are the tokens that the model reads (all of a row but its last one), `learned`
    those that are targets of the loss. No padding is in either, though mlx-lm learns a padding token after most rows.
peak: of MLX's memory since the base was loaded, and of what frozen blocks give where that is kept, less the base.
    `resident` is the process's own.
padding: tokens that the model reads over positions that it computes.
held-out: nats per supervised token of rows that neither side has seen. One judge for both: mlx-lm's plain model in
    float32, whole logits, and a sum over the vocabulary in float64. Supervised is an answer to its end-of-turn token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cases  # imports mlx_lora before MLX
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from cases import CASES, Case
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import data, lora, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Data, Lora, Model
from mlx_lora.errors import exit_code

PEER, OURS, CHECKPOINTED, SAME = "mlx-lm", "ours", "ours, checkpointing", "ours, mlx-lm's batches"
FIGURES = ("process", "steady", "real", "learned", "peak", "resident", "padding", "held_out")


def sides(case: Case, same_batches: bool) -> list[str]:
    """What is measured in a case."""
    if case.name == "long":
        return [CHECKPOINTED]
    return [PEER, OURS] + [SAME] * same_batches + [CHECKPOINTED] * (case.checkpointed is not None)


def measure(
    case: Case, repeats: int, dtype: str, overrides: list[str], same_batches: bool, scratch: Path
) -> dict[str, Any]:
    """All figures of a case: medians and ratios by side, and every run by itself."""
    base = cases.write_model(case, scratch / "model", dtype)
    mx.clear_cache()
    train, held_out = cases.write_rows(case, scratch / "rows")
    shared = asdict(case) | {
        "model": str(base),
        "train": str(train),
        "chats": case.shape is None or case.supervised < 1,
        "max_seq_length": max(2048, case.longest),
    }
    chosen = sides(case, same_batches)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen}
    for seed in range(repeats):
        start = _save_start(case, base, seed, scratch / f"start {seed}")
        for side in chosen if seed % 2 == 0 else chosen[::-1]:
            output = scratch / f"{side} {seed}"
            spec = shared | {"seed": seed, "start": str(start), "output": str(output), "overrides": overrides}
            spec["same_batches"] = side == SAME
            if side == CHECKPOINTED:
                spec["overrides"] = ["train.gradient_checkpointing=true", *overrides]
            runs[side].append({"seed": seed} | _run(side, spec, scratch))
    network, rows = _judge(base, held_out, scratch / "start 0")
    untrained = _loss(network, rows)
    for side, of_side in runs.items():
        for run in of_side:
            adapter = mx.load(str(scratch / f"{side} {run['seed']}" / mlx_form.WEIGHTS))
            network.update(tree_unflatten(list(adapter.items())))
            run["held_out"] = _loss(network, rows)
    medians = {side: _medians(of_side) for side, of_side in runs.items()}
    return {
        "case": asdict(case),
        "untrained": untrained,
        "sides": medians,
        "ratios": {
            side: {name: _ratio(own[name], medians[PEER][name]) for name in FIGURES}
            for side, own in medians.items()
            if PEER in medians and side != PEER
        },
        "runs": runs,
    }


def _save_start(case: Case, base: Path, seed: int, folder: Path) -> Path:
    """The adapter that both sides start from."""
    structure = model.load(Model(path=str(base)), weights=False)
    options = Lora(rank=case.rank, alpha=case.alpha, layers=f"last:{case.layers}")
    lora.attach(structure.model, options, seed)
    folder.mkdir()
    settings = mlx_form.settings(lora.attached(structure.model), len(structure.model.layers))
    mlx_form.save(folder, lora.parameters(structure.model), settings, {})
    return folder


def _run(side: str, spec: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The figures of one training, in a process of its own."""
    spec_file, figures_file = scratch / "spec.json", scratch / "figures.json"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    program = Path(__file__).with_name("train_once.py")
    command = [sys.executable, str(program), PEER if side == PEER else OURS, str(spec_file), str(figures_file)]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode:
        error = f"ended with {ended.returncode}\n{ended.stderr[-3000:]}"
        sys.exit(f"{side}, case {spec['name']}, seed {spec['seed']}: {error}")
    watched = json.loads(figures_file.read_text(encoding="utf-8"))
    epochs = spec["epochs"]
    steady = statistics.fmean(watched["epoch_seconds"][1:] or watched["epoch_seconds"]) + watched["filling"] / epochs
    print(f"{spec['name']}, {side}, seed {spec['seed']}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return {
        "process": seconds / epochs,
        "steady": steady,
        "real": watched["inputs"] / epochs / steady,
        "learned": watched["supervised"] / epochs / steady,
        "peak": watched["peak"] - watched["weights"],
        "resident": watched["resident"],
        "padding": watched["inputs"] / watched["padded"],
        "watched": watched,
    }


def _judge(base: Path, held_out: Path, adapter: Path) -> tuple[nn.Module, Sequence[data.Example]]:
    """mlx-lm's model with its own adapted layers, in float32, and the rows to score."""
    network, tokenizer = mlx_lm.load(str(base))[:2]
    network.set_dtype(mx.float32)
    load_adapters(network, str(adapter))
    network.eval()
    if not held_out.stat().st_size:
        return network, []
    options = Data(train=str(held_out), max_seq_length=10**6)
    return network, data.tokenize(data.read(held_out), tokenizer, options).examples


def _loss(network: nn.Module, rows: Sequence[data.Example]) -> float | None:
    """Nats per supervised token; None without rows."""
    total, count = 0.0, 0
    for row in rows:
        logits = network(mx.array(row.tokens[None, :-1]))[0]
        places = np.flatnonzero(row.supervised[1:])
        for some in np.array_split(places, -(-len(places) // 256)):
            chosen = np.array(logits[mx.array(some)])
            chosen -= chosen.max(axis=1, keepdims=True)
            target = chosen[np.arange(len(some)), row.tokens[1:][some]]
            total += float((np.log(np.exp(chosen).sum(axis=1, dtype=np.float64)) - target).sum())
        count += len(places)
    return total / count if count else None


def _medians(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    return {name: None if runs[0][name] is None else statistics.median(run[name] for run in runs) for name in FIGURES}


def _ratio(ours: float | None, peers: float | None) -> float | None:
    return None if ours is None or peers is None else ours / peers


def heading(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    return f"{figures['device']}, {versions}; {figures['dtype']}, medians of {figures['repeats']}"


def table(result: dict[str, Any]) -> str:
    """A case's figures, ratios and what was required of them."""
    case = result["case"]
    heads = ("s/epoch", "s/epoch", "tokens/s", "tokens/s", "peak", "resident", "padding", "held-out")
    units = ("process", "steady", "real", "learned", "GB", "GB", "real/all", "loss")
    lines = ["", f"{case['name']}: {case['title']}; rows {case['rows']}, epochs {case['epochs']}"]
    lines += [f"{'':28}" + "".join(f"{head:>10}" for head in row) for row in (heads, units)]
    for side, own in result["sides"].items():
        shown = own | {name: own[name] / 1e9 for name in ("peak", "resident")}
        lines.append(f"{side:28}" + "".join(_cell(shown[name], name) for name in FIGURES))
    for side, ratios in result["ratios"].items():
        lines.append(f"{side + ' / ' + PEER:28}" + "".join(_cell(ratios[name], "ratio") for name in FIGURES))
        required = {"peak": f"<= {case['checkpointed']}"} if side == CHECKPOINTED else {}
        if side == OURS:
            required = {"real": f">= {case['speed']}", "peak": f"<= {case['memory']}"}
        lines.append((f"{'  required':28}" + "".join(f"{required.get(name, ''):>10}" for name in FIGURES)).rstrip())
    return "\n".join(lines + _notes(result))


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return f"{'-':>10}"
    digits = {"process": 2, "steady": 2, "real": 1, "learned": 1, "padding": 3, "held_out": 4, "ratio": 3}
    return f"{value:10.{digits.get(name, 3)}f}"


def _notes(result: dict[str, Any]) -> list[str]:
    """What the columns do not say: the losses seed by seed, and what mlx-lm's batches hold."""
    runs, notes = result["runs"], []
    if result["untrained"] is not None:
        notes.append(f"held-out loss before training {result['untrained']:.4f}")
    for side in result["ratios"]:
        differences = [own["held_out"] - peer["held_out"] for own, peer in zip(runs[side], runs[PEER], strict=True)]
        shown = ", ".join(f"{difference:+.4f}" for difference in differences)
        notes.append(f"held-out loss, {side} less {PEER}, seed by seed: {shown}; mean {_mean(differences)}")
    case = result["case"]
    learned = {side: of_side[0]["watched"]["supervised"] // case["epochs"] for side, of_side in runs.items()}
    notes.append("tokens learned in an epoch: " + ", ".join(f"{side} {number:,}" for side, number in learned.items()))
    if PEER in runs:
        padding = runs[PEER][0]["watched"]["padding_targets"] // case["epochs"]
        left_out = case["rows"] % case["batch_size"]
        notes[-1] += f"; {PEER} learns {padding:,} of padding too, and leaves out {left_out} of the rows"
    return notes


def _mean(values: list[float]) -> str:
    """With its standard error, where there are several."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}"


def _main() -> None:
    parser = argparse.ArgumentParser(description="The real mlx-lm trainer against ours on the same work.")
    default = [name for name in CASES if name != "long"]
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=default, help="all but long unless given")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, each with a seed of its own")
    parser.add_argument("--rows", type=int, metavar="N", help="rows to train on; the case's own unless given")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="another option of ours; any number of times"
    )
    parser.add_argument("--same-batches", action="store_true", help="another side: ours with mlx-lm's batches")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the base")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short rows, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    dtype = options.dtype or ("float32" if mx.default_device() == mx.cpu else "bfloat16")
    figures: dict[str, Any] = {
        "device": model.device(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-lora")},
        "dtype": dtype,
        "repeats": options.repeats,
        "overrides": options.set,
        "cases": {},
    }
    print(heading(figures), flush=True)
    for name in options.cases:
        case = cases.tiny(CASES[name]) if options.tiny else CASES[name]
        case = replace(case, rows=options.rows or case.rows)
        if case.rows < case.batch_size:
            parser.error(f"--rows: mlx-lm trains on no fewer rows than a batch of case {name} holds, {case.batch_size}")
        if options.same_batches and case.rows % case.batch_size:
            parser.error(
                f"--rows: with --same-batches, a multiple of what a batch of case {name} holds, {case.batch_size}"
            )
        with tempfile.TemporaryDirectory() as scratch:
            figures["cases"][name] = measure(
                case, options.repeats, dtype, options.set, options.same_batches, Path(scratch)
            )
        mx.clear_cache()
        print(table(figures["cases"][name]), flush=True)
        if options.json:  # after each case: the next one may take long, or more memory than there is
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(_main))
