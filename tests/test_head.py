"""Logits at chosen positions are those of the whole model, whatever its head is; so are loss and gradient in parts."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlx_lora import lora
from mlx_lora import loss as loss_module
from mlx_lora.batches import Batch
from mlx_lora.config import Lora
from mlx_lora.head import Head, output_of
from mlx_lora.loss import arrays, batch_loss, batch_score, head_loss, head_loss_sum, loss_sum

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
DIVIDED = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
MODELS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "divided": ("granite", DIVIDED),
    "scaled": ("cohere", {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "layer_norm_bias": False}),
    "capped": ("gemma2", {"query_pre_attn_scalar": 8.0, "final_logit_softcapping": 3.0}),
}


def build(name):
    kind, more = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SMALL, **more}))
    model.freeze()
    return model


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
    output = output_of(model)

    def logits(ids, positions):
        hidden = output.hidden(ids)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return output.head(hidden if positions is None else hidden[positions])

    np.testing.assert_array_equal(np.array(logits(ids, None)), whole)
    positions = mx.array([20, 3, 4, 11])
    np.testing.assert_allclose(np.array(logits(ids, positions)), whole[[20, 3, 4, 11]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_one_of_these_heads_is_found(name):
    output = output_of(build(name))
    assert (output.whole, output.head.vocabulary, output.at_once) == (None, 61, None)


def test_an_unknown_head_says_that_logits_are_computed_whole():
    model = build("untied")
    model.lm_head = Wrapped(model.lm_head)
    output = output_of(model)
    assert "llama" in output.whole
    ids = mx.array([[3, 4, 5]])
    np.testing.assert_array_equal(output.head(output.hidden(ids)), model(ids))


def test_a_head_whose_tokens_have_no_rows_of_their_own_says_that_its_logits_exist_at_once():
    model = build("untied")
    model.lm_head = nn.Sequential(model.lm_head)
    output = output_of(model)
    assert (output.whole, output.at_once) == (None, "the head is a Sequential")
    ids = mx.array([[3, 4, 5]])
    np.testing.assert_array_equal(output.head(output.hidden(ids)), model(ids))


class Wrapped(nn.Module):
    """A head that is no function of one position alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, hidden):
        logits = self.inner(hidden)
        return logits - logits.mean(axis=-2, keepdims=True) if hidden.ndim == 3 else logits


# ---- loss and gradient, part by part ---------------------------------------------------------------------------------


def heads() -> dict[str, tuple]:
    """Each with its logits and the gradient that it passes to the hidden states, both in numpy and float64."""
    mx.random.seed(1)
    plain, biased = nn.Linear(32, 61, bias=False), nn.Linear(32, 61)
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(32, 61), group_size=32, bits=4)
    embedding = nn.Embedding(61, 32)
    packed = nn.QuantizedEmbedding.from_embedding(embedding, group_size=32, bits=4)

    def weight(layer):
        if "scales" in layer:
            return tiny.float64(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4))
        return tiny.float64(layer.weight)

    def linear(layer, factor=1.0):
        w, b = weight(layer), tiny.float64(layer.bias) if "bias" in layer else 0
        return lambda h: (h @ w.T + b) * factor, lambda h, dz: factor * dz @ w

    def capped(layer, cap):
        logits, back = linear(layer)
        return (
            lambda h: np.tanh(logits(h) / cap) * cap,
            lambda h, dz: back(h, dz * (1 - np.tanh(logits(h) / cap) ** 2)),
        )

    return {
        "untied": (Head(plain, lambda logits: logits), *linear(plain)),
        "biased": (Head(biased, lambda logits: logits), *linear(biased)),
        "quantized": (Head(quantized, lambda logits: logits), *linear(quantized)),
        "tied": (Head(embedding, lambda logits: logits), *linear(embedding)),
        "tied, quantized": (Head(packed, lambda logits: logits), *linear(packed)),
        "scaled": (Head(plain, lambda logits: logits * 0.25), *linear(plain, 0.25)),
        "capped": (Head(plain, lambda logits: mx.tanh(logits / 3) * 3), *capped(plain, 3.0)),
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("chunk", "part"), [(1, 16), (7, 61), (100, 7)])
@pytest.mark.parametrize("name", list(heads()))
def test_loss_and_gradient_in_parts_are_the_closed_form_in_float64(name, chunk, part, smoothing, compiled, monkeypatch):
    monkeypatch.setattr(loss_module, "part_size", lambda positions: part)
    head, logits_of, back = heads()[name]
    random = np.random.default_rng(0)
    hidden = random.normal(0, 2, (37, 32)).astype(np.float32)
    targets, mask = random.integers(0, 61, 37), (random.random(37) < 0.6).astype(np.float32)

    def loss(hidden, targets, mask):
        return 0.5 * head_loss_sum(head, hidden, targets, mask, smoothing, chunk=chunk)

    function = mx.value_and_grad(loss)
    value, gradient = (mx.compile(function) if compiled else function)(*map(mx.array, (hidden, targets, mask)))

    wide = hidden.astype(np.float64)
    logits = logits_of(wide)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    wanted = (1 - smoothing) * np.eye(61)[targets] + smoothing / 61
    expected = 0.5 * -(mask[:, None] * wanted * np.log(probabilities)).sum()
    slope = back(wide, 0.5 * mask[:, None] * (probabilities - wanted))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), slope, rtol=0, atol=2e-6 * np.abs(slope).max())


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16])
def test_a_token_that_is_nearly_certain_gets_its_small_gradient(kind, monkeypatch):
    """Its p - 1 is about -1e-3: in bfloat16, p itself would be 1. Each part has a higher logit than the one before."""
    monkeypatch.setattr(loss_module, "part_size", lambda positions: 16)
    layer = nn.Linear(32, 61, bias=False)
    layer.weight = mx.zeros((61, 32))
    layer.weight[:, 0] = mx.arange(61) / 8
    layer.weight[60, 0] = 16
    layer.set_dtype(kind)
    hidden, targets = mx.ones((1, 32)).astype(kind), mx.array([60])
    loss, gradient = head_loss(Head(layer, lambda logits: logits), hidden, targets)
    logits = tiny.float64(layer.weight)[:, 0]
    powers = np.exp(logits - 16)
    p = powers / powers.sum()
    assert 5e-5 < 1 - p[60] < 5e-3
    assert loss.item() == pytest.approx(-np.log(p[60]), abs=2e-7)
    expected = (p[:60] * (logits[:60] - 16)).sum()  # the derivative of -log p, along the first axis
    assert gradient[0, 0].item() == pytest.approx(expected, rel=1e-5 if kind == mx.float32 else 1e-2)


