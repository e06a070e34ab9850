"""The rows of one side, training or validation, and an account of all that was read for it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from mlx_lora.data import formats
from mlx_lora.data.examples import (
    NOTHING,
    NOTHING_LEFT,
    PIECE,
    RECORDS,
    TOO_LONG,
    TRUNCATED,
    Examples,
    place,
)
from mlx_lora.data.sources import MAX_LISTED

FORMS = list(formats.KEYS)


class Listed(Sequence[str]):
    """As many texts as there are rows to list, each made when it is asked for."""

    def __init__(self, count: int, text: Callable[[int], str]) -> None:
        self._count = count
        self._text = text

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        return self._text(index)


@dataclass(frozen=True)
class Tokenized:
    """All rows of some sources: arrays, prefixes and notes of a Store, and what is wrong with the others."""

    arrays: dict[str, np.ndarray]
    prefixes: list[str]
    notes: list[str]
    faulty: list[str]  # the first KEPT of them
    faults: int
    sources: int = 1


@dataclass(frozen=True)
class Dataset:
    """The usable rows of one side, training or validation, and an account of all: read = used + skipped + faulty + what
    a weight below 1 leaves out."""

    rows: Tokenized
    side: np.ndarray  # the records of this side
    order: np.ndarray  # those of them that are used, each as often as its weight says
    max_seq_length: int

    @property
    def examples(self) -> Examples:
        return Examples(self.rows.arrays, self.rows.prefixes, self.order)

    def field(self, name: str) -> np.ndarray:
        """A field of the record of each row of this side, pieces and unused ones too."""
        return self.rows.arrays[RECORDS][name][self.side]

    @property
    def read(self) -> int:
        return int((self.field("kind") != PIECE).sum()) + self.rows.faults

    @property
    def used(self) -> int:
        """Rows; however many pieces they are in, and however often they are seen."""
        return len(np.unique(self.order[self.rows.arrays[RECORDS]["kind"][self.order] != PIECE]))

    @property
    def pieces(self) -> int:
        """Examples beyond the first of their row."""
        return int((self.field("kind") == PIECE).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row, before it was cut."""
        return int(self.field("whole").max(initial=0))

    @property
    def cut(self) -> int:
        """Tokens that truncation took."""
        lost = self.field("whole") - self.field("size")
        return int(lost[self.field("kind") == TRUNCATED].sum())

    @property
    def tokens(self) -> int:
        return int(self.examples.field("size").sum(dtype=np.int64))

    @property
    def supervised(self) -> int:
        """Targets of the loss: the first token of a row has nothing before it and is never one."""
        return int(self.examples.field("targets").sum(dtype=np.int64))

    @property
    def forms(self) -> Counter[str]:
        """How many rows there are of each form."""
        found = np.bincount(self.field("form")[self.field("kind") != PIECE], minlength=len(FORMS))
        return Counter({form: int(number) for form, number in zip(FORMS, found, strict=True) if number})

    @property
    def digest(self) -> str:
        """sha256 of the rows' digests, in order."""
        records = self.rows.arrays[RECORDS]
        kept = self.order[records["kind"][self.order] != PIECE]
        return hashlib.sha256(np.ascontiguousarray(records["content"][kept]).tobytes()).hexdigest()

    @property
    def truncated(self) -> Listed:
        """file:line: reason of each."""
        return self._listed([TRUNCATED])

    @property
    def skipped(self) -> Listed:
        return self._listed([TOO_LONG, NOTHING_LEFT, NOTHING])

    @property
    def faulty(self) -> Listed:
        return Listed(self.rows.faults, self.rows.faulty.__getitem__)

    def _listed(self, kinds: list[int]) -> Listed:
        found = self.side[np.isin(self.field("kind"), kinds)]

        def text(index: int) -> str:
            record = self.rows.arrays[RECORDS][found[index]]
            where, kind = place(record, self.rows.prefixes), record["kind"]
            if kind == NOTHING:
                return f"{where}: no supervised tokens{self.rows.notes[record['note']]}"
            ends = {TOO_LONG: ", dropped", NOTHING_LEFT: ", and no supervised tokens are left"}
            return too_long(where, record["whole"], self.max_seq_length) + ends.get(kind, "")

        return Listed(len(found), text)

    def summary(self) -> dict[str, Any]:
        """The account as figures, and how many rows have how many tokens: `rows` between each two of `edges`."""
        rows, edges = np.histogram(self.examples.field("size"), min(20, len(self.order)))
        return {
            "read": self.read,
            "used": self.used,
            "truncated": len(self.truncated),
            "skipped": len(self.skipped),
            "listed": [*self.truncated[:MAX_LISTED], *self.skipped[:MAX_LISTED]],
            "tokens": self.tokens,
            "supervised": self.supervised,
            "lengths": {"edges": edges.tolist(), "rows": rows.tolist()},
        }

    def account(self, name: str) -> list[str]:
        """Lines for a person: what was read, used, truncated and skipped, and where."""
        pieces = f" in {self.used + self.pieces} pieces" if self.pieces else ""
        missing = self.read - self.used - len(self.skipped) - self.rows.faults
        weighted = len(self.order) != self.used + self.pieces or missing
        weights = f", {missing} left out by weight, {len(self.order)} an epoch" if weighted else ""
        lines = [
            f"{name}: {self.read} rows read, {self.used} used{pieces}, {len(self.truncated)} truncated, "
            f"{len(self.skipped)} skipped{weights}; {self.tokens} tokens, {self.supervised} supervised"
        ]
        for listed in (self.truncated, self.skipped):
            lines += [f"  {line}" for line in listed[:MAX_LISTED]]
            if len(listed) > MAX_LISTED:
                lines.append(f"  ... and {len(listed) - MAX_LISTED} more")
        return lines


def too_long(where: str, size: int, longest: int) -> str:
    return f"{f'{where}: ' if where else ''}{size} tokens, more than data.max_seq_length ({longest})"
