"""LoRA layers and adapters, against numpy in float64, PEFT, mlx-lm's layers and closed formulas."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner import lora as mlx_lm_lora

from mlx_lora import lora
from mlx_lora.config import Lora
from mlx_lora.errors import InputError
from mlx_lora.lora import LoRAEmbedding, LoRALayer, LoRALinear, LoRASwitchLinear
from mlx_lora.lora.layers import adapt

RANK, ALPHA = 4, 6.0
BITS = [3, 4, 5, 6, 8]
EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]


def adapted(base: nn.Module, seed: int = 1, dropout: float = 0.0) -> LoRALayer:
    """A layer whose lora_a and lora_b are both random."""
    layer = adapt(base, RANK, ALPHA, dropout, "kaiming_uniform", mx.random.key(seed))
    random = np.random.default_rng(seed)
    layer.lora_b = mx.array(random.normal(0, 0.3, layer.lora_b.shape).astype(np.float32))
    return layer


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32))


def dense(module: nn.Module) -> np.ndarray:
    if "scales" not in module:
        return tiny.float64(module.weight)
    return tiny.float64(
        mx.dequantize(module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits)
    )


def linear(bits: int | None, bias: bool, inputs: int = 96, outputs: int = 24, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    base = nn.Linear(inputs, outputs, bias=bias)
    return base.to_quantized(group_size=32, bits=bits) if bits else base


def embedding(bits: int | None, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    base = nn.Embedding(40, 96)
    return base.to_quantized(group_size=32, bits=bits) if bits else base


def switch(bits: int | None, bias: bool = False, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    base = SwitchLinear(96, 24, 3, bias=bias)
    if bias:
        base.bias = normal(3, 24, seed=5)
    return base.to_quantized(group_size=32, bits=bits) if bits else base


def model_of(name: str, tied: bool = True, bits: int | None = None, **shape) -> nn.Module:
    model = tiny.BUILDERS[name](tie_word_embeddings=tied, **shape)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def with_adapter(model: nn.Module, patterns: str | list[str] = "all-linear", **options) -> nn.Module:
    lora.attach(model, Lora(rank=RANK, alpha=ALPHA, target_modules=patterns, **options), seed=1)
    tiny.randomize(model)
    return model


def same(actual: mx.array, expected: mx.array) -> bool:
    return actual.dtype == expected.dtype and mx.array_equal(actual, expected).item()


def everything(tied: bool) -> list[str]:
    return EVERYTHING[:2] if tied else EVERYTHING


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_linear_is_base_plus_scaled_low_rank_update(bits, bias):
    base = linear(bits, bias)
    assert isinstance(base, nn.QuantizedLinear if bits else nn.Linear)
    layer, x = adapted(base), normal(2, 5, 96)
    assert isinstance(layer, LoRALinear)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((96, RANK), (RANK, 24))
    a, b = tiny.float64(layer.lora_a), tiny.float64(layer.lora_b)
    update = ALPHA / RANK * tiny.float64(x) @ a @ b
    expected = tiny.float64(x) @ dense(base).T + (tiny.float64(base.bias) if bias else 0) + update
    assert np.abs(update).max() > 0.3
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.delta(), ALPHA / RANK * (a @ b).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [None, *BITS])
def test_embedding_adds_the_update_to_rows_and_transposed_to_logits(bits):
    base = embedding(bits)
    assert isinstance(base, nn.QuantizedEmbedding if bits else nn.Embedding)
    layer, ids, x = adapted(base), mx.array([[3, 39, 0], [7, 3, 12]]), normal(2, 3, 96)
    assert isinstance(layer, LoRAEmbedding)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((40, RANK), (RANK, 96))
    update = ALPHA / RANK * tiny.float64(layer.lora_a) @ tiny.float64(layer.lora_b)
    assert np.abs(update).max() > 0.1
    table = dense(base) + update
    np.testing.assert_allclose(layer(ids), table[np.array(ids)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.as_linear(x), tiny.float64(x) @ table.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.delta(), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["as they come", "sorted"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_each_expert_gets_its_own_update(bits, bias, order):
    base = switch(bits, bias)
    assert isinstance(base, QuantizedSwitchLinear if bits else SwitchLinear)
    layer = adapted(base)
    assert isinstance(layer, LoRASwitchLinear)
    assert (layer.rank, layer.lora_a.shape, layer.lora_b.shape) == (RANK, (3, RANK, 96), (3, 24, RANK))
    update = ALPHA / RANK * tiny.float64(layer.lora_b) @ tiny.float64(layer.lora_a)
    assert np.abs(update).max() > 0.1
    weight = dense(base) + update
    if order == "sorted":  # one row per expert and token, as mlx-lm calls it for many tokens
        x, chosen = normal(7, 1, 96), np.array([0, 0, 0, 1, 2, 2, 2])
        y = layer(x, mx.array(chosen), sorted_indices=True)
    else:
        x, chosen = normal(2, 3, 1, 1, 96), np.array([[[0, 2], [2, 1], [1, 0]], [[2, 0], [0, 1], [1, 2]]])
        y = layer(x, mx.array(chosen))
    expected = np.einsum("...i,...oi->...o", tiny.float64(x)[..., 0, :], weight[chosen])
    if bias:
        expected = expected + tiny.float64(base.bias)[chosen]
    np.testing.assert_allclose(y[..., 0, :], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.delta(), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["linear", "embedding", "switch"])
def test_layers_compute_what_mlx_lms_compute(kind, bits):
    base = {"linear": lambda: linear(bits, True), "embedding": lambda: embedding(bits), "switch": lambda: switch(bits)}
    layer = adapted(base[kind]())
    theirs = {
        "linear": mlx_lm_lora.LoRALinear,
        "embedding": mlx_lm_lora.LoRAEmbedding,
        "switch": mlx_lm_lora.LoRASwitchLinear,
    }[kind].from_base(layer.base, r=RANK, dropout=0.0, scale=ALPHA / RANK)
    assert (layer.lora_a.shape, layer.lora_b.shape) == (theirs.lora_a.shape, theirs.lora_b.shape)
    theirs.lora_a, theirs.lora_b = layer.lora_a, layer.lora_b
    ids, x = mx.array([[3, 39], [0, 7]]), normal(2, 5, 96)
    if kind == "switch":
        x, chosen = normal(2, 3, 1, 1, 96), mx.array([[[0, 2], [2, 1], [1, 0]]] * 2)
        assert same(layer(x, chosen), theirs(x, chosen))
    elif kind == "embedding":
        assert same(layer(ids), theirs(ids))
        assert same(layer.as_linear(x), theirs.as_linear(x))
    else:
        assert same(layer(x), theirs(x))


def test_layers_compute_what_pefts_compute():
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    def tensor(array: mx.array) -> torch.Tensor:
        return torch.tensor(np.array(array))

    table, dense_layer = adapted(embedding(None), seed=2), adapted(linear(None, True))
    theirs = torch.nn.ModuleDict({"table": torch.nn.Embedding(40, 96), "dense": torch.nn.Linear(96, 24)})
    theirs["table"].weight.data = tensor(table.base.weight)
    theirs["dense"].weight.data = tensor(dense_layer.base.weight)
    theirs["dense"].bias.data = tensor(dense_layer.base.bias)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["table", "dense"])
    inject_adapter_in_model(config, theirs)
    assert theirs["dense"].scaling["default"] == dense_layer.scale
    theirs["table"].lora_embedding_A["default"].data = tensor(table.lora_a.T)
    theirs["table"].lora_embedding_B["default"].data = tensor(table.lora_b.T)
    theirs["dense"].lora_A["default"].weight.data = tensor(dense_layer.lora_a.T)
    theirs["dense"].lora_B["default"].weight.data = tensor(dense_layer.lora_b.T)

    ids, x = mx.array([[3, 39], [0, 7]]), normal(2, 5, 96)
    with torch.no_grad():
        np.testing.assert_allclose(dense_layer(x), theirs["dense"](tensor(x)), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(table(ids), theirs["table"](tensor(ids).long()), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            dense_layer.delta(), theirs["dense"].get_delta_weight("default"), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
def test_half_precision_activations_stay_so_and_the_adapter_stays_float32(bits, kind):
    for base in (linear(bits, True), embedding(bits), switch(bits)):
        base.set_dtype(kind)
        layer = adapted(base, dropout=0.2)
        layer.set_dropout_key(mx.random.key(0))
        x = normal(2, 3, 1, 1, 96).astype(kind)
        if isinstance(layer, LoRASwitchLinear):
            calls = {"call": lambda it, x=x: it(x, mx.array([[[0, 2], [2, 1], [1, 0]]] * 2))}
        elif isinstance(layer, LoRAEmbedding):
            calls = {"call": lambda it: it(mx.array([[3, 39]])), "as_linear": lambda it, x=x: it.as_linear(x)}
        else:
            calls = {"call": lambda it, x=x: it(x)}
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        for call in calls.values():
            assert call(layer).dtype == kind
            squares = nn.value_and_grad(layer, lambda it, call=call: call(it).astype(mx.float32).square().sum())
            gradients = dict(tree_flatten(squares(layer)[1]))
            assert gradients.keys() == {"lora_a", "lora_b"}
            assert all(array.dtype == mx.float32 for array in gradients.values())
            if not isinstance(layer, LoRASwitchLinear):  # MLX's CPU multiplies experts in float32 only
                assert all(mx.abs(array).max().item() > 0 for array in gradients.values())
        assert (layer.lora_a.dtype, layer.lora_b.dtype) == (mx.float32, mx.float32)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["linear", "embedding", "as_linear", "switch"])
def test_no_float32_copy_of_an_activation_is_in_the_graph(kind, bits):
    """Neither of the forward pass nor of the backward one; 7 is the number of tokens, and of nothing else."""
    make = {"linear": lambda: linear(bits, True), "switch": lambda: switch(bits)}.get(kind, lambda: embedding(bits))
    base = make()
    base.set_dtype(mx.bfloat16)
    layer = adapted(base)
    call = {
        "linear": lambda x: layer(x),
        "embedding": lambda x: layer(mx.arange(7)) + x,
        "as_linear": lambda x: layer.as_linear(x),
        "switch": lambda x: layer(x[:, None, None], mx.array([[0, 2]] * 7)),
    }[kind]

    def slopes(x, a, b):
        def total(x, a, b):
            layer.lora_a, layer.lora_b = a, b
            return call(x).square().sum()  # so that the gradient needs the output

        return mx.grad(total, argnums=(0, 1, 2))(x, a, b)

    kinds: dict[str, set] = {}

    def note(entry):
        if entry["type"] == "primitive":
            for _, shape, dtype in entry["outputs"]:
                if shape[0:1] == (7,) and shape[-1] in (24, 40, 96):
                    kinds.setdefault(entry["name"], set()).add(dtype)

    arrays = (normal(7, 96).astype(mx.bfloat16), layer.lora_a, layer.lora_b)
    mx.eval(layer.parameters(), arrays)
    mx.export_function(note, slopes, *arrays)
    matmul = "GatherMM" if kind == "switch" else "Matmul"
    assert kinds[matmul] == {mx.bfloat16}
    assert not [name for name, dtypes in kinds.items() if mx.float32 in dtypes]


def test_half_precision_model_gives_half_precision_logits_and_float32_gradients():
    for name in tiny.BUILDERS:
        model = model_of(name)
        model.set_dtype(mx.bfloat16)
        with_adapter(model, EVERYTHING[:2])
        ids = tiny.tokens()
        assert model(ids).dtype == mx.bfloat16
        _, gradients = nn.value_and_grad(model, lambda ids, it=model: it(ids).astype(mx.float32).square().mean())(ids)
        assert {array.dtype for _, array in tree_flatten(gradients)} == {mx.float32}
        assert {array.dtype for array in lora.parameters(model).values()} == {mx.float32}


def test_dropout_zeroes_its_share_of_the_input_and_scales_up_the_rest():
    base = nn.Linear(64, 64, bias=False)
    base.weight = mx.zeros((64, 64))
    layer = LoRALinear(base, mx.eye(64), mx.eye(64), alpha=64.0, dropout=0.25)
    x = normal(400, 64)
    assert same(layer(x), x)  # off until a key is set
    layer.set_dropout_key(mx.random.key(5))
    y, again = np.array(layer(x)), np.array(layer(x))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.array(x)[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.01  # 25600 draws: 3.7 deviations
    np.testing.assert_array_equal(y, again)
    layer.set_dropout_key(mx.random.key(6))
    assert 0.2 < (kept != (np.array(layer(x)) != 0)).mean() < 0.55  # independent masks differ in 3/8 of the places
    layer.set_dropout_key(None)
    assert same(layer(x), x)


@pytest.mark.parametrize("kind", ["embedding", "as_linear", "switch"])
def test_dropout_of_embeddings_and_experts_scales_up_what_it_keeps(kind):
    base = embedding(None) if kind != "switch" else switch(None)
    layer = adapted(base, dropout=0.5)
    x = normal(1, 1, 1, 1, 96)
    call = {
        "embedding": lambda: layer(mx.array([3])),
        "as_linear": lambda: layer.as_linear(x),
        "switch": lambda: layer(x, mx.array([[[1]]])),
    }[kind]
    whole = tiny.float64(call())
    draws = []
    for seed in range(1500):
        layer.set_dropout_key(mx.random.key(seed))
        draws.append(call())
    draws = tiny.float64(mx.stack(draws))
    deviation = draws.std(0)
    assert deviation.max() > 1e-3
    assert np.all(np.abs(draws.mean(0) - whole) <= 5 * deviation / 1500**0.5 + 1e-6)


class Chain(nn.Module):
    """Two linear layers that pass their input on, held by name and in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.others = nn.Linear(64, 64, bias=False), [nn.Linear(64, 64, bias=False)]
        self.first.weight = self.others[0].weight = mx.eye(64)

    def __call__(self, x):
        return self.others[0](self.first(x))


