"""Training runs that are killed again and again, and have to end as if nothing had happened.

    python benchmarks/kills.py [--kills 200] [--deaths 100] [--seed 0] [--json FILE]

A run of a tiny model, with dropout, accumulation, evaluations and a checkpoint every 3 of its 60 updates, is killed by
SIGKILL: in every second life at a random instant of it, in the others inside one of its file operations, drawn from all
that a whole run makes. It is resumed and killed again until it has ended, then another one is started, until there were
`kills` of them. After each kill the newest checkpoint must be whole, every array in the run's folder must load, and no
more than 3 updates may be lost; each run that has ended must have the adapter, the optimizer's state and the losses of
a run that nobody killed, bit for bit.

`deaths`: then a longer run under `--supervise`, whose process dies so many times of random signals (SIGABRT, SIGSEGV,
SIGKILL) while nobody does anything else.

Exit code 1 where anything of this does not hold.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CASES, ROOT, tiny, write_model, write_rows  # imports mlx_lora before MLX

# isort: split
import mlx.core as mx

from mlx_lora import checkpoint, metrics
from mlx_lora.adapter_files import mlx_form
from mlx_lora.files import LOCK

EVERY = 3
UPDATES = 60
KILLER = Path(__file__).with_name("killed_run.py")
SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL)


class Failure(Exception):
    """Something was lost."""


def config(folder: Path, output: Path, updates: int, every: int) -> Path:
    """The configuration of a run, as a file."""
    options = {
        "model": str(folder / "model"),
        "data": {"train": str(folder / "rows" / "train.jsonl"), "valid": 0.25},
        "lora": {"rank": 4, "dropout": 0.1},
        "train": {"max_steps": updates, "epochs": None, "batch_size": 2, "gradient_accumulation_steps": 2},
        "eval": {"every": 7},
        "checkpoint": {"every": every, "keep": 2},
        "log": {"every": 1},
        "output_dir": str(output),
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(options))  # JSON is YAML
    return path


def start(path: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlx_lora.train", "--config", str(path), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


def ended(process: subprocess.Popen[bytes], expected: int) -> None:
    """Waits for a process. Raises Failure where it ends otherwise."""
    _, errors = process.communicate(timeout=600)
    if process.returncode != expected:
        raise Failure(f"exit code {process.returncode}, not {expected}: {errors.decode(errors='replace')[-2000:]}")


def steps(run: Path) -> int:
    """The updates that a run has made, by its newest checkpoint."""
    newest, complaints = checkpoint.latest(run)
    if complaints:
        raise Failure(f"after a kill: {complaints}")
    return 0 if newest is None else int(newest.name)


def check_files(run: Path) -> None:
    """Raises Failure where a file that is in its place does not load."""
    for path in [*run.glob("*.safetensors"), *run.glob("checkpoints/[0-9]*/*.safetensors")]:
        try:
            mx.eval(mx.load(str(path)))
        except RuntimeError as error:
            raise Failure(f"{path}: {error}") from None
    for path in [*run.glob("*.json"), *run.glob("checkpoints/[0-9]*/*.json")]:
        json.loads(path.read_text())


def check_equal(run: Path, whole: Path) -> None:
    """Raises Failure where the end of a run is not that of another one."""
    ends = [checkpoint.latest(each)[0] for each in (run, whole)]
    one, other = ends
    if one is None or other is None or one.name != other.name:
        raise Failure(f"the run ended at {one}, not {other}")
    for end in (mlx_form.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.BEST, Path("..", "..", mlx_form.WEIGHTS)):
        arrays, expected = mx.load(str(one / end)), mx.load(str(other / end))
        for path in expected.keys() | arrays.keys():
            if path not in arrays or path not in expected or not mx.array_equal(arrays[path], expected[path]):
                raise Failure(f"{one / end}: {path} differs")
    told, expected_story = story(run), story(whole)
    if told != expected_story:
        other_lines = [line for line in told if line not in expected_story]
        missing = [line for line in expected_story if line not in told]
        raise Failure(
            f"{run / metrics.FILE} tells another story: {other_lines} more, {missing} missing, or in disorder"
        )


def story(run: Path) -> list[tuple[Any, ...]]:
    events = [event for _, event in metrics.events(run / metrics.FILE) if event["event"] not in metrics.OF_PROCESS]
    return [(event["event"], event["step"], event.get("loss")) for event in events]


def kill_runs(folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Runs that are killed `kills` times in all; how often, and how many updates were lost at most."""
    whole = folder / "whole"
    count_file = folder / "count"
    begin = time.monotonic()
    ended(_killed_run(-1, 0, count_file, config(folder, whole, UPDATES, EVERY)), 0)
    seconds, operations = time.monotonic() - begin, int(count_file.read_text())
    found: Counter[str] = Counter()
    lost, runs = 0, 0
    while found.total() < kills:
        runs += 1
        run = folder / f"run {runs}"
        path = config(folder, run, UPDATES, EVERY)
        resume: list[str] = []
        while True:
            inside = found.total() % 2 == 1
            if found.total() == kills:
                process = start(path, *resume)
            elif inside:
                process = _killed_run(draw.randrange(operations), draw.uniform(0, 0.003), count_file, path, *resume)
            else:
                process, begin = start(path, *resume), time.monotonic()
                try:
                    process.wait(draw.uniform(0, seconds))
                    seconds = time.monotonic() - begin  # the machine is faster than it was
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait(600)
            if process.returncode == 0:
                break
            ended(process, -signal.SIGKILL)
            found["inside a file operation" if inside else "at a random instant"] += 1
            if run.exists():
                check_files(run)
                made = max([event["step"] for _, event in metrics.events(run / metrics.FILE)], default=0)
                lost = max(lost, made - steps(run))
            resume = ["--resume"]
        check_equal(run, whole)
        print(f"{found.total()} kills, {runs} runs ended", file=sys.stderr, flush=True)
    if lost > EVERY:
        raise Failure(f"{lost} updates were lost, with a checkpoint every {EVERY}")
    return {"kills": dict(found), "runs": runs, "file operations of a run": operations, "updates lost at most": lost}


