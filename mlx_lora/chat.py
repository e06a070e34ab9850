"""Conversations, as the model's chat template writes them: their tokens, and which of these the model is to learn."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.errors import InputError
from mlx_lora.time_limit import TookTooLong, time_limit

RENDER_SECONDS = 5  # some 10,000 times what a conversation takes

MARK = re.compile("\ufdd0(\\d+)([<>])\ufdd1")  # noncharacters, which no text holds: content NUMBER begins or ends here
EMPTY_THOUGHT = re.compile(r"(\s|</?think>)*")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message, which transformers takes for the same


def configure(tokenizer: Any, template: str | None, settings: Mapping[str, Any]) -> None:
    """From here on, `tokenizer` (mlx-lm's wrapper) writes conversations with this chat template (None: its own) and
    tells it these settings: they become a part of its text, which exports carry too.

    Raises InputError where the template cannot be read, or there is none to tell anything.
    """
    if template is None and not settings:
        return
    if getattr(tokenizer, "_chat_template", None) is not None:
        raise InputError("model.chat_template: mlx-lm writes this model's conversations with code; remove it")
    text = tokenizer.chat_template if template is None else template_text(template)
    if text is None:
        raise InputError("model.template_kwargs: the model has no chat template; give one as model.chat_template")
    opening = "".join(f"{{% set {name} = {value!r} %}}" for name, value in settings.items())
    if isinstance(text, dict):  # some models have a template for tools apart
        tokenizer.chat_template = {name: opening + each for name, each in text.items()}
    else:
        tokenizer.chat_template = opening + text


def template_text(template: str) -> str:
    """The Jinja text of `model.chat_template`: itself, or what the file that it names holds."""
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"model.chat_template: {template} cannot be read ({reason})") from None


def tokenize(row: dict[str, Any], tokenizer: Any, loss_on: str) -> tuple[list[int], list[bool]]:
    """The tokens of a row's ``messages``, and which of them are supervised.

    Supervised is exactly what the model has to write itself: each answer (`loss_on` assistant) or the last one (last),
    from the prompt for it to its end-of-turn token, that token included; or everything (all). An answer with ``train``
    false or ``weight`` 0 is left out. Raises InputError where the template does not let an answer be told from the
    rest.
    """
    messages, learned = checked(row)
    tools = row.get("tools")
    text = render(messages, tokenizer, tools)
    check_tools(messages, tools, tokenizer, text)
    _check_reasoning(messages, tools, tokenizer, text)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    tokens, (starts, ends) = list(encoding.ids), zip(*encoding.offsets, strict=True) if encoding.offsets else ((), ())
    rendered = _Rendered(messages, tools, tokenizer, text, tokens, starts, ends)
    if loss_on == "all":
        if not all(learned):
            raise InputError(f"message {learned.index(False) + 1} is not to be trained on, but data.loss_on is all")
        return tokens, [True] * len(tokens)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if loss_on == "last" else answers
    answers = [number for number in answers if learned[number] and _says_something(messages[number])]
    supervised = [False] * len(tokens)
    for number in answers:
        for place in rendered.answer(number):
            supervised[place] = True
    return tokens, supervised


def _says_something(message: dict[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


@dataclass(frozen=True)
class _Place:
    """Where the text holds a message's content, without the spaces around it: from ``begin`` (None: the template takes
    its first part elsewhere, as it does with thoughts) to ``end``."""

    begin: int | None
    end: int


class _Rendered:
    """A conversation and the text that the template makes of it: which of its tokens are an answer.

    No template has to write a beginning of the conversation as it writes the whole: contents are followed through it by
    marks, and what comes between the last content and an answer is compared with the prompt for that answer.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        tokenizer: Any,
        text: str,
        tokens: list[int],
        starts: Sequence[int],  # in the text, of each token
        ends: Sequence[int],
    ) -> None:
        self.messages = messages
        self.tools = tools
        self.tokenizer = tokenizer
        self.text = text
        self.tokens = tokens
        self.starts = starts
        self.ends = ends
        self.places = self._places()

    def answer(self, number: int) -> range:
        """The tokens of an answer, from its prompt to its end of turn: also one that holds the prompt's last characters
        together with its first ones."""
        begin = self._begin(number)
        first = bisect_right(self.ends, begin)
        return range(first, self._last(number, first, begin) + 1)

    def _places(self) -> dict[int, _Place] | None:
        """Where each content stands in the text; None where the template writes marked contents otherwise."""
        for roles in (None, ("assistant",)):  # some look into the contents of others
            try:
                marked = self._render(_marked(self.messages, roles))
            except InputError:
                continue
            if MARK.sub("", marked) == self.text:
                self._check_contents(marked, roles)
                return _found(marked)
        return None

    def _check_contents(self, marked: str, roles: tuple[str, ...] | None) -> None:
        """Raises InputError for a message whose content the template leaves out, such as a system prompt that it has no
        place for: nothing that is given may be ignored."""
        for number, message in enumerate(self.messages):
            given = (message.get("content") or "").strip() and (roles is None or message["role"] in roles)
            if given and _mark(number, ">") not in marked:
                raise InputError(
                    f"the chat template leaves out the content of message {number + 1} ({message['role']}); take it "
                    "out, or use another model.chat_template"
                )

    def _begin(self, number: int) -> int:
        """Where, in the text, what the model has to write begins."""
        place, message = (self.places or {}).get(number), self.messages[number]
        content = (message.get("content") or "").strip()
        lost = place is None if self.places is not None else content not in self.text
        if content and lost and not message.get("tool_calls"):  # calls may stand alone
            raise InputError(
                f"the chat template changes the content of message {number + 1}, leaves it out or repeats it"
            )
        if number == 0:
            raise InputError("message 1 is an answer to nothing; begin with a user message, or set its train to false")
        before = (self.places or {}).get(number - 1)
        after = before.end if before else 0
        until = len(self.text) if place is None else place.end if place.begin is None else place.begin
        prompt = self._render(self.messages[:number], add_generation_prompt=True)
        if self.text.startswith(prompt) and after <= len(prompt) <= until:
            return len(prompt)
        # The template writes what came before otherwise: only what follows the last content has to be the same.
        if before is not None:
            marked = self._render(_marked(self.messages[:number], None), add_generation_prompt=True)
            _, mark, opening = marked.rpartition(_mark(number - 1, ">"))
            if mark and self.text.startswith(opening, after) and after + len(opening) <= until:
                return after + len(opening)
            # A prompt may open more than the conversation holds, such as a thought, or an empty one otherwise.
            if mark and place and place.begin is not None:
                written = self.text[after : place.begin]
                agreed = _common(opening, written)
                if agreed == len(written) or EMPTY_THOUGHT.fullmatch(written[agreed:] + opening[agreed:]):
                    return max(after, place.begin)
        raise InputError(
            f"the chat template renders what comes before message {number + 1} differently once the answer is there, "
            "so the answer cannot be told from its prompt; use data.loss_on: all, or another model.chat_template"
        )

    def _last(self, number: int, first: int, begin: int) -> int:
        """The last token of an answer: the first stop token after its content, else the special token that ends its
        turn, else the last of the turn."""
        place = (self.places or {}).get(number)
        later = [
            other.begin
            for index, other in (self.places or {}).items()
            if index > number and other.begin is not None and other.begin >= begin
        ]
        if later or number + 1 == len(self.messages):
            limit = min(later, default=len(self.text))
        else:
            limit = self._turn(number) or 0
        since = begin if place is None else place.end
        after = range(max(first, bisect_left(self.starts, since)), bisect_left(self.starts, limit))
        if stops := [index for index in after if self.tokens[index] in self.tokenizer.eos_token_ids]:
            return stops[0]
        turn = self._turn(number)
        known = self.tokenizer.added_tokens_decoder.items()
        controls = {token for token, added in known if added.special}
        special = [i for i in after if self.tokens[i] in controls and self.starts[i] < (turn or limit)]
        if special and place is not None and not self.messages[number].get("tool_calls"):
            return special[0]
        if turn is not None:
            return special[-1] if special else sum(start < turn for start in self.starts) - 1
        raise InputError(
            f"the chat template ends message {number + 1} in a way that cannot be told from what follows; "
            "use data.loss_on: last, or another model.chat_template"
        )

    def _turn(self, number: int) -> int | None:
        """Where an answer's turn ends, if the template writes the conversation up to it as it does in the whole."""
        turn = self._render(self.messages[: number + 1])
        return len(turn) if self.text.startswith(turn) else None

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return render(messages, self.tokenizer, self.tools, add_generation_prompt)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _mark(number: int, side: str) -> str:
    return f"\ufdd0{number}{side}\ufdd1"


