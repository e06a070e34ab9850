"""Gradient checkpointing at every level: the same numbers in less memory, and nothing else changed."""

import re
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models import lfm2, mamba2, mixtral

from mlx_lora import lora
from mlx_lora.config import Lora, Train
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import Level, checkpoint_blocks
from mlx_lora.step import prepare

LEVELS: list[Level] = ["selective", 3, 2, "mlp", True]


def adapted(name: str = "llama", dropout: float = 0.3, **shape: Any) -> nn.Module:
    model = tiny.BUILDERS[name](**{"num_hidden_layers": 4, **shape})
    lora.attach(model, Lora(rank=4, alpha=8.0, dropout=dropout, target_modules="all-linear"), seed=1)
    tiny.randomize(model)
    return model


def gradients(model: nn.Module, ids: mx.array, compiled: bool = False) -> dict[str, mx.array]:
    """Of a sum over the logits, for every adapter array; the model is left as it was."""

    def loss(adapter: dict[str, mx.array]) -> mx.array:
        lora.set_parameters(model, adapter)
        return mx.sin(model(ids)).sum()

    adapter = lora.parameters(model)
    lora.set_dropout_key(model, mx.random.key(5))
    try:
        return (mx.compile(mx.grad(loss)) if compiled else mx.grad(loss))(adapter)
    finally:
        lora.set_dropout_key(model, None)
        lora.set_parameters(model, adapter)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "compiled"), [("llama", False), ("llama", True), ("qwen3_moe", False)])
def test_no_gradient_changes(name, compiled, level):
    """Not by one bit where all is recomputed; otherwise the parts of a gradient may be added in another order."""
    kept, recomputed = adapted(name), adapted(name)
    checkpoint_blocks(recomputed, level)
    expected = tiny.copies(gradients(kept, tiny.tokens(), compiled))
    found = tiny.copies(gradients(recomputed, tiny.tokens(), compiled))
    for path, array in expected.items():
        tolerance = 0.0 if level is True else 2e-6 * np.abs(array).max()
        np.testing.assert_allclose(found[path], array, rtol=0, atol=tolerance, err_msg=path)
    without = tiny.copies(gradients(adapted(name, dropout=0.0), tiny.tokens()))
    assert any(not np.array_equal(without[path], expected[path]) for path in expected)  # dropout did something


def test_what_is_recomputed_takes_no_memory():
    ids, peaks = tiny.tokens(4, 256), []
    for level in (None, *LEVELS):
        model = adapted(dropout=0.0, num_hidden_layers=16, intermediate_size=192, vocab_size=128)
        if level is not None:
            checkpoint_blocks(model, level)
        mx.eval(model.parameters())
        peaks.append(tiny.peak(lambda model=model: gradients(model, ids, compiled=True)))
    none, selective, *some, every = peaks
    assert every < min(some)
    assert max(some) < 0.95 * selective
    assert selective < 0.5 * none


def test_another_checkpointed_block_keeps_its_input_alone():
    """From 10 blocks on too, where paths in the order of the alphabet would have block 10 before block 2."""
    ids, peaks = tiny.tokens(4, 256), []
    for blocks in (8, 24):
        model = adapted(dropout=0.0, num_hidden_layers=blocks, intermediate_size=192, vocab_size=128)
        checkpoint_blocks(model, True)
        mx.eval(model.parameters())
        peaks.append(tiny.peak(lambda model=model: gradients(model, ids, compiled=True)))
        adapter = sum(array.nbytes for array in lora.parameters(model).values()) / blocks
    hidden = 4 * ids.size * model.args.hidden_size
    assert (peaks[1] - peaks[0]) / 16 < 1.5 * (hidden + adapter)


def test_uncompiled_too_only_one_block_keeps_what_was_recomputed():
    """MLX by itself would leave the gradients of all blocks' adapters for the end."""
    ids, peaks = tiny.tokens(4, 256), []
    for blocks in (2, 8):
        model = adapted(dropout=0.0, num_hidden_layers=blocks, intermediate_size=192, vocab_size=128)
        checkpoint_blocks(model, True)
        mx.eval(model.parameters())
        peaks.append(tiny.peak(lambda model=model: gradients(model, ids)))
    assert peaks[1] < 1.5 * peaks[0]