def test_parts_take_less_memory_than_all_logits():
    """256 positions of a vocabulary of 30,000: all logits take 31 MB, several times over."""
    head = Head(nn.Linear(64, 30_000, bias=False), lambda logits: logits)
    hidden, targets, mask = mx.random.normal((256, 64)), mx.arange(256), mx.ones(256)
    mx.eval(head.layer.parameters(), hidden, targets, mask)

    def peak(loss):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() - before

    whole = peak(lambda hidden: loss_sum(head(hidden), targets, mask))
    assert whole > 90e6
    for chunk in (16, 1024):  # all of the vocabulary at a time, and 4,096 tokens of it
        assert peak(lambda hidden, chunk=chunk: head_loss_sum(head, hidden, targets, mask, chunk=chunk)) < 0.5 * whole


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gradient", [True, False])
def test_memory_does_not_grow_with_the_vocabulary(gradient, smoothing, compiled):
    """256 positions, of two and of sixteen parts: 8 and 67 MB of logits."""

    def peak(vocabulary):
        head = Head(nn.Linear(64, vocabulary, bias=False), lambda logits: logits)
        hidden, targets = mx.random.normal((256, 64)), mx.arange(256)
        mx.eval(head.layer.parameters(), hidden, targets)

        def computed(hidden, targets):
            found = head_loss(head, hidden, targets, smoothing, gradient)
            return found if gradient else found[0]

        return tiny.peak(lambda: (mx.compile(computed) if compiled else computed)(hidden, targets))

    assert peak(65_536) < 1.2 * peak(8192)


def test_hidden_states_in_half_precision_get_their_gradient_in_it():
    layer = nn.Linear(32, 61, bias=False)
    layer.set_dtype(mx.bfloat16)
    head = Head(layer, lambda logits: logits)
    hidden = mx.random.normal((9, 32)).astype(mx.bfloat16)
    targets, mask = mx.arange(9), mx.full(9, 1 / 257)
    value, gradient = mx.value_and_grad(lambda h: head_loss_sum(head, h, targets, mask, chunk=4))(hidden)
    whole, expected = mx.value_and_grad(lambda h: loss_sum(head(h), targets, mask))(hidden)
    assert gradient.dtype == mx.bfloat16
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(whole.item(), rel=1e-6)
    slope, expected = tiny.float64(gradient), tiny.float64(expected)
    assert (slope * expected).sum() / (expected * expected).sum() == pytest.approx(1, rel=1e-3)  # no common factor
    np.testing.assert_allclose(slope, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "patterns"), [("tied", ["embed_tokens"]), ("untied", ["lm_head"]), ("tied", ["q_proj"])]
)
def test_an_adapted_head_gets_its_gradient(name, patterns):
    """By finite differences along the gradient; with a head in parts it would be without one."""
    model = build(name)
    lora.attach(model, Lora(rank=2, target_modules=patterns))
    tiny.randomize(model, size=0.5)
    output = output_of(model)
    assert bool(output.at_once) == (patterns != ["q_proj"])
    ids = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
    batch = arrays(Batch(ids[:, :-1], ids[:, 1:], np.ones((2, 8), np.float32), (0, 1), 18))

    def loss(adapter):
        lora.set_parameters(model, adapter)
        return batch_loss(output, batch, chunk=3)

    start = lora.parameters(model)
    value, gradient = mx.value_and_grad(loss)(start)
    assert batch_score(output, batch).item() == pytest.approx(value.item(), rel=1e-6)
    norm2 = sum(float((array * array).sum().item()) for array in gradient.values())
    assert all(mx.abs(array).max().item() > 0 for array in gradient.values())
    step = 2e-3 / norm2**0.5
    ends = [loss({key: array + sign * step * gradient[key] for key, array in start.items()}).item() for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm2, rel=2e-2)
