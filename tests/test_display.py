"""The live view: what a person sees in a real terminal, and that nothing else there is harmed."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from mlx_lora import display, metrics
from mlx_lora.display import BLOCKS, sparkline

ROOT = Path(__file__).parents[1]


class Terminal:
    """A command in a terminal of its own, and what stands on the screen."""

    def __init__(self, command: list[str], columns: int = 80, lines: int = 24, **environment: str) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._ours, its = pty.openpty()
        self._resize(its, columns, lines)
        self.process = subprocess.Popen(
            command,
            stdin=its,
            stdout=its,
            stderr=its,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def type(self, text: bytes) -> None:
        os.write(self._ours, text)

    def feed(self, written: bytes) -> None:
        self.written += written
        self._stream.feed(written)

    def widen(self, columns: int, lines: int) -> None:
        self._resize(self._ours, columns, lines)
        self.screen.resize(lines, columns)

    def wait_for(self, words: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < end, self.text()
            assert self._reader.is_alive() or words in self.text(), self.text()
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(300)
        self._reader.join(10)
        return code

    def lines(self) -> list[str]:
        """What stands on the screen, and what has scrolled out of it above."""
        above = ["".join(row[column].data for column in range(self.screen.columns)) for row in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def text(self) -> str:
        return "\n".join(self.lines())

    @staticmethod
    def _resize(terminal: int, columns: int, lines: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self._ours, 65536)
            except OSError:
                return
            self.feed(read)


# A run's log without a run: it writes what a run of `steps` would, `pause` seconds apart.
TALK = """
import math, sys, time
from pathlib import Path
from mlx_lora.metrics import Log

folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
log = Log()
folder.mkdir(exist_ok=True)
begin = int(sys.argv[4])
log.say("what is said before")
log.start(log.open(folder, begin), begin, steps, [], {})
for step in range(begin, steps):
    if step % 20 == 0:
        log.doing("evaluating")
        log.event("eval", step, f"eval at step {step}: loss {9 / (step + 3):.4f}", loss=9 / (step + 3), best=True)
    time.sleep(pause)
    log.advance(step + 1)
    report = dict(loss=10 / (step + 3), learning_rate=1e-4, gradient_norm=0.5 + step % 3, tokens_per_second=1234.0)
    more = dict(supervised_tokens_per_second=567.0, active_memory=1.5e9, peak_memory=2.25e9)
    log.event("train", step + 1, f"step {step + 1}/{steps}  loss {10 / (step + 3):.4f}", **report, **more)
    if step == 30:
        print("a library's line")
        print("a library's complaint", file=sys.stderr)
log.close()
print("done")
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Terminal]]:
    """Starts TALK, or another command, in a terminal."""
    terminals: list[Terminal] = []

    def start(
        columns: int = 80,
        lines: int = 24,
        steps: int = 60,
        pause: float = 0.0,
        begin: int = 0,
        command: list[str] | None = None,
        **environment: str,
    ) -> Terminal:
        command = command or talk(tmp_path, steps, pause, begin)
        terminals.append(Terminal(command, columns, lines, **environment))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()


def talk(folder: Path, steps: int, pause: float = 0.0, begin: int = 0) -> list[str]:
    return [sys.executable, "-c", TALK, str(folder / "run"), str(steps), str(pause), str(begin)]


def figures(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in metrics.events(folder / "run" / metrics.FILE) if event["event"] == kind]


