"""Logits at chosen positions are those of the whole model, bit for bit, whatever its head is."""

import importlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora import lora
from mlx_lora.config import Lora
from mlx_lora.head import logits_function

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "rope_theta": 1e4,
}
MODELS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "scaled": ("cohere", {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "layer_norm_bias": False}),
    "capped": ("gemma2", {"query_pre_attn_scalar": 8.0, "final_logit_softcapping": 3.0}),
}


def build(name):
    kind, more = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict({"model_type": kind, **SMALL, **more}))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_at_positions_are_those_of_the_whole_model(name, adapted):
    model = build(name)
    if adapted:
        lora.attach(model, Lora(target_modules=["q_proj", "embed_tokens"]))
        grown = {key: mx.random.normal(array.shape) for key, array in lora.parameters(model).items()}
        lora.set_parameters(model, grown)
    ids = mx.random.randint(0, 61, (3, 7))
    whole = np.array(model(ids)).reshape(21, 61)
    logits = logits_function(model)
    np.testing.assert_array_equal(np.array(logits(ids, None)), whole)
    positions = mx.array([20, 3, 4, 11])
    np.testing.assert_allclose(np.array(logits(ids, positions)), whole[[20, 3, 4, 11]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "split"), [("tied", True), ("untied", True), ("scaled", False), ("capped", False)])
def test_only_a_plain_head_is_split_off(name, split):
    assert (logits_function(build(name)).__name__ == "at_positions") == split
