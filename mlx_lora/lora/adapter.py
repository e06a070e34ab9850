"""Operations on a model's adapted layers as a whole: attach, detach, enable, disable, merge, unmerge, count."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.config import Lora
from mlx_lora.errors import InputError
from mlx_lora.lora.layers import LoRALayer, adapt, factor_shapes, layer_type, weight_shape
from mlx_lora.lora.targets import adaptable, natural, select
from mlx_lora.lora.value import Adapter, Pair


def attach(model: nn.Module, config: Lora, seed: int = 0) -> list[str]:
    """Adapts the modules that `config` chooses and freezes everything else; returns their paths.

    The start of each lora_a is a pure function of the seed and the list of paths. The logits do not change.
    Raises InputError where the choice matches nothing, ValueError where an adapter is attached already.
    """
    _check_free(model)
    paths = select(model, config.target_modules, config.layers)
    attach_at(model, paths, config.rank, config.alpha, config.dropout, config.init, seed)
    return paths


def attach_at(
    model: nn.Module,
    paths: list[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    init: str = "kaiming_uniform",
    seed: int = 0,
) -> None:
    """Adapts the modules at `paths`, as `attach` does."""
    _check_free(model)
    modules = dict(model.named_modules())
    model.freeze()
    for path, key in zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True):
        layer = adapt(modules[path], rank, alpha, dropout, init, key)
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        _replace(model, path, layer)


def attach_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Attaches an adapter to the model that it was made for, or another of the same shapes.

    Takes milliseconds: no array is copied. Raises InputError, before anything changes, for a pair that has no place in
    this model; ValueError where an adapter is attached already.
    """
    _check_free(model)
    check_fit(model, adapter)
    modules = dict(model.named_modules())
    model.freeze()
    for path, pair in adapter.pairs.items():
        kind: Any = layer_type(modules[path])
        layer = kind(modules[path], pair.lora_a, pair.lora_b, pair.alpha, adapter.dropout)
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        _replace(model, path, layer)


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Raises InputError for a pair of `adapter` that has no place in this model."""
    modules, places = dict(model.named_modules()), adaptable(model)
    for path, pair in adapter.pairs.items():
        if path not in places:
            raise InputError(f"{path} has no place in this model; is it another base's adapter?")
        module = modules[path]
        base = module.base if isinstance(module, LoRALayer) else module
        shapes = factor_shapes(base, pair.rank)
        for name, array, shape in zip(("lora_a", "lora_b"), (pair.lora_a, pair.lora_b), shapes, strict=True):
            if array.shape != shape:
                raise InputError(f"{path}.{name} has shape {array.shape}, this model needs {shape}")


def attached(model: nn.Module) -> Adapter:
    """The attached adapter as a value (its dropout is that of its first layer)."""
    adapted = layers(model)
    pairs = {path: Pair(layer.lora_a, layer.lora_b, layer.alpha) for path, layer in adapted.items()}
    return Adapter(pairs, next((layer.dropout for layer in adapted.values()), 0.0))


def detach(model: nn.Module) -> None:
    """Puts the base layers back, bit for bit."""
    for path, layer in layers(model).items():
        layer.unmerge()
        _replace(model, path, layer.base)


def layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by path, in the order of blocks.

    MLX forms a step's gradients from the last of its results to the first: in an order in which block 10 comes before
    block 2, inputs of all blocks from 10 on would be kept until block 2 has been through its backward pass.
    """
    modules = sorted(model.named_modules(), key=lambda item: natural(item[0]))
    return {path: module for path, module in modules if isinstance(module, LoRALayer)}


def enable(model: nn.Module) -> None:
    """Uses the adapter again."""
    for layer in layers(model).values():
        layer.enabled = True


def disable(model: nn.Module) -> None:
    """Ignores the adapter: the output is the base's, bit for bit. A merged adapter must be unmerged instead."""
    adapted = layers(model)
    if any(layer.merged for layer in adapted.values()):
        raise ValueError("a merged adapter cannot be disabled: unmerge it")
    for layer in adapted.values():
        layer.enabled = False


def merge(model: nn.Module) -> None:
    """Writes base + delta into dense weights; the base layers are kept for `unmerge`. Enable the adapter first."""
    adapted = layers(model).values()
    if not all(layer.enabled for layer in adapted):
        raise ValueError("a disabled adapter cannot be merged: enable it")
    for layer in adapted:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restores the kept base layers, bit for bit."""
    for layer in layers(model).values():
        layer.unmerge()


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays, flat, by full path: what is trained and what is saved."""
    return {f"{path}.{name}": layer[name] for path, layer in layers(model).items() for name in ("lora_a", "lora_b")}


def set_parameters(model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Puts arrays (by full path, as `parameters` gives them) in the places of the adapter's."""
    model.update(tree_unflatten(list(arrays.items())))


def set_dropout_key(model: nn.Module, key: mx.array | None) -> None:
    """Turns dropout on with noise that is a pure function of `key`, or off with None."""
    adapted = layers(model).values()
    keys = [None] * len(adapted) if key is None else mx.random.split(key, len(adapted))
    for layer, own in zip(adapted, keys, strict=True):
        layer.set_dropout_key(own)


@dataclass(frozen=True)
class Count:
    """Parameters (a quantized weight counts its unpacked entries) and bytes."""

    trainable: int
    total: int
    adapter_bytes: int
    base_bytes: int


def count(model: nn.Module) -> Count:
    """Counts trainable and all parameters, and the memory of both."""
    adapter = parameters(model)
    base = 0
    for _, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}
        if isinstance(module, LoRALayer):
            continue
        if "scales" in own:
            base += math.prod(weight_shape(module)) + (own["bias"].size if "bias" in own else 0)
        else:
            base += sum(value.size for value in own.values())
    adapter_size = sum(array.size for array in adapter.values())
    adapter_bytes = sum(array.nbytes for array in adapter.values())
    all_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return Count(
        trainable=sum(array.size for _, array in tree_flatten(model.trainable_parameters())),
        total=base + adapter_size,
        adapter_bytes=adapter_bytes,
        base_bytes=all_bytes - adapter_bytes,
    )


def _check_free(model: nn.Module) -> None:
    if layers(model):
        raise ValueError("an adapter is attached already: detach it first")


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    place: Any = model
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[int(name) if isinstance(place, list) else name] = layer
