"""Text from a model, on top of mlx-lm's generation."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import batch_generate, stream_generate
from mlx_lm.sample_utils import make_sampler

from mlx_lora import chat
from mlx_lora.errors import InputError


def chat_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Tokens that ask the model for the next answer of a conversation."""
    text = chat.render(messages, tokenizer, tools, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def prompt_tokens(tokenizer: Any, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
    """Tokens of a prompt: as a user's message where the model has a chat template, else (or `raw`) as it stands."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid Unicode") from None
    if raw or tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "system", "content": system}] if system else []
    return chat_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the answer as they come; greedy at temperature 0, else sampled with `seed`."""
    mx.random.seed(seed)
    sampler = make_sampler(temp=temperature, top_p=top_p)
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler):
        yield response.text


def answers(model: nn.Module, tokenizer: Any, prompts: list[list[int]], max_tokens: int = 256) -> list[str]:
    """The greedy answer to each prompt, many at a time."""
    return list(batch_generate(model, tokenizer, prompts, max_tokens=max_tokens).texts if prompts else [])
