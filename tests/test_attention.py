"""Attention in blocks, against closed forms in float64, MLX's own attention, and the documents of a line alone."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache, deepseek_v2, gemma3_text, gpt2, gpt_oss, lfm2, mamba2

from mlx_lora import lora
from mlx_lora.attention import BLOCK, Attention, causal_attention
from mlx_lora.config import Lora
from mlx_lora.errors import InputError
from mlx_lora.gradient_checkpointing import checkpoint_blocks

# batch, heads, heads of the keys, positions, size of a head
SHAPES = [
    (1, 4, 2, 2, 8),
    (2, 6, 2, BLOCK // 2 - 1, 8),
    (2, 4, 4, BLOCK // 2, 8),
    (1, 4, 1, BLOCK // 2 + 1, 16),
    (3, 4, 2, 300, 8),
    (1, 2, 1, 1024 + BLOCK + 5, 8),
]


def inputs(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Queries, keys, values and the weights of a sum over the result, which makes its gradients."""
    batch, heads, shared, length, size = shape
    random = np.random.default_rng(0)
    sizes = [(batch, length, number, size) for number in (heads, shared, shared, heads)]
    return [mx.array(random.normal(size=size).astype(np.float32), dtype).swapaxes(1, 2) for size in sizes]


def documents(batch: int, length: int, longest: int, shortest: int = 1) -> np.ndarray:
    """(B, T): every line cut into documents of random lengths, one of them the longest."""
    random = np.random.default_rng(1)
    lines = []
    for _ in range(batch):
        lengths = [longest, *random.integers(shortest, longest + 1, length)]
        random.shuffle(lengths[: length // longest])
        lines.append(np.repeat(np.arange(len(lengths)), lengths)[:length])
    return np.array(lines, np.int32)


def visible(length: int, segments: np.ndarray | None) -> np.ndarray:
    """(B or 1, 1, T, T): which key each query may look at."""
    mask = np.tri(length, dtype=bool)[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask[:, None]


def closed_form(arrays: list[mx.array], scale: float, mask: np.ndarray) -> list[np.ndarray]:
    """The result and the gradients of its weighted sum, in float64."""
    q, k, v, weight = map(tiny.float64, arrays)
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    scores = np.where(mask, scale * q @ k.swapaxes(-1, -2), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    by_p = weight @ v.swapaxes(-1, -2)
    by_scores = scale * p * (by_p - (p * by_p).sum(axis=-1, keepdims=True))
    by_keys, by_values = by_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ weight
    by_keys, by_values = (x.reshape(x.shape[0], -1, repeats, *x.shape[2:]).sum(axis=2) for x in (by_keys, by_values))
    return [p @ v, by_scores @ k, by_keys, by_values]


def differentiated(attention: Any, arrays: list[mx.array]) -> list[mx.array]:
    """The result and the gradients of its weighted sum."""
    *inputs, weight = arrays
    _, gradients = mx.value_and_grad(lambda *inputs: (attention(*inputs) * weight).sum(), argnums=(0, 1, 2))(*inputs)
    return [attention(*inputs), *gradients]


def assert_close(actual: Any, expected: Any, tolerance: float, least: float = 0.0) -> None:
    """Within a tolerance relative to the largest entry of each array, or to `least` where that is more."""
    for one, other in zip(actual, expected, strict=True):
        one, other = np.array(one, np.float64), np.array(other, np.float64)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), least)


# ---- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [None, 1, 40, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_the_closed_forms_and_those_of_mlx(shape, longest):
    batch, _, _, length, size = shape
    arrays, scale = inputs(shape), size**-0.5
    segments = None if longest is None else documents(batch, length, min(longest, length))
    mask = visible(length, segments)
    ours = differentiated(
        partial(causal_attention, scale=scale)
        if segments is None
        else partial(causal_attention, scale=scale, segments=mx.array(segments), window=longest),
        arrays,
    )
    # where a document has one position, some gradients are 0: the difference of two equal numbers of this size
    assert_close(ours, closed_form(arrays, scale, mask), 1e-6, least=4.0)
    given = "causal" if segments is None else mx.array(mask)
    original = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=given)
    assert_close(ours, differentiated(original, arrays), 2e-6, least=4.0)  # each of the two has its own rounding


def test_compiled_is_eager():
    arrays, segments = inputs((2, 4, 2, 150, 8)), mx.array(documents(2, 150, 90))

    def both(segments: mx.array, *arrays: mx.array) -> list[mx.array]:
        return differentiated(partial(causal_attention, scale=0.3, segments=segments, window=128), list(arrays))

    assert_close(mx.compile(both)(segments, *arrays), both(segments, *arrays), 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("longest", [None, 50])
def test_half_precision_is_no_less_exact_than_mlx(dtype, longest):
    arrays = inputs((1, 4, 2, 200, 16), dtype)
    segments = None if longest is None else documents(1, 200, longest)
    mask = visible(200, segments)
    expected = closed_form(arrays, 0.25, mask)
    original = partial(mx.fast.scaled_dot_product_attention, scale=0.25, mask=mx.array(mask))
    segments = None if segments is None else mx.array(segments)
    ours = partial(causal_attention, scale=0.25, segments=segments, window=longest)
    for one, other, exact in zip(differentiated(ours, arrays), differentiated(original, arrays), expected, strict=True):
        assert one.dtype == dtype
        off, original_off = (np.square(tiny.float64(x) - exact).mean() ** 0.5 for x in (one, other))
        assert off <= 1.2 * original_off


def test_keys_beyond_the_window_are_not_looked_at():
    arrays, segments = inputs((1, 2, 1, 400, 8)), mx.zeros((1, 400), mx.int32)
    whole, cut = (causal_attention(*arrays[:3], scale=1.0, segments=segments, window=window) for window in (400, 128))
    assert np.abs(np.array(whole - cut))[:, :, :128].max() == 0
    assert np.abs(np.array(whole - cut))[:, :, 300:].max() > 1e-3


@pytest.mark.parametrize("longest", [None, 256])
def test_no_probabilities_are_kept(longest):
    shape = (1, 8, 2, 2048, 16)
    *arrays, weight = inputs(shape)
    segments = None if longest is None else mx.array(documents(1, 2048, longest))

    def loss(*arrays: mx.array) -> mx.array:
        return (causal_attention(*arrays, scale=0.25, segments=segments, window=longest) * weight).sum()

    mx.eval(arrays, weight, segments)
    probabilities = 4 * 8 * 2048**2
    assert tiny.peak(lambda: mx.compile(mx.grad(loss, argnums=(0, 1, 2)))(*arrays)) < probabilities * (
        0.5 if longest is None else 0.2
    )


# ---- in models -------------------------------------------------------------------------------------------------------

DENSE = ["llama", "qwen2", "qwen3"]


def adapted(name: str = "llama", dropout: float = 0.0, **shape: Any) -> nn.Module:
    model = tiny.BUILDERS[name](**shape)
    lora.attach(model, Lora(rank=4, alpha=8.0, dropout=dropout, target_modules="all-linear"), seed=1)
    tiny.randomize(model)
    return model


def losses_and_gradients(
    model: nn.Module, ids: mx.array, weight: mx.array, context: Any = None, compiled: bool = False
) -> list[mx.array]:
    """Each position's loss (B, T - 1), and the gradients of their weighted sum for every adapter array by name."""

    def loss(adapter: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        lora.set_parameters(model, adapter)
        each = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        return (each * weight).sum(), each

    adapter = lora.parameters(model)
    lora.set_dropout_key(model, mx.random.key(5))
    try:
        with context or nullcontext():
            step = mx.value_and_grad(loss)
            (_, each), gradients = mx.compile(step)(adapter) if compiled else step(adapter)
    finally:
        lora.set_dropout_key(model, None)
        lora.set_parameters(model, adapter)
    return [each, *(gradients[name] for name in sorted(gradients))]


def identical(one: list[mx.array], other: list[mx.array]) -> bool:
    return all(mx.array_equal(x, y).item() for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "checkpointed", "compiled"),
    [
        *((name, None, False) for name in [*DENSE, "qwen3_moe"]),
        ("llama", "before", False),
        ("llama", "after", False),
        ("llama", "after", True),
    ],
)
def test_losses_and_gradients_are_those_without_it(name, checkpointed, compiled):
    ids = tiny.tokens(2, 2 * BLOCK + 3)
    weight = mx.ones((2, 2 * BLOCK + 2))
    expected = losses_and_gradients(adapted(name, dropout=0.2), ids, weight)
    model = adapted(name, dropout=0.2)
    if checkpointed == "before":
        checkpoint_blocks(model)
    Attention.install(model)
    if checkpointed == "after":
        checkpoint_blocks(model)
    assert_close(losses_and_gradients(model, ids, weight, compiled=compiled), expected, 3e-6)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="on a GPU, MLX's own attention is called")
def test_model_keeps_no_probabilities_on_a_cpu():
    ids, weight = tiny.tokens(1, 1025), mx.ones((1, 1024))
    kept, ours = (adapted(num_hidden_layers=6) for _ in range(2))
    Attention.install(ours)
    mx.eval(kept.parameters(), ours.parameters())
    assert tiny.peak(lambda: losses_and_gradients(ours, ids, weight)) < 0.4 * tiny.peak(
        lambda: losses_and_gradients(kept, ids, weight)
    )


def line(lengths: list[int], seed: int = 3) -> tuple[mx.array, mx.array]:
    """Documents end to end: the tokens (1, T + 1), and the document of each of the first T positions (1, T)."""
    ids = tiny.tokens(1, sum(lengths) + 1, seed=seed)
    return ids, mx.array(np.repeat(np.arange(len(lengths)), lengths)[None].astype(np.int32))


@pytest.mark.parametrize(
    ("name", "checkpointed", "compiled"),
    [
        *((name, False, False) for name in [*DENSE, "qwen3_moe"]),
        ("llama", True, False),
        ("llama", "mlp", False),
        ("llama", True, True),
    ],
)
def test_packed_documents_are_the_documents_alone(name, checkpointed, compiled):
    lengths = [70, 1, 128, 33, 90]
    ids, segments = line(lengths)
    weight = mx.random.uniform(shape=segments.shape, key=mx.random.key(2))
    expected: list[list[mx.array]] = []
    for last in np.cumsum(lengths):
        first = last - lengths[len(expected)]
        expected.append(losses_and_gradients(adapted(name), ids[:, first : last + 1], weight[:, first:last]))
    each = mx.concatenate([found[0] for found in expected], axis=1)
    gradients = [sum(parts[1:], parts[0]) for parts in zip(*(found[1:] for found in expected), strict=True)]

    model = adapted(name)
    attention = Attention.install(model)
    if checkpointed:
        checkpoint_blocks(model, checkpointed)
    packed = losses_and_gradients(model, ids, weight, attention.packed(segments, 128), compiled)
    assert_close(packed, [each, *gradients], 1e-5)  # rotations further along the line round differently
    apart = losses_and_gradients(model, ids, weight)
    assert np.abs(np.array(apart[0] - each))[:, 70:].max() > 1e-2  # not packed: they do see one another


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_no_document_moves_another_by_one_bit(name, checkpointed):
    model = adapted(name)
    attention = Attention.install(model)
    if checkpointed:
        checkpoint_blocks(model)
    lengths = [70, 50, 128, 33]
    (ids, segments), (others, _) = line(lengths), line(lengths, seed=4)
    for document in range(len(lengths)):
        here = np.array(segments) == document
        first = int(here.argmax())
        kept = slice(first, first + lengths[document] + 1)  # and the token after it, its last target
        perturbed = np.array(others)
        perturbed[:, kept] = np.array(ids)[:, kept]
        (one, *gradients), (other, *other_gradients) = (
            losses_and_gradients(model, tokens, mx.array(here, mx.float32), attention.packed(segments, 128))
            for tokens in (ids, mx.array(perturbed))
        )
        assert np.array_equal(np.array(one)[here], np.array(other)[here])
        assert not np.array_equal(np.array(one), np.array(other))
        assert identical(gradients, other_gradients)
        assert any(mx.abs(gradient).max().item() > 0 for gradient in gradients)


def test_generation_with_a_cache_is_what_it_was():
    model, installed = adapted(), adapted()
    Attention.install(installed)
    ids = tiny.tokens(1, 20)
    for one in ids[:, :15], ids[:, 15:16], ids[:, 16:]:
        if one.shape[1] == 15:
            caches = [cache.make_prompt_cache(each) for each in (model, installed)]
        assert mx.array_equal(model(one, cache=caches[0]), installed(one, cache=caches[1])).item()
    assert mx.array_equal(model(ids[:, :1]), installed(ids[:, :1])).item()


def test_only_the_modules_of_its_model_change():
    other, model = adapted(), adapted()
    kind = type(other.layers[0].self_attn)
    call, found = kind.__call__, dict(kind.__call__.__globals__)
    Attention.install(model)
    assert kind.__call__ is call
    assert kind.__call__.__globals__ == found
    for block in model.layers:
        installed = type(block.self_attn)
        assert installed is not kind
        assert issubclass(installed, kind)
        assert (installed.__module__, installed.__qualname__) == (kind.__module__, kind.__qualname__)
    assert all(type(block.self_attn) is kind for block in [*other.layers, *adapted().layers])
    assert list(lora.parameters(model)) == list(lora.parameters(other))


def test_nothing_stays_of_packed_rows_after_an_exception():
    model, ids = adapted(), tiny.tokens(1, 20)
    attention = Attention.install(model)
    expected = model(ids)

    @mx.compile
    def wrong(segments: mx.array) -> mx.array:
        with attention.packed(segments, 128):
            return model(ids) + mx.zeros((3, 3, 3))

    with pytest.raises(ValueError, match="broadcast"):
        wrong(mx.zeros((1, 20), mx.int32))
    assert mx.array_equal(model(ids), expected).item()


# ---- where rows cannot be packed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DENSE, "qwen3_moe"])
def test_rows_of_these_models_can_be_packed(name):
    assert Attention.install(adapted(name)).why_not_packed(1000) is None


def test_rows_can_be_packed_where_values_are_smaller_than_keys():
    assert Attention.install(of_deepseek()).why_not_packed(200) is None


def build(module: Any, **arguments: Any) -> nn.Module:
    """A tiny model of one of mlx-lm's modules."""
    mx.random.seed(0)
    return module.Model(module.ModelArgs(module.__name__.split(".")[-1], **arguments))


def of_gpt2() -> nn.Module:
    return build(
        gpt2, n_ctx=64, n_embd=32, n_head=4, n_layer=2, n_positions=256, layer_norm_epsilon=1e-5, vocab_size=128
    )


def of_lfm2() -> nn.Module:
    return build(
        lfm2, vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=32, block_ff_dim=64,
        block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, rope_theta=1e4,
        full_attn_idxs=[1],
    )  # fmt: skip


def of_mamba2() -> nn.Module:
    return build(
        mamba2, num_heads=4, head_dim=16, vocab_size=128, hidden_size=32, intermediate_size=64, state_size=8,
        num_hidden_layers=2, layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True,
        tie_word_embeddings=True, time_step_limit=(0.0, 100.0), time_step_rank="auto",
    )  # fmt: skip


def of_gemma3() -> nn.Module:
    return build(
        gemma3_text, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=128, sliding_window=64, sliding_window_pattern=2,
    )  # fmt: skip


def of_gpt_oss() -> nn.Module:
    return build(
        gpt_oss, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=128, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip


def of_deepseek() -> nn.Module:
    return build(
        deepseek_v2, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        n_routed_experts=None, n_shared_experts=None, first_k_dense_replace=2, rope_scaling={"factor": 1.0},
    )  # fmt: skip


def half_installed() -> nn.Module:
    """The second block's `__call__` does not name the function that it calls."""
    model = adapted()
    kind = type(model.layers[1].self_attn)
    model.layers[1].self_attn.__class__ = type("Other", (kind,), {"__call__": lambda *inputs: kind.__call__(*inputs)})
    return model


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (of_gpt2, "positions are absolute"),
        (of_lfm2, "see one another"),
        (of_mamba2, "see one another"),
        (of_gemma3, "not plainly causal"),
        (of_gpt_oss, "not plainly causal"),
        (half_installed, "see one another"),
    ],
)
def test_rows_of_other_models_cannot_be_packed_and_the_reason_is_told(other, reason):
    model = other()
    ids = tiny.tokens(1, 30)
    expected = model(ids)
    attention = Attention.install(model)
    assert reason in (attention.why_not_packed(200) or "")
    assert_close([model(ids)], [expected], 1e-5)


def test_a_sliding_window_matters_only_where_it_is_shorter_than_the_line():
    attention = Attention.install(of_gemma3())
    assert attention.why_not_packed(64) is None
    with pytest.raises(InputError), attention.packed(mx.zeros((1, 65), mx.int32), 128):
        attention._model(tiny.tokens(1, 65))
