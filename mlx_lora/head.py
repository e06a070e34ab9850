"""Where a model's hidden states become logits, so that logits are computed only where a loss needs them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Function = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Output:
    """A model cut in two: ``hidden`` takes token ids (B, T) to (B, T, D), ``head`` takes (N, D) to logits (N, K).

    ``whole`` says why a model cannot be cut there (None where it can): then ``hidden`` gives the logits, D = K, and
    ``head`` does nothing. ``adapted`` is whether the head itself is trained.
    """

    hidden: Function
    head: Function
    vocabulary: int
    whole: str | None
    adapted: bool


def output_of(model: nn.Module) -> Output:
    """Cuts a model before its head. Which head it has, plain, tied, scaled or capped, is found by comparing each with
    the model itself on two tokens, bit for bit."""
    ids = mx.array([[0, 1]])
    expected = model(ids)[0]
    vocabulary = expected.shape[-1]
    try:
        hidden = model.model(ids)[0]
        for head in _heads(model):
            if mx.array_equal(head(hidden), expected, equal_nan=True).item():
                return Output(model.model, head, vocabulary, None, bool(_projection(model)[1].trainable_parameters()))
    except (AttributeError, TypeError, ValueError):
        pass
    reason = f"{type(model).__module__}'s logits are no known function of its last hidden states"
    return Output(model, lambda logits: logits, vocabulary, reason, adapted=False)


def _heads(model: nn.Module) -> Iterator[Function]:
    """What mlx-lm's models make logits with: a projection, which some scale or cap."""
    project = _projection(model)[0]
    yield project
    for holder in (model, model.args, model.model):
        if cap := getattr(holder, "final_logit_softcapping", None):
            yield partial(_capped, project, cap)
        if factor := getattr(holder, "logit_scale", None):
            yield partial(_scaled, project, factor)
        if divisor := getattr(holder, "logits_scaling", None):
            yield partial(_divided, project, divisor)


def _capped(project: Function, cap: float, hidden: mx.array) -> mx.array:
    return mx.tanh(project(hidden) / cap) * cap


def _scaled(project: Function, factor: float, hidden: mx.array) -> mx.array:
    return project(hidden) * factor


def _divided(project: Function, divisor: float, hidden: mx.array) -> mx.array:
    return project(hidden) / divisor


def _projection(model: nn.Module) -> tuple[Any, nn.Module]:
    """The output projection and the module that it is of; tied models use their embedding."""
    if "lm_head" in model:
        return model.lm_head, model.lm_head
    return model.model.embed_tokens.as_linear, model.model.embed_tokens
