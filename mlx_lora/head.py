"""Logits only where they are needed: hidden states at chosen positions, then the output head."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Logits = Callable[[mx.array, mx.array | None], mx.array]


def logits_function(model: nn.Module) -> Logits:
    """A function of (token ids (B, T), positions (N,) in the flattened batch) → logits (N, K).

    With None for the positions it gives all B · T of them. Models whose output is not simply a head on the last
    hidden states (scaled or capped logits) compute all logits first; which is the case is found by comparing both on
    two tokens.
    """

    def at_positions(ids: mx.array, positions: mx.array | None) -> mx.array:
        hidden = model.model(ids)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return _head(model)(hidden if positions is None else hidden[positions])

    def all_first(ids: mx.array, positions: mx.array | None) -> mx.array:
        logits = model(ids)
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if positions is None else logits[positions]

    ids = mx.array([[0, 1]])
    try:
        same = mx.array_equal(at_positions(ids, None), all_first(ids, None), equal_nan=True).item()
    except (AttributeError, TypeError, ValueError):
        same = False
    return at_positions if same else all_first


def _head(model: nn.Module) -> Any:
    return model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear
