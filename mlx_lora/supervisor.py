"""`--supervise`: a parent that starts a run again from its last checkpoint when the process dies.

On macOS the watchdog of the GPU, the memory killer and MLX's own completion handlers end a process without any Python
exception, so nothing inside the process can save it.
"""

import os
import signal
import subprocess
import threading
from collections import deque
from types import FrameType
from typing import Any, BinaryIO

from mlx_lora.errors import complain

STEPS = "MLX_LORA_STEPS_TO"  # the file descriptor to which a supervised run writes the steps it has made
LIVES = "MLX_LORA_LIVES"  # what was before this life: the furthest step, and how many deaths there were since
MOST_DEATHS = 3  # without a new step
KEPT_LINES = 50  # of what the child said on stderr, for a diagnosis
CURES = {
    "ImpactingInteractivity": "macOS ended it because its GPU work kept the display waiting: let the display sleep, or "
    "make steps shorter with train.batch_tokens",
    "OutOfMemory": "the GPU ran out of memory: set train.plan to auto, or train.gradient_checkpointing to true",
    "Insufficient Memory": "the GPU ran out of memory: set train.plan to auto, or train.gradient_checkpointing to true",
    "Resource limit": "MLX ran out of GPU buffers: set train.batch_tokens or data.max_seq_length lower",
    "bad_alloc": "it ran out of memory: set train.plan to auto, or train.gradient_checkpointing to true",
    "MemoryError": "it ran out of memory: set train.plan to auto, or train.gradient_checkpointing to true",
}
OF_SIGNALS = {
    signal.SIGKILL: "the system killed it, as it does where memory runs out: set train.plan to auto, or "
    "train.gradient_checkpointing to true, and close other programs",
}
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def report_step(step: int) -> None:
    """Tells the supervisor, if there is one, how far the run is."""
    if descriptor := os.environ.get(STEPS):
        try:
            os.write(int(descriptor), f"{step}\n".encode())
        except OSError:  # the supervisor has gone
            del os.environ[STEPS]


def before() -> tuple[int, int]:
    """Of a supervised run: the furthest step of its earlier lives, and how many of them ended without a new one. Zeros
    in a first life, and where nobody supervises."""
    step, deaths = os.environ.get(LIVES, "0 0").split()
    return int(step), int(deaths)


def supervise(command: list[str], resumed: list[str]) -> int:
    """Runs `command` until it ends by itself, and returns its exit code: 0, 2 for bad input, 128 + n where it was told
    to stop. After every other end, `resumed` is run in its place: the command that goes on from the last checkpoint.
    After three deaths with no new step between them it gives up, says what is known of the cause, and returns 1.

    SIGINT, SIGTERM and SIGHUP are passed on, and the run is not started again. Ctrl-Z stops both, until they continue.
    """
    furthest, deaths = 0, 0
    with _Signals() as signals:
        while True:
            child = _Child(command, f"{furthest} {deaths}")
            signals.pass_on_to(child)
            code = child.wait()
            if code in (0, 2) or signals.received is not None or code - 128 in PASSED_ON:
                return code if code >= 0 else 128 - code
            furthest, deaths = (child.step, 1) if child.step > furthest else (furthest, deaths + 1)
            said = f"the run died after step {child.step} ({_ending(code)})"
            if deaths == MOST_DEATHS:
                complain(f"{said}, {deaths} times without a new step: giving up. {_diagnosis(code, child.last_lines)}")
                return 1
            complain(f"{said}: going on from the last checkpoint")
            command = resumed


class _Signals:
    """Passes signals on to the newest child, one that comes before there is any too."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: _Child | None = None

    def __enter__(self) -> "_Signals":
        heard = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # not nohup's
        self._kept = {number: signal.signal(number, self._pass_on) for number in heard}
        self._kept[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)

    def pass_on_to(self, child: "_Child") -> None:
        self._child = child
        if self.received is not None:
            child.send(self.received)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if self._child is not None:
            self._child.send(number)

    def _stop(self, *_: Any) -> None:
        if self._child is not None:
            self._child.send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._child is not None:  # somebody let us continue
            self._child.send(signal.SIGCONT)


class _Child:
    """One process of the run. It has a session of its own: signals of the terminal come to the supervisor alone."""

    def __init__(self, command: list[str], lives: str) -> None:
        self.step = 0
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        steps, to_supervisor = os.pipe()
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            pass_fds=[to_supervisor],
            start_new_session=True,
            env=os.environ | {STEPS: str(to_supervisor), LIVES: lives},
        )
        os.close(to_supervisor)
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_steps, args=(os.fdopen(steps, "rb"),)),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,)),
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """The exit code, as subprocess gives it: -n after signal n."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join()
        return code

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def _read_steps(self, stream: BinaryIO) -> None:
        with stream:
            for line in stream:
                self.step = int(line)

    def _read_errors(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.last_lines.append(line.decode(errors="replace"))
                complain(self.last_lines[-1].removesuffix("\n"))


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _diagnosis(code: int, last_lines: deque[str]) -> str:
    text = "".join(last_lines)
    found = [cure for sign, cure in CURES.items() if sign in text]
    if not found and code < 0 and (cure := OF_SIGNALS.get(signal.Signals(-code))):
        found = [cure]
    return found[0] if found else "The cause is not known; what it said last is above"
