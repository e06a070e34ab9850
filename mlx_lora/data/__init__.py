"""Rows → tokens, each with a mark that says whether it is learned.

`sources` reads rows, `formats` says what they hold, `examples` keeps what they become, in memory or in a cache on the
disk, and `dataset` accounts for it. What cannot be used is counted and listed by file and line; nothing is dropped in
silence.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from mlx_lora import chat
from mlx_lora.config import Data
from mlx_lora.data import cache, formats
from mlx_lora.data.dataset import FORMS, Dataset, Tokenized, too_long
from mlx_lora.data.examples import (
    FINE,
    NOTHING,
    NOTHING_LEFT,
    OPEN,
    PIECE,
    RECORDS,
    TOO_LONG,
    TRUNCATED,
    USED,
    Example,
    Store,
    place,
    sizes,
)
from mlx_lora.data.oddities import Oddities
from mlx_lora.data.sources import MAX_LISTED, Row, digest, entries, raise_all, read
from mlx_lora.errors import InputError

MAX_CHARACTERS = 2_000_000  # in a row, as JSON: some 500,000 tokens, and seconds to tokenize
KEPT = 1000  # messages on faulty rows that are kept, of any number
PAUSE = 10.0  # seconds between two words on how far it is

__all__ = [
    "Dataset",
    "Example",
    "Row",
    "Tokenized",
    "check",
    "digest",
    "entries",
    "examine",
    "held_out",
    "last_answer",
    "load",
    "read",
    "sizes",
    "split",
    "tokenize",
    "used_rows",
]


def check(config: Data, paths: list[str]) -> None:
    """Raises InputError where a source cannot be read, or something is wrong with its first rows: what can be known
    without the tokenizer, in no time."""
    for path in dict.fromkeys(paths):
        faults = []
        for entry in islice(entries(path, config.max_seq_length), KEPT):
            try:
                if isinstance(entry, str):
                    raise InputError(entry)
                formats.form(formats.renamed(entry.content, config), config)
            except InputError as error:
                faults.append(str(error) if isinstance(entry, str) else f"{entry.place}: {error}")
        raise_all(faults)


def load(
    config: Data, tokenizer: Any, say: Callable[[str], None] = lambda text: None
) -> tuple[Dataset, Dataset | None]:
    """The rows for training, each as often as its source's weight says, and for validation (None: none).

    Large sources are tokenized once, into files that are mapped (see cache.py), and `say` is told how far it is.
    Rows that are too long are truncated, cut into pieces, dropped or refused (`on_overflow`); rows without a supervised
    token are left out. Raises InputError that lists up to 20 rows of the wrong form by file and line.
    """
    train, valid = examine(config, tokenizer, say)
    return _sound(train), None if valid is None else _sound(valid)


def examine(
    config: Data, tokenizer: Any, say: Callable[[str], None] = lambda text: None
) -> tuple[Dataset, Dataset | None]:
    """What `load` gives, with the rows of the wrong form listed as ``faulty`` where it would raise."""
    rows = _tokenized(config.train_paths, tokenizer, config, say)
    records = rows.arrays[RECORDS]
    if isinstance(config.valid, str):
        held_out = np.zeros(len(records), bool)
    else:
        held_out = split(records["content"][:, 0], config.valid)
        if len(records) and held_out.all():
            raise InputError(
                f"{place(records[0], rows.prefixes)}: data.valid: {config.valid:g} leaves no row to train on; "
                "give more rows"
            )
    weights = np.array([source.weight for source in config.sources])
    train = _side(rows, ~held_out, config, weights)
    if len(train.side) and not len(train.order):
        used = np.isin(train.field("kind"), [USED, TRUNCATED])
        if used.any():
            raise InputError("data.train: the weights leave no row to train on; raise them")
    if isinstance(config.valid, str):
        return train, _all(_tokenized(config.valid_paths, tokenizer, config, say), config)
    return train, _side(replace(rows, faulty=[], faults=0), held_out, config) if held_out.any() else None


def held_out(config: Data, tokenizer: Any, say: Callable[[str], None] = lambda text: None) -> Dataset:
    """The validation rows that `load` gives; there have to be some."""
    if isinstance(config.valid, str):
        return _sound(_all(_tokenized(config.valid_paths, tokenizer, config, say), config))
    found = load(config, tokenizer, say)[1]
    assert found is not None
    return found


def used_rows(dataset: Dataset, paths: list[str], config: Data) -> Iterator[Row]:
    """The rows of a data set that are used, as they are in its sources."""
    places = {example.place for example in dataset.examples}
    for path in paths:
        for row in entries(path, config.max_seq_length):
            if isinstance(row, Row) and row.place in places:
                yield row


def tokenize(rows: Iterable[Row], tokenizer: Any, config: Data) -> Dataset:
    """These rows, all of them, in memory: what `load` does with those of files."""
    return _sound(_all(_fill(Store(), [rows], tokenizer, config), config))


def split(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which rows are held out: those whose digest (uint64) falls below `fraction`. Equal rows stay together, and new
    rows move no other. A positive fraction that catches no row holds out the row with the smallest digest."""
    parts = digests / 2.0**64
    if fraction == 0 or not len(parts):
        return np.zeros(len(parts), bool)
    return parts < max(fraction, np.nextafter(parts.min(), 1.0))


