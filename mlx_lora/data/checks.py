"""What is wrong with rows, before a run finds out: each check gives findings, with the places they were made at."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.dataset import Dataset, Listed
from mlx_lora.data.examples import FINE, OPEN, PIECE, RECORDS, Examples
from mlx_lora.data.oddities import CHARACTERS, CONTROL_TOKEN, DOUBLE_START, PATTERNS

MOST = 0.5  # rows that may be lost or cut before a run is not worth its time


@dataclass(frozen=True)
class Finding:
    """Something found in the rows. ``spoils``: a run on them would be spoilt."""

    text: str
    places: Sequence[str]  # "file:line" or "file:line: reason"
    spoils: bool = False


def check(name: str, dataset: Dataset, tokenizer: Any, config: Data) -> list[Finding]:
    """The findings in one set of rows (`name`: train or valid)."""
    return [
        *_lost(name, dataset, config),
        *_copies(name, dataset),
        *_double_starts(name, dataset, tokenizer),
        *_endings(name, dataset, tokenizer),
        *_odd_texts(name, dataset, tokenizer),
    ]


def overlap(train: Dataset, valid: Dataset) -> list[Finding]:
    """Validation rows that are trained on, which makes their loss worth nothing, and some that ask the same."""
    tokens, prompt = (valid.examples.field(name) for name in ("tokens", "prompt"))
    copied = np.isin(tokens, train.examples.field("tokens"))
    alike = ~copied & (prompt != 0) & np.isin(prompt, train.examples.field("prompt"))
    found = []
    if copied.any():
        places = _places(valid, np.flatnonzero(copied))
        found.append(Finding(f"also in train: {_count(len(places))} of valid; take them out of one side", places, True))
    if alike.any():
        places = _places(valid, np.flatnonzero(alike))
        found.append(Finding(f"the prompt of a row that is trained on: {_count(len(places))} of valid", places))
    return found


def _count(rows: int) -> str:
    return f"{rows:,} row{'s' if rows != 1 else ''}"


def _places(dataset: Dataset, examples: np.ndarray) -> Listed:
    """Where these examples stand."""
    return Listed(len(examples), lambda index: dataset.examples[int(examples[index])].place)


def _lost(name: str, dataset: Dataset, config: Data) -> Iterator[Finding]:
    if dataset.faulty:
        yield Finding(f"of the wrong form: {_count(len(dataset.faulty))} of {name}", dataset.faulty, True)
    if not len(dataset.order):
        yield Finding(f"nothing can be used of {name}", dataset.skipped, True)
        return
    if skipped := len(dataset.skipped):
        yield Finding(
            f"left out: {skipped:,} of {_count(dataset.read)} of {name}", dataset.skipped, skipped > MOST * dataset.read
        )
    if truncated := len(dataset.truncated):
        yield Finding(
            f"truncated: {truncated:,} of {_count(dataset.read)} of {name}, by {dataset.cut:,} tokens in all; the "
            f"longest has {dataset.longest:,} (data.max_seq_length: {config.max_seq_length:,})",
            dataset.truncated,
            truncated > MOST * dataset.read,
        )


def _copies(name: str, dataset: Dataset) -> Iterator[Finding]:
    """Rows of equal tokens; a row that its source's weight repeats is none."""
    order = np.unique(dataset.order)
    tokens = dataset.rows.arrays[RECORDS]["tokens"][order]
    _, first, which = np.unique(tokens, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[which] != np.arange(len(order)))
    examples = replace(dataset, order=order).examples

    def text(index: int) -> str:
        copy = int(copies[index])
        return f"{examples[copy].place}: the same as {examples[int(first[which[copy]])].place}"

    if len(copies):
        yield Finding(f"copies of other rows: {_count(len(copies))} of {name}", Listed(len(copies), text))


def _double_starts(name: str, dataset: Dataset, tokenizer: Any) -> Iterator[Finding]:
    double = np.flatnonzero(dataset.examples.field("odd") & DOUBLE_START)
    if len(double):
        start = tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id)
        yield Finding(
            f"two {start} at the beginning: {_count(len(double))} of {name}; take it out of text or template",
            _places(dataset, double),
            True,
        )


def _endings(name: str, dataset: Dataset, tokenizer: Any) -> Iterator[Finding]:
    """Answers that end otherwise than generation does."""
    endings = dataset.examples.field("ending")
    stops = ", ".join(tokenizer.convert_ids_to_tokens(token) for token in sorted(tokenizer.eos_token_ids))
    for token in set(np.unique(endings).tolist()) - {FINE}:
        found = np.flatnonzero(endings == token)
        if token == OPEN:
            yield Finding(
                f"answers without an end-of-turn token: {_count(len(found))} of {name}; the model would not learn to "
                f"stop (it stops at {stops})",
                _places(dataset, found),
                True,
            )
        else:
            yield Finding(
                f"answers that end with {tokenizer.convert_ids_to_tokens(token)}, at which generation does not "
                f"stop (it stops at {stops}): {_count(len(found))} of {name}",
                _places(dataset, found),
            )


def _odd_texts(name: str, dataset: Dataset, tokenizer: Any) -> Iterator[Finding]:
    odd = np.unique(dataset.order)
    odd = odd[dataset.rows.arrays[RECORDS]["kind"][odd] != PIECE]
    examples = replace(dataset, order=odd).examples
    bits = examples.field("odd")
    kinds: list[tuple[str, int, re.Pattern[str] | None]] = [
        (kind, 1 << bit, PATTERNS[bit]) for bit, kind in enumerate(CHARACTERS)
    ]
    control = "text that the tokenizer reads as a control token"
    kinds.append((control, CONTROL_TOKEN, None))
    for kind, bit, pattern in kinds:
        found = np.flatnonzero(bits & bit)
        if len(found):
            yield Finding(f"{kind}: {_count(len(found))} of {name}", _with_text(examples, found, tokenizer, pattern))


def _with_text(examples: Examples, found: np.ndarray, tokenizer: Any, pattern: re.Pattern[str] | None) -> Listed:
    """Where these rows stand, with the characters that are meant if they are still to be seen in the tokens."""

    def text(index: int) -> str:
        example = examples[int(found[index])]
        seen = pattern and pattern.search(tokenizer.decode(example.tokens.tolist()))
        return f"{example.place}: {seen[0]!a}" if seen else example.place

    return Listed(len(found), text)
