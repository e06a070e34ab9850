"""Adapters on disk, in any form that is read: mlx-lm's (ours) and PEFT's."""

from pathlib import Path

import mlx.nn as nn

from mlx_lora import config_file, lora
from mlx_lora.adapter_files import mlx_form, peft_form
from mlx_lora.adapter_files.reading import settings_of
from mlx_lora.config import Model
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter

CHECKPOINTS = "checkpoints"  # a run's folder of them


def read(folder: str | Path) -> Adapter:
    """The adapter in a run's folder, a checkpoint, or a folder of mlx-lm or PEFT.

    Raises InputError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and not folder.is_dir():
        raise InputError(f"{folder}: a GGUF file is no adapter that is read here; give the folder it was made from")
    form = peft_form if "peft_type" in settings_of(folder / mlx_form.SETTINGS) else mlx_form
    return form.read(folder)


def load(model: nn.Module, folder: str | Path) -> Adapter:
    """Reads the adapter in `folder` and attaches it to `model`. Raises InputError where it does not fit."""
    adapter = read(folder)
    check(model, adapter, folder)
    lora.attach_adapter(model, adapter)
    return adapter


def check(model: nn.Module, adapter: Adapter, folder: str | Path) -> None:
    """Raises InputError where the adapter that was read from `folder` does not fit `model`."""
    try:
        lora.check_fit(model, adapter)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    peft_form.check_tying(Path(folder), adapter, tied="lm_head" not in dict(model.named_modules()))


def base_of(folder: str | Path) -> Model:
    """The base that the adapter in `folder` was trained on: from the run's config, else from adapter_config.json."""
    folder = Path(folder)
    if (path := run_config(folder)).is_file():
        return config_file.load(path).model
    base = read(folder).base
    if base is None:
        raise InputError(f"{folder / mlx_form.SETTINGS}: does not name its base; give it with --model")
    return base


def run_config(folder: Path) -> Path:
    """The config of the run that an adapter's folder is, or is a checkpoint of."""
    parent = folder.resolve().parent
    return (parent.parent if parent.name == CHECKPOINTS else folder) / config_file.RUN_CONFIG
