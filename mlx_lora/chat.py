"""Conversations, as the model's chat template writes them: their tokens, and which of these the model is to learn."""

from typing import Any

from mlx_lora.errors import InputError
from mlx_lora.time_limit import TookTooLong, time_limit

RENDER_SECONDS = 5  # some 10,000 times what a conversation takes


def tokenize(row: dict[str, Any], tokenizer: Any, loss_on: str) -> tuple[list[int], list[bool]]:
    """The tokens of a row's ``messages``, and which of them are supervised.

    Supervised is exactly what the model has to write itself: each answer (`loss_on` assistant) or the last one (last),
    from the prompt for it to its end-of-turn token, that token included; or everything (all).
    """
    messages, tools = _checked(row), row.get("tools")
    text = render(messages, tokenizer, tools)
    check_tools(messages, tools, tokenizer, text)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    tokens, offsets = list(encoding.ids), encoding.offsets
    if loss_on == "all":
        return tokens, [True] * len(tokens)
    supervised = [False] * len(tokens)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in answers[-1:] if loss_on == "last" else answers:
        if not messages[number].get("content") and not messages[number].get("tool_calls"):
            continue
        prompt = render(messages[:number], tokenizer, tools, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise InputError(
                f"the chat template renders what comes before message {number + 1} differently once the answer is "
                "there, so the answer cannot be told from its prompt; use data.loss_on: all"
            )
        turn = render(messages[: number + 1], tokenizer, tools)
        whole_turn = text.startswith(turn) and len(turn) > len(prompt)
        end = len(turn) if whole_turn else len(text)
        span = [place for place, (start, _) in enumerate(offsets) if len(prompt) <= start < end]
        last = _end_of_turn([tokens[place] for place in span], whole_turn, tokenizer)
        if last is None and not whole_turn:
            raise InputError(
                f"the chat template ends message {number + 1} in a way that cannot be told from what follows; "
                "use data.loss_on: last"
            )
        for place in span if last is None else span[: last + 1]:
            supervised[place] = True
    return tokens, supervised


def _end_of_turn(answer: list[int], whole_turn: bool, tokenizer: Any) -> int | None:
    """Where an answer's tokens end: at the first stop token, else (where `answer` is known to hold no more than the
    turn) at the last special token; None without either."""
    stops = [place for place, token in enumerate(answer) if token in tokenizer.eos_token_ids]
    added = tokenizer.added_tokens_decoder
    special = [place for place, token in enumerate(answer) if token in added and added[token].special]
    return stops[0] if stops else special[-1] if special and whole_turn else None


def check_tools(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, text: str) -> None:
    """Raises InputError where the chat template, which makes `text` of them, leaves out tools or tool calls."""
    if tools and render(messages, tokenizer) == text:
        raise InputError("the model's chat template leaves out tools; use another model, or take them out")
    if any(message.get("tool_calls") for message in messages):
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if render(without, tokenizer, tools) == text:
            raise InputError(
                "the model's chat template leaves out tool_calls; use another model, or write them as content"
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


def _checked(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} has no role")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise InputError(f"message {number} ({message['role']}) has no text content")
    return messages
