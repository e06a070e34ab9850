"""Examples → batches of one shape each, in an order that is a pure function of (data, seed, epoch).

Rows are grouped by their true length inside shuffled windows, so that a batch holds rows of about one length while
the composition of batches still changes every epoch. Padding is on the right and never supervised.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlx_lora.data import Example

MAX_SHAPES = 16
WINDOW = 64  # batches that are sorted together


@dataclass(frozen=True)
class Batch:
    """``inputs``, ``targets`` (B, T) int32 and ``mask`` (B, T) float32: 1 where a target is supervised.

    ``rows`` are indices into the examples; B can exceed their number by empty rows that are wholly masked.
    ``positions`` (N,) int32 index the flattened (B · T): every supervised target, and unsupervised ones that fill up
    to a number which is the same for all batches of this shape. None means every position.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    rows: tuple[int, ...]
    tokens: int  # real ones, padding not counted
    positions: np.ndarray | None = None

    @property
    def supervised(self) -> int:
        return int(self.mask.sum())


class Batches:
    """The batches of a data set."""

    def __init__(self, examples: list[Example], batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.seed = seed
        self._lengths = np.array([example.tokens.size - 1 for example in examples])
        self._supervised = np.array([int(example.supervised[1:].sum()) for example in examples])
        self._widths = _widths(self._lengths, MAX_SHAPES)
        self._capacity = lru_cache(maxsize=None)(self._most_supervised)
        self.epoch = lru_cache(maxsize=2)(self._epoch)  # a step needs its epoch's order again and again

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def _epoch(self, number: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch, every row exactly once; only one batch may hold fewer than the others."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.examples))
        batches = []
        for window in np.split(order, range(WINDOW * self.batch_size, len(order), WINDOW * self.batch_size)):
            by_length = window[np.argsort(self._lengths[window], kind="stable")]
            batches += np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        return [batches[index] for index in random.permutation(len(batches))]

    def in_order(self) -> Iterator[Batch]:
        """Every row once, by length, the same each time: for evaluation."""
        by_length = np.argsort(self._lengths, kind="stable")
        for rows in np.split(by_length, range(self.batch_size, len(by_length), self.batch_size)):
            yield self.collate(rows)

    def collate(self, rows: np.ndarray) -> Batch:
        """The rows padded on the right to one of at most 16 lengths, and to the full number of rows."""
        width = int(self._widths[np.searchsorted(self._widths, self._lengths[rows].max())])
        inputs = np.zeros((self.batch_size, width), np.int32)
        targets = np.zeros((self.batch_size, width), np.int32)
        mask = np.zeros((self.batch_size, width), np.float32)
        for place, row in enumerate(rows):
            example, length = self.examples[row], self._lengths[row]
            inputs[place, :length] = example.tokens[:-1]
            targets[place, :length] = example.tokens[1:]
            mask[place, :length] = example.supervised[1:]
        first_supervised = np.argsort(mask.reshape(-1) == 0, kind="stable").astype(np.int32)
        return Batch(
            inputs,
            targets,
            mask,
            rows=tuple(map(int, rows)),
            tokens=int(self._lengths[rows].sum()) + len(rows),
            positions=first_supervised[: self._capacity(width)],
        )

    def _most_supervised(self, width: int) -> int:
        """The most supervised targets that a batch of this width can hold: one number, so one trace, per width."""
        counts = np.sort(self._supervised[self._lengths <= width])[-self.batch_size :]
        return int(counts.sum())

    def steps_per_epoch(self, accumulate: int) -> int:
        """Optimizer updates in an epoch; the last one holds the micro-batches that are left."""
        return -(-len(self) // accumulate)

    def steps(self, accumulate: int, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps `first` to `last` - 1, counted from 0 over the whole run, collated one step
        ahead in a thread."""

        def collate(step: int) -> list[Batch]:
            epoch, position = divmod(step, self.steps_per_epoch(accumulate))
            chosen = self.epoch(epoch)[position * accumulate : (position + 1) * accumulate]
            return [self.collate(rows) for rows in chosen]

        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(collate, first) if first < last else None
            for step in range(first, last):
                assert coming is not None
                now, coming = coming, ahead.submit(collate, step + 1) if step + 1 < last else None
                yield now.result()


def _widths(lengths: np.ndarray, most: int) -> np.ndarray:
    """At most `most` widths, multiples of 8 (16, 32, ... for very long rows), that pad rows of these lengths the least.

    Dynamic programming over the distinct lengths: `least[j]` is the least padded size of the rows up to length j.
    """
    unit = 8
    while lengths.max() > 512 * unit:
        unit *= 2
    widths, counts = np.unique(-(-lengths // unit) * unit, return_counts=True)
    if len(widths) <= most:
        return widths
    rows = np.cumsum(counts)
    # grown[i, j]: rows above length i, up to length j, all padded to j
    grown = np.where(np.tri(len(widths), dtype=bool), np.inf, (rows[None, :] - rows[:, None]) * widths[None, :])
    least, cuts = rows * widths.astype(float), []
    for _ in range(most - 1):
        sizes = least[:, None] + grown
        cuts.append(np.where(sizes.min(axis=0) < least, sizes.argmin(axis=0), -1))
        least = np.minimum(least, sizes.min(axis=0))
    last, chosen = len(widths) - 1, []
    for cut in reversed(cuts):
        if last >= 0 and cut[last] >= 0:
            chosen.append(last)
            last = cut[last]
    return widths[sorted([*chosen, last])]