def _marked(messages: list[dict[str, Any]], roles: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The messages (of some roles, or all) with marks around each content, inside the spaces that templates trim."""
    marked = []
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        if (core := content.strip()) and (roles is None or message["role"] in roles):
            before, _, after = content.partition(core)
            content = f"{before}{_mark(number, '<')}{core}{_mark(number, '>')}{after}"
            message = message | {"content": content}
        marked.append(message)
    return marked


def _found(marked: str) -> dict[int, _Place]:
    """The places of the marked contents in the text without marks; of one that stands there several times, none."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    removed = 0
    for mark in MARK.finditer(marked):
        (begins if mark[2] == "<" else ends).setdefault(int(mark[1]), []).append(mark.start() - removed)
        removed += len(mark[0])
    return {
        number: _Place(begins[number][0] if len(begins.get(number, [])) == 1 else None, found[0])
        for number, found in ends.items()
        if len(found) == 1
    }


def check_tools(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, text: str) -> None:
    """Raises InputError where the chat template, which makes `text` of them, leaves out tools or tool calls."""
    if tools and render(messages, tokenizer) == text:
        raise InputError("the model's chat template leaves out tools; use another model, or take them out")
    if any(message.get("tool_calls") for message in messages):
        without = [
            {key: value for key, value in message.items() if key != "tool_calls"}
            | {"content": message.get("content") or ""}
            for message in messages
        ]
        if render(without, tokenizer, tools) == text:
            raise InputError(
                "the model's chat template leaves out tool_calls; use another model, or write them as content"
            )


def _check_reasoning(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, text: str) -> None:
    """Raises InputError where the chat template leaves out the reasoning before the last answer. That before earlier
    ones is left out by most, since the model does not see it then."""
    *before, last = messages
    if last["role"] != "assistant":
        return
    without = {key: value for key, value in last.items() if key not in REASONING}
    left_out = any(last.get(key) for key in REASONING) and render([*before, without], tokenizer, tools) == text
    if left_out or ("</think>" in (last.get("content") or "") and "</think>" not in text):
        raise InputError(
            "the model's chat template leaves out the reasoning of the last answer; set data.reasoning: drop, or use "
            "another model.chat_template"
        )


def render(
    messages: list[dict[str, Any]], tokenizer: Any, tools: Any = None, add_generation_prompt: bool = False
) -> str:
    """The conversation as the model's chat template writes it. Raises InputError with the template's own words."""
    if tokenizer.chat_template is None:
        raise InputError("messages need a chat template and the model has none; use prompt and completion, or text")
    try:
        with time_limit(RENDER_SECONDS):
            return tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except TookTooLong:
        raise InputError(f"the chat template takes more than {RENDER_SECONDS} seconds for it") from None
    except Exception as error:  # a template is a program: it can raise anything
        raise InputError(f"the chat template refuses it: {error}") from None


def checked(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages as templates read them, without ``train`` and ``weight``, and which of them these keys leave to be
    learned."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is not a list of messages")
    found, learned = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} has no role")
        learned.append(_learned(number, message))
        message = {key: value for key, value in message.items() if key not in ("train", "weight")}
        if "function_call" in message:
            raise InputError(f"message {number} has a function_call, which is not read; write it as tool_calls")
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"])
        calls = message.get("tool_calls")
        if isinstance(message.get("content"), str):
            pass
        elif not calls or message.get("content") is not None:
            raise InputError(f"message {number} ({message['role']}) has no text content")
        if isinstance(calls, list):
            message["tool_calls"] = [_with_arguments(call) for call in calls]
        found.append(message)
    return found, learned


def _joined(parts: list[Any]) -> Any:
    """Parts of text, as OpenAI's API takes them, in one; other parts as they are."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(parts) else parts


def _learned(number: int, message: dict[str, Any]) -> bool:
    """Whether an answer is to be learned, as its ``train`` (true or false) or ``weight`` (0 or 1) says."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise InputError(f"message {number}: train is not true or false")
    if weight is not None and weight not in (0, 1):
        raise InputError(f"message {number}: weight is not 0 or 1")
    if message["role"] != "assistant" and (train or weight):
        raise InputError(f"message {number} ({message['role']}) cannot be trained on: only assistant messages are")
    return message["role"] != "assistant" or not (train is False or weight == 0)


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates read them, and not the JSON text that OpenAI sends."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