def _killed_run(operation: int, seconds: float, count_file: Path, path: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(KILLER), str(operation), str(seconds), str(count_file), "--config", str(path), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


def supervised(folder: Path, deaths: int, draw: random.Random) -> dict[str, Any]:
    """A run under `--supervise` whose process dies `deaths` times."""
    whole, run, updates = folder / "whole, long", folder / "supervised", 40 * deaths + 40
    ended(start(config(folder, whole, updates, 10)), 0)
    parent = start(config(folder, run, updates, 10), "--supervise")
    found: Counter[str] = Counter()
    known, made, early = 0, 0, False
    while found.total() < deaths and parent.poll() is None:
        child = _holder(run)
        early = not early and draw.random() < 0.2  # while it starts, but never twice in turn: the supervisor gives up
        while parent.poll() is None and (child in (0, known) or (not early and _made(run) <= made + 1)):
            time.sleep(0.01)
            child = _holder(run)
        time.sleep(draw.uniform(0, 0.4))
        number = draw.choice(SIGNALS)
        try:
            os.kill(child, number)
        except ProcessLookupError:
            break
        known, made = child, max(made, _made(run))
        found[signal.Signals(number).name] += 1
    ended(parent, 0)
    check_equal(run, whole)
    return {"deaths": dict(found), "updates": updates}


def _made(run: Path) -> int:
    """The newest step that a run has noted. It may have told the supervisor of one more."""
    path = run / metrics.FILE
    lines = path.read_bytes()[-2000:].splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[1:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _holder(run: Path) -> int:
    """The process that holds the folder of a run, as its lock says; 0 where none has yet."""
    try:
        found = re.match(r"process (\d+) ", (run / LOCK).read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) if found else 0


def _main() -> int:
    parser = argparse.ArgumentParser(description="Training runs that are killed again and again.")
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL, of runs that are resumed")
    parser.add_argument("--deaths", type=int, default=100, help="of one run under --supervise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    case = replace(tiny(CASES["e"]), rows=40, held_out=1)
    figures: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(case, folder / "model")
        write_rows(case, folder / "rows")
        try:
            if options.kills:
                figures["killed"] = kill_runs(folder, options.kills, draw)
            if options.deaths:
                figures["supervised"] = supervised(folder, options.deaths, draw)
        except Failure as failure:
            print(f"seed {options.seed}: {failure}", file=sys.stderr)
            return 1
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
