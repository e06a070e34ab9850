"""LoRA layers and the operations on a model that carries them."""

from mlx_lora.lora.adapter import (
    Count,
    attach,
    attach_adapter,
    attach_at,
    attached,
    check_fit,
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
from mlx_lora.lora.value import Adapter, Pair, check_finite, pairs_of

__all__ = [
    "Adapter",
    "Count",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRASwitchLinear",
    "Pair",
    "adaptable",
    "attach",
    "attach_adapter",
    "attach_at",
    "attached",
    "block_number",
    "check_finite",
    "check_fit",
    "count",
    "detach",
    "disable",
    "enable",
    "layers",
    "merge",
    "pairs_of",
    "parameters",
    "select",
    "set_dropout_key",
    "set_parameters",
    "unmerge",
    "weight_shape",
]