def _side(rows: Tokenized, chosen: np.ndarray, config: Data, weights: np.ndarray | None = None) -> Dataset:
    """The chosen records; a row is used as often as the whole number in its source's weight, and once more where its
    second digest falls below the rest."""
    records = rows.arrays[RECORDS]
    side = np.flatnonzero(chosen)
    order = side[records["kind"][side] <= PIECE]
    if weights is not None and (weights != 1).any():
        often, rest = np.divmod(weights[records["source"][order]], 1)
        order = np.repeat(order, often.astype(int) + (records["content"][order, 1] / 2.0**64 < rest))
    return Dataset(rows, side, order, config.max_seq_length)


def _all(rows: Tokenized, config: Data) -> Dataset:
    return _side(rows, np.ones(len(rows.arrays[RECORDS]), bool), config)


def _sound(dataset: Dataset) -> Dataset:
    """The data set itself. Raises InputError for one with faulty rows, or with none that can be used."""
    raise_all(dataset.faulty)
    if dataset.read and not len(dataset.order):
        raise InputError("\n       ".join(["no row can be used:", *dataset.skipped[:MAX_LISTED]]))
    return dataset


def _tokenized(paths: list[str], tokenizer: Any, config: Data, say: Callable[[str], None]) -> Tokenized:
    """The rows of these sources, out of the cache or tokenized now."""
    found: list[Tokenized] = []

    def fill(store: Store) -> cache.Kept:
        found.append(_fill(store, [entries(path, config.max_seq_length) for path in paths], tokenizer, config, say))
        return cache.Kept(found[0].prefixes, found[0].notes, found[0].faulty, found[0].faults)

    arrays, kept = cache.rows(paths, tokenizer, config, fill)
    return Tokenized(arrays, kept.prefixes, kept.notes, kept.faulty, kept.faults)


def _fill(
    store: Store,
    sources: Iterable[Iterable[Row | str]],
    tokenizer: Any,
    config: Data,
    say: Callable[[str], None] = lambda text: None,
) -> Tokenized:
    """Tokenizes rows into a store. An entry that is a text says what is wrong with its row."""
    faulty: list[str] = []
    faults = read = 0
    forms: dict[str, tuple[str, str]] = {}  # of each file: its form, and the first row's place
    odd = Oddities(tokenizer)
    begin = said = time.monotonic()
    for source, rows in enumerate(sources):
        for entry in rows:
            read += 1
            if time.monotonic() - said > PAUSE:
                said = time.monotonic()
                say(f"tokenizing: {read:,} rows in {said - begin:.0f} s")
            try:
                if isinstance(entry, str):
                    raise InputError(entry)
                _add(store, entry, source, forms, odd, tokenizer, config)
            except InputError as error:
                faults += 1
                if faults <= KEPT:
                    faulty.append(str(error) if isinstance(entry, str) else f"{entry.place}: {error}")
    return Tokenized(store.close(), list(store.prefixes), list(store.notes), faulty, faults)


def _add(
    store: Store,
    row: Row,
    source: int,
    forms: dict[str, tuple[str, str]],
    odd: Oddities,
    tokenizer: Any,
    config: Data,
) -> None:
    """Tokenizes a row into a store. Raises InputError that says what is wrong with it."""
    content = formats.renamed(row.content, config)
    form = formats.form(content, config)
    first, where = forms.setdefault(row.place.rpartition(":")[0], (form, row.place))
    if form != first:
        raise InputError(
            f"holds {' and '.join(formats.KEYS[form])}, but {where} {' and '.join(formats.KEYS[first])}; a "
            "file's rows are of one form: put these in a file of their own (data.train takes a list)"
        )
    found = _content(content, form, config)
    tokens, supervised = _tokenize(found, row.last, tokenizer, config)
    sha = digest([replace(row, content=found)])  # the same whatever else a row holds, such as its number
    fields = {
        "whole": len(tokens),
        "source": source,
        "form": FORMS.index(form),
        "odd": odd.find(row.content, form, tokens),
        "content": (int(sha[:16], 16), int(sha[16:32], 16)),
    }
    whole = Example(np.array(tokens, np.int32), np.array(supervised, np.bool_), row.place, row.last)
    for kind, example in _fitted(whole, form, row, config):
        ending = _ending(example, tokenizer, odd) if form != "text" and config.loss_on != "all" else FINE
        note = _roles(content, form) if kind == NOTHING else ""
        store.add(kind, example, note, ending=ending, **fields)


