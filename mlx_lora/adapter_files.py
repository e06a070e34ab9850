"""An adapter on disk, in mlx-lm's form: adapters.safetensors and adapter_config.json in one folder."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import config_file, files, lora
from mlx_lora.config import Config, Model
from mlx_lora.errors import InputError

WEIGHTS = "adapters.safetensors"
SETTINGS = "adapter_config.json"
RUN_CONFIG = "config.yaml"


def settings(model: nn.Module, config: Config) -> dict[str, Any]:
    """adapter_config.json for the adapter that is attached to `model`: what mlx-lm reads, and alpha."""
    layers, keys = _blocks_and_keys(model, list(lora.layers(model)))
    return {
        "fine_tune_type": "lora",
        "model": config.model.path,
        "num_layers": layers,
        "lora_parameters": {
            "rank": config.lora.rank,
            "scale": config.lora.alpha / config.lora.rank,
            "alpha": config.lora.alpha,
            "dropout": config.lora.dropout,
            "keys": keys,
        },
    }


def save(folder: Path, arrays: dict[str, mx.array], settings: dict[str, Any], metadata: dict[str, str]) -> None:
    """Writes both files, each whole or not at all; `metadata` goes into the header of the safetensors file."""
    with files.new_file(folder / SETTINGS) as path:
        files.write_json(path, settings)
    with files.new_file(folder / WEIGHTS) as path:
        mx.save_safetensors(str(path), arrays, metadata)


def load(model: nn.Module, folder: str | Path) -> list[str]:
    """Attaches the adapter in `folder` (ours or mlx-lm's LoRA) to the model and returns the adapted paths.

    Every array must have its place and every place its array. Raises InputError naming the file and what differs.
    """
    folder = Path(folder)
    config = read_settings(folder)
    options = config["lora_parameters"]
    paths = _paths(model, config["num_layers"], options.get("keys"))
    if not paths:
        raise InputError(f"{folder / SETTINGS}: its keys name no layer of this model; is it another base's adapter?")
    rank = options["rank"]
    lora.attach_at(model, paths, rank, options["scale"] * rank, options.get("dropout", 0.0))
    try:
        lora.set_parameters(model, read_arrays(folder / WEIGHTS, lora.parameters(model)))
    except InputError:
        lora.detach(model)
        raise
    return paths


def read_arrays(path: Path, places: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a safetensors file, which must fit `places` in name, shape and type; evaluated, so that a later
    change of the file changes nothing."""
    try:
        arrays = dict(mx.load(str(path)))
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if names := sorted(places.keys() ^ arrays.keys()):
        side = "is missing" if names[0] in places else "has no place in this model"
        more = f" (and {len(names) - 1} more differ)" if len(names) > 1 else ""
        raise InputError(f"{path}: {names[0]} {side}{more}; is it another base's adapter?")
    for name, place in places.items():
        if arrays[name].shape != place.shape:
            raise InputError(f"{path}: {name} has shape {arrays[name].shape}, this model needs {place.shape}")
    return {name: arrays[name].astype(place.dtype) for name, place in places.items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked. Raises InputError for what is no LoRA adapter of this form."""
    path = folder / SETTINGS
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder}: holds no adapter ({SETTINGS}: {error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from None
    options = config.get("lora_parameters") if isinstance(config, dict) else None
    if not isinstance(options, dict) or config.get("fine_tune_type", "lora") != "lora":
        raise InputError(f"{path}: describes no LoRA adapter in mlx-lm's form")
    rank, scale, count = options.get("rank"), options.get("scale"), config.get("num_layers")
    keys, dropout = options.get("keys"), options.get("dropout", 0.0)
    if type(rank) is not int or not 0 < rank < 2**31:
        raise InputError(f"{path}: rank is {rank}, not a positive whole number")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) < 1e30:
        raise InputError(f"{path}: scale is {scale}, not a finite number")
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise InputError(f"{path}: dropout is {dropout}, not a share below 1")
    if type(count) is not int:
        raise InputError(f"{path}: num_layers is {count}, not a whole number")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise InputError(f"{path}: keys is not a list of module paths")
    return config


def base_of(folder: str | Path) -> Model:
    """The base that the adapter in `folder` was trained on: from the run's config, else from adapter_config.json."""
    folder = Path(folder)
    if (path := run_config(folder)).is_file():
        return config_file.load(path).model
    name = read_settings(folder).get("model")
    if not isinstance(name, str):
        raise InputError(f"{folder / SETTINGS}: does not name its base; give it with --model")
    return Model(path=name)


def run_config(folder: Path) -> Path:
    """The config of the run that an adapter's folder is, or is a checkpoint of."""
    in_run = folder.resolve().parent.parent / RUN_CONFIG
    return in_run if in_run.is_file() and not (folder / RUN_CONFIG).is_file() else folder / RUN_CONFIG


def _blocks_and_keys(model: nn.Module, paths: list[str]) -> tuple[int, list[str]]:
    """`num_layers` and `keys` that make mlx-lm adapt exactly `paths`: the usual short form where the same modules of
    the last blocks are adapted, else every path in full."""
    count = len(model.layers)
    inside = [path for path in paths if lora.block_number(path) is not None]
    blocks = {lora.block_number(path) for path in inside}
    names = list(dict.fromkeys(_within_block(path) for path in inside))
    keys = names + [path for path in paths if path not in inside]
    if blocks and set(_paths(model, len(blocks), keys)) == set(paths):
        return len(blocks), keys
    return count, paths


def _paths(model: nn.Module, num_layers: int, keys: list[str] | None) -> list[str]:
    """The paths that mlx-lm adapts for these settings."""
    count = len(model.layers)
    first = count - num_layers if num_layers > 0 else 0
    chosen = []
    for path in lora.adaptable(model):
        number = lora.block_number(path)
        in_block = number is not None and number >= first and (keys is None or _within_block(path) in keys)
        if in_block or (keys is not None and path in keys):
            chosen.append(path)
    return chosen


def _within_block(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``self_attn.q_proj``."""
    return path.split("layers.", 1)[1].split(".", 1)[1]
