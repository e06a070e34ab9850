"""The live view of a run: its figures, their curves and its progress, below the lines of a terminal."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.segment import ControlType
from rich.text import Text

REDRAW = 0.2  # seconds between two pictures at least
MOST_POINTS = 10_000  # of a curve: the last ones
BLOCKS = " ▁▂▃▄▅▆▇█"
DONE, LEFT = "━", "─"
LABEL, VALUE, WORDS = 11, 10, 22  # columns
WIDEST = 79  # columns, so that a terminal that stays as wide as most need not wrap the picture
SMALLEST = (36, 12)  # columns and lines below which only the progress is shown
DETAILED = 72  # columns from which on a value has words beside it
TALL = 20  # lines from which on the loss has three
CURVES = {  # kind of event, value: label, colour
    ("train", "loss"): ("loss", "cyan"),
    ("eval", "loss"): ("valid loss", "magenta"),
    ("train", "learning_rate"): ("lr", "blue"),
    ("train", "gradient_norm"): ("grad norm", "blue"),
    ("train", "tokens_per_second"): ("tokens/s", "blue"),
    ("train", "active_memory"): ("memory", "blue"),
}


class View(RenderHook):
    """The newest figures and their curves, drawn anew below whatever is printed. The last picture stays.

    Nothing of the terminal is changed but the lines drawn, and the cursor rests below them: a run that is killed
    leaves nothing to mend. Where there is no terminal, or one that cannot move its cursor or show the characters,
    nothing is drawn and `active` stays False.
    """

    def __init__(self, console: Console) -> None:
        self.active = False
        self._console = console
        self._curves: dict[tuple[str, str], deque[float]] = {key: deque(maxlen=MOST_POINTS) for key in CURVES}
        self._newest: dict[str, dict[str, Any]] = {}  # events by kind
        self._best: dict[str, Any] | None = None  # the best evaluation
        self._drawn: list[int] = []  # columns of each line of the picture that stands
        self._drawn_at = -math.inf
        self._status = ""
        self._step = self._steps = 0
        self._begun = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=100)  # steps, and when they were done

    def start(self, events: Iterable[dict[str, Any]], step: int, steps: int) -> None:
        """Begins at `step` of `steps`; `events` are those of the run until then."""
        console = self._console
        if not (console.is_interactive and console.file.isatty()) or console.options.ascii_only:
            return
        self._step, self._steps, self._begun = step, steps, time.monotonic()
        self._recent.append((step, self._begun))
        for event in events:
            self._take(event)
        self.active = True
        console.push_render_hook(self)
        self._streams = sys.stdout, sys.stderr
        if sys.stdout.isatty():
            sys.stdout = FileProxy(console, sys.stdout)
        if sys.stderr.isatty():
            sys.stderr = FileProxy(console, sys.stderr)
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGCONT, self._forget)
        self._draw()

    def stop(self) -> None:
        """The last picture stays where it is; what is printed from now on stands below it."""
        if not self.active:
            return
        self._status = ""
        self._draw()
        self.active = False
        self._console.pop_render_hook()
        sys.stdout, sys.stderr = self._streams
        if self._handler is not None:
            signal.signal(signal.SIGCONT, self._handler)

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        if self.active:
            now = time.monotonic()
            self._step, self._status = step, ""
            self._recent.append((step, now))
            if now - self._drawn_at >= REDRAW:
                self._draw()

    def doing(self, what: str) -> None:
        """What is being done that is no update, until the next one."""
        self._status = what
        if self.active:
            self._draw()

    def event(self, event: dict[str, Any]) -> None:
        """Takes an event's figures, for the next picture."""
        if self.active:
            self._take(event)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What is printed takes the picture's place, and a new picture stands below it."""
        erase = self._erase()
        lines = self._picture(*self._console.size)
        self._drawn = [line.cell_len for line in lines]
        self._drawn_at = time.monotonic()
        return [erase, *renderables, *lines]

    def _draw(self) -> None:
        with suppress(OSError):  # a closed terminal; its signal ends the run
            self._console.print(Control())

    def _forget(self, *_: object) -> None:
        """After a stop (Ctrl-Z) the shell has written below the picture: it stays."""
        self._drawn = []

    def _erase(self) -> Control:
        """Goes back to where the picture begins. A terminal that has become narrower has wrapped its lines.

        Lines may stay behind where the picture is taller than the terminal has become, or is drawn before the terminal
        tells of its new size (tmux does a quarter of a second late).
        """
        rows = sum(max(1, math.ceil(columns / self._console.width)) for columns in self._drawn)
        rows = min(rows, self._console.height - 1)
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)]
        return Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up * rows)

    def _take(self, event: dict[str, Any]) -> None:
        self._newest[event["event"]] = event
        if event.get("best"):
            self._best = event
        for (kind, name), curve in self._curves.items():
            value = event.get(name)
            if event["event"] == kind and isinstance(value, (int, float)) and math.isfinite(value):
                curve.append(value)

    def _picture(self, columns: int, lines: int) -> list[Text]:
        width = min(columns - 1, WIDEST)  # a full line would wrap on some terminals
        if columns < SMALLEST[0] or lines < SMALLEST[1]:
            return [self._progress(width)]
        shown = []
        for key, (label, colour) in CURVES.items():
            if self._curves[key]:
                rows = 3 if label == "loss" and lines >= TALL else 1
                shown += self._curve(key, label, colour, width, rows)
        return [*shown, self._progress(width)]

    def _curve(self, key: tuple[str, str], label: str, colour: str, width: int, rows: int) -> list[Text]:
        """Label, curve and newest value, the last two in line with the curve's foot."""
        value, words = self._value(key)
        words_width = WORDS if width >= DETAILED else 0
        room = width - LABEL - VALUE - 1 - words_width
        curve = sparkline(self._curves[key], room, rows, from_zero=key[1] != "loss")
        pictured = []
        for number, line in enumerate(curve):
            last = number == rows - 1
            text = Text(f"{label if last else '':{LABEL}}", style="dim", no_wrap=True)
            text.append(line, style=f"not dim {colour}")
            if last:
                text.append(f"{value:>{VALUE}} ", style="not dim bold")
                text.append(words[:words_width])
            text.rstrip()
            pictured.append(text)
        return pictured

    def _value(self, key: tuple[str, str]) -> tuple[str, str]:
        """The newest value, and words beside it."""
        newest, value = self._newest[key[0]], self._curves[key][-1]
        if key == ("train", "learning_rate"):
            return f"{value:.2e}", ""
        if key == ("train", "gradient_norm"):
            return f"{value:.3f}", "before clipping"
        if key == ("train", "tokens_per_second"):
            return f"{value:,.0f}", f"{newest['supervised_tokens_per_second']:,.0f} supervised"
        if key == ("train", "active_memory"):
            return f"{value / 1e9:.2f} GB", f"peak {newest['peak_memory'] / 1e9:.2f} GB"
        if key == ("eval", "loss") and self._best:
            return f"{value:.4f}", f"best {self._best['loss']:.4f} at {self._best['step']}"
        return f"{value:.4f}", f"at step {newest['step']}"

    def _progress(self, width: int) -> Text:
        left = self._seconds_left()
        share = self._step / self._steps if self._steps else 1.0
        head = f"{self._step}/{self._steps} "
        times = f" {share:4.0%}  {clock(time.monotonic() - self._begun)}"
        if self._step < self._steps:
            times += f" + {clock(left)}" if left is not None else ""
        if self._status:
            times += f"  {self._status}"
        text = Text(head, no_wrap=True)
        room = width - len(head) - len(times)
        if room >= 4:
            done = int(share * room)
            text.append(DONE * done, style="green")
            text.append(LEFT * (room - done), style="dim")
        text.append(times)
        text.truncate(width)
        return text

    def _seconds_left(self) -> float | None:
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        return (end - begin) / (last - first) * (self._steps - last) if last > first else None


def sparkline(values: Sequence[float], width: int, rows: int = 1, from_zero: bool = False) -> list[str]:
    """A filled curve of `rows` lines of `width` characters, from the least of the values, or 0, to the greatest.

    Of more values than columns, each column shows the mean of its share; fewer are as wide as they are many.
    """
    values, count = list(values), len(values)
    columns = min(width, count)
    edges = [count * column // columns for column in range(columns + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    least, greatest = 0.0 if from_zero else min(means), max(means)
    share = min((8 * rows - 1) / (greatest - least), 1e300) if greatest > least else 0.0
    heights = [1 + round((mean - least) * share) for mean in means]
    return [
        "".join(BLOCKS[min(8, max(0, height - 8 * row))] for height in heights).ljust(width)
        for row in reversed(range(rows))
    ]


def clock(seconds: float) -> str:
    """1:02, 1:02:03 or 2 d 03 h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
