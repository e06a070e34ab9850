"""Which modules of a model are adapted: names, globs and regular expressions → paths."""

import difflib
import fnmatch
import re

import mlx.nn as nn

from mlx_lora.errors import InputError
from mlx_lora.lora.layers import LoRAEmbedding, LoRALayer, layer_type


def select(model: nn.Module, patterns: str | list[str], layers: str | list[int]) -> list[str]:
    """Paths of the modules that `patterns` and `layers` choose, in the model's order.

    A pattern is ``all-linear`` (every linear layer of the blocks, experts included), a module's name
    (``q_proj``), a glob on its path (``*.mlp.*``) or ``re:`` and a regular expression for the whole path. `layers`
    limits the blocks: ``all``, ``last:N``, ``FIRST-LAST`` (both included) or a list of numbers; modules outside the
    blocks (embeddings, output head) are chosen by name alone.

    Raises InputError for a pattern that chooses nothing, with what there is.
    """
    kinds = adaptable(model)
    blocks = {path: block_number(path) for path in kinds}
    count = 1 + max((number for number in blocks.values() if number is not None), default=-1)
    wanted = _numbers(layers, count)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern == "all-linear":
            matches = [path for path in kinds if blocks[path] is not None and kinds[path] is not LoRAEmbedding]
        else:
            matches = [path for path in kinds if _matches(pattern, path)]
        if not matches:
            raise InputError(f"lora.target_modules: {pattern!r} matches no layer{_advice(pattern, list(kinds))}")
        matches = [path for path in matches if blocks[path] is None or blocks[path] in wanted]
        if not matches:
            raise InputError(
                f"lora.target_modules: {pattern!r} matches no layer in the blocks of lora.layers: {layers}"
            )
        chosen.update(matches)
    return sorted(chosen, key=natural)


def adaptable(model: nn.Module) -> dict[str, type[LoRALayer]]:
    """Every module that can be adapted or is, by path, and its adapted type."""
    modules = dict(model.named_modules())
    return {
        path: kind
        for path, module in modules.items()
        if not isinstance(modules.get(path.rpartition(".")[0]), LoRALayer)  # the base inside an adapted layer
        and (kind := type(module) if isinstance(module, LoRALayer) else layer_type(module))
    }


def block_number(path: str) -> int | None:
    """The number of the block that a module stands in; None outside the blocks."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts paths with numbers as numbers: block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return path.rsplit(".", 1)[-1] == pattern or fnmatch.fnmatchcase(path, pattern)


def _numbers(layers: str | list[int], count: int) -> set[int]:
    if layers == "all":
        return set(range(count))
    if isinstance(layers, list):
        first, last = min(layers), max(layers)
    elif layers.startswith("last:"):
        first, last = count - int(layers.removeprefix("last:")), count - 1
    else:
        first, last = map(int, layers.split("-"))
    if not 0 <= first <= last < count:
        raise InputError(f"lora.layers: {layers} does not lie within the model's blocks, 0 to {count - 1}")
    return set(layers) if isinstance(layers, list) else set(range(first, last + 1))


def _advice(pattern: str, paths: list[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    near = difflib.get_close_matches(pattern, names, 1)
    return (f"; did you mean {near[0]}?" if near else ".") + f" This model has {', '.join(names)}"
