"""Examples → batches of a few shapes, in an order that is a pure function of (data, seed, epoch).

Rows are grouped by their length inside shuffled windows, so that a batch holds rows of about one length while its
composition still changes every epoch. How the rows of an update are laid out in batches changes the time and the memory
that it takes, never its result. Padding is on the right and never supervised.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, islice

import numpy as np

from mlx_lora.config import Config
from mlx_lora.data import Example, sizes

MAX_SHAPES = 16
WINDOW = 128  # batches that are sorted together,
SHARE = 3  # and at most one in so many of an epoch's: few updates learn less well from rows that are alike
SAMPLE = 2000  # batches that the shapes are chosen for
ORDER = 3  # raised with every change of the order of rows: no run goes on in another one
BLOCK = 128  # the window of packed rows is a multiple of it
Lines = list[np.ndarray]  # of a batch: the rows in each line


@dataclass(frozen=True)
class Batch:
    """``inputs``, ``targets`` (B, T) int32 and ``mask`` (B, T) float32: 1 where a target is supervised.

    ``rows`` are indices into the examples, ``places`` the (line, first column) of each; B can exceed the lines that are
    used by empty ones that are wholly masked. ``positions`` (N,) int32 index the flattened (B · T): every supervised
    target, and unsupervised ones that fill up to one of a few numbers. None means every position. Where rows are
    packed, end to end in a line, ``segments`` (B, T) int32 tells them apart and none is longer than ``window``.
    ``kept`` is what a frozen prefix gives for the inputs, where that is computed once (see prefix.py).
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    rows: tuple[int, ...]
    tokens: int  # real ones, padding not counted
    positions: np.ndarray | None = None
    places: tuple[tuple[int, int], ...] = ()
    segments: np.ndarray | None = None
    window: int | None = None
    kept: np.ndarray | None = None

    @property
    def supervised(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class _Shapes:
    """At most 16 shapes: each width with its number of lines and its room for supervised positions, in each window."""

    widths: np.ndarray
    rooms: np.ndarray
    windows: np.ndarray


class Batches:
    """The batches of a data set.

    An update holds `accumulate` groups of `batch_size` rows. A group is one batch, or a few where its shape has no room
    for all of its supervised targets; with `batch_tokens`, it is laid out in as few as have at most that many tokens
    each, padding counted (a longer row is a batch of its own). With `packing` the rows of a batch stand end to end in
    one line.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        batch_tokens: int | None = None,
        packing: bool = False,
    ) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.accumulate = accumulate
        self.batch_tokens = batch_tokens
        self.packing = packing
        self.seed = seed
        self._lengths, self._supervised = sizes(examples)
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # a step needs its epoch's order again and again
        self._shapes = self._choose_shapes()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in an epoch; the last one holds the groups that are left over."""
        return math.ceil(math.ceil(len(self.examples) / self.batch_size) / self.accumulate)

    @cached_property
    def padding_efficiency(self) -> float:
        """The share of real tokens among those computed, in the first epochs."""
        laid_out = self._layout(self._sample())
        real = sum(int(self._lengths[np.concatenate(lines)].sum()) for lines in laid_out)
        return real / sum(self._size(self._width(self._shapes.widths, lines)) for lines in laid_out)

    def _epoch(self, number: int) -> list[list[np.ndarray]]:
        """The rows of an epoch by update and group: every row exactly once, `batch_size` rows of about one length in a
        group, groups of any length in an update. Only one group and one update may hold fewer than the others."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.examples))
        together = self.batch_size * max(1, min(WINDOW, len(order) // self.batch_size // SHARE))
        groups = []
        for window in np.split(order, range(together, len(order), together)):
            by_length = window[np.argsort(self._lengths[window], kind="stable")]
            groups += np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        groups = [groups[index] for index in random.permutation(len(groups))]
        return [groups[start : start + self.accumulate] for start in range(0, len(groups), self.accumulate)]

    def steps(self, first: int, last: int, kept: Callable[[Batch], np.ndarray] | None = None) -> Iterator[list[Batch]]:
        """The batches of steps `first` to `last` - 1, counted from 0 over the whole run, each with what `kept` gives
        for it; collated one step ahead in a thread."""

        def collate(step: int) -> list[Batch]:
            epoch, position = divmod(step, self.steps_per_epoch)
            batches = [self.collate(lines) for lines in self._layout(self.epoch(epoch)[position])]
            return [replace(batch, kept=kept(batch)) for batch in batches] if kept else batches

        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(collate, first) if first < last else None
            for step in range(first, last):
                assert coming is not None
                now, coming = coming, ahead.submit(collate, step + 1) if step + 1 < last else None
                yield now.result()

    def in_order(self) -> Iterator[Batch]:
        """Every row once, the longest first, the same each time: for evaluation."""
        by_length = np.argsort(self._lengths, kind="stable")
        groups = np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        for lines in self._layout(groups[::-1]):
            yield self.collate(lines)

    def largest(self) -> Batch:
        """A batch of the run's largest shape: what takes the most memory."""
        by_length = np.argsort(-self._lengths, kind="stable")
        if self.packing:
            lines = self._batches(by_length[: self.batch_size], self._shapes.widths)[0]
            return self.collate(lines, int(self._shapes.widths[-1]))
        width = max(map(int, self._shapes.widths), key=self._size)
        rows = by_length[self._lengths[by_length] <= width][: self._lines(width)]
        return self.collate(list(rows[:, None]), width)

    # ---- layout: which rows share a batch and a line -----------------------------------------------------------------

    def _layout(self, groups: list[np.ndarray]) -> list[Lines]:
        """Groups of rows in batches of lines; one with more supervised targets than there is room for in its shape
        becomes two."""
        waiting = [lines for group in groups for lines in self._batches(group, self._shapes.widths)][::-1]
        found = []
        while waiting:
            lines = waiting.pop()
            width = self._width(self._shapes.widths, lines)
            room = self._shapes.rooms[np.searchsorted(self._shapes.widths, width)]
            if self._targets(lines) > room:
                half = (len(lines) if len(lines) > 1 else len(lines[0])) // 2
                waiting += [lines[half:], lines[:half]] if len(lines) > 1 else [[lines[0][half:]], [lines[0][:half]]]
            else:
                found.append(lines)
        return found

    def _batches(self, group: np.ndarray, widths: np.ndarray) -> list[Lines]:
        if self.batch_tokens is None:
            return [[group]] if self.packing else [list(group[:, None])]
        rows = group[np.argsort(-self._lengths[group], kind="stable")]
        if self.packing:
            return self._pack(rows)
        found = []
        while len(rows):
            number = self._lines(_level(widths, self._lengths[rows[0]]))
            found.append(list(rows[:number, None]))
            rows = rows[number:]
        return found

    def _pack(self, rows: np.ndarray) -> list[Lines]:
        """Rows, longest first, in lines of at most `batch_tokens`: each goes where it leaves the least room."""
        assert self.batch_tokens is not None
        lines: list[list[int]] = []
        room: list[int] = []
        for row in rows:
            length = int(self._lengths[row])
            fitting = [line for line, left in enumerate(room) if left >= length]
            if fitting:
                line = min(fitting, key=room.__getitem__)
                lines[line].append(row)
                room[line] -= length
            else:
                lines.append([row])
                room.append(self.batch_tokens - length)
        return [[np.array(line)] for line in lines]

    def _longest_line(self) -> int:
        """The most tokens that a line of packed rows can hold."""
        if self.batch_tokens is None:
            return int(np.sort(self._lengths)[-self.batch_size :].sum())
        return max(self.batch_tokens, int(self._lengths.max()))

    def _lines(self, width: int) -> int:
        """Lines in a batch of this width."""
        if self.packing:
            return 1
        if self.batch_tokens is None:
            return self.batch_size
        batches = -(-self.batch_size // max(1, self.batch_tokens // width))
        return -(-self.batch_size // batches)  # all batches of a group hold about as many

    def _size(self, width: int) -> int:
        """Tokens in a batch of this width, padding counted."""
        return self._lines(width) * width

    def _width(self, widths: np.ndarray, lines: Lines) -> int:
        return _level(widths, max(self._lengths[rows].sum() for rows in lines))

    def _targets(self, lines: Lines) -> int:
        """Supervised targets in a batch."""
        return int(self._supervised[np.concatenate(lines)].sum())

    def _sample(self) -> list[np.ndarray]:
        """Groups of the first epochs."""
        epochs = chain.from_iterable(map(self.epoch, range(8)))
        return list(islice((group for groups in epochs for group in groups), SAMPLE))

    # ---- shapes: few enough to compile a step for each ---------------------------------------------------------------

    def _choose_shapes(self) -> _Shapes:
        """Shapes that pad a sample of the first epochs little."""
        groups = self._sample()
        lengths, windows = self._lengths, np.array([1])
        if self.packing:
            packed = [lines[0] for group in groups for lines in self._batches(group, windows)]
            lengths = np.array([self._lengths[rows].sum() for rows in packed])
            needed = np.array([-(-self._lengths[rows].max() // BLOCK) for rows in packed])
            windows = np.union1d(_levels(needed, 2, unit=1)[:-1], [-(-self._lengths.max() // BLOCK)])
        number = MAX_SHAPES // len(windows)
        if self.packing:
            # no line of several rows is longer than `batch_tokens`, though single rows may be
            most = [self.batch_tokens, self._longest_line()] if self.batch_tokens else [self._longest_line()]
            inner = _levels(lengths, number - len(most), unit=8)
            widths = np.union1d(inner[inner < min(most)], most)
        else:
            widths = _levels(lengths, number, unit=8)
        sample = [lines for group in groups for lines in self._batches(group, widths)]
        width = np.array([self._width(widths, lines) for lines in sample])
        targets = np.array([self._targets(lines) for lines in sample])
        rooms = [self._room(each, targets[width == each]) for each in widths]
        return _Shapes(widths, np.array(rooms), windows)

    def _room(self, width: int, targets: np.ndarray) -> int:
        """How many supervised positions a shape has room for, given those of sampled batches of its width: three
        standard deviations above their mean, so that few batches have to be computed as two, and enough for any single
        row."""
        if not len(targets):
            return self._size(width)
        least = int(self._supervised[self._lengths <= width].max())
        return min(self._size(width), max(least, math.ceil(targets.mean() + 3 * targets.std())))

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def collate(self, lines: Lines, width: int | None = None) -> Batch:
        """The lines padded on the right to one of the run's widths (None: the least), and to the number of lines."""
        width = width or self._width(self._shapes.widths, lines)
        shape = self._lines(width), width
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        segments = np.zeros(shape, np.int32)
        places = []
        for line, rows in enumerate(lines):
            start = 0
            for number, row in enumerate(rows, 1):
                example, end = self.examples[row], start + self._lengths[row]
                inputs[line, start:end] = example.tokens[:-1]
                targets[line, start:end] = example.tokens[1:]
                mask[line, start:end] = example.supervised[1:]
                segments[line, start:end] = number
                places.append((line, start))
                start = end
        room = self._shapes.rooms[np.searchsorted(self._shapes.widths, width)]
        rows = np.concatenate(lines)
        by_supervision = np.argsort(mask.reshape(-1) == 0, kind="stable")
        window = None
        if self.packing:
            window = BLOCK * _level(self._shapes.windows, -(-self._lengths[rows].max() // BLOCK))
        return Batch(
            inputs,
            targets,
            mask,
            rows=tuple(map(int, rows)),
            tokens=int(self._lengths[rows].sum()) + len(rows),
            positions=None if room == mask.size else by_supervision[:room].astype(np.int32),
            places=tuple(places),
            segments=segments if self.packing else None,
            window=window,
        )


def valid_batches(config: Config, examples: Sequence[Example]) -> Batches:
    """The batches that a run is scored on."""
    options = config.train
    return Batches(examples, options.batch_size, 0, batch_tokens=options.batch_tokens)


def train_batches(config: Config, examples: Sequence[Example]) -> Batches:
    """The batches that a run trains on."""
    options = config.train
    return Batches(
        examples,
        options.batch_size,
        options.seed,
        options.gradient_accumulation_steps,
        options.batch_tokens,
        config.data.packing,
    )


def _level(levels: np.ndarray, value: int) -> int:
    """The lowest level that is not below the value."""
    return int(levels[np.searchsorted(levels, value)])


def _levels(values: np.ndarray, most: int, unit: int) -> np.ndarray:
    """At most `most` levels, multiples of `unit` (of twice that, 4 times, ... for very large values), to which these
    values are raised with the least sum.

    Dynamic programming over the distinct values: `least[j]` is the least sum of the values up to the j-th.
    """
    if most == 0:
        return np.array([], int)
    while values.max() > 512 * unit:
        unit *= 2
    levels, counts = np.unique(-(-values // unit) * unit, return_counts=True)
    if len(levels) <= most:
        return levels
    number = np.cumsum(counts)
    # grown[i, j]: values above level i, up to level j, all raised to j
    grown = np.where(np.tri(len(levels), dtype=bool), np.inf, (number[None, :] - number[:, None]) * levels[None, :])
    least, cuts = number * levels.astype(float), []
    for _ in range(most - 1):
        sums = least[:, None] + grown
        cuts.append(np.where(sums.min(axis=0) < least, sums.argmin(axis=0), -1))
        least = np.minimum(least, sums.min(axis=0))
    last, chosen = len(levels) - 1, []
    for cut in reversed(cuts):
        if last >= 0 and cut[last] >= 0:
            chosen.append(last)
            last = cut[last]
    return levels[sorted([*chosen, last])]
