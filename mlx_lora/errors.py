"""Bad input and interruption, and the exit code that every command gives each."""

import signal
import sys
from collections.abc import Callable
from types import FrameType


class InputError(Exception):
    """Something in the input is wrong: says what, where (file and line, or config key) and what to do."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved and ``signum`` says which signal it was."""

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
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, _: FrameType | None) -> None:
    raise Interrupted(number, "stopped")
