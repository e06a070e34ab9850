"""Rows of a file → tokens, each with a mark that says whether it is learned.

A row is one JSON object: ``messages`` (and ``tools``), ``prompt`` and ``completion``, or ``text``. What cannot be used
is counted and listed by file and line; nothing is dropped in silence.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora import chat, files
from mlx_lora.config import Data
from mlx_lora.errors import InputError

MAX_LISTED = 20
MAX_CHARACTERS = 2_000_000  # in a row, as JSON: some 500,000 tokens, and seconds to tokenize


@dataclass(frozen=True)
class Row:
    """One JSON object of a file and where it stands."""

    content: dict[str, Any]
    place: str  # file:line


@dataclass(frozen=True)
class Example:
    """A tokenized row: ``tokens`` (T,) int32; ``supervised`` (T,) bool, True where a token is a target of the loss."""

    tokens: np.ndarray
    supervised: np.ndarray
    place: str


@dataclass
class Dataset:
    """The usable rows of a source, and an account of all: read = used + skipped."""

    examples: list[Example]
    digest: str  # sha256 of the rows, in order
    read: int = 0
    truncated: list[str] = field(default_factory=list)  # "file:line: reason"
    skipped: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(example.tokens.size for example in self.examples)

    @property
    def supervised(self) -> int:
        """Targets of the loss: the first token of a row has nothing before it and is never one."""
        return sum(int(example.supervised[1:].sum()) for example in self.examples)

    def summary(self) -> dict[str, Any]:
        """The account as figures, and how many rows have how many tokens: `rows` between each two of `edges`."""
        rows, edges = np.histogram([example.tokens.size for example in self.examples], min(20, len(self.examples)))
        return {
            "read": self.read,
            "used": len(self.examples),
            "truncated": len(self.truncated),
            "skipped": len(self.skipped),
            "listed": [*self.truncated[:MAX_LISTED], *self.skipped[:MAX_LISTED]],
            "tokens": self.tokens,
            "supervised": self.supervised,
            "lengths": {"edges": edges.tolist(), "rows": rows.tolist()},
        }

    def account(self, name: str) -> list[str]:
        """Lines for a person: what was read, used, truncated and skipped, and where."""
        lines = [
            f"{name}: {self.read} rows read, {len(self.examples)} used, {len(self.truncated)} truncated, "
            f"{len(self.skipped)} skipped; {self.tokens} tokens, {self.supervised} supervised"
        ]
        for listed in (self.truncated, self.skipped):
            lines += [f"  {line}" for line in listed[:MAX_LISTED]]
            if len(listed) > MAX_LISTED:
                lines.append(f"  ... and {len(listed) - MAX_LISTED} more")
        return lines


def load(config: Data) -> tuple[list[Row], list[Row]]:
    """The rows for training and for validation (possibly none). Raises InputError listing file and line."""
    train = read(config.train)
    if isinstance(config.valid, str):
        return train, read(config.valid)
    return split(train, config.valid)


def read(path: str | Path) -> list[Row]:
    """The rows of a JSONL file (one object a line) or a JSON file (a list of objects).

    Raises InputError that lists up to 20 faulty lines by number.
    """
    path = Path(path)
    try:
        text = files.finite(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"{path}: is not UTF-8 (byte {error.start}); convert it to UTF-8") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}); name a file of rows") from None
    rows, faults = [], []
    for line, entry in _entries(path, text):
        if isinstance(entry, dict):
            rows.append(Row(entry, f"{path}:{line}"))
        else:
            faults.append(f"{path}:{line}: {entry if isinstance(entry, str) else 'is not a JSON object'}")
    _raise(faults)
    if not rows:
        raise InputError(f"{path}: holds no rows; write one JSON object a line")
    return rows


def _entries(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    """(line, or the row's number in a list; parsed value) of each entry.

    A value that is a string says what is wrong with the line.
    """
    if path.suffix == ".json":
        try:
            entries = _parse(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: is not valid JSON ({error})") from None
        if not isinstance(entries, list):
            raise InputError(
                f"{path}: is not a list of rows; a .json file holds one list, a .jsonl file one row a line"
            )
        for number, entry in enumerate(entries, 1):
            yield f"row {number}", entry if not isinstance(entry, str) else [entry]
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
        except (ValueError, RecursionError) as error:
            entry = f"is not valid JSON ({error}); each line is one JSON object"
        else:
            entry = [entry] if isinstance(entry, str) else entry
        yield str(number), entry


def _parse(text: str) -> Any:
    """Strict JSON: NaN, Infinity and repeated keys are errors."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
        return found

    return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_repetition)