def test_a_block_without_adapter_between_adapted_ones_is_recomputed_too():
    kept, recomputed = (tiny.llama(num_hidden_layers=3) for _ in range(2))
    for model in (kept, recomputed):
        lora.attach(model, Lora(rank=4, layers=[0, 2]), seed=1)
        tiny.randomize(model)
    checkpoint_blocks(recomputed)
    expected, found = (tiny.copies(gradients(model, tiny.tokens())) for model in (kept, recomputed))
    tiny.assert_identical(found, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_only_the_parts_of_its_model_that_the_level_names_change(level):
    other, model = adapted(), adapted()
    checkpoint_blocks(model, level)
    blocks = [f"model.layers.{number}" for number in range(4)]
    assert changed(model, other) == sorted(blocks + [f"{block}.mlp" for block in blocks if level == "mlp"])
    assert changed(adapted(), other) == []
    assert list(lora.parameters(model)) == list(lora.parameters(other))


def changed(model: nn.Module, other: nn.Module) -> list[str]:
    """The paths of modules that are called otherwise than those of another model."""
    others = dict(other.named_modules())
    return sorted(
        path for path, module in model.named_modules() if type(module).__call__ is not type(others[path]).__call__
    )


def of_mixtral() -> nn.Module:
    return mixtral.Model(
        mixtral.ModelArgs("mixtral", 128, 32, 48, 4, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    )


def of_lfm2() -> nn.Module:
    return lfm2.Model(
        lfm2.ModelArgs(
            "lfm2", vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=32, block_ff_dim=64,
            block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, rope_theta=1e4,
            full_attn_idxs=[1],
        )
    )  # fmt: skip


@pytest.mark.parametrize(("build", "name"), [(of_mixtral, "block_sparse_moe"), (of_lfm2, "feed_forward")])
def test_mlps_are_found_under_other_names(build, name):
    model = build()
    checkpoint_blocks(model, "mlp")
    assert {f"model.layers.{number}.{name}" for number in range(4)} <= set(changed(model, build()))


def test_blocks_without_mlps_are_refused():
    model = mamba2.Model(
        mamba2.ModelArgs(
            "mamba2", num_heads=4, head_dim=16, vocab_size=128, hidden_size=32, intermediate_size=64, state_size=8,
            num_hidden_layers=2, layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=1, use_bias=False,
            use_conv_bias=True, tie_word_embeddings=True, time_step_limit=(0.0, 100.0), time_step_rank="auto",
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="no block has an MLP"):
        checkpoint_blocks(model, "mlp")


class Gated(nn.Module):
    """A block that takes an array by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([0.5, -2.0])

    def __call__(self, x: mx.array, *, gate: mx.array, fail: bool = False) -> mx.array:
        if fail:
            raise RuntimeError("on purpose")
        return mx.sin(self.weight * x) * gate


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Gated()]


def test_gradients_reach_arrays_that_are_given_by_name():
    x, gate = mx.array([1.0, 2.0]), mx.array([3.0, 4.0])
    expected, actual = (
        mx.grad(lambda x, gate, block=block: block(x, gate=gate).sum(), argnums=(0, 1))(x, gate)
        for block in (Gated(), checkpointed_gated())
    )
    assert all(mx.array_equal(one, other).item() for one, other in zip(actual, expected, strict=True))
    assert mx.array_equal(actual[1], mx.sin(mx.array([0.5, -4.0]))).item()


def checkpointed_gated() -> nn.Module:
    model = Stack()
    checkpoint_blocks(model)
    return model.layers[0]


@pytest.mark.parametrize("fail", [False, True])
def test_no_tracer_stays_in_the_model(fail):
    block = checkpointed_gated()
    kept = block.weight

    @mx.compile
    def gradient(x: mx.array, gate: mx.array) -> mx.array:
        return mx.grad(lambda x: block(x, gate=gate, fail=fail).sum())(x)

    with pytest.raises(RuntimeError, match="on purpose") if fail else nullcontext():
        gradient(mx.array([1.0, 2.0]), mx.array([3.0, 4.0]))
    assert block.weight is kept


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="elsewhere MLX's own attention runs again")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_no_product_is_computed_again_where_only_the_rest_is(name, targets, tmp_path):
    """By the operations in the graph of all gradients."""

    def products(level: Level) -> int:
        model = tiny.BUILDERS[name](num_hidden_layers=4)
        lora.attach(model, Lora(rank=4, target_modules=targets), seed=1)
        prepare(model, Train(gradient_checkpointing=level))
        mx.export_to_dot(str(tmp_path / "graph"), *gradients(model, tiny.tokens()).values())
        return len(re.findall(r'label ?="(?:Matmul|AddMM|GatherMM)"', (tmp_path / "graph").read_text()))

    assert products("selective") == products(False) > 0
    assert products("selective") < products("mlp") < products(True)
