"""mlx-lm's form of an adapter: adapters.safetensors and adapter_config.json, as runs and checkpoints hold them."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import files, lora
from mlx_lora.adapter_files.reading import arrays_of, base_named, finite_number, positive_whole, settings_of
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter

WEIGHTS = "adapters.safetensors"
SETTINGS = "adapter_config.json"


def settings(adapter: Adapter, blocks: int | None = None) -> dict[str, Any]:
    """adapter_config.json of an adapter of one rank and alpha: what mlx-lm reads, and alpha.

    Where the same modules of the last of the model's `blocks` are adapted, mlx-lm's usual short form names them; else
    every path stands in full.
    """
    if adapter.uniform is None:
        raise ValueError("the adapter has several ranks or alphas: fold it first")
    rank, alpha = adapter.uniform
    layers, keys = _layers_and_keys(list(adapter.pairs), blocks)
    return {
        "fine_tune_type": "lora",
        "model": adapter.base.path if adapter.base else None,
        "num_layers": layers,
        "lora_parameters": {
            "rank": rank,
            "scale": alpha / rank,
            "alpha": alpha,
            "dropout": adapter.dropout,
            "keys": keys,
        },
    }


def save(folder: Path, arrays: dict[str, mx.array], settings: dict[str, Any], metadata: dict[str, str]) -> None:
    """Writes both files, each whole or not at all; `metadata` goes into the header of the safetensors file."""
    with files.new_file(folder / SETTINGS) as path:
        files.write_json(path, settings)
    with files.new_file(folder / WEIGHTS) as path:
        mx.save_safetensors(str(path), arrays, metadata)


def read(folder: Path) -> Adapter:
    """The adapter in `folder`. Raises InputError naming the file and what is wrong with it.

    What is adapted is told by the arrays: a module that the settings name and no array belongs to has no update.
    """
    path = folder / SETTINGS
    config = settings_of(path)
    options = config.get("lora_parameters")
    if not isinstance(options, dict) or config.get("fine_tune_type", "lora") != "lora":
        raise InputError(f"{path}: describes no LoRA adapter in mlx-lm's form (full and DoRA are not supported)")
    rank = positive_whole(path, "rank", options.get("rank"))
    scale = finite_number(path, "scale", options.get("scale"))
    dropout = finite_number(path, "dropout", options.get("dropout", 0.0), 0, 1)
    alpha = options.get("alpha")  # ours; scale alone would lose its last digits
    if not isinstance(alpha, (int, float)) or not math.isclose(alpha, scale * rank, rel_tol=1e-6):
        alpha = scale * rank
    arrays, metadata = arrays_of(folder / WEIGHTS)
    try:
        pairs = lora.pairs_of(arrays, float(alpha))
        lora.check_finite(pairs.items())
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}") from None
    for module, pair in pairs.items():
        if pair.rank != rank:
            raise InputError(f"{folder / WEIGHTS}: {module} has rank {pair.rank}, {SETTINGS} says {rank}")
    return Adapter(pairs, dropout, base_named(path, config.get("model")), metadata)


def _layers_and_keys(paths: list[str], blocks: int | None) -> tuple[int, list[str]]:
    """`num_layers` and `keys` that make mlx-lm adapt exactly `paths`."""
    inside = {path: number for path in paths if (number := lora.block_number(path)) is not None}
    names = list(dict.fromkeys(_within_block(path) for path in inside))
    numbers = sorted(set(inside.values()))
    whole = {(number, _within_block(path)) for path, number in inside.items()}
    last = blocks is not None and numbers == list(range(blocks - len(numbers), blocks))
    if numbers and last and len(whole) == len(numbers) * len(names):
        return len(numbers), names + [path for path in paths if path not in inside]
    return blocks or 1 + max(numbers, default=0), paths


def _within_block(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``self_attn.q_proj``."""
    return path.split("layers.", 1)[1].split(".", 1)[1]