def test_dropout_of_each_layer_is_its_own():
    model = tiny.llama()
    lora.attach(model, Lora(rank=64, alpha=64.0, dropout=0.5, target_modules=["q_proj", "o_proj"]))
    x, on = mx.ones((100, 64)), []
    lora.set_dropout_key(model, mx.random.key(0))
    for layer in lora.layers(model).values():
        layer.linear.weight = mx.zeros((64, 64))
        layer.lora_a = layer.lora_b = mx.eye(64)
        on.append(np.array(layer(x)) != 0)
    assert len(on) == 4
    for place, one in enumerate(on):
        for other in on[:place]:
            assert 0.45 < (one != other).mean() < 0.55
    lora.set_dropout_key(model, None)
    assert all(same(layer(x), x) for layer in lora.layers(model).values())


def test_layer_that_stands_in_a_list_is_adapted_like_any_other():
    model, x = Chain(), normal(3, 64)
    lora.attach_at(model, ["first", "others.0"], RANK, ALPHA)
    assert list(lora.layers(model)) == ["first", "others.0"]
    assert same(model(x), x)
    tiny.randomize(model)
    assert not same(model(x), x)
    lora.detach(model)
    assert same(model(x), x)


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "bound"),
    [
        (lambda: nn.Linear(900, 20), 1 / 30),
        (lambda: nn.Linear(1024, 20).to_quantized(group_size=32, bits=3), 1 / 32),
        (lambda: nn.Embedding(900, 16), 1 / 30),  # the input of a table is a one-hot row
        (lambda: SwitchLinear(400, 8, 5, bias=False), 1 / 20),
    ],
)
def test_kaiming_start_is_uniform_within_one_over_root_of_inputs(base, bound):
    layer = adapt(base(), 8, 16.0, 0.0, "kaiming_uniform", mx.random.key(0))
    a = tiny.float64(layer.lora_a)
    assert a.size >= 7200
    assert 0.995 * bound < np.abs(a).max() <= bound * (1 + 1e-6)
    assert abs(a.mean()) < 5 * bound / 3**0.5 / a.size**0.5
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.03)
    assert not np.array(layer.lora_b).any()


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_gaussian_start_has_deviation_one_over_rank(rank):
    layer = adapt(nn.Linear(4096, 8), rank, 16.0, 0.0, "gaussian", mx.random.key(0))
    a = tiny.float64(layer.lora_a)
    np.testing.assert_allclose(a.std(), 1 / rank, rtol=0.04)
    assert abs(a.mean()) < 5 / rank / a.size**0.5
    assert np.abs(a).max() > 3 / rank  # a uniform one of this deviation ends at 1.73
    assert not np.array(layer.lora_b).any()


