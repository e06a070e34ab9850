"""Gradient checkpointing: blocks run again in the backward pass, and keep only what costs much to compute.

Only the given model's modules change, not their classes, and the recomputation is exact: dropout's noise is a function
of explicit keys that both passes share. Selective recomputation: Korthikanti et al., 2022, arXiv:2205.05198.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.errors import InputError
from mlx_lora.lora.layers import LoRAEmbedding, LoRALayer, layer_type
from mlx_lora.recomputation import FirstRun, forgotten, remember

Level = bool | Literal["selective", "mlp"] | int
MLP_NAMES = ("shared_mlp", "mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")  # in the blocks of mlx-lm's models


def checkpoint_blocks(model: nn.Module, level: Level = True) -> None:
    """Makes parts of `model.layers` run their forward pass again when gradients are taken.

    Args:
        model: changed in place, once.
        level: "selective" for all of a block but its matrix products and, where it is ours, its attention; "mlp" for
            the products of its MLP or its experts too; True for everything; k for everything in every k-th block, and
            what "selective" says in the others. False for nothing. Raises InputError for "mlp" where no block has an
            MLP of its own.
    """
    if level is False:
        return
    if level == "mlp":
        mlps = [block[name] for block in model.layers for name in MLP_NAMES if name in block]
        if not mlps:
            raise InputError("train.gradient_checkpointing: no block has an MLP of its own; set it to true")
        for mlp in mlps:
            _change(mlp, _forgetting)
    for number, block in enumerate(model.layers):
        everything = not isinstance(level, str) and number % level == 0
        if not everything:
            of_adapted = {id(layer.base) for layer in block.modules() if isinstance(layer, LoRALayer)}
            for layer in block.modules():
                if layer_type(layer) not in (None, LoRAEmbedding) and id(layer) not in of_adapted:
                    _change(layer, _remembering)
        _change(block, _recomputing_everything if everything else _recomputing)


def _change(module: nn.Module, changed: Callable[[type], Callable[..., Any]]) -> None:
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), names | {"__call__": changed(kind)})


def _remembering(kind: type) -> Callable[..., Any]:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return remember(lambda x: kind.__call__(self, x, *args, **kwargs), x)

    return call


def _forgetting(kind: type) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with forgotten():
            return kind.__call__(self, *args, **kwargs)

    return call


def _recomputing(kind: type) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: _recomputed(self, kind, FirstRun().used, args, kwargs)


def _recomputing_everything(kind: type) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: _recomputed(self, kind, nullcontext, args, kwargs)


def _recomputed(self: Any, kind: type, first_run: Any, args: Any, kwargs: Any) -> Any:
    def forward(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kept = self.trainable_parameters()
        self.update(parameters)
        try:
            with first_run():
                return kind.__call__(self, *args, **kwargs)
        finally:  # no tracer stays in the model
            self.update(kept)

    parameters = self.trainable_parameters()
    if args and tree_flatten(parameters):
        parameters, x = _own_gradients_first(parameters, args[0])
        args = (x, *args[1:])
    return mx.checkpoint(forward)(parameters, *args, **kwargs)


def _own_gradients_first(parameters: dict[str, Any], x: mx.array) -> tuple[dict[str, Any], mx.array]:
    """The same values; in the backward pass the gradient to `x` waits for those to the parameters.

    Else MLX, which forms what a result needs as late as it can, goes on to the blocks below first, and keeps of several
    blocks (uncompiled: of all) everything that was recomputed, until their parameters' gradients are formed at the end.
    """
    names, arrays = zip(*tree_flatten(parameters), strict=True)

    @mx.custom_function
    def same(x: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return x, *arrays

    @same.vjp
    def gradients(_: Any, cotangents: Any, __: Any) -> tuple[mx.array, ...]:
        by_x, *by_arrays = cotangents
        return mx.depends(by_x, by_arrays), *by_arrays

    x, *arrays = same(x, *arrays)
    return tree_unflatten(list(zip(names, arrays, strict=True))), x
