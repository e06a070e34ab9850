"""LoRA fine-tuning on MLX, Apple Silicon first.

from mlx_lora import finetune
result = finetune("configs/quickstart.yaml", ["train.max_steps=20"])
print(result.final_loss, result.best_loss, result.seconds)
"""

import importlib
from typing import Any

from mlx_lora import blas

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "mlx_lora.config",
    "InputError": "mlx_lora.errors",
    "Interrupted": "mlx_lora.errors",
    "Result": "mlx_lora.loop",
    "finetune": "mlx_lora.train",
}
__all__ = sorted(_PUBLIC)

blas.preload()


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: importing the package loads neither MLX nor transformers."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
