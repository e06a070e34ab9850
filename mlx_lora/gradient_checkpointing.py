"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept.

Only the given model's blocks change, not their classes, and the recomputation is exact: dropout's noise is a function
of explicit keys that both passes share.
"""

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.errors import InputError

MLP_NAMES = ("shared_mlp", "mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")  # in the blocks of mlx-lm's models


def checkpoint_blocks(model: nn.Module, level: bool | Literal["mlp"] | int = True) -> None:
    """Makes parts of `model.layers` run their forward pass again when gradients are taken.

    Args:
        model: changed in place, once.
        level: True for every block, k for every k-th one, "mlp" for the MLP or the experts of each block, which is
            cheaper in memory where the attention keeps little. Raises InputError for "mlp" where no block has one.
    """
    if level == "mlp":
        parts = [block[name] for block in model.layers for name in MLP_NAMES if name in block]
        if not parts:
            raise InputError("train.gradient_checkpointing: no block has an MLP of its own; set it to true")
    else:
        parts = model.layers[:: int(level)]
    for part in parts:
        part.__class__ = _checkpointed(type(part))


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def forward(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            kept = self.trainable_parameters()
            self.update(parameters)
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:  # no tracer stays in the model
                self.update(kept)

        return mx.checkpoint(forward)(self.trainable_parameters(), *args, **kwargs)

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})
