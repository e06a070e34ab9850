"""What a row holds: its form, seen by its keys, and its content as messages, as prompt and completion, or as text."""

import json
import re
from typing import Any

from mlx_lora import chat
from mlx_lora.config import Data
from mlx_lora.errors import InputError

KEYS = {  # the keys that every row of a form has
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
ROLES = {  # as sharegpt calls them
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Thoughts before an answer; the first one may have begun in the prompt.
THOUGHTS = re.compile(r"(\s*<think>(?:(?!</think>).)*</think>\s*)+|(?:(?!<think>).)*?</think>\s*", re.DOTALL)


def renamed(row: dict[str, Any], config: Data) -> dict[str, Any]:
    """The row with the names of `data.columns`. Raises InputError for a column that it has not."""
    for ours, theirs in config.columns.items():
        if theirs not in row:
            raise InputError(f"has no {theirs!r}, which data.columns names for {ours}; it holds {_listed(row)}")
    taken = {*config.columns, *config.columns.values()}
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {ours: row[theirs] for ours, theirs in config.columns.items()}


def form(row: dict[str, Any], config: Data) -> str:
    """messages, completion, text, alpaca or sharegpt. Raises InputError for a row that is none of these, or several."""
    if config.format != "auto":
        return config.format
    forms = [name for name, keys in KEYS.items() if row.keys() >= set(keys)]
    if len(forms) == 1:
        return forms[0]
    known = ", or ".join(" and ".join(keys) for keys in KEYS.values())
    cure = f"data.format chooses one of {', '.join(forms)}" if forms else "data.columns gives columns these names"
    raise InputError(f"holds {_listed(row)}; a row holds {known} ({cure})")


def content(row: dict[str, Any], form: str, config: Data) -> dict[str, Any]:
    """The row as ``messages`` (and ``tools``), as ``prompt`` and ``completion`` (and ``system``, ``tools``), or as
    ``text``.

    Raises InputError for values of the wrong kind.
    """
    if form == "text":
        return {"text": _string(row, "text")}
    if form == "alpaca":
        if row.get("history"):
            raise InputError("has a history, which is not read; write the conversation as messages")
        prompt, more = _string(row, "instruction"), _string(row, "input") if row.get("input") is not None else ""
        prompt = f"{prompt}\n\n{more}" if more else prompt
        found: dict[str, Any] = {"prompt": prompt, "completion": _string(row, "output")}
    elif form == "completion":
        found = {"prompt": _string(row, "prompt"), "completion": _string(row, "completion")}
    else:
        messages = _json(row.get(KEYS[form][0]))
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{KEYS[form][0]} is not a list of messages")
        if form == "sharegpt":
            messages = [_sharegpt(number, message) for number, message in enumerate(messages, 1)]
        if opening := _system(row):
            if isinstance(messages[0], dict) and messages[0].get("role") == "system":
                raise InputError("has a system and a system message; keep one of them")
            messages = [{"role": "system", "content": opening}, *messages]
        if config.reasoning == "drop":
            messages = [_without_thought(message) for message in messages]
        return {"messages": messages, "tools": _json(row.get("tools"))}
    if config.reasoning == "drop":
        found["completion"] = _without_thought({"role": "assistant", "content": found["completion"]})["content"]
    return found | {"system": _system(row), "tools": _json(row.get("tools"))}


def _sharegpt(number: int, message: Any) -> dict[str, Any]:
    """A message of the keys from and value, in ours."""
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        cure = "; data.columns: {messages: conversations} reads role and content" if _has_role(message) else ""
        raise InputError(f"message {number} does not say whom it is from{cure}")
    if message["from"] not in ROLES:
        raise InputError(f"message {number} is from {message['from']!r}; known are {', '.join(ROLES)}")
    flags = {key: message[key] for key in ("train", "weight") if key in message}
    if message["from"] != "function_call":
        return {"role": ROLES[message["from"]], "content": message.get("value")} | flags
    call = _json(message.get("value"))
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise InputError(f"message {number} (function_call) is not a JSON object with a name and arguments")
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} | flags


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message


def _system(row: dict[str, Any]) -> str:
    """The system prompt beside the rest of a row, "" for none."""
    return _string(row, "system") if row.get("system") is not None else ""


def _without_thought(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in chat.REASONING}
    if isinstance(content := kept.get("content"), str):
        thoughts = THOUGHTS.match(content)
        kept["content"] = content[thoughts.end() :] if thoughts else content
        if kept["content"].lstrip().startswith("<think>"):
            raise InputError("an answer's <think> has no end, so data.reasoning: drop cannot take it out")
    return kept


def _json(value: Any) -> Any:
    """What tables hold as JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key} is missing" if key not in row else f"{key} is not a string")
    return value


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "nothing"