def start(seed: int, draws: int = 0, patterns: str | list[str] = "all-linear") -> dict[str, np.ndarray]:
    model = model_of("llama", seed=draws)
    mx.random.seed(draws)  # the global state must not matter
    lora.attach(model, Lora(rank=4, target_modules=patterns), seed)
    return tiny.copies(lora.parameters(model))


def test_start_is_a_function_of_seed_and_paths():
    tiny.assert_identical(start(5, draws=0), start(5, draws=99))
    one, other = start(5), start(6)
    assert all((one[name] != other[name]).mean() > 0.99 for name in one if name.endswith("lora_a"))


def test_start_of_every_layer_differs():
    arrays = [array for name, array in start(5).items() if name.endswith("q_proj.lora_a")]
    assert len(arrays) == 2
    assert (arrays[0] != arrays[1]).mean() > 0.99


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", ["all-linear", "everything"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_attaching_changes_no_logit_and_training_b_does(name, tied, patterns):
    model, ids = model_of(name, tied), tiny.tokens()
    base = model(ids)
    lora.attach(model, Lora(rank=RANK, target_modules=everything(tied) if patterns == "everything" else patterns))
    assert same(model(ids), base)
    tiny.randomize(model)
    assert mx.abs(model(ids) - base).max().item() > 1e-3


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_off_unmerged_and_detached_are_the_base_bit_for_bit(name, tied, bits):
    model, ids = model_of(name, tied, bits), tiny.tokens()
    base, modules, arrays = model(ids), dict(model.named_modules()), tiny.copies(model)
    with_adapter(model, everything(tied))
    on = model(ids)

    lora.disable(model)
    assert same(model(ids), base)
    lora.enable(model)
    assert same(model(ids), on)

    lora.merge(model)
    merged = model(ids)
    assert not same(merged, base)
    np.testing.assert_allclose(merged, on, rtol=1e-5, atol=1e-5)
    lora.unmerge(model)
    assert same(model(ids), on)
    lora.disable(model)
    assert same(model(ids), base)
    lora.enable(model)

    lora.merge(model)
    lora.detach(model)  # from the merged state
    assert same(model(ids), base)
    assert lora.layers(model) == {}
    assert lora.parameters(model) == {}
    assert all(module is modules[path] for path, module in model.named_modules())
    tiny.assert_identical(tiny.copies(model), arrays)


