"""Tiny random models, built by mlx-lm's own classes without files or tokenizers, and adapters that do something."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama as mlx_llama
from mlx_lm.models import qwen2 as mlx_qwen2
from mlx_lm.models import qwen3 as mlx_qwen3
from mlx_lm.models import qwen3_moe as mlx_qwen3_moe

from mlx_lora import lora

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def llama(seed: int = 0, **shape: Any) -> nn.Module:
    return _build(mlx_llama, {"model_type": "llama"}, seed, shape)


def qwen2(seed: int = 0, **shape: Any) -> nn.Module:
    return _build(mlx_qwen2, {"model_type": "qwen2"}, seed, shape)


def qwen3(seed: int = 0, **shape: Any) -> nn.Module:
    return _build(mlx_qwen3, {"model_type": "qwen3", "head_dim": 32}, seed, shape)


def qwen3_moe(seed: int = 0, **shape: Any) -> nn.Module:
    experts = {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    return _build(mlx_qwen3_moe, experts, seed, shape)


BUILDERS = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe}


def _build(module: Any, family: dict[str, Any], seed: int, shape: dict[str, Any]) -> nn.Module:
    """A model whose arrays are still to be computed: nothing is allocated before they are used."""
    mx.random.seed(seed)
    return module.Model(module.ModelArgs(**{**SHAPE, **family, **shape}))


def randomize(model: nn.Module, seed: int = 7, size: float = 0.05) -> None:
    """Gives every lora_b random numbers, so that the adapter changes the output."""
    random = np.random.default_rng(seed)
    arrays = {
        name: mx.array(random.normal(0, size, array.shape).astype(np.float32))
        for name, array in lora.parameters(model).items()
        if name.endswith("lora_b")
    }
    lora.set_parameters(model, arrays)


def tokens(rows: int = 2, width: int = 12, vocabulary: int = 128, seed: int = 3) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, vocabulary, (rows, width)))


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def copies(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a model or tree as a numpy copy, by path."""
    flat = tree_flatten(tree.parameters() if isinstance(tree, nn.Module) else tree)
    return {name: np.array(array, copy=True) for name, array in flat if isinstance(array, mx.array)}


def assert_identical(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, NaN included."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        assert actual[name].tobytes() == array.tobytes(), f"{name} changed"


def peak(compute: Callable[[], Any]) -> int:
    """The bytes that a computation needs beyond what is there; MLX's scheduler does not run ahead."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, limit = mx.get_active_memory(), mx.set_memory_limit(1)
    try:
        mx.eval(compute())
    finally:
        mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before
