"""Bad input and interruption, and the exit code that every command gives each."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TextIO


class InputError(Exception):
    """Something in the input is wrong: says what, where (file and line, or config key) and what to do."""


class Interrupted(BaseException):
    """A signal asked the run to stop; everything is saved and ``signum`` says which signal it was. Like
    KeyboardInterrupt it is no Exception: what is raised anywhere must come through."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def exit_code(main: Callable[[], None]) -> int:
    """Runs a command's ``main`` and returns its exit code.

    0 done, 2 bad input (its message on stderr, no traceback), 128 + n stopped by signal n (130 Ctrl-C, 143 SIGTERM).
    Any other exception is a bug and passes through with its traceback (the interpreter then exits with 1).
    """
    before = signal.signal(signal.SIGTERM, _stop)  # so that what is half written is cleared away
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        complain(f"error: {error}")
        return 2
    except Interrupted as stop:
        complain(str(stop))
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        mute(sys.stdout)
        complain(f"error: {error}: what was to be written there is not whole")
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def complain(line: str) -> None:
    """Prints a line on stderr, if there is still anything behind it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """What is written to a stream from now on goes nowhere: its terminal is closed, its disk full, its reader gone."""
    with suppress(OSError, ValueError):  # ValueError: it is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stop(number: int, _: FrameType | None) -> None:
    raise Interrupted(number, "stopped")