def test_merging_and_unmerging_twice_are_as_once():
    model, ids = with_adapter(model_of("llama")), tiny.tokens()
    on = model(ids)
    lora.merge(model)
    once = model(ids)
    lora.merge(model)
    assert same(model(ids), once)
    lora.unmerge(model)
    lora.unmerge(model)
    assert same(model(ids), on)


@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("make", [lambda bits: linear(bits, True), embedding, lambda bits: switch(bits, True)])
def test_merged_weight_is_base_plus_update_and_dense(make, bits):
    layer = adapted(make(bits))
    expected = dense(layer.base) + tiny.float64(layer.delta())
    bias = layer.base.get("bias")
    layer.merge()
    assert layer.merged
    assert type(layer.base) in (nn.Linear, nn.Embedding, SwitchLinear)
    assert layer.base.weight.dtype == mx.float32
    np.testing.assert_allclose(layer.base.weight, expected, rtol=1e-6, atol=1e-6)
    assert layer.base.get("bias") is bias


def test_merged_half_precision_weight_is_rounded_once():
    base = linear(None, False)
    base.set_dtype(mx.bfloat16)
    layer = adapted(base)
    delta = ALPHA / RANK * (tiny.float64(layer.lora_a) @ tiny.float64(layer.lora_b)).T
    expected = tiny.float64(base.weight) + delta
    layer.merge()
    assert layer.base.weight.dtype == mx.bfloat16
    error = np.abs(tiny.float64(layer.base.weight) - expected)
    half_step = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 8)  # bfloat16 has 8 significant bits
    assert np.all(error <= half_step * 1.001 + 1e-7)


