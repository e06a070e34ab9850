"""LoRA layers and the operations on a model that carries them."""

from mlx_lora.lora.adapter import (
    Count,
    attach,
    attach_at,
    count,
    detach,
    disable,
    enable,
    layers,
    merge,
    parameters,
    set_dropout_key,
    set_parameters,
    unmerge,
)
from mlx_lora.lora.layers import LoRAEmbedding, LoRALayer, LoRALinear, LoRASwitchLinear, weight_shape
from mlx_lora.lora.targets import adaptable, block_number, select

__all__ = [
    "Count",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRASwitchLinear",
    "adaptable",
    "attach",
    "attach_at",
    "block_number",
    "count",
    "detach",
    "disable",
    "enable",
    "layers",
    "merge",
    "parameters",
    "select",
    "set_dropout_key",
    "set_parameters",
    "unmerge",
    "weight_shape",
]