def split(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Holds out the rows whose hash falls below `fraction`: equal rows stay together, and new rows move no other.

    A positive fraction that catches no row holds out the row with the smallest hash.
    """
    if fraction == 0:
        return rows, []
    hashes = [int(digest([row])[:16], 16) / 16**16 for row in rows]
    limit = max(fraction, np.nextafter(min(hashes), 1.0))
    train = [row for row, value in zip(rows, hashes, strict=True) if value >= limit]
    valid = [row for row, value in zip(rows, hashes, strict=True) if value < limit]
    if not train:
        raise InputError(f"{rows[0].place}: data.valid: {fraction:g} leaves no row to train on; give more rows")
    return train, valid


def digest(rows: Iterable[Row]) -> str:
    """sha256 over the content of the rows, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row.content, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def tokenize(rows: list[Row], tokenizer: Any, config: Data) -> Dataset:
    """Tokenizes every row (`tokenizer`: as mlx-lm loads it).

    Rows that are too long are truncated, dropped or refused (`on_overflow`); rows without a supervised token are left
    out. Raises InputError that lists up to 20 rows of the wrong form by file and line.
    """
    dataset = Dataset([], digest(rows), read=len(rows))
    faults = []
    for row in rows:
        try:
            tokens, supervised = _tokenize(row.content, tokenizer, config)
        except InputError as error:
            faults.append(f"{row.place}: {error}")
            continue
        if len(tokens) > config.max_seq_length:
            reason = f"{row.place}: {len(tokens)} tokens, more than data.max_seq_length ({config.max_seq_length})"
            if config.on_overflow == "error":
                faults.append(f"{reason}; raise it, or set data.on_overflow to truncate or drop")
                continue
            if config.on_overflow == "drop":
                dataset.skipped.append(f"{reason}, dropped")
                continue
            tokens, supervised = tokens[: config.max_seq_length], supervised[: config.max_seq_length]
            if any(supervised[1:]):
                dataset.truncated.append(reason)
            else:
                dataset.skipped.append(f"{reason}, and no supervised tokens are left")
                continue
        if not any(supervised[1:]):
            dataset.skipped.append(f"{row.place}: no supervised tokens{_roles(row.content)}")
            continue
        dataset.examples.append(Example(np.array(tokens, np.int32), np.array(supervised, np.bool_), row.place))
    _raise(faults)
    if rows and not dataset.examples:
        raise InputError("\n       ".join(["no row can be used:", *dataset.skipped[:MAX_LISTED]]))
    return dataset


def _roles(row: dict[str, Any]) -> str:
    """The roles of a conversation that has no assistant turn, in which a misspelt one shows."""
    roles = [str(message.get("role")) for message in row.get("messages") or []]
    return f" (roles: {', '.join(dict.fromkeys(roles))})" if roles and "assistant" not in roles else ""


def _raise(faults: list[str]) -> None:
    if faults:
        more = [f"... and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
        raise InputError("\n       ".join(faults[:MAX_LISTED] + more))


def _tokenize(row: dict[str, Any], tokenizer: Any, config: Data) -> tuple[list[int], list[bool]]:
    form = _form(row, config)
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("holds text that is not valid Unicode (a lone surrogate)") from None
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"holds {len(text):,} characters, more than {MAX_CHARACTERS:,}; split it into several rows")
    if form == "text":
        if config.loss_on in ("last", "completion"):
            raise InputError(f"a text row has no answer for data.loss_on: {config.loss_on}; use assistant or all")
        tokens = list(tokenizer.encode(_string(row, "text")))
        if tokens and tokenizer.eos_token_id is not None and tokens[-1] != tokenizer.eos_token_id:
            tokens = [*tokens, tokenizer.eos_token_id]
        return tokens, [True] * len(tokens)
    if form == "completion":
        if config.loss_on == "last":
            raise InputError("data.loss_on: last needs messages rows; use completion")
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if not completion:
            return [], []
        if tokenizer.chat_template is None:
            return _plain_completion(prompt, completion, tokenizer, config)
        row = {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
            "tools": row.get("tools"),
        }
    elif config.loss_on == "completion":
        raise InputError("data.loss_on: completion needs rows with prompt and completion; use assistant or last")
    return chat.tokenize(row, tokenizer, config.loss_on)


def last_answer(row: dict[str, Any], config: Data) -> tuple[list[dict[str, Any]], str] | None:
    """The messages before a row's last answer, and that answer; None for a row that does not end with one."""
    form = _form(row, config)
    if form == "text":
        return None
    if form == "completion":
        return [{"role": "user", "content": row["prompt"]}], row["completion"]
    *before, last = row["messages"]
    if last["role"] != "assistant" or not last.get("content") or not before:
        return None
    return before, last["content"]


def _form(row: dict[str, Any], config: Data) -> str:
    if config.format != "auto":
        return config.format
    forms = [
        name
        for name, keys in (("messages", {"messages"}), ("completion", {"prompt", "completion"}), ("text", {"text"}))
        if keys <= row.keys()
    ]
    if len(forms) != 1:
        found = ", ".join(map(repr, row)) or "nothing"
        raise InputError(
            f"holds {found}; a row holds messages, or prompt and completion, or text"
            + (" (data.format chooses one)" if forms else "")
        )
    return forms[0]


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key} is missing" if key not in row else f"{key} is not a string")
    return value


def _plain_completion(prompt: str, completion: str, tokenizer: Any, config: Data) -> tuple[list[int], list[bool]]:
    """Without a chat template: the prompt, the completion and the end-of-text token, one after the other."""
    before = list(tokenizer.encode(prompt))
    after = list(tokenizer.encode(completion, add_special_tokens=False))
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return before + after, [config.loss_on == "all"] * len(before) + [True] * len(after)