def test_merged_adapter_cannot_be_disabled():
    model, ids = with_adapter(model_of("llama")), tiny.tokens()
    lora.merge(model)
    merged = model(ids)
    with pytest.raises(ValueError, match="unmerge"):
        lora.disable(model)
    assert same(model(ids), merged)


@pytest.mark.parametrize("patterns", ["all-linear", "q_proj", "*.mlp.*", "embed_tokens"])
def test_attaching_twice_is_an_error(patterns):
    model = with_adapter(model_of("llama"), patterns)
    before = tiny.copies(lora.parameters(model))
    with pytest.raises(ValueError, match="attached already"):
        lora.attach(model, Lora(target_modules=patterns))
    tiny.assert_identical(tiny.copies(lora.parameters(model)), before)


def test_another_adapter_can_be_attached_after_detaching():
    model, ids = with_adapter(model_of("llama")), tiny.tokens()
    base = model_of("llama")(ids)
    lora.detach(model)
    with_adapter(model, ["q_proj"])
    assert [path.rsplit(".", 1)[-1] for path in lora.layers(model)] == ["q_proj"] * 2
    lora.disable(model)
    assert same(model(ids), base)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_only_the_adapter_is_trainable(name, bits):
    model = model_of(name, tied=False, bits=bits)
    paths = lora.attach(model, Lora(rank=RANK, target_modules=EVERYTHING))
    names = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b")}
    assert names == set(lora.parameters(model))
    model.train()
    model.eval()
    assert {path for path, _ in tree_flatten(model.trainable_parameters())} == names


