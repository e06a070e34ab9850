"""What a run says: one line per event for a person, one JSON object per event in metrics.jsonl."""

import errno
import json
import math
import os
import stat
import sys
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlx_lora import files
from mlx_lora.errors import mute

FILE = "metrics.jsonl"


class PatientConsole(Console):
    """A console that falls silent, and does not end the run, where nothing can be written any more: its reader went
    away (`| head`), its terminal was closed, its disk is full."""

    def __exit__(self, *_: Any) -> None:  # where rich writes
        try:
            super().__exit__(*_)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute(sys.stdout)
        leave_terminal()


def leave_terminal() -> None:
    """What is said from now on goes nowhere, if it went to a terminal that is closed: writing there is an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # ValueError: it is no file of the system
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not os.isatty(stream.fileno()):
                mute(stream)


class Log:
    """The run's output: lines and a progress bar on the console, and metrics.jsonl in the run's folder.

    Where the console is no terminal there is no bar, only lines.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or PatientConsole(highlight=False)
        self._run = Path()
        self._file: FileIO | None = None
        self._waiting = b""
        self._failed = False
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", start=False)

    def open(self, run: Path, step: int) -> None:
        """Starts metrics.jsonl, or goes on with it after the checkpoint of `step`.

        What an interrupted run wrote beyond is removed; where it ended between the checkpoint and its note, the note
        is made up for.
        """
        path = run / FILE
        with files.writing(run):
            kept = [(line, event) for line, event in events(path) if event["step"] <= step] if step else []
            with files.new_file(path) as temporary:
                temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
            self._file = path.open("ab", buffering=0)
        self._run = run
        if step and not any((event["event"], event["step"]) == ("saved", step) for _, event in kept):
            self.record("saved", step)

    def close(self) -> None:
        self._bar.stop()
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def start_bar(self, step: int, steps: int) -> None:
        self._bar.update(self._task, total=steps, completed=step)
        self._bar.start()
        self._bar.start_task(self._task)

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def event(self, kind: str, step: int, line: str, **values: Any) -> None:
        """One event: the line on the console, the values in metrics.jsonl (a number that is not finite as null)."""
        self.say(line)
        self.record(kind, step, **values)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One event in metrics.jsonl only."""
        if self._file:
            clean = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
            record = {"event": kind, "step": step, "time": round(time.time(), 3), **clean}
            self._waiting += json.dumps(record).encode() + b"\n"
            self._write()

    def _write(self) -> None:
        """Adds what is waiting to the file; where that fails, the file stays as it was until the next event."""
        assert self._file is not None
        end = None
        try:
            end = self._file.seek(0, os.SEEK_END)
            written = self._file.write(self._waiting)
            os.fsync(self._file.fileno())
            if written < len(self._waiting):
                raise OSError(errno.ENOSPC, "too little room")
            self._waiting = b""
        except OSError as error:
            if end is not None:
                with suppress(OSError):
                    self._file.truncate(end)
            if not self._failed:
                self.say(
                    f"warning: {self._run / FILE}: cannot be written ({error.strerror}); tried again at each event"
                )
        self._failed = bool(self._waiting)


def events(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, event) of a metrics file; lines that a kill cut off or something damaged are left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int) and "event" in event and line.endswith("\n"):
            found.append((line, event))
    return found
