"""Text from a model, on top of mlx-lm's generation."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import batch_generate, stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_lora import chat
from mlx_lora.errors import InputError
from mlx_lora.model import Base


def context_length(base: Base) -> int | None:
    """The tokens that the model has positions for, prompt and answer together, where its config says so."""
    length = (base.config.get("text_config") or base.config).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def longest_answer(max_tokens: int, prompt: list[int], context: int | None) -> int:
    """`max_tokens`, or what the prompt leaves of the context: 0 or below where it leaves nothing."""
    return max_tokens if context is None else min(max_tokens, context - len(prompt))


def sampler(temperature: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """Log-probabilities (…, vocabulary) → tokens; greedy below a temperature of 1e-4, since logarithms divided by
    less can overflow."""
    sample = make_sampler(temp=0.0 if temperature < 1e-4 else temperature, top_p=top_p)
    return lambda logprobs: sample(logprobs.astype(mx.float32))


def chat_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Tokens that ask the model for the next answer of a conversation."""
    text = chat.render(messages, tokenizer, tools, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def prompt_tokens(tokenizer: Any, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
    """Tokens of a prompt: as a user's message where the model has a chat template, else (or `raw`) as it stands."""
    _check_unicode(prompt)
    if raw or tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    return chat_prompt(tokenizer, [*_opening(system), {"role": "user", "content": prompt}])


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
    for text, _ in _pieces(model, tokenizer, prompt, max_tokens, temperature, top_p, seed):
        yield text


def answers(model: nn.Module, tokenizer: Any, prompts: list[list[int]], max_tokens: int = 256) -> list[str]:
    """The greedy answer to each prompt, many at a time."""
    return list(batch_generate(model, tokenizer, prompts, max_tokens=max_tokens).texts if prompts else [])


class Conversation:
    """What was said in a chat with a model, and the model's cache of it, of which the next answer uses as many leading
    tokens as are the same. `context` is the model's `context_length`."""

    def __init__(self, model: nn.Module, tokenizer: Any, system: str | None = None, context: int | None = None) -> None:
        self.messages = _opening(system)
        self._model = model
        self._tokenizer = tokenizer
        self._system = system
        self._context = context
        self.forget_cache()

    def reset(self) -> None:
        """Begins anew, with the system message alone."""
        self.messages = _opening(self._system)

    def forget_cache(self) -> None:
        """Must be called when the model has changed, by another adapter for one."""
        self._cache: list[Any] | None = None
        self._tokens: list[int] = []  # what the cache holds

    def answer(self, text: str, max_tokens: int = 256, **sampling: Any) -> Generator[str, None, None]:
        """Pieces of the answer to a user's message, as `stream` gives them; both are in `messages` afterwards.

        Of an answer that is broken off (closed, or Ctrl-C within it), what was written stays; with nothing
        written, the message goes too. Raises InputError, without a trace of the message, where it has no prompt or
        the context no room.
        """
        _check_unicode(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = chat_prompt(self._tokenizer, messages)
        max_tokens = longest_answer(max_tokens, tokens, self._context)
        if max_tokens < 1:
            raise InputError(
                f"the conversation is longer than the model's context ({self._context} tokens); /reset starts a new one"
            )
        written, complete = "", False
        try:
            known = self._cached(tokens)
            self._tokens = list(tokens)
            for piece, token in _pieces(
                self._model, self._tokenizer, tokens[known:], max_tokens, prompt_cache=self._cache, **sampling
            ):
                written += piece
                self._tokens.append(token)
                yield piece
            complete = True
        finally:
            if written or complete:
                self.messages = [*messages, {"role": "assistant", "content": written}]
            if not complete:  # Ctrl-C can fall between two layers
                self.forget_cache()

    def _cached(self, tokens: list[int]) -> int:
        """Cuts the cache down to what it has in common with `tokens`, and says how many that are: never all."""
        limit = min(len(self._tokens), len(tokens) - 1)
        common = next((place for place in range(limit) if self._tokens[place] != tokens[place]), limit)
        surplus = len(self._tokens) - common
        if self._cache is None or (surplus and not can_trim_prompt_cache(self._cache)):
            self._cache = make_prompt_cache(self._model)
            return 0
        trim_prompt_cache(self._cache, surplus)
        return common


def _pieces(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt_cache: list[Any] | None = None,
) -> Iterator[tuple[str, int]]:
    """Each token of the answer, the one that ends it included, and the text that it completes."""
    mx.random.seed(seed)
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampler=sampler(temperature, top_p),
        prompt_cache=prompt_cache,
    ):
        yield response.text, response.token


def _opening(system: str | None) -> list[dict[str, Any]]:
    _check_unicode(system or "")
    return [{"role": "system", "content": system}] if system else []


def _check_unicode(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid Unicode") from None