@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_arrays_set_by_path_are_those_used(layers):
    model, ids = with_adapter(model_of("llama"), layers=layers), tiny.tokens()
    base = model_of("llama")(ids)
    before = lora.parameters(model)
    assert not same(model(ids), base)
    lora.set_parameters(model, {name: mx.zeros_like(array) for name, array in before.items()})
    assert same(model(ids), base)
    lora.set_parameters(model, before)
    assert all(array is before[name] for name, array in lora.parameters(model).items())


# ---- targets ---------------------------------------------------------------------------------------------------------

ATTENTION = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]


@pytest.fixture(scope="module")
def twelve() -> nn.Module:
    return model_of("llama", tied=False, num_hidden_layers=12)


def paths(blocks, names) -> list[str]:
    return [f"model.layers.{block}.{name}" for block in blocks for name in names]


@pytest.mark.parametrize(
    ("patterns", "layers", "expected"),
    [
        ("q_proj", "all", paths(range(12), ["self_attn.q_proj"])),
        (["v_proj", "q_proj"], "all", paths(range(12), ["self_attn.q_proj", "self_attn.v_proj"])),
        (["q_proj", "*.q_proj"], "all", paths(range(12), ["self_attn.q_proj"])),
        ("*.mlp.*", "all", paths(range(12), MLP)),
        ("model.layers.1?.mlp.[gu]*", "all", paths((10, 11), ["mlp.gate_proj", "mlp.up_proj"])),
        (r"re:.*\.1\..*attn\.[qk]_proj", "all", paths([1], ["self_attn.k_proj", "self_attn.q_proj"])),
        ("all-linear", "all", paths(range(12), MLP + ATTENTION)),
        ("all-linear", "last:1", paths([11], MLP + ATTENTION)),
        ("q_proj", "last:3", paths((9, 10, 11), ["self_attn.q_proj"])),
        ("q_proj", "last:12", paths(range(12), ["self_attn.q_proj"])),
        ("q_proj", "0-1", paths((0, 1), ["self_attn.q_proj"])),
        ("q_proj", "2-10", paths(range(2, 11), ["self_attn.q_proj"])),
        ("q_proj", "7-7", paths([7], ["self_attn.q_proj"])),
        ("q_proj", [10, 2], paths((2, 10), ["self_attn.q_proj"])),
        ("lm_head", "all", ["lm_head"]),
        ("embed_tokens", "last:1", ["model.embed_tokens"]),
        (
            ["q_proj", "embed_tokens", "lm_head"],
            [3],
            ["lm_head", "model.embed_tokens", "model.layers.3.self_attn.q_proj"],
        ),
    ],
)
def test_targets_are_the_modules_meant_in_natural_order(twelve, patterns, layers, expected):
    assert lora.select(twelve, patterns, layers) == expected


