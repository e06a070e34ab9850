"""Line charts as HTML with inline SVG that are readable at any width: the curves stretch, the words do not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

WIDTH, HEIGHT = 1000, 1000  # the drawing's own coordinates; its shape on the page is the style sheet's
MOST_POINTS = 1000  # of a curve; of more, the least and the greatest of each share are drawn
MOST_DOTS = 60  # of a curve: more would be a band on a phone
FAR = 30  # times the median: from there on a greatest value makes its axis logarithmic

Point = tuple[int, float | None]  # step, value; None where it was not finite


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `kind`: line, faint, dotted (with its points), dashed or mark (a point alone). `again`: its
    colour has been given to another one."""

    name: str
    points: Sequence[Point]
    colour: int  # of the style sheet
    kind: str = "line"
    again: bool = False

    @property
    def classes(self) -> str:
        """Of the style sheet."""
        return f"{self.kind} c{self.colour}{' again' if self.again else ''}"


@dataclass(frozen=True)
class Chart:
    """Curves over a run's steps. `form` is how values are written: plain, si (k, M) or power (2e-4)."""

    title: str
    unit: str
    curves: list[Curve]
    form: str = "plain"
    from_zero: bool = True

    def numbers(self) -> list[dict[str, Any]]:
        """What is drawn, for the readout beside the pointer."""
        return [{"name": c.name, "colour": c.colour, "points": c.points} for c in self.curves if c.kind != "dashed"]


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, and the round values to mark on it."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(title: str, unit: str, curves: list[Curve], form: str = "plain", from_zero: bool = True) -> Chart | None:
    """A chart of the curves that have a value; None where none has."""
    shown = [replace(curve, points=thinned(curve.points)) for curve in curves if values([curve])]
    return Chart(title, unit, shown, form, from_zero) if shown else None


def figure(drawn: Chart, number: int) -> str:
    """A chart as HTML; `number` is its place among the page's `numbers`."""
    down, across = _value_axis(values(drawn.curves), drawn.from_zero), _step_axis(drawn.curves)
    grid = "".join(f'<path d="M0 {_y(down, tick)}H{WIDTH}"/>' for tick in down.ticks)
    paths = "".join(_path(curve, across, down) for curve in drawn.curves)
    labels = [
        f'<span class="y" style="top:{100 - 100 * down.place(tick):.2f}%">{written(tick, drawn.form)}</span>'
        for tick in down.ticks
    ] + [
        f'<span class="x" style="left:{100 * across.place(tick):.2f}%">{written(tick, "si")}</span>'
        for tick in across.ticks
    ]
    legend = [f'<span class="key {c.classes}">{escape(c.name)}</span>' for c in drawn.curves]
    unit = drawn.unit + (", log scale" if down.logarithmic else "")
    return (
        f"<figure><figcaption><b>{escape(drawn.title)}</b> <i>{escape(unit)}</i>"
        f'<span class="legend">{"".join(legend)}</span></figcaption>'
        f'<div class="plot" data-chart="{number}" data-form="{drawn.form}" data-last="{across.high:g}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(drawn.title)}"><g class="grid">{grid}</g>{paths}</svg>{"".join(labels)}</div></figure>'
    )


def values(curves: Sequence[Curve]) -> list[float]:
    """Every finite value of the curves."""
    return [value for curve in curves for _, value in curve.points if value is not None]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points: of each share of them the least and the greatest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    shares = most // 2
    for share in range(shares):
        part = points[len(points) * share // shares : len(points) * (share + 1) // shares]
        finite = sorted((value, step) for step, value in part if value is not None)
        ends = {finite[0], finite[-1]} if finite else set()
        kept += sorted((step, value) for value, step in ends) or [part[0]]
    return kept


def running_mean(points: Sequence[Point], over: int) -> list[Point]:
    """The mean of each value and its neighbours, about `over` in all; what is not finite is left out."""
    finite = [(step, value) for step, value in points if value is not None]
    means: list[Point] = []
    for number, (step, _) in enumerate(finite):
        reach = min(over // 2, number, len(finite) - 1 - number)  # as many on both sides
        window = [value for _, value in finite[number - reach : number + reach + 1]]
        means.append((step, sum(window) / len(window)))
    return means


def linear(low: float, high: float, most: int = 5) -> Axis:
    """An axis that holds both values, marked at multiples of 1, 2 or 5 times a power of ten, `most` + 1 or fewer."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return Axis(first * step, last * step, [number * step for number in range(first, last + 1)])


def logarithmic(low: float, high: float, most: int = 5) -> Axis:
    """An axis that holds both values, which are positive, marked at powers of ten, `most` + 1 or fewer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    powers = range(first, first + step * max(1, math.ceil((last - first) / step)) + 1, step)
    return Axis(10.0 ** powers[0], 10.0 ** powers[-1], [10.0**power for power in powers], True)


def _value_axis(found: list[float], from_zero: bool) -> Axis:
    """Logarithmic where a few values would press all others to the ground."""
    least, greatest = min(found), max(found)
    if least > 0 and greatest > FAR * sorted(found)[len(found) // 2]:
        return logarithmic(least, greatest)
    return linear(min(0.0, least) if from_zero else least, greatest)


def _step_axis(curves: Sequence[Curve]) -> Axis:
    """From 0 to the last step, which is marked only where it is round."""
    last = max(1, *(step for curve in curves for step, _ in curve.points))
    return Axis(0, last, [tick for tick in linear(0, last, 8).ticks if tick <= last and tick == int(tick)])


def _path(curve: Curve, across: Axis, down: Axis) -> str:
    places = [
        None if value is None else f"{across.place(step) * WIDTH:.2f} {_y(down, value)}" for step, value in curve.points
    ]
    line, pen_down = [], False
    for place in places:
        if place is not None:
            line.append(f"L{place}" if pen_down else f"M{place}h0")  # h0: a point alone is a dot
        pen_down = place is not None
    drawn = "" if curve.kind == "mark" else f'<path class="{curve.classes}" d="{"".join(line)}"/>'
    if curve.kind == "mark" or (curve.kind == "dotted" and len(places) <= MOST_DOTS):
        dots = "".join(f"M{place}h0" for place in places if place is not None)
        drawn += f'<path class="{"mark" if curve.kind == "mark" else "dots"} c{curve.colour}" d="{dots}"/>'
    return drawn


def _y(down: Axis, value: float) -> str:
    return f"{(1 - down.place(value)) * HEIGHT:.2f}"


def written(value: float, form: str = "plain") -> str:
    """A value for a person: 0.25; si: 1.5k, 20M; power: 2e-4."""
    if form == "power" and value:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    if form == "si":
        for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= 0.9995 * unit:
                return f"{value / unit:.3g}{letter}"
    return f"{value:.4g}"
