"""Code of others that may not end, such as a hostile chat template."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_deadlines: dict[int, float] = {}  # of each thread that is inside
_started = threading.Lock()


class TookTooLong(Exception):
    """Raised inside `time_limit`."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in what runs inside, in any thread, within a second after the limit. It must be Python code:
    a call into C is not ended."""
    if _started.acquire(blocking=False):
        threading.Thread(target=_watch, daemon=True).start()
    thread = threading.get_ident()
    _deadlines[thread] = time.monotonic() + seconds
    try:
        yield
    finally:
        _deadlines.pop(thread, None)


def _watch() -> None:
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    while True:
        time.sleep(0.5)
        for thread, deadline in list(_deadlines.items()):
            if time.monotonic() > deadline and _deadlines.pop(thread, None) is not None:
                raise_in(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
