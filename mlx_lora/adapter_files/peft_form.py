"""PEFT's form of an adapter: adapter_model.safetensors and adapter_config.json."""

from pathlib import Path

from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter


def read(folder: Path) -> Adapter:
    raise InputError(f"{folder}: PEFT adapters are not read yet")
