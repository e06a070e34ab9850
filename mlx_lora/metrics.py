"""What a run says: one line per event for a person, one JSON object per event in metrics.jsonl."""

import errno
import json
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_lora import files, trackers
from mlx_lora.display import View
from mlx_lora.errors import mute
from mlx_lora.trackers import Tracker

FILE = "metrics.jsonl"
# Kinds of events that tell of the process, not of the training: a resumed run has more of them.
OF_PROCESS = ("start", "note")


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
    """The run's output: lines on the console, a live view where that is a terminal, metrics.jsonl in the run's folder,
    and what else the run reports to."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or PatientConsole(highlight=False)
        self._run = Path()
        self._file: FileIO | None = None
        self._waiting = b""
        self._failed = False
        self._said: list[str] = []  # before the run began
        self._step = 0
        self._view = View(self.console)
        self._trackers: dict[str, Tracker] = {}

    def open(self, run: Path, step: int) -> list[dict[str, Any]]:
        """Starts metrics.jsonl, or goes on with it after the checkpoint of `step`, and returns the events until then.

        What an interrupted run wrote beyond is removed; where it ended between the checkpoint and its note, the note
        is made up for.
        """
        path = run / FILE
        with files.writing(run):
            kept = [(line, event) for line, event in events(path) if event["step"] <= step] if step else []
            with files.new_file(path) as temporary:
                temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
            self._file = path.open("ab", buffering=0)
        self._run, self._step = run, step
        if step and not any((event["event"], event["step"]) == ("saved", step) for _, event in kept):
            self.record("saved", step)
        return [event for _, event in kept]

    def start(
        self,
        earlier: list[dict[str, Any]],
        step: int,
        steps: int,
        report_to: Sequence[str],
        config: dict[str, Any],
        **facts: Any,
    ) -> None:
        """The process begins to train at `step` of `steps`; `earlier` are the events that `open` returned."""
        known = [event["id"] for event in earlier if event["event"] == "start" and isinstance(event.get("id"), str)]
        identity = known[0] if known else secrets.token_hex(4)
        for name in report_to:
            try:
                self._trackers[name] = trackers.start(name, self._run, identity, config, step)
            except Exception as error:
                self._unreported(name, error)
        self.record("start", step, id=identity, steps=steps, **facts)
        for line in self._said:
            self.record("note", step, text=line)
        self._view.start(earlier, step, steps)

    def close(self) -> None:
        self._view.stop()
        for name in list(self._trackers):
            self._tell(name, lambda tracker: tracker.close())
        self._trackers = {}
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self._step = step
        self._view.advance(step)

    def doing(self, what: str) -> None:
        """Says in the live view what is being done that is no update."""
        self._view.doing(what)

    def say(self, line: str) -> None:
        """A line for a person, which is noted in metrics.jsonl too."""
        self._print(line)
        if self._file:
            self.record("note", self._step, text=line)
        else:
            self._said.append(line)

    def notice(self, kind: str, step: int, line: str, **values: Any) -> None:
        """An event that a person should know of: the line on the console, and with the values in metrics.jsonl."""
        self._print(line)
        self.record(kind, step, text=line, **values)

    def event(self, kind: str, step: int, line: str, **values: Any) -> None:
        """One event: the line on the console, the values in metrics.jsonl (a number that is not finite as null).

        The live view shows what a report says, which then has no line.
        """
        self.record(kind, step, **values)
        if kind != "train" or not self._view.active:
            self._print(line)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One event, without a line on the console."""
        if self._file:
            clean = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
            record = {"event": kind, "step": step, "time": round(time.time(), 3), **clean}
            self._waiting += json.dumps(record).encode() + b"\n"
            self._write()
            self._view.event(record)
            for name in list(self._trackers):
                self._tell(name, lambda tracker: tracker.event(record))

    def _tell(self, name: str, tell: Callable[[Tracker], None]) -> None:
        try:
            tell(self._trackers[name])
        except Exception as error:
            del self._trackers[name]
            self._unreported(name, error)

    def _unreported(self, name: str, error: Exception) -> None:
        """Training does not end because it cannot be reported."""
        self.say(f"warning: log.report_to: {name}: {' '.join(str(error).split())}; nothing is reported to it")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

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
                self._print(
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
