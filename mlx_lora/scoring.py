"""The loss of a model on a whole data set."""

import math
from dataclasses import dataclass

import mlx.nn as nn

from mlx_lora.batches import Batches
from mlx_lora.head import output_of
from mlx_lora.loss import arrays, batch_score
from mlx_lora.memory import NoFurtherAhead


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy per supervised token (nats), over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def score(model: nn.Module, batches: Batches, ahead: NoFurtherAhead | None = None) -> Score:
    """Scores every row once, in a fixed order, with each supervised token counting alike; draws no random numbers.

    `ahead`: that of the run's steps.
    """
    ahead = ahead or NoFurtherAhead()
    total, tokens = 0.0, 0
    output = output_of(model)
    for batch in batches.in_order():
        with ahead.allowed():
            total += float(batch_score(output, arrays(batch)).item())
        tokens += batch.supervised
    return Score(total / tokens, tokens)
