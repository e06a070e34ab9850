"""What must not be lost: runs that die, disks that fill up, folders that two runs want; all with real processes."""

import errno
import fcntl
import importlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_lora import chat, checkpoint, config_file, files, finetune, lora, metrics, planning
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Config
from mlx_lora.data import Example
from mlx_lora.errors import InputError
from mlx_lora.files import LOCK
from mlx_lora.model import load_tokenizer
from mlx_lora.step import State
from mlx_lora.supervisor import LIVES, supervise

ROOT = Path(__file__).parents[1]


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n * n}"}] for n in range(40)]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.2},
        "lora": {"rank": 4},
        "train": {"max_steps": 12, "epochs": None, "batch_size": 4},
        "eval": {"every": 5},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the training command as a process."""
    started: list[subprocess.Popen[str]] = []

    def start(options: dict[str, Any], *more: str) -> subprocess.Popen[str]:
        path = tmp_path / f"config {len(started)}.yaml"
        path.write_text(json.dumps(options))
        command = [sys.executable, "-m", "mlx_lora.train", "--config", str(path), *more]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # waits, and closes the pipes: what a supervisor leaves behind may still hold their other ends
            pass


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- one run, one folder ---------------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_until_the_first_one_is_gone(options, start, tmp_path):
    run = tmp_path / "run"
    first = start(options | {"train": options["train"] | {"max_steps": 100_000}})
    wait_for(lambda: bool(checkpoint.complete(run)), first)
    for more in ([], ["--resume"]):
        second = start(options, *more)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2
        assert "Traceback" not in errors
        assert ("already holds a run" if not more else f"in use by another run (process {first.pid} on") in errors
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(options | {"train": options["train"] | {"max_steps": 100_000}}, "--resume")
    wait_for(lambda: f"process {third.pid} on" in (run / LOCK).read_text(), third)


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 150 KiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def test_training_goes_on_while_a_disk_is_full_and_saves_when_there_is_room(options, start, disk):
    changed = options | {"output_dir": str(disk / "run"), "checkpoint": {"every": 1, "keep": 100}}
    process = start(changed | {"train": options["train"] | {"max_steps": 400}})
    log = disk / "run" / metrics.FILE
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("cannot be written" in line and "training goes on" in line for line in lines)
    saved, complaints = checkpoint.latest(disk / "run")
    assert saved is not None
    assert not complaints
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "done: 400 steps" in output
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.index("not_saved") < len(kinds) - 1 - kinds[::-1].index("saved")
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, 401))


def test_a_run_that_ends_on_a_full_disk_says_so_and_can_be_resumed(options, start, disk):
    changed = options | {"output_dir": str(disk / "run"), "checkpoint": {"every": 1, "keep": 100}}
    process = start(changed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "cannot be written" in errors
    assert "--resume" in errors
    assert all(json.loads(line) for line in (disk / "run" / metrics.FILE).read_text().splitlines())
    saved, complaints = checkpoint.latest(disk / "run")
    assert saved is not None
    assert not complaints
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert finetune(changed, resume=True).steps == 12


def test_a_run_whose_volume_vanishes_trains_to_its_end_and_says_so(options, start, disk):
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    changed = options | {"output_dir": str(disk / "run"), "train": options["train"] | {"max_steps": 300}}
    process = start(changed)
    wait_for(lambda: bool(checkpoint.complete(disk / "run")), process)
    subprocess.run(["umount", "-l", str(disk)], check=True)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "cannot be written" in errors
    assert "training goes on" in output
    assert "step 300/300" in output
    assert not list(disk.iterdir())  # nothing beside it was written instead


@pytest.fixture
def saved(options: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a finished run."""
    finetune(options)
    return tmp_path / "run"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE])
def test_every_file_operation_of_a_save_may_fail(saved, code, tmp_path, monkeypatch):
    """Each of them once: the checkpoint before stays what it was, and the next attempt to save succeeds."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    operations_of = importlib.import_module("killed_run").Operations
    before, _ = checkpoint.latest(saved)
    assert before is not None
    progress, contract = checkpoint.read_progress(before)
    adapter = mx.load(str(before / mlx_form.WEIGHTS))
    settings = json.loads((before / mlx_form.SETTINGS).read_text())
    state = State(adapter, {"step": mx.array(1)})
    later = replace(progress, step=progress.step + 1)

    def save(run: Path, fails: int) -> int:
        def maybe(number: int) -> None:
            if number == fails:
                raise OSError(code, os.strerror(code))

        with operations_of(maybe, reading=True) as operations:
            checkpoint.save(run, state, None, later, settings, contract, {}, keep=1)
        return operations.count

    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    number = save(copy("counted"), -1)
    assert number > 20
    for fails in range(number):
        run = copy(f"fails {fails}")
        with suppress(OSError):  # where it was the removal of an old one, the new one is there already
            save(run, fails)
        newest, complaints = checkpoint.latest(run)
        assert newest is not None
        assert not complaints
        assert newest.name in (before.name, f"{later.step:08d}")
        save(run, -1)
        files.clear_temporaries(run / "checkpoints")
        assert [path.name for path in (run / "checkpoints").iterdir()] == [f"{later.step:08d}"]
        assert checkpoint.latest(run)[1] == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(saved, tmp_path, monkeypatch):
    """Kills cannot show it, since what a process has written outlives it; a power cut is what it is for."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    newest, _ = checkpoint.latest(saved)
    assert newest is not None
    state = State(mx.load(str(newest / mlx_form.WEIGHTS)), {"step": mx.array(1)})
    flushed: list[str] = []
    sync = files.sync
    monkeypatch.setattr(files, "sync", lambda path: (flushed.append(path.name), sync(path)))
    with importlib.import_module("killed_run").Operations(lambda _: None) as operations:
        progress, contract = checkpoint.read_progress(newest)
        checkpoint.save(saved, state, None, replace(progress, step=progress.step + 1), {}, contract, {}, keep=9)
    renamed = max(n for n, name in enumerate(operations.names) if name in ("rename", "replace"))
    written = len([name for name in operations.names if name == "save_safetensors"]) + 3  # and three of JSON
    flushes = [n for n, name in enumerate(operations.names) if name in ("fsync", "fcntl")]
    assert len([n for n in flushes if n < renamed]) > written  # each file, and the folder that lists them
    assert len([n for n in flushes if n > renamed]) == 1
    assert flushed[-1] == "checkpoints"


