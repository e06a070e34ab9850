"""A training run that kills itself inside one of its file operations: for kills.py.

    python benchmarks/killed_run.py OPERATION SECONDS COUNT_FILE --config FILE [--resume]

SIGKILL comes SECONDS after the OPERATION-th one has begun (from 0; -1: never), so before, in or after it. Operations
are all calls that change the file system: those of `os`, files opened for writing, and MLX's own writing. How many
there were is in COUNT_FILE at the end.
"""

import builtins
import fcntl
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lora.train  # loads OpenBLAS on Linux before MLX is imported

# isort: split
import mlx.core as mx

CHANGING = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "remove", "ftruncate")
READING = ("open", "scandir", "stat")


class Operations:
    """Inside, `before` is called with the number of every operation, from 0, that changes the file system, and of those
    that only read too where `reading`. `names` tells what they were."""

    def __init__(self, before: Callable[[int], None], reading: bool = False) -> None:
        self.names: list[str] = []
        self._before = before
        self._reading = reading

    @property
    def count(self) -> int:
        return len(self.names)

    def __enter__(self) -> "Operations":
        self._kept: list[tuple[Any, str, Any]] = [(os, name, getattr(os, name)) for name in CHANGING]
        if self._reading:
            self._kept += [(os, name, getattr(os, name)) for name in READING]
        self._kept += [
            (fcntl, "fcntl", fcntl.fcntl),  # macOS: flushes to the disk
            (builtins, "open", builtins.open),
            (io, "open", io.open),
            (mx, "save_safetensors", mx.save_safetensors),
        ]
        for place, name, function in self._kept:
            setattr(place, name, self._watched(place, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, function in self._kept:
            setattr(place, name, function)

    def _watched(self, place: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            if name != "open" or place is os or self._reading or set(mode) & set("wax+"):
                self.names.append(name)
                self._before(self.count - 1)
            return function(*args, **kwargs)

        return call


def _main() -> None:
    operation, seconds, count_file = sys.argv[1:4]
    sys.argv[1:4] = []

    def kill() -> None:
        time.sleep(float(seconds))
        os.kill(os.getpid(), signal.SIGKILL)

    def before(number: int) -> None:
        if number == int(operation):
            threading.Thread(target=kill, daemon=True).start()

    operations = Operations(before)
    try:
        with operations:
            mlx_lora.train._main()
    finally:
        Path(count_file).write_text(str(operations.count))


if __name__ == "__main__":
    _main()