# ---- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 40, 1000])
def test_a_sparkline_is_as_high_as_its_values(rows, count):
    """Each column's blocks against the mean of its share of the values."""
    values = [float((7 * n * n) % 101) for n in range(count)]
    drawn = sparkline(values, 40, rows)
    assert [len(line) for line in drawn] == [40] * rows
    columns = min(40, count)
    heights = [sum(BLOCKS.index(line[column]) for line in drawn) for column in range(40)]
    means = [
        sum(part) / len(part)
        for n in range(columns)
        if (part := values[count * n // columns : count * (n + 1) // columns])
    ]
    span = max(means) - min(means)
    for height, mean in zip(heights, means, strict=False):
        exact = 1 + (8 * rows - 1) * (mean - min(means)) / span if span else 1
        assert abs(height - exact) <= 0.5
    assert not any(heights[columns:])


def test_a_sparkline_from_zero():
    assert sparkline([4.0, 8.0], 2, from_zero=True) == ["▅█"]
    assert sparkline([4.0, 8.0], 2) == ["▁█"]
    assert sparkline([0.0], 1, from_zero=True) == ["▁"]


def test_times():
    assert [display.clock(seconds) for seconds in (0, 59.6, 3600, 90_000)] == ["0:00", "1:00", "1:00:00", "1 d 01 h"]


# ---- a terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (50, 24), (30, 24), (80, 9)])
def test_the_last_picture_stands_below_all_lines(start, tmp_path, columns, lines):
    """Each line once, in the order of their saying, those of other libraries too; then the last figures."""
    terminal = start(columns, lines)
    assert terminal.end() == 0
    text = terminal.text()
    said = ["what is said before", "at step 0:", "at step 20:", "a library's line", "a library's complaint", "step 40:"]
    assert [text.count(words) for words in said] == [1] * len(said)
    assert sorted(said, key=text.index) == said
    picture = text[text.rindex("eval at step") :].partition("\n")[2].strip()
    assert picture.endswith("\ndone")
    assert re.search(r"^60/60 .*100%", picture, re.MULTILINE)
    assert "step 60/60" not in text  # a report's line
    small = columns < display.SMALLEST[0] or lines < display.SMALLEST[1]
    words = ["loss", "0.1613", "valid loss", "0.2093", "lr", "1.00e-04", "grad norm", "2.500", "tokens/s", "1,234"]
    words += ["memory", "1.50 GB"]
    assert all((word in picture) != small for word in words)
    more = ["567 supervised", "best 0.2093 at 40", "peak 2.25 GB", "before clipping"]
    assert all((word in picture) == (columns >= 80 and not small) for word in more)
    assert len(picture.splitlines()) == 2 if small else 8 + 2 * (lines >= display.TALL)
    assert not terminal.screen.cursor.hidden
    assert b"\x1b[?" not in terminal.written  # no state of the terminal was changed
    assert b"\x1b[2J" not in terminal.written


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_without_a_terminal_there_are_lines_alone(tmp_path, environment):
    ended = subprocess.run(
        talk(tmp_path, 4), capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=True
    )
    assert ended.stdout.splitlines()[1:] == ["eval at step 0: loss 3.0000", *[
        f"step {step}/4  loss {10 / (step + 2):.4f}" for step in range(1, 5)
    ], "done"]  # fmt: skip


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}])
def test_a_terminal_that_cannot_show_it_has_lines(start, environment):
    terminal = start(steps=4, **environment)
    assert terminal.end() == 0
    assert "step 4/4  loss" in terminal.text()
    assert b"\x1b[1A" not in terminal.written