def test_a_save_that_fails_is_made_up_for_at_the_next_checkpoint_at_the_latest(options, monkeypatch):
    real, saves = checkpoint.save, 0

    def save(*arguments: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(errno.EMFILE, "too many open files")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    finetune(options | {"log": {"every": 20}})
    events = [event for _, event in metrics.events(Path(options["output_dir"]) / metrics.FILE)]
    assert [event["step"] for event in events if event["event"] == "not_saved"] == [4]
    assert [event["step"] for event in events if event["event"] == "saved"] == [2, 6, 8, 10, 12]


def test_a_read_only_folder_is_one_clear_error(options, start, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    process = start(options | {"output_dir": str(disk / "run")})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines() == [f"error: output_dir: {disk / 'run'} cannot be written (Read-only file system)"]


@pytest.mark.parametrize("more", [[], ["--supervise"]])
def test_a_console_on_a_full_disk_falls_silent(options, tmp_path, more):
    (tmp_path / "config.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "mlx_lora.train", "--config", str(tmp_path / "config.json"), *more]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, cwd=ROOT, timeout=120).returncode == 0
    assert checkpoint.latest(tmp_path / "run")[0] is not None


def test_a_volume_that_has_gone_is_not_made_anew_elsewhere(options, monkeypatch, tmp_path):
    """As it is for a life after the first one, which the supervisor starts."""
    monkeypatch.setenv(LIVES, "40 1")
    with pytest.raises(InputError, match="has gone; bring it back"):
        finetune(options, resume=True)
    assert not (tmp_path / "run").exists()


DAMAGE = {
    "cut short": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "with another bit": lambda path, _: flip(path),
    "emptied": lambda path, _: path.write_bytes(b""),
    "gone": lambda path, _: path.unlink(),
    "another run's": lambda path, other: shutil.copy(other, path),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_one_before_used(options, saved, damage, tmp_path, capsys):
    finetune(options | {"output_dir": str(tmp_path / "other"), "train": options["train"] | {"seed": 1}})
    newest, before = checkpoint.complete(saved)[::-1][:2]
    end = mx.load(str(newest / mlx_form.WEIGHTS))
    mx.eval(end)
    for name in sorted(path.name for path in newest.iterdir()):
        kept = Path(shutil.copytree(saved, tmp_path / name))
        others = tmp_path / "other" / "checkpoints" / newest.name / name
        if damage == "another run's" and others.read_bytes() == (newest / name).read_bytes():
            assert name == mlx_form.SETTINGS
            continue
        DAMAGE[damage](newest / name, others)
        found, complaints = checkpoint.latest(saved)
        assert found == before
        gone = name == checkpoint.MANIFEST and damage == "gone"  # then it is no checkpoint at all
        assert gone or name in complaints[0] or (name == checkpoint.MANIFEST and "is damaged" in complaints[0])
        capsys.readouterr()
        assert finetune(options, resume=True).steps == 12
        assert gone or "passed over" in capsys.readouterr().out, name
        for path, array in end.items():
            assert mx.array_equal(mx.load(str(newest / mlx_form.WEIGHTS))[path], array)
        shutil.rmtree(saved)
        shutil.copytree(kept, saved)


# ---- the supervisor --------------------------------------------------------------------------------------------------


def test_it_gives_up_after_three_deaths_at_one_step_and_knows_some_causes(capfd):
    watchdog = "echo 'kIOGPUCommandBufferCallbackErrorImpactingInteractivity' >&2; kill -ABRT $$"
    assert supervise(["bash", "-c", "kill -KILL $$"], ["bash", "-c", watchdog]) == 1
    errors = capfd.readouterr().err
    assert errors.count("going on from the last checkpoint") == 2
    assert (
        "SIGABRT), 3 times without a new step: giving up. macOS ended it because its GPU work kept the display waiting"
        in errors
    )


def test_deaths_at_other_steps_do_not_add_up(tmp_path):
    """Each life makes a step more than the one before, and the tenth one ends well."""
    life = 'n=$(($(cat n 2>/dev/null) + 1)); echo $n > n; echo $n >&"$MLX_LORA_STEPS_TO"; [ $n = 10 ] || kill -SEGV $$'
    command = ["bash", "-c", f"cd {tmp_path}; {life}"]
    assert supervise(command, command) == 0


def test_each_life_knows_of_those_before_it(tmp_path):
    life = f'echo "${LIVES}" >> {tmp_path}/lives; echo 7 >&"$MLX_LORA_STEPS_TO"; kill -KILL $$'
    assert supervise(["bash", "-c", life], ["bash", "-c", life]) == 1
    assert (tmp_path / "lives").read_text().splitlines() == ["0 0", "7 1", "7 2"]


def test_ctrl_z_stops_the_run_too(tmp_path):
    life = f"while sleep 0.02; do echo x >> {tmp_path}/lines; done"
    code = f"from mlx_lora.supervisor import supervise; supervise(['bash', '-c', {life!r}], [])"
    lines = tmp_path / "lines"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        try:
            wait_for(lines.exists, process)
            process.send_signal(signal.SIGTSTP)
            time.sleep(0.5)
            stopped = lines.stat().st_size
            time.sleep(0.5)
            assert lines.stat().st_size == stopped
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: lines.stat().st_size > stopped, process)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


@pytest.mark.parametrize("code", [0, 2])
def test_what_ends_by_itself_is_not_started_again(code):
    assert supervise(["bash", "-c", f"exit {code}"], ["bash", "-c", "exit 7"]) == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_the_run_is_saved(options, start, tmp_path, number):
    parent = start(options | {"train": options["train"] | {"max_steps": 100_000}}, "--supervise")
    wait_for(lambda: bool(checkpoint.complete(tmp_path / "run")), parent)
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 128 + number
    assert "everything is saved" in errors
    assert checkpoint.latest(tmp_path / "run")[1] == []


@pytest.mark.parametrize("counts", [["--kills", "4", "--deaths", "0"], ["--kills", "0", "--deaths", "4"]])
def test_killed_runs_end_as_if_nothing_had_happened(counts):
    """A slice of the whole thing, which the README names."""
    command = [sys.executable, "benchmarks/kills.py", *counts]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": ""})
    assert ended.returncode == 0, ended.stderr


def test_broken_input_is_refused_or_accepted_and_right():
    """A slice of what the README names, with a seed of its own."""
    command = [sys.executable, "tests/fuzz.py", "--cases", "600", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": ""})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for kind in ("config", "data", "adapter", "gguf"):
        counts = next(line for line in ended.stdout.splitlines() if line.startswith(f"{kind}: "))
        refused, accepted = (int(word) for word in counts.split() if word.isdigit())
        assert refused + accepted == 150
        assert accepted > 0


# ---- signals, sleep, and long runs -----------------------------------------------------------------------------------


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(options, start, tmp_path):
    """While it is at something long: the samples of an evaluation."""
    changed = options | {"train": options["train"] | {"max_steps": 100_000}, "checkpoint": {"every": 1}}
    process = start(changed | {"eval": {"every": 5, "samples": [f"Sample {number}" for number in range(5000)]}})
    wait_for(lambda: "Sample 3" in log_of(tmp_path / "run"), process)  # before the first step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - begin < 2
    assert "Traceback" not in errors
    assert checkpoint.latest(tmp_path / "run") == (None, [])
    resumed = start(changed, "--resume")
    wait_for(lambda: bool(checkpoint.complete(tmp_path / "run")), resumed)
    resumed.send_signal(signal.SIGINT)
    resumed.communicate(timeout=60)
    before, complaints = checkpoint.latest(tmp_path / "run")
    assert before is not None
    assert not complaints
    resumed = start(changed, "--resume")
    wait_for(lambda: checkpoint.complete(tmp_path / "run")[-1] > before, resumed)


def test_sigterm_while_the_model_is_read_is_no_bad_input(options, start, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")  # reading waits there
    process = start(options | {"model": str(folder)})
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.strip().endswith("stopped")


@pytest.mark.parametrize("more", [[], ["--supervise"]])
def test_a_terminal_that_is_closed_ends_the_run_with_everything_saved(options, tmp_path, more):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(options | {"train": options["train"] | {"max_steps": 100_000}}))
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora.train", "--config", str(path), *more],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    reader = threading.Thread(target=drain, args=(ours,), daemon=True)
    reader.start()
    try:
        wait_for(lambda: bool(checkpoint.complete(tmp_path / "run")), process)
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    newest, complaints = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    assert not complaints
    made = max(event["step"] for _, event in metrics.events(tmp_path / "run" / metrics.FILE))
    assert int(newest.name) == made


def test_a_run_that_was_told_to_outlive_its_terminal_does(options, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(options | {"train": options["train"] | {"max_steps": 40}}))
    command = ["nohup", sys.executable, "-m", "mlx_lora.train", "--config", str(tmp_path / "config.json")]
    with (tmp_path / "nohup.out").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=ROOT)
    try:
        wait_for(lambda: bool(checkpoint.complete(tmp_path / "run")), process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "done: 40 steps" in (tmp_path / "nohup.out").read_text()


def log_of(run: Path) -> str:
    return (run / metrics.FILE).read_text() if (run / metrics.FILE).exists() else ""


def drain(terminal: int) -> None:
    with suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_a_run_that_is_stopped_and_continued_goes_on_as_if_nothing_had_happened(options, start, tmp_path):
    """As a laptop that sleeps does it to its processes."""
    whole = finetune(options | {"output_dir": str(tmp_path / "whole"), "train": options["train"] | {"max_steps": 60}})
    process = start(options | {"train": options["train"] | {"max_steps": 60}})
    wait_for(lambda: bool(checkpoint.complete(tmp_path / "run")), process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    stopped = checkpoint.complete(tmp_path / "run")
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert int(stopped[-1].name) < 60
    ends = [mx.load(str(run / mlx_form.WEIGHTS)) for run in (tmp_path / "run", whole.output_dir)]
    for path, array in ends[1].items():
        assert mx.array_equal(ends[0][path], array)


@pytest.mark.slow
def test_memory_and_files_stay_bounded_over_2000_steps(options, tmp_path):
    """Rows of many lengths; the slope of MLX's memory once the best adapter is kept, and what lies on the disk."""
    rows = tmp_path / "rows.jsonl"
    random = np.random.default_rng(0)
    texts = ["x" * int(length) for length in random.integers(1, 300, 400)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train = options["train"] | {"max_steps": 2000}
    often = {"eval": {"every": 500}, "log": {"every": 20}, "checkpoint": {"every": 100, "keep": 2}}
    finetune(options | {"train": train, **often})
    events = [event for _, event in metrics.events(tmp_path / "run" / metrics.FILE) if event["event"] == "train"]
    steps, memory = np.array([(event["step"], event["active_memory"]) for event in events if event["step"] > 500]).T
    slope = np.polyfit(steps, memory, 1)[0]
    assert abs(slope) * 2000 < 0.01 * memory.mean()
    assert len(checkpoint.complete(tmp_path / "run")) == 2
    assert max(len(json.dumps(event)) for event in events) < 500  # a line per report
    assert len(log_of(tmp_path / "run").splitlines()) < 2000 / 20 + 4 * 2 + 2000 / 100 + 50
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "adapter_config.json", "adapters.safetensors", "checkpoints", "config.yaml", "metrics.jsonl", "report.html",
        LOCK,
    }  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------


def planned(limit: float | None = None, **train: Any) -> Config:
    return config_file.parse(
        {
            "model": "tiny",
            "data": {"train": "rows"},
            "lora": {"rank": 4},
            "train": {"batch_size": 8, "memory_limit": limit, **train},
            "output_dir": "run",
        }
    )


def test_a_memory_limit_names_a_change_that_fits():
    """What it names is then within the limit, and one of each kind is named as the limit falls."""
    model = tiny.llama(num_hidden_layers=4, hidden_size=64, intermediate_size=256, vocab_size=1000)
    model.freeze()
    lora.attach(model, planned().lora)
    mx.eval(model.parameters())
    random = np.random.default_rng(0)
    rows = [Example(random.integers(1, 1000, n).astype(np.int32), np.arange(n) > n // 2, "rows") for n in [256] * 8]
    assert planning.require(planned(), model, rows, [], 10**9, compiled=False)
    named = set()
    for limit in (20_000_000, 6_000_000):
        with pytest.raises(
            InputError, match=r"train\.memory_limit: too little for this run; set .*, which fits"
        ) as error:
            planning.require(planned(), model, rows, [], limit, compiled=False)
        cure = str(error.value).split("; set ")[-1].removesuffix(", which fits")
        named |= {setting.split("=")[0] for setting in cure.split(", ") if not setting.endswith("=null")}
        changes = [setting for setting in cure.split(", ") if setting.startswith("train.")]
        length = next((int(s.split("=")[1]) for s in cure.split(", ") if s.startswith("data.max_seq_length")), 256)
        short = [Example(row.tokens[:length], row.supervised[:length], "rows") for row in rows]
        changed = config_file.parse(planned().model_dump(), changes)
        planning.require(changed, model, short, [], limit, compiled=False)
    assert {"train.batch_tokens", "train.gradient_checkpointing", "data.max_seq_length"} <= named


def test_a_memory_limit_holds_for_evaluations_and_resumed_runs_too(options, tmp_path):
    """Training rows are short and validation rows long; `plan: auto` is bound by it as well."""
    for name, lengths in (("train", [20] * 16), ("valid", [600] * 4)):
        lines = [json.dumps({"text": "x" * length + str(number)}) + "\n" for number, length in enumerate(lengths)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "valid")} | {"max_seq_length": 2048}
    options |= {"data": data}
    roomy = options | {"train": options["train"] | {"memory_limit": 1.0, "max_steps": 2}}
    finetune(roomy)
    events = [event for _, event in metrics.events(tmp_path / "run" / metrics.FILE) if event["event"] == "train"]
    peak = max(event["peak_memory"] for event in events)
    assert peak < 1e9
    for plan in ("manual", "auto"):
        tight = options | {"train": options["train"] | {"memory_limit": 0.9 * peak / 1e9, "plan": plan}}
        with pytest.raises(InputError, match=r"for an evaluation, too much"):
            finetune(tight | {"output_dir": str(tmp_path / plan)})
        assert not (tmp_path / plan).exists()
    with pytest.raises(InputError, match=r"train\.memory_limit: too little"):
        finetune(roomy | {"train": roomy["train"] | {"max_steps": 4, "memory_limit": 0.001}}, resume=True)


# ---- input that no fuzzer came upon ----------------------------------------------------------------------------------

HOSTILE_TEMPLATES = [
    "{{ 1 // 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%c' % 99999999 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch outside') }}",
    "{{ messages.append(1) }}",
    "{{ lipsum.__globals__['os'].popen('touch outside').read() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_a_hostile_template_is_refused(template, tiny_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "RENDER_SECONDS", 1)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="the chat template"):
        chat.render([{"role": "user", "content": "Hello"}], tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.start_from=" + "a" * 300], "cannot be read"),
        (["output_dir=" + "a" * 300], "output_dir: "),
        (["data.train=/dev/zero"], "/dev/zero: cannot be read"),
        (["lora.alpha=!!timestamp x"], "not valid YAML"),
    ],
)
def test_odd_names_and_values_are_refused(options, overrides, words):
    for resume in (False, True):
        with pytest.raises(InputError, match=words):
            finetune(options, overrides, resume=resume)


def test_a_config_without_an_end_is_refused():
    with pytest.raises(InputError, match="/dev/zero: cannot be read"):
        config_file.load("/dev/zero")


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, metrics.FILE])
def test_nesting_without_end_is_damage(options, saved, name):
    newest, before = checkpoint.complete(saved)[::-1][:2]
    path = saved / name if name == metrics.FILE else newest / name
    path.write_text("[" * 100_000 + "\n")
    assert checkpoint.latest(saved)[0] == (newest if name == metrics.FILE else before)
    assert finetune(options, resume=True).steps == 12
