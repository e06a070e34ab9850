"""What a person wants to see of rows: counts, lengths, and a few of them token by token."""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_lora.data.dataset import Dataset

# What a terminal would obey, or turns the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
FIRST, LAST = 140, 40  # tokens of a row that are shown


@dataclass(frozen=True)
class Summary:
    """One side, train or valid, in words by what they count."""

    name: str
    counts: dict[str, str]


@dataclass(frozen=True)
class Lengths:
    """A histogram of the examples' lengths, each bar twice as wide as the one before."""

    words: str
    bars: list[tuple[str, int]]


@dataclass(frozen=True)
class Shown:
    """A row's first and last tokens as text, each with whether it is learned, and how many are ``between`` them."""

    place: str
    first: list[tuple[str, bool]]
    between: int
    last: list[tuple[str, bool]]


class _Batches(Protocol):
    batch_size: int
    accumulate: int

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def padding_efficiency(self) -> float: ...


def summary(name: str, dataset: Dataset) -> Summary:
    tokens = dataset.tokens
    counts = {
        "rows read": dataset.read,
        "used": dataset.used,
        "truncated": len(dataset.truncated),
        "left out": len(dataset.skipped),
        "faulty": len(dataset.faulty),
    }
    if len(dataset.order) != dataset.used:
        counts["an epoch"] = len(dataset.order)
    words = {key: f"{number:,}" for key, number in counts.items()}
    words["tokens"] = f"{tokens:,}"
    words["learned"] = f"{100 * dataset.supervised / tokens:.1f} %" if tokens else "-"
    return Summary(name, words | {"form": ", ".join(dataset.forms)})


def lengths(dataset: Dataset) -> Lengths:
    sizes = dataset.examples.field("size")
    middle, most = np.quantile(sizes, [0.5, 0.95])
    words = f"lengths of train: {sizes.min():,} to {sizes.max():,} tokens, "
    words += f"half below {middle:,.0f}, 95 % below {most:,.0f}"
    powers = range(int(np.log2(sizes.min())), int(np.log2(sizes.max())) + 1)
    counts = [int(((sizes >= 2**power) & (sizes < 2 ** (power + 1))).sum()) for power in powers]
    names = [f"{2**power:,} to {2 ** (power + 1) - 1:,}" for power in powers]
    return Lengths(words, list(zip(names, counts, strict=True)))


def padding(batches: _Batches) -> str:
    """What the planned batching wastes."""
    return (
        f"padding: {100 * (1 - batches.padding_efficiency):.1f} % of the tokens computed (rows a step: "
        f"{batches.batch_size * batches.accumulate}, steps an epoch: {batches.steps_per_epoch:,})"
    )


def shown(dataset: Dataset, tokenizer: Any, number: int) -> list[Shown]:
    """Rows from the shortest to the longest."""
    examples = dataset.examples
    if not len(examples):
        return []
    by_length = np.argsort(examples.field("size"), kind="stable")
    chosen = dict.fromkeys(int(by_length[int(index)]) for index in np.linspace(0, len(by_length) - 1, number))
    found = []
    for example in map(examples.__getitem__, chosen):
        words = [_word(token, tokenizer) for token in example.tokens.tolist()]
        tokens = list(zip(words, example.supervised.tolist(), strict=True))
        between = max(0, len(tokens) - FIRST - LAST)
        found.append(Shown(example.place, tokens[:FIRST], between, tokens[FIRST + between :]))
    return found


def _word(token: int, tokenizer: Any) -> str:
    word = str(tokenizer.decode([token]))
    if "\ufffd" in word or not word:  # a part of a character
        return f"<{token}>"
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), word)