def _fitted(whole: Example, form: str, row: Row, config: Data) -> list[tuple[int, Example]]:
    """A row at most `max_seq_length` at a time, each part with what becomes of it."""
    longest, way = config.max_seq_length, "split" if row.document else config.on_overflow
    size = whole.tokens.size
    if size <= longest:
        found = [whole]
    elif way == "error":
        reason = too_long("", size, longest)
        raise InputError(f"{reason}; raise it, or set data.on_overflow to truncate or drop")
    elif way == "drop":
        return [(TOO_LONG, whole)]
    elif way == "truncate":
        cut = _part(whole, 0, longest)
        return [(TRUNCATED if cut.supervised[1:].any() else NOTHING_LEFT, cut)]
    elif form != "text":
        reason = too_long("", size, longest)
        raise InputError(f"{reason}; data.on_overflow: split is for rows of text: truncate or drop others")
    else:  # every token but the first is a target once
        found = [_part(whole, start, longest) for start in range(0, size - 1, longest - 1)]
    if not any(example.supervised[1:].any() for example in found):
        return [(NOTHING, whole)]
    return [(PIECE if number else USED, example) for number, example in enumerate(found)]


def _part(example: Example, start: int, size: int) -> Example:
    end = start + size
    ends = example.ends and end >= example.tokens.size
    return Example(example.tokens[start:end], example.supervised[start:end], example.place, ends)


def _ending(example: Example, tokenizer: Any, odd: Oddities) -> int:
    """How a row's answers end: each with a stop token (FINE), or one with another special token (which), or with none
    of both (OPEN). The last answer of a row that is cut off may end anyhow."""
    last = np.flatnonzero(example.supervised & ~np.append(example.supervised[1:], not example.ends))
    found = set(example.tokens[last].tolist()) - tokenizer.eos_token_ids
    if not found:
        return FINE
    special = [token for token in found if token in odd.special]
    return OPEN if len(special) < len(found) else special[0]


def _roles(row: dict[str, Any], form: str) -> str:
    """The roles of a conversation that has no assistant turn, in which a misspelt one shows."""
    messages = row["messages"] if form == "messages" and isinstance(row["messages"], list) else []
    roles = [str(message.get("role")) for message in messages]
    return f" (roles: {', '.join(dict.fromkeys(roles))})" if roles and "assistant" not in roles else ""


def _content(row: dict[str, Any], form: str, config: Data) -> dict[str, Any]:
    """What `formats.content` gives of a row that is not too large."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("holds text that is not valid Unicode (a lone surrogate)") from None
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"holds {len(text):,} characters, more than {MAX_CHARACTERS:,}; split it into several rows")
    return formats.content(row, form, config)


def _tokenize(found: dict[str, Any], last: bool, tokenizer: Any, config: Data) -> tuple[list[int], list[bool]]:
    """The tokens of a row's content, and which are supervised. `last`: nothing of its document follows."""
    if "text" in found:
        if config.loss_on in ("last", "completion"):
            raise InputError(f"a text row has no answer for data.loss_on: {config.loss_on}; use assistant or all")
        tokens = list(tokenizer.encode(found["text"]))
        end = tokenizer.eos_token_id
        if last and tokens and end is not None and tokens[-1] != end:
            tokens = [*tokens, end]
        return tokens, [True] * len(tokens)
    if "prompt" in found:
        if config.loss_on == "last":
            raise InputError("data.loss_on: last needs messages rows; use completion")
        if not found["completion"]:
            return [], []
        if tokenizer.chat_template is None:
            return _plain_completion(found, tokenizer, config)
        return chat.tokenize({"messages": _turns(found), "tools": found["tools"]}, tokenizer, config.loss_on)
    if config.loss_on == "completion":
        raise InputError("data.loss_on: completion needs rows with prompt and completion; use assistant or last")
    return chat.tokenize(found, tokenizer, config.loss_on)


def _turns(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt and completion as a conversation."""
    opening = [{"role": "system", "content": found["system"]}] if found["system"] else []
    asked = {"role": "user", "content": found["prompt"]}
    return [*opening, asked, {"role": "assistant", "content": found["completion"]}]


def last_answer(row: dict[str, Any], config: Data) -> tuple[list[dict[str, Any]], Any, str] | None:
    """The messages before a row's last answer, the tools, and that answer, all as they are trained on; None for a row
    that does not end with one."""
    row = formats.renamed(row, config)
    found = formats.content(row, formats.form(row, config), config)
    if "text" in found:
        return None
    *before, last = chat.checked(found if "messages" in found else {"messages": _turns(found)})[0]
    if last["role"] != "assistant" or not last.get("content") or not before:
        return None
    return before, found["tools"], last["content"]


def _plain_completion(found: dict[str, Any], tokenizer: Any, config: Data) -> tuple[list[int], list[bool]]:
    """Without a chat template: the prompt, the completion and the end-of-text token, one after the other."""
    if found["system"]:
        raise InputError("system needs a chat template and the model has none; write it in the prompt")
    before = list(tokenizer.encode(found["prompt"]))
    after = list(tokenizer.encode(found["completion"], add_special_tokens=False))
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return before + after, [config.loss_on == "all"] * len(before) + [True] * len(after)
