"""Files of adapters, read and checked: what the forms have in common."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.config import Model
from mlx_lora.errors import InputError


def settings_of(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises InputError naming it."""
    _require_file(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.parent}: holds no adapter ({path.name}: {error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not a JSON object")
    return config


def arrays_of(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the metadata of a safetensors file; evaluated, so that later changes of the file
    change nothing."""
    _require_file(path)
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not arrays:
        raise InputError(f"{path}: holds no arrays")
    return dict(arrays), dict(metadata)


def _require_file(path: Path) -> None:
    """Raises InputError for a folder, a device or a pipe, some of which have no end. What is missing passes."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no file")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def fitting_arrays(path: Path, places: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a safetensors file, which must fit `places` in name, shape and type."""
    arrays, _ = arrays_of(path)
    if names := sorted(places.keys() ^ arrays.keys()):
        side = "is missing" if names[0] in places else "has no place in this model"
        more = f" (and {len(names) - 1} more differ)" if len(names) > 1 else ""
        raise InputError(f"{path}: {names[0]} {side}{more}; is it another base's adapter?")
    for name, place in places.items():
        if arrays[name].shape != place.shape:
            raise InputError(f"{path}: {name} has shape {arrays[name].shape}, this model needs {place.shape}")
    return {name: arrays[name].astype(place.dtype) for name, place in places.items()}


def base_named(path: Path, name: Any, revision: Any = None) -> Model | None:
    """The base that a settings file names."""
    try:
        return Model(path=name, revision=revision or None) if name else None
    except ValueError:
        raise InputError(f"{path}: the base's name {name!r} or revision {revision!r} is no name") from None


def positive_whole(path: Path, key: str, value: Any) -> int:
    """A setting that must be a positive whole number."""
    if type(value) is not int or not 0 < value < 2**31:
        raise InputError(f"{path}: {key} is {value}, not a positive whole number")
    return value


def finite_number(path: Path, key: str, value: Any, least: float = -1e30, below: float = 1e30) -> float:
    """A setting that must be a number from `least` to below `below`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < below:
        raise InputError(f"{path}: {key} is {value}, not a number from {least:g} to below {below:g}")
    return float(value)
