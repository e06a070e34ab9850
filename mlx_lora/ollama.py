"""An Ollama Modelfile: the model's file, where answers end, and the chat template in Ollama's own language.

Ollama writes a conversation with a Go template, not with the Jinja template that the GGUF file carries. The Go template
here puts fixed text around the content of each message; that text is read off what the Jinja template makes of sample
conversations, and used only where the two agree on many others, to the letter. Reference: Ollama's docs/modelfile.md
and docs/template.md.
"""

from dataclasses import dataclass
from typing import Any

from mlx_lora import chat
from mlx_lora.errors import InputError

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Turns:
    """What stands before and after the content of each role; `opening` where no system message opens a conversation."""

    opening: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str

    def render(self, messages: Messages) -> str:
        """The conversation up to where the model answers, as Ollama will write it."""
        text = "" if messages[0]["role"] == "system" else self.opening
        for message in messages:
            text += self.before[message["role"]] + message["content"] + self.after[message["role"]]
        return text + self.prompt

    def go_template(self) -> str:
        """The same in Ollama's language. No action trims spaces: text is text."""
        roles = "".join(
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}'
            f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
            for number, role in enumerate(ROLES)
        )
        opening = ""
        if self.opening:
            opening = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_literal(self.opening)}{{{{ end }}}}'
        return f"{{{{ range $i, $_ := .Messages }}}}{opening}{roles}{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}"


def modelfile(model: str, adapter: str | None, tokenizer: Any) -> tuple[str, list[str]]:
    """The text of a Modelfile beside the files `model` and `adapter`, and what a person should know about it.

    `tokenizer` is mlx-lm's wrapper. TEMPLATE is left out where no Go template says what the chat template says: Ollama
    then takes the one of its own whose Jinja form is nearest to the file's.
    """
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines += ["# Ollama 0.34.1 and later take no adapters: give them a merged file.", f"ADAPTER ./{adapter}"]
    stops = [tokenizer.convert_ids_to_tokens(number) for number in sorted(tokenizer.eos_token_ids)]
    notes = []
    turns = _turns(tokenizer)
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
        stops += [end for end in [turns.after["assistant"].strip()] if end in tokenizer.get_added_vocab()]
        if "tools" in str(tokenizer.chat_template):
            notes.append("TEMPLATE has no place for tools; the chat template has")
        bos = _bos(tokenizer)
        if not chat.render([QUESTION], tokenizer).startswith(bos):
            notes.append(f"Ollama puts {bos} before the text; the chat template, with which training went, does not")
    elif tokenizer.chat_template is None:
        notes.append("no TEMPLATE: the model has no chat template")
    else:
        notes.append("no TEMPLATE: the chat template does more than one of Ollama's can; Ollama looks for its own")
    lines += [f'PARAMETER stop "{token}"' for token in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n", notes


# ---- reading the template --------------------------------------------------------------------------------------------


def _turns(tokenizer: Any) -> _Turns | None:
    """The chat template as fixed text around contents; None where there is none, or it is something else."""
    if "strftime_now" in str(tokenizer.chat_template):
        return None  # today's date is no fixed text
    try:
        turns = _observed(tokenizer)
        exact = all(turns.render(sample) == _rendered(sample, tokenizer) for sample in SAMPLES)
    except (InputError, ValueError):  # the template refuses a sample, or does not hold what it was given
        return None
    return turns if exact else None


def _observed(tokenizer: Any) -> _Turns:
    """Reads the text around contents off four renderings. Raises ValueError where they contradict one another."""
    s, q, a, r = SYSTEM["content"], QUESTION["content"], ANSWER["content"], AGAIN["content"]
    start, to_answer, to_question, end = _between(_rendered([QUESTION, ANSWER, AGAIN], tokenizer), q, a, r)
    before_system, from_system, _ = _between(_rendered([SYSTEM, QUESTION], tokenizer), s, q)
    after_user = _between(_rendered([QUESTION], tokenizer, False), q)[-1]
    after_answer = _between(_rendered([QUESTION, ANSWER], tokenizer, False), q, a)[-1]
    before_user = _without(to_question, after_answer, "")
    return _Turns(
        opening=_without(start, "", before_user),
        before={
            "system": before_system,
            "user": before_user,
            "assistant": _without(to_answer, after_user, ""),
        },
        after={
            "system": _without(from_system, "", before_user),
            "user": after_user,
            "assistant": after_answer,
        },
        prompt=_without(end, after_user, ""),
    )


def _rendered(messages: Messages, tokenizer: Any, prompt: bool = True) -> str:
    """What the chat template makes of a conversation, without the BOS that llama.cpp puts in front itself."""
    return chat.render(messages, tokenizer, add_generation_prompt=prompt).removeprefix(_bos(tokenizer))


def _bos(tokenizer: Any) -> str:
    """The BOS that is put in front of every text, or nothing."""
    added = tokenizer.backend_tokenizer.encode("a").ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if added else ""


def _between(text: str, *contents: str) -> list[str]:
    """What stands before, between and after the contents, each of which occurs once."""
    parts = []
    for content in contents:
        part, found, text = text.partition(content)
        if not found or content in text:
            raise ValueError(f"{content!r} occurs not once")
        parts.append(part)
    return [*parts, text]


def _without(text: str, start: str, end: str) -> str:
    """`text` but for what it starts and ends with."""
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise ValueError(f"{text!r} does not start with {start!r} and end with {end!r}")
    return text[len(start) : len(text) - len(end)]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM, QUESTION = _message("system", "<system message>"), _message("user", "<first question>")
ANSWER, AGAIN = _message("assistant", "<first answer>"), _message("user", "<second question>")
# Contents that a template may treat in its own way: spaces at the ends, nothing, thoughts, brackets, other scripts.
_OTHERS = [
    _message("system", " Be brief.\n\n"),
    _message("user", "\n Hi  "),
    _message("assistant", "  Hello.\n"),
    _message("user", ""),
    _message("assistant", "<think>\nhm\n</think>\n\nYes, {{ it }} is."),
    _message("user", "Why? 为什么"),
    _message("assistant", ""),
    _message("user", '[INST] <|x|> """{% raw %} \\n'),
]
_WHOLE = [[SYSTEM, QUESTION, ANSWER, AGAIN], _OTHERS, [_message("system", ""), *_OTHERS[1:4]]]
SAMPLES: list[Messages] = [
    part[:length] for whole in _WHOLE for part in (whole, whole[1:]) for length in range(1, len(part) + 1)
    if part[length - 1]["role"] == "user"
]  # fmt: skip


def _literal(text: str) -> str:
    """Text in a Go template inside a Modelfile's triple quotes. Reading a Modelfile loses what cannot be printed."""
    lost = any(not (char.isprintable() or char in "\n\t") for char in text)
    if not (lost or "{{" in text or '"""' in text or text.endswith(("{", '"'))):
        return text
    safe = "".join(char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text)
    return f'{{{{ "{safe}" }}}}'