def test_ctrl_c_leaves_a_run_s_screen_in_order(start, tiny_model, tmp_path):
    """A real run, with a sample whose prompt would clear the screen."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {n}. " * (1 + n % 5)}) + "\n" for n in range(40)))
    options = {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.2},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"epochs": None, "max_steps": 100_000, "learning_rate": 0.01},
        "eval": {"every": 1000, "samples": ["a\x1b[2Jb"], "sample_tokens": 4},
        "log": {"every": 2},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "my.yaml").write_text(json.dumps(options))
    terminal = start(command=[sys.executable, "-m", "mlx_lora.train", "--config", str(tmp_path / "my.yaml")])
    terminal.wait_for("grad norm")
    terminal.type(b"\x03")
    assert terminal.end() == 128 + signal.SIGINT
    text = terminal.text()
    last = figures(tmp_path, "train")[-1]
    picture = text[text.rindex("valid loss") :]
    assert f"{last['gradient_norm']:.3f}" in picture
    assert f"{last['learning_rate']:.2e}" in picture
    assert f"peak {last['peak_memory'] / 1e9:.2f} GB" in picture
    assert text.count("/100000 ") == 1
    assert "go on with the same command and --resume" in picture[picture.rindex("/100000") :].replace("\n", "")
    assert not terminal.screen.cursor.hidden
    notes = [event["text"] for event in figures(tmp_path, "note")]
    assert any(note.startswith("stopped by SIGINT at step") for note in notes)
    assert r"'a\x1b[2Jb'" in text
    assert b"\x1b[2J" not in terminal.written


def test_a_kill_leaves_the_cursor_below_the_picture(start):
    terminal = start(steps=100_000, pause=0.01)
    terminal.wait_for("grad norm")
    terminal.process.kill()
    terminal.end()
    screen = terminal.screen
    assert not screen.cursor.hidden
    assert screen.cursor.x == 0
    assert "/100000" in screen.display[screen.cursor.y - 1]


def test_what_a_shell_writes_while_a_run_is_stopped_stays(start):
    """As after Ctrl-Z and fg."""
    terminal = start(steps=300, pause=0.01)
    terminal.wait_for("grad norm")
    terminal.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    terminal.feed(b"[1]+  Stopped\r\n$ fg\r\n")
    terminal.process.send_signal(signal.SIGCONT)
    assert terminal.end() == 0
    assert "[1]+  Stopped\n$ fg\n" in terminal.text()


def test_a_resumed_run_shows_its_whole_curve(start, tmp_path):
    assert start(steps=60).end() == 0
    terminal = start(steps=61, begin=60)
    assert terminal.end() == 0
    curve = next(line for line in terminal.lines() if line.startswith("grad norm"))
    assert len(re.findall(f"[{BLOCKS[1:]}]", curve)) >= 35
    assert len(figures(tmp_path, "train")) == 61


def test_a_terminal_that_becomes_wider_has_a_wider_picture(start):
    terminal = start(50, 24, steps=200, pause=0.02)
    terminal.wait_for("grad norm")
    terminal.widen(100, 30)
    assert terminal.end() == 0
    text = terminal.text()
    assert "567 supervised" in text
    assert text.count("valid loss") == 1
    assert text.count("eval at step 0:") == 1


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux, a terminal that wraps its lines anew, is not installed")
@pytest.mark.parametrize(("widths", "steps", "pause"), [((110, 84, 95), 150, 0.02), ((80, 50), 7, 0.7)])
def test_a_terminal_that_becomes_narrower_keeps_one_picture(tmp_path, widths, steps, pause):
    """While it draws often, to a width that its lines have; or to a narrower one, between two drawings."""
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]
    environment = os.environ | {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    shell = shlex.join(talk(tmp_path, steps, pause)) + "; sleep 60"
    start = [*tmux, "new-session", "-d", "-x", str(widths[0]), "-y", "40", shell]
    subprocess.run(start, check=True, cwd=ROOT, env=environment)

    def shown() -> str:
        command = [*tmux, "capture-pane", "-p", "-J", "-S", "-"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    def wait_for(reports: int) -> None:
        end = time.monotonic() + 60
        while len(figures(tmp_path, "train")) < reports:
            assert time.monotonic() < end, shown()
            time.sleep(0.02)

    try:
        for number, width in enumerate(widths[1:], 1):
            wait_for(number * steps // 4)
            subprocess.run([*tmux, "resize-window", "-x", str(width), "-y", "40"], check=True)
        wait_for(steps)
        time.sleep(0.5)  # for the last picture
        text = shown()
        assert text.rstrip().endswith("done")
        assert text.count("valid loss") == 1
        assert text.count("memory") == 1
        for step in range(0, steps, 20):
            assert text.count(f"eval at step {step}:") == 1
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
