"""The prefix cache: training goes on as without it, wherever it is kept; models that it does not fit are refused."""

import importlib
import resource

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlx_lora import lora
from mlx_lora.batches import Batches
from mlx_lora.config import Lora
from mlx_lora.data import Example
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import checkpoint_blocks
from mlx_lora.prefix import PrefixCache, choose, first_adapted_block, size, unusable

# Sorted all together, in batches of four each row meets other rows every epoch, in a batch of the same shape.
LENGTHS = [6, 7, 8, 9] * 2 + [20] * 8 + [42, 44, 47, 49] * 2 + [150] * 4


@pytest.fixture
def same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lora.batches.SHARE", 1)


def rows_of(lengths) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(1, 128, length).astype(np.int32), random.random(length) < 0.7, "rows")
        for length in lengths
    ]


def other(kind: str, **settings) -> nn.Module:
    """A tiny model of mlx-lm's, of a kind that tiny.py has no builder for."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    shape = {**tiny.SHAPE, "model_type": kind, "head_dim": 16, "num_hidden_layers": 6}
    return module.Model(module.ModelArgs.from_dict({**shape, **settings}))


def adapted(model: nn.Module | None = None, layers="last:2", patterns="all-linear", dropout=0.0) -> nn.Module:
    """A Llama of four blocks, or the given model, with an adapter that does something."""
    model = model or tiny.llama(num_hidden_layers=4)
    lora.attach(model, Lora(rank=4, dropout=dropout, target_modules=patterns, layers=layers), seed=1)
    tiny.randomize(model)
    return model


def trained(model, batches, cache=None, compiled=True) -> dict[str, np.ndarray]:
    """Losses and gradients of every batch in two epochs of descent. Leaves the model as it was."""

    def summed_loss(adapter, inputs, targets, mask, kept, key):
        lora.set_parameters(model, adapter)
        lora.set_dropout_key(model, key)
        hidden = model.model(inputs) if cache is None else cache.rest(inputs, kept)
        logits = model.lm_head(hidden) if "lm_head" in model else model.model.embed_tokens.as_linear(hidden)
        return (nn.losses.cross_entropy(logits.astype(mx.float32), targets) * mask).sum()

    value_and_gradients = mx.value_and_grad(summed_loss)
    if compiled:
        value_and_gradients = mx.compile(value_and_gradients)
    start = adapter = lora.parameters(model)
    found = {}
    for number, [batch] in enumerate(batches.steps(0, 2 * batches.steps_per_epoch)):
        kept = None if cache is None else mx.array(cache.inputs(batch))
        arrays = map(mx.array, (batch.inputs, batch.targets, batch.mask))
        loss, gradients = value_and_gradients(adapter, *arrays, kept, mx.random.key(number))
        found[f"{number} loss"] = np.array(loss)
        found |= {f"{number} {name}": np.array(gradient) for name, gradient in gradients.items()}
        adapter = {name: array - 1e-4 * gradients[name] for name, array in adapter.items()}
    lora.set_parameters(model, start)
    lora.set_dropout_key(model, None)
    return found


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("same_shapes")
@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_losses_and_gradients_of_two_epochs_are_the_same_bit_for_bit(name, tmp_path):
    model = adapted(tiny.BUILDERS[name](num_hidden_layers=4))
    batches = Batches(rows_of(LENGTHS), 4, seed=0)
    assert [set(rows) for [rows] in batches.epoch(0)] != [set(rows) for [rows] in batches.epoch(1)]
    without = trained(model, batches)
    tiny.assert_identical(trained(model, batches, PrefixCache(model, batches)), without)
    tiny.assert_identical(trained(model, batches, PrefixCache(model, batches, tmp_path)), without)


@pytest.mark.usefixtures("same_shapes")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_the_same_bit_for_bit(dtype, tmp_path):
    model = tiny.llama(num_hidden_layers=3)
    model.set_dtype(dtype)
    model, batches = adapted(model), Batches(rows_of(LENGTHS[:16]), 4, seed=0)
    cache = PrefixCache(model, batches, tmp_path)
    assert cache.rest(mx.array([[1]]), mx.zeros((1, 1, 64), mx.uint16)).dtype == dtype
    tiny.assert_identical(trained(model, batches, cache), trained(model, batches))


@pytest.mark.usefixtures("same_shapes")
@pytest.mark.parametrize("case", ["eager", "dropout", "checkpointed before", "checkpointed after", "head", "head only"])
def test_whatever_the_upper_part_does_is_the_same_bit_for_bit(case):
    patterns = {"head": ["all-linear", "lm_head"], "head only": ["lm_head"]}.get(case, "all-linear")
    model = adapted(
        tiny.llama(num_hidden_layers=4, tie_word_embeddings=False),
        patterns=patterns,
        dropout=0.3 if case != "eager" else 0.0,
    )
    batches = Batches(rows_of(LENGTHS), 4, seed=0)
    if case == "checkpointed before":
        checkpoint_blocks(model)
    cache = PrefixCache(model, batches)
    if case == "checkpointed after":
        checkpoint_blocks(model)
    compiled = case != "eager"
    tiny.assert_identical(trained(model, batches, cache, compiled), trained(model, batches, compiled=compiled))


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_batches_of_other_shapes_differ_by_rounding_alone(name):
    rows = rows_of(np.random.default_rng(1).integers(4, 150, 40))
    model, batches = adapted(tiny.BUILDERS[name](num_hidden_layers=4)), Batches(rows, 3, seed=5)
    cache = PrefixCache(model, Batches(rows, 8, seed=0))
    without, cached = trained(model, batches), trained(model, batches, cache)
    assert cached.keys() == without.keys()
    for key, expected in without.items():
        np.testing.assert_allclose(cached[key], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=key)


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2}
MODELS = {  # what the inner models of mlx-lm do besides running their blocks
    "llama": SLIDING,  # masks by the blocks' own attribute, made from the first of each kind
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3},  # masks by number; scaled embeddings
    "gemma2": {"query_pre_attn_scalar": 16.0},
    "phi3": {},
    "cohere": {"layer_norm_eps": 1e-5, "layer_norm_bias": False},
    "ministral3": {  # queries scaled by the tokens' places
        **SLIDING,
        "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8},
    },
}


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_masks_and_scales_remain_those_of_the_model(kind, last):
    """Rows are longer than the sliding windows, and blocks are cut off at places where their pattern shifts."""
    model = adapted(other(kind, **MODELS[kind]), layers=f"last:{last}")
    assert unusable(model) is None
    batches = Batches(rows_of([33] * 3), 3, seed=0)
    [batch] = batches.in_order()
    cache, ids = PrefixCache(model, batches), mx.array(batch.inputs)
    above = np.array(cache.rest(ids, mx.array(cache.inputs(batch))))[:, :32]
    np.testing.assert_array_equal(above, np.array(model.model(ids))[:, :32])


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_kept_is_what_the_lower_blocks_give_and_zeros_elsewhere():
    model, batches = adapted(layers="last:1"), Batches(rows_of([5, 30, 12, 9, 2]), 2, seed=0)
    cache = PrefixCache(model, batches)
    seen = []
    for batch in batches.in_order():
        hidden = model.model.embed_tokens(mx.array(batch.inputs))
        for block in model.model.layers[:3]:
            hidden = block(hidden, "causal", None)
        expected = np.zeros_like(np.array(hidden))
        for line, row in enumerate(batch.rows):
            length = batches.examples[row].tokens.size - 1
            expected[line, :length] = np.array(hidden)[line, :length]
            seen.append(row)
        np.testing.assert_array_equal(cache.inputs(batch).view(np.float32), expected)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_packed_rows_are_laid_out_where_they_stand():
    rows = rows_of([5, 30, 12, 9, 2, 40])
    packed, plain = Batches(rows, 3, seed=0, packing=True), Batches(rows, 3, seed=0)
    model = adapted()
    cache = PrefixCache(model, packed)
    alone = {}
    for batch in plain.in_order():
        laid_out = PrefixCache(model, plain).inputs(batch)
        alone |= {row: laid_out[line, : rows[row].tokens.size - 1] for line, row in enumerate(batch.rows)}
    for batch in packed.in_order():
        assert len(batch.rows) > batch.inputs.shape[0] == 1
        expected = np.zeros((*batch.inputs.shape, 64), np.uint32)
        for row, (line, column) in zip(batch.rows, batch.places, strict=True):
            kept = alone.pop(row)
            expected[line, column : column + len(kept)] = kept
        np.testing.assert_array_equal(cache.inputs(batch), expected)
    assert not alone


def test_filling_depends_on_the_rows_alone(tmp_path):
    """So a resumed run goes on with the numbers that the interrupted one had."""
    model, rows = adapted(), rows_of(np.random.default_rng(1).integers(4, 60, 50))
    fresh, used = Batches(rows, 4, seed=3), Batches(rows, 4, seed=3)
    first = PrefixCache(model, fresh)
    assert len(list(used.steps(0, 20))) == 20
    lora.set_parameters(model, {name: array + 1 for name, array in lora.parameters(model).items()})
    again = PrefixCache(model, used, tmp_path)
    for batch in fresh.in_order():
        np.testing.assert_array_equal(again.inputs(batch), first.inputs(batch))


def test_the_lower_part_is_not_run_again():
    model, batches = adapted(), Batches(rows_of([20] * 4), 4, seed=0)
    cache, [batch] = PrefixCache(model, batches), batches.in_order()
    ids, kept = mx.array(batch.inputs), mx.array(cache.inputs(batch))
    before = np.array(cache.rest(ids, kept))
    for part in (model.model.embed_tokens, *model.model.layers[:2]):
        part.update(nn.utils.tree_map(lambda array: mx.full(array.shape, mx.nan), part.parameters()))
    np.testing.assert_array_equal(np.array(cache.rest(ids, kept)), before)
    assert np.isnan(np.array(model.model(ids))).all()


@pytest.mark.parametrize(("dtype", "bytes_each"), [(mx.float32, 4), (mx.bfloat16, 2)])
def test_size_is_that_of_the_rows_without_padding(dtype, bytes_each):
    model, batches = tiny.llama(num_hidden_layers=4), Batches(rows_of([5, 100, 7]), 3, seed=0)
    model.set_dtype(dtype)
    adapted(model)
    assert size(model, batches) == (4 + 99 + 6) * 64 * bytes_each == PrefixCache(model, batches)._kept.nbytes


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_file_has_no_name(tmp_path):
    batches = Batches(rows_of([20] * 4), 4, seed=0)
    cache, [batch] = PrefixCache(adapted(), batches, tmp_path), batches.in_order()
    assert list(tmp_path.iterdir()) == []
    assert cache.inputs(batch).any()


def test_a_file_that_cannot_be_made_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: the prefix cache of 0\.00 GB cannot be written \(No such file"):
        PrefixCache(adapted(), Batches(rows_of([20] * 4), 4, seed=0), tmp_path / "nowhere")


def test_a_file_that_cannot_grow_is_an_input_error(tmp_path):
    """The limit on the size of files stands for a full disk: writing fails midway."""
    model, batches = adapted(), Batches(rows_of([60] * 16), 4, seed=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size(model, batches) // 2, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\); make room, or set train.prefix_c"):
            PrefixCache(model, batches, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# ---- whether it is used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "patterns", "first"), [("last:3", "all-linear", 1), ("all", ["lm_head"], 4)])
def test_a_row_of_blocks_is_usable(layers, patterns, first):
    model = adapted(tiny.llama(num_hidden_layers=4, tie_word_embeddings=False), layers, patterns)
    assert first_adapted_block(model) == first
    assert unusable(model) is None


SHARED = {  # the upper blocks use the keys and values of lower ones
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
HEAD = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0, "tie_word_embeddings": False}
WRAPPED = {"text_config": {**tiny.SHAPE, "model_type": "llama", "num_hidden_layers": 6}}


REASONS = {
    "all blocks": (tiny.llama(), "all", "all-linear", "the first block is adapted"),
    "first block": (tiny.llama(), [0], "q_proj", "the first block is adapted"),
    "tied embedding": (tiny.llama(), "last:1", ["q_proj", "embed_tokens"], "model.embed_tokens is adapted"),
    "embedding": (tiny.llama(tie_word_embeddings=False), "last:1", "embed_tokens", "model.embed_tokens is adapted"),
    "shared keys": (other("gemma4_text", **SHARED), "last:1", "q_proj", "gemma4_text does not simply run one block"),
    "run twice": (other("iquestloopcoder"), "last:1", "q_proj", "iquestloopcoder does not simply run one block"),
    "own head": (other("minicpm", **HEAD), "last:1", "q_proj", "minicpm's logits are no known function"),
    "no inner model": (other("mistral3", **WRAPPED), "last:1", "q_proj", "mistral3's logits are no known function"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_against_it(case):
    model, layers, patterns, reason = REASONS[case]
    assert reason in unusable(adapted(model, layers, patterns))


GB = 10**9


@pytest.mark.parametrize(
    ("asked", "against", "epochs", "limit", "memory", "where", "sentence"),
    [
        ("never", None, 3, 9, 9, "never", None),
        ("auto", "the first block is adapted", 3, 9, 9, "never", "prefix cache: off, since the first block is adapted"),
        ("disk", "the first block is adapted", 3, 9, 9, "never", "prefix cache: off, since the first block is adapted"),
        ("auto", None, 1.9, 9, 9, "never", "prefix cache (5.00 GB): off, since there are fewer than two epochs"),
        ("auto", None, 2, 9, 9, "memory", "kept in memory"),
        ("auto", None, 2, 9, 4, "disk", "kept in a file"),
        ("auto", None, 2, 4, 9, "never", "prefix cache (5.00 GB): off, since train.prefix_cache_limit is 4.00 GB"),
        ("memory", None, 1, 9, 4, "memory", "kept in memory"),
        ("disk", None, 1, 9, 9, "disk", "kept in a file"),
        ("memory", None, 3, 4, 9, "never", "prefix cache (5.00 GB): off, since train.prefix_cache_limit is 4.00 GB"),
    ],
)
def test_choice(asked, against, epochs, limit, memory, where, sentence):
    found = choose(asked, against, epochs, 5 * GB, limit * GB, memory * GB)
    assert found[0] == where
    assert found[1] == sentence or found[1].endswith(f"what they give is {sentence}")
