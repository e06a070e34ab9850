"""Gradient checkpointing: a block's activations are recomputed in the backward pass instead of kept.

Only the given model's blocks change, not their classes, and the recomputation is exact: dropout's noise is a function
of explicit keys that both passes share.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def checkpoint_blocks(model: nn.Module) -> None:
    """Makes every block of `model.layers` recompute its forward pass when gradients are taken."""
    for block in model.layers:
        block.__class__ = _checkpointed(type(block))


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def forward(parameters: dict[str, Any], *args: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        return mx.checkpoint(forward)(self.trainable_parameters(), *args)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})