def test_all_linear_takes_the_experts_and_no_embedding_or_head():
    model = model_of("qwen3_moe", tied=False)
    experts = [f"mlp.switch_mlp.{name}" for name in ("down_proj", "gate_proj", "up_proj")]
    assert lora.select(model, "all-linear", "all") == paths((0, 1), ["mlp.gate", *experts, *ATTENTION])


def test_all_linear_takes_no_table_that_stands_in_a_block():
    model, block = nn.Module(), nn.Module()
    block.table, block.dense = nn.Embedding(8, 4), nn.Linear(4, 4)
    model.layers = [block]
    assert lora.select(model, "all-linear", "all") == ["layers.0.dense"]
    assert lora.select(model, "table", "all") == ["layers.0.table"]


def test_selection_of_a_quantized_model_is_that_of_the_plain_one():
    for name in tiny.BUILDERS:
        plain, quantized = model_of(name, tied=False), model_of(name, tied=False, bits=4)
        chosen = lora.select(plain, EVERYTHING, "all")
        assert lora.select(quantized, EVERYTHING, "all") == chosen
        assert {"lm_head", "model.embed_tokens"} < set(chosen)


def test_layers_and_parameters_are_listed_in_one_order_whatever_order_was_asked(twelve):
    model = model_of("llama")
    lora.attach(model, Lora(target_modules=["v_proj", "q_proj"]))
    other = model_of("llama")
    lora.attach(other, Lora(target_modules=["q_proj", "v_proj"]))
    assert list(lora.layers(model)) == list(lora.layers(other)) == sorted(lora.layers(model))
    tiny.assert_identical(tiny.copies(lora.parameters(model)), tiny.copies(lora.parameters(other)))


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("q_prj", "q_proj"), ("embed_token", "embed_tokens"), ("gateproj", "gate_proj"), ("xyz", None)],
)
def test_unmatched_pattern_is_an_error_that_lists_what_there_is(twelve, pattern, nearest):
    with pytest.raises(InputError) as error:
        lora.select(twelve, ["q_proj", pattern], "all")
    message = str(error.value)
    assert repr(pattern) in message
    names = ["down_proj", "embed_tokens", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert ", ".join(names) in message
    assert (f"did you mean {nearest}?" in message) if nearest else ("did you mean" not in message)


def test_error_of_an_unmatched_pattern_is_made_of_sentences(twelve):
    with pytest.raises(InputError, match=r"matches no layer[.;:,] .*This model has"):
        lora.select(twelve, "xyz", "all")


def test_regular_expression_is_for_the_whole_path(twelve):
    for pattern in ("re:q_proj", "re:model.layers.1", "re:.*attn"):
        with pytest.raises(InputError, match="matches no layer"):
            lora.select(twelve, pattern, "all")


def test_pattern_that_matches_only_other_blocks_is_an_error(twelve):
    with pytest.raises(InputError, match=r"layers\.3\..*last:2"):
        lora.select(twelve, ["q_proj", "model.layers.3.*"], "last:2")


@pytest.mark.parametrize("layers", ["0-12", "12-13", "last:13", [0, 12], "5-3"])
def test_layers_beyond_the_model_are_an_error(twelve, layers):
    with pytest.raises(InputError, match="0 to 11"):
        lora.select(twelve, "all-linear", layers)


def test_nothing_is_attached_when_the_choice_is_wrong():
    model, ids = model_of("llama"), tiny.tokens()
    base, trainable = model(ids), [name for name, _ in tree_flatten(model.trainable_parameters())]
    with pytest.raises(InputError):
        lora.attach(model, Lora(target_modules=["q_proj", "nothing"]))
    assert lora.layers(model) == {}
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trainable
    assert same(model(ids), base)


# ---- counting --------------------------------------------------------------------------------------------------------

QWEN25_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def test_counts_of_qwen25_05b_without_computing_any_array():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = tiny.qwen2(**QWEN25_05B)
    lora.attach(model, Lora(rank=8, alpha=16.0, target_modules=["q_proj", "v_proj"]))
    counts = lora.count(model)
    assert mx.get_peak_memory() - before < 1_000_000
    assert counts.trainable == 540_672 == 24 * 8 * ((896 + 896) + (896 + 128))
    attention = 896 * 896 + 896 + 2 * (896 * 128 + 128) + 896 * 896
    total = 151936 * 896 + 24 * (attention + 3 * 896 * 4864 + 2 * 896) + 896
    assert total == 494_032_768  # as the model's card says: 0.49B
    assert counts.total == total + 540_672
    assert (counts.adapter_bytes, counts.base_bytes) == (4 * 540_672, 4 * total)


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_of_llama_by_formula(tied, bits):
    model = model_of("llama", tied, bits)
    lora.attach(model, Lora(rank=4, target_modules=everything(tied)))
    h, kv, ffn, vocabulary, layers = 64, 32, 96, 128, 2
    sides = [(h, h), (h, kv), (h, kv), (h, h), (h, ffn), (h, ffn), (ffn, h)] * layers
    sides += [(vocabulary, h)] * (1 if tied else 2)
    weights, norms = sum(a * b for a, b in sides), h * (2 * layers + 1)
    trainable = 4 * sum(a + b for a, b in sides)
    counts = lora.count(model)
    assert (counts.trainable, counts.total) == (trainable, weights + norms + trainable)
    assert counts.adapter_bytes == 4 * trainable
    packed = weights * bits // 8 + weights // 32 * 2 * 4 if bits else 4 * weights  # a scale and a bias for each 32
    assert counts.base_bytes == packed + 4 * norms


@pytest.mark.parametrize("bits", [None, 4])
def test_counts_of_biases_head_norms_and_experts_by_formula(bits):
    qwen2, qwen3, moe = (model_of(name, True, bits) for name in ("qwen2", "qwen3", "qwen3_moe"))
    h, kv, ffn, vocabulary, experts, inner = 64, 32, 96, 128, 4, 32
    for model in (qwen2, qwen3, moe):
        lora.attach(model, Lora(rank=4))

    sides = [(h, h), (h, kv), (h, kv), (h, h), (h, ffn), (h, ffn), (ffn, h)]
    base = vocabulary * h + h + 2 * (sum(a * b for a, b in sides) + h + 2 * kv + 2 * h)
    trainable = 2 * 4 * sum(a + b for a, b in sides)
    assert (lora.count(qwen2).trainable, lora.count(qwen2).total) == (trainable, base + trainable)

    attention = [(h, 128), (h, 64), (h, 64), (128, h)]  # heads of 32
    sides = [*attention, (h, ffn), (h, ffn), (ffn, h)]
    base = vocabulary * h + h + 2 * (sum(a * b for a, b in sides) + 2 * 32 + 2 * h)
    trainable = 2 * 4 * sum(a + b for a, b in sides)
    assert (lora.count(qwen3).trainable, lora.count(qwen3).total) == (trainable, base + trainable)

    sides = [*attention, (h, experts)] + [(h, inner)] * (3 * experts)
    base = vocabulary * h + h + 2 * (sum(a * b for a, b in sides) + 2 * 32 + 2 * h)
    trainable = 2 * 4 * sum(a + b for a, b in sides)
    assert (lora.count(moe).trainable, lora.count(moe).total) == (trainable, base + trainable)
    assert lora.count(moe).adapter_bytes == 4 * trainable


def test_a_disabled_adapter_is_not_merged():
    model = tiny.llama()
    lora.attach(model, Lora(target_modules="q_proj"))
    lora.disable(model)
    with pytest.raises(ValueError, match="enable it"):
        lora.merge(model)
    assert not any(layer.merged for layer in lora.layers(model).values())
