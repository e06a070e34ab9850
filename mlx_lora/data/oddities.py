"""What is seldom meant in a row's text, as bits: characters that tell of damage, and control tokens written out."""

import re
from collections.abc import Iterator
from typing import Any

# What bytes that continue a character of UTF-8 are in Windows-1252, but those that end words there.
CONTINUED = (
    "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2018\u201a\u201c\u201e\u2020-\u2022"
)
CONTINUED += "\u2030\u2039\u203a\u20ac\u2122"
MISREAD = f"\u00c3[{CONTINUED}]|\u00e2\u20ac|\u00c2[\u00a0-\u00bf]|\u00f0\u0178|"
MISREAD += f"(?:[\u00d0\u00d1][{CONTINUED}]){{2}}"
CHARACTERS = {
    "replacement characters, of text that was decoded wrongly": "\ufffd",
    "UTF-8 that was read as another encoding": MISREAD,
    "control characters": "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",
    "invisible characters": "[\u00ad\u200b\u2060\ufeff]",
    "characters that turn the direction of writing": "[\u202a-\u202e\u2066-\u2069]",
    "private-use characters": "[\ue000-\uf8ff]",
}
PATTERNS = [re.compile(pattern) for pattern in CHARACTERS.values()]
SOME = re.compile("|".join(CHARACTERS.values()))
CONTROL_TOKEN = 1 << len(PATTERNS)
DOUBLE_START = CONTROL_TOKEN << 1


class Oddities:
    """Finds what is odd about a row, under one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        known = tokenizer.added_tokens_decoder.items()
        self.special = {token: added.content for token, added in known if added.special}
        self._start = tokenizer.bos_token_id
        self._openings = {content[:2] for content in self.special.values()}  # far quicker to look for
        longest_first = sorted(self.special.values(), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find(self, content: Any, form: str, tokens: list[int]) -> int:
        """The bits of a row (`content`, as it was read) and of what it became. Text that is learned whole may hold
        control tokens: it may have been written by a template."""
        text = "\n".join(_texts(content))
        found = 0
        if SOME.search(text):
            found = sum(1 << bit for bit, pattern in enumerate(PATTERNS) if pattern.search(text))
        if form != "text" and any(opening in text for opening in self._openings) and self.control.search(text):
            found |= CONTROL_TOKEN
        if self._start is not None and tokens[:2] == [self._start, self._start]:
            found |= DOUBLE_START
        return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
