"""Where a model's hidden states become logits, so that logits are computed only where a loss needs them."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Function = Callable[[mx.array], mx.array]
LAYERS = nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding  # whose arrays have a row for each token


@dataclass(frozen=True)
class Head:
    """A projection to logits by one layer, and what is done to each logit then. One of `LAYERS` can be had in parts.

    Args:
        layer: of K rows; an embedding is used as a linear layer.
        finish: takes a logit to a logit.
    """

    layer: nn.Module
    finish: Function

    @property
    def vocabulary(self) -> int:
        return self.layer.weight.shape[0]

    def __call__(self, hidden: mx.array) -> mx.array:
        """The logits (..., K) of hidden states (..., D)."""
        return self.finish(self.project(hidden))

    def project(self, hidden: mx.array) -> mx.array:
        """The layer's outputs (..., K), before `finish`."""
        return getattr(self.layer, "as_linear", self.layer)(hidden)

    def by_hidden(self, hidden: mx.array, projected: mx.array, by_logits: mx.array) -> mx.array:
        """The gradient (..., D) to `hidden`, whose `project` is given, from that to the logits; the head is frozen."""
        by_projected = mx.vjp(self.finish, [projected], [by_logits.astype(projected.dtype)])[1]
        return mx.vjp(self.project, [hidden], by_projected)[1][0]

    def part(self, tokens: slice | mx.array) -> "Head":
        """The head of some tokens of the vocabulary alone."""
        layer = copy(self.layer)
        for name, array in layer.items():
            layer[name] = array[tokens]
        return Head(layer, self.finish)

    def of_each(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """The logit (N,) of one token (N,) for each of the hidden states (N, D)."""
        layer = self.part(tokens).layer
        weight = layer.weight
        if "scales" in layer:
            weight = mx.dequantize(
                weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
            )
        logits = (hidden * weight).sum(axis=-1)
        return self.finish(logits + layer.bias if "bias" in layer else logits)


@dataclass(frozen=True)
class Output:
    """A model cut in two: ``hidden`` takes token ids (B, T) to (B, T, D), ``head`` takes (N, D) to logits (N, K).

    ``whole`` says why a model cannot be cut there (None where it can): then ``hidden`` gives the logits, D = K, and
    ``head`` does nothing. ``at_once`` says why a loss needs all logits of a batch at once (None where it does not).
    """

    hidden: Function
    head: Head | Function
    whole: str | None
    at_once: str | None


def output_of(model: nn.Module) -> Output:
    """Cuts a model before its head. Which head it has, plain, tied, scaled or capped, is found by comparing each with
    the model itself on two tokens, bit for bit."""
    ids = mx.array([[0, 1]])
    expected = model(ids)[0]
    try:
        hidden = model.model(ids)[0]
        for head in _heads(model):
            if mx.array_equal(head(hidden), expected, equal_nan=True).item():
                if tree_flatten(head.layer.trainable_parameters()):
                    return Output(model.model, head.__call__, None, "the output head is adapted")
                if not isinstance(head.layer, LAYERS):
                    return Output(model.model, head.__call__, None, f"the head is a {type(head.layer).__name__}")
                return Output(model.model, head, None, None)
    except (AttributeError, TypeError, ValueError):
        pass
    reason = f"{type(model).__module__}'s logits are no known function of its last hidden states"
    return Output(model, lambda logits: logits, reason, reason)


def _heads(model: nn.Module) -> Iterator[Head]:
    """What mlx-lm's models make logits with: a layer, tied models their embedding; some scale or cap them."""
    layer = model.lm_head if "lm_head" in model else model.model.embed_tokens
    yield Head(layer, lambda logits: logits)
    for holder in (model, model.args, model.model):
        if cap := getattr(holder, "final_logit_softcapping", None):
            yield Head(layer, partial(_capped, cap))
        if factor := getattr(holder, "logit_scale", None):
            yield Head(layer, partial(_scaled, factor))
        if divisor := getattr(holder, "logits_scaling", None):
            yield Head(layer, partial(_divided, divisor))


def _capped(cap: float, logits: mx.array) -> mx.array:
    return mx.tanh(logits / cap) * cap


def _scaled(factor: float, logits: mx.array) -> mx.array:
    return logits * factor


def _divided(divisor: float, logits: mx.array) -> mx.array:
    return logits / divisor
