"""Tokenized rows, end to end in three arrays, which lie in memory or in files that are mapped."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

TOKENS, SUPERVISED, RECORDS = "tokens.bin", "supervised.bin", "records.bin"
ARRAYS = {TOKENS: np.dtype(np.int32), SUPERVISED: np.dtype(np.bool_)}
# What became of a row; a piece is what follows the first part of a row that was split.
USED, TRUNCATED, PIECE, TOO_LONG, NOTHING_LEFT, NOTHING = range(6)
MAX_NOTES = 1000
# Of each row, used or not, and of each piece.
ARRAYS[RECORDS] = RECORD = np.dtype(
    [
        ("kind", np.uint8),
        ("ends", np.bool_),  # as in Example
        ("form", np.uint8),  # which of formats.KEYS
        ("odd", np.uint16),  # bits of oddities
        ("note", np.uint16),  # which of the notes
        ("source", np.uint16),  # which of data.train
        ("prefix", np.uint32),  # which of the prefixes: the place but for the number at its end
        ("number", np.int64),  # of the line or row; -1: none
        ("start", np.int64),  # of its tokens among all
        ("size", np.int32),  # of these
        ("whole", np.int32),  # tokens of the row before it was cut
        ("targets", np.int32),  # supervised tokens, the first not counted
        ("ending", np.int32),  # how its answers end: FINE, OPEN, or the special token
        ("content", np.uint64, 2),  # digest of the row as it was read
        ("tokens", np.uint64),  # digests of its tokens, and of those before the first supervised one (0: none)
        ("prompt", np.uint64),
    ]
)
FINE, OPEN = -1, -2


@dataclass(frozen=True)
class Example:
    """A tokenized row: ``tokens`` (T,) int32; ``supervised`` (T,) bool, True where a token is a target of the loss.

    ``ends`` is False where tokens of the row are cut off at the end, or follow in another piece.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    place: str
    ends: bool = True


class Store:
    """Where tokenized rows are added one by one: files in `folder`, or memory where that is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self.prefixes: dict[str, int] = {}
        self.notes: dict[str, int] = {"": 0}
        self._folder = folder
        self._tokens = 0
        self._streams: dict[str, IO[bytes]] = {
            name: (folder / name).open("wb") if folder else io.BytesIO() for name in ARRAYS
        }

    def add(self, kind: int, example: Example, note: str = "", **fields: Any) -> None:
        """Adds a row or a piece of one; of one without a supervised token, or that is not used, the record alone."""
        record = np.zeros((), RECORD)
        prefix, number = _split(example.place)
        record["prefix"], record["number"] = self.prefixes.setdefault(prefix, len(self.prefixes)), number
        record["kind"], record["ends"], record["start"] = kind, example.ends, self._tokens
        record["note"] = self.notes.setdefault(note, len(self.notes) if len(self.notes) < MAX_NOTES else 0)
        for name, value in fields.items():
            record[name] = value
        if kind <= PIECE:
            tokens, supervised = example.tokens.tobytes(), example.supervised
            record["size"], record["targets"] = supervised.size, supervised[1:].sum()
            record["tokens"], record["prompt"] = _digest(tokens), _digest(tokens[: 4 * int(supervised.argmax())])
            self._streams[TOKENS].write(tokens)
            self._streams[SUPERVISED].write(supervised.tobytes())
            self._tokens += supervised.size
        self._streams[RECORDS].write(record.tobytes())

    def close(self) -> dict[str, np.ndarray]:
        """What was added, by the names in ARRAYS."""
        if self._folder is None:
            return {name: np.frombuffer(stream.getbuffer(), ARRAYS[name]) for name, stream in self._streams.items()}  # type: ignore[attr-defined]
        for stream in self._streams.values():
            stream.close()
        return opened(self._folder)


def opened(folder: Path) -> dict[str, np.ndarray]:
    """The arrays in a folder, of which only what is used comes into memory."""
    return {
        name: np.memmap(folder / name, dtype, "r") if (folder / name).stat().st_size else np.empty(0, dtype)
        for name, dtype in ARRAYS.items()
    }


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") if content else 0


def _split(place: str) -> tuple[str, int]:
    """A place (file:line, file:row 7) and the number at its end, -1 for none."""
    found = re.fullmatch(r"(.*?)([1-9][0-9]{0,17})?", place, re.DOTALL)
    assert found is not None
    return found[1], int(found[2] or -1)


class Examples(Sequence[Example]):
    """Rows that are used, in an order which may repeat them or leave some out; each is read when it is asked for."""

    def __init__(self, arrays: dict[str, np.ndarray], prefixes: list[str], order: np.ndarray) -> None:
        self._arrays = arrays
        self._prefixes = prefixes
        self.order = order  # indices of records

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        record = self._arrays[RECORDS][self.order[index]]
        part = slice(int(record["start"]), int(record["start"]) + int(record["size"]))
        tokens, supervised = (np.asarray(self._arrays[name][part]) for name in (TOKENS, SUPERVISED))
        return Example(tokens, supervised, place(record, self._prefixes), bool(record["ends"]))

    def field(self, name: str) -> np.ndarray:
        """A field of the record of each."""
        return self._arrays[RECORDS][name][self.order]


def place(record: Any, prefixes: list[str]) -> str:
    """Where the row of a record stands."""
    return prefixes[record["prefix"]] + (str(record["number"]) if record["number"] >= 0 else "")


def sizes(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """The inputs (tokens but the last) and the supervised targets of each, (N,) int64."""
    if isinstance(examples, Examples):
        return examples.field("size").astype(np.int64) - 1, examples.field("targets").astype(np.int64)
    inputs = np.array([example.tokens.size - 1 for example in examples])
    return inputs, np.array([int(example.supervised[1:].sum()) for example in examples])
