"""Adapters as GGUF LoRA files, in llama.cpp itself against the same adapter attached to the model in MLX."""

import re
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from llama_cpp import LlamaCpp
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2_moe as mlx_qwen2_moe

from mlx_lora import gguf_layout, lora, model
from mlx_lora.adapter_files import gguf_form
from mlx_lora.config import Model
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter, Pair
from mlx_lora.lora.layers import factor_shapes

TOKENS = tiny.tokens(1, 12)
UNTIED = {"tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", UNTIED),
    "llama, tied, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("llama", UNTIED | {"model_type": "mistral", "head_dim": 32}),
    "qwen2": ("qwen2", UNTIED),
    "qwen2, tied": ("qwen2", {}),
    "qwen3": ("qwen3", UNTIED),
    "qwen3, tied": ("qwen3", {}),
    "qwen2_moe": ("qwen2_moe", UNTIED),
    "qwen3_moe": ("qwen3_moe", UNTIED),
}


def qwen2_moe(**shape: Any) -> nn.Module:
    experts = {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }
    arguments = mlx_qwen2_moe.ModelArgs.from_dict({**tiny.SHAPE, **experts, **shape})
    return mlx_qwen2_moe.Model(arguments)


def random_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of such weights that its attention looks at something, and its config.json."""
    kind, shape = MODELS[name]
    built = (tiny.BUILDERS | {"qwen2_moe": qwen2_moe})[kind](**shape)
    random = np.random.default_rng(0)

    def weights(name: str, shape: tuple[int, ...]) -> mx.array:
        values = random.normal(size=shape)
        return mx.array((1 + 0.1 * values if "norm" in name else 2 * values / shape[-1] ** 0.5).astype(np.float32))

    flat = tree_flatten(built.parameters())
    built.update(tree_unflatten([(name, weights(name, array.shape)) for name, array in flat]))
    return built, asdict(built.args)


def random_adapter(
    built: nn.Module,
    ranks: tuple[int, ...] = (4, 8, 3),
    alphas: tuple[float, ...] = (8.0, 16.0, -4.0, 0.0, 10.1),
    size: float = 0.1,
) -> Adapter:
    """Pairs for every module that can be adapted, but for tied embeddings; ranks and alphas in turn."""
    random = np.random.default_rng(1)
    modules = dict(built.named_modules())
    pairs = {}
    for number, path in enumerate(lora.adaptable(built)):
        if path != "model.embed_tokens" or "lm_head" in modules:
            a, b = factor_shapes(modules[path], ranks[number % len(ranks)])
            lora_a = random.normal(0, a[-1 if len(a) == 3 else 0] ** -0.5, a)
            lora_b = random.normal(0, size, b)
            arrays = (mx.array(values.astype(np.float32)) for values in (lora_a, lora_b))
            pairs[path] = Pair(*arrays, alphas[number % len(alphas)])
    return Adapter(pairs)


def mlx_logits(built: nn.Module, adapter: Adapter | None = None, tokens: mx.array = TOKENS) -> np.ndarray:
    if adapter is not None:
        lora.attach_adapter(built, adapter)
    logits = np.array(built(tokens)[0])
    lora.detach(built)
    return logits


def llama_logits(base: Path, *loras: Path, scale: float = 1.0) -> np.ndarray:
    return LlamaCpp(base, [(path, scale) for path in loras]).logits(TOKENS[0].tolist())


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max())


def changed(adapter: Adapter, path: str, **values: Any) -> Adapter:
    return replace(adapter, pairs=adapter.pairs | {path: replace(adapter.pairs[path], **values)})


# What llama.cpp computes


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_mlx_does(tmp_path: Path, name: str) -> None:
    built, config = random_model(name)
    base = gguf_files.write_base(tmp_path / "base.gguf", built, config)
    adapter = random_adapter(built)
    assert len(adapter.pairs) == len(lora.adaptable(built)) - ("lm_head" not in built)
    notes = gguf_form.write(tmp_path / "lora.gguf", adapter, config, "f32")
    expected, plain = mlx_logits(built, adapter), mlx_logits(built)
    actual = llama_logits(base, tmp_path / "lora.gguf")
    print("base", difference(llama_logits(base), plain), "with adapter", difference(actual, expected))
    assert difference(llama_logits(base), plain) < 1e-4
    assert difference(actual, expected) < 1e-4
    assert difference(expected, plain) > 1
    others = sum(pair.alpha != 16 for pair in adapter.pairs.values())
    assert notes[0].startswith(f"the file has one alpha, 16: lora_b of {others} of {len(adapter.pairs)} modules")
    assert len(notes) == 1


@pytest.mark.parametrize("alphas", [(16.0,), (-16.0,), (0.0,), (0.1,), (1e-60,), (0.0, 0.5), (-8.0, 4.0)])
def test_every_scale_comes_out_at_user_scale_one(tmp_path: Path, alphas: tuple[float, ...]) -> None:
    built, config = random_model("qwen2")
    base = gguf_files.write_base(tmp_path / "base.gguf", built, config)
    adapter = random_adapter(built, (4,), alphas, 1.6 / max(0.1, *map(abs, alphas)))
    notes = gguf_form.write(tmp_path / "lora.gguf", adapter, config, "f32")
    stored = GGUFReader(tmp_path / "lora.gguf").fields["adapter.lora.alpha"].contents()
    assert stored == (np.float32(max(alphas, key=abs)) or 1)
    expected, plain = mlx_logits(built, adapter), mlx_logits(built)
    assert difference(expected, plain) > 1 or max(map(abs, alphas)) < 1e-30
    assert difference(llama_logits(base, tmp_path / "lora.gguf"), expected) < 1e-4
    assert difference(llama_logits(base, tmp_path / "lora.gguf", scale=0.0), plain) < 1e-4
    if len(alphas) == 1 and alphas[0] > 1e-30:  # one alpha: the arrays are what they were
        assert notes == []
        tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "lora.gguf").tensors}
        expected = np.array(adapter.pairs["model.layers.1.mlp.up_proj"].lora_b.T)
        assert tensors["blk.1.ffn_up.weight.lora_b"].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.15)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_smaller_types_are_as_good_as_their_digits(tmp_path: Path, name: str, dtype: str, bound: float) -> None:
    built, config = random_model(name)
    base = gguf_files.write_base(tmp_path / "base.gguf", built, config)
    adapter = random_adapter(built, (32, 8), (16.0,), 0.05)
    notes = gguf_form.write(tmp_path / "lora.gguf", adapter, config, dtype)
    expected = mlx_logits(built, adapter)
    error = difference(llama_logits(base, tmp_path / "lora.gguf"), expected)
    print("error", error, "of", difference(expected, mlx_logits(built)))
    assert 1e-4 < error < bound
    assert difference(expected, mlx_logits(built)) > 1
    gguf_form.write(tmp_path / "f32.gguf", adapter, config, "f32")
    exact = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "f32.gguf").tensors}
    odd = 0
    for tensor in GGUFReader(tmp_path / "lora.gguf").tensors:
        values = exact.pop(tensor.name)
        rows = values.shape[-1]
        assert tensor.tensor_type.name == ("F16" if dtype == "q8_0" and rows % 32 else dtype.upper())
        odd += rows % 32 != 0
        digits = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}[tensor.tensor_type.name]
        assert difference(dequantize(tensor.data, tensor.tensor_type), values) <= digits * abs(values).max()
    assert exact == {}
    assert [line.split(":")[0] for line in notes] == (
        [f"{odd} of {2 * len(adapter.pairs)} tensors are F16"] if dtype == "q8_0" else []
    )
    assert odd > 5


def test_numbers_too_small_for_their_type_are_told(tmp_path: Path) -> None:
    built, config = random_model("qwen2")
    adapter = random_adapter(built, (8,), (16.0,), 1e-7)
    told = gguf_form.write(tmp_path / "lora.gguf", adapter, config, "f16")
    assert len(told) == 1
    assert told[0].startswith(f"{len(adapter.pairs)} tensors, such as output.weight.lora_b")
    assert gguf_form.write(tmp_path / "lora.gguf", adapter, config, "bf16") == []


# What llama.cpp computes with files that are wrong in one thing


def without_order(adapter: Adapter, head_dim: int) -> Adapter:
    """B of q_proj and k_proj such that the file holds them in Hugging Face's order."""
    for path, pair in adapter.pairs.items():
        if path.endswith((".q_proj", ".k_proj")):
            rows = gguf_layout.deinterleave(np.array(pair.lora_b.T), head_dim)
            adapter = changed(adapter, path, lora_b=mx.array(rows.T))
    return adapter


def with_alpha(path: Path, alpha: float) -> None:
    """Changes alpha, and nothing else, in the file at `path`."""
    key = b"adapter.lora.alpha" + struct.pack("<I", GGUFValueType.FLOAT32)
    data = path.read_bytes()
    assert data.count(key) == 1
    start = data.index(key) + len(key)
    path.write_bytes(data[:start] + struct.pack("<f", alpha) + data[start + 4 :])


@pytest.mark.parametrize("wrong", ["nothing", "order of rows", "ratio of alphas", "alpha", "no alpha", "user scale"])
def test_a_wrong_file_gives_wrong_logits(tmp_path: Path, wrong: str) -> None:
    built, config = random_model("llama")
    base = gguf_files.write_base(tmp_path / "base.gguf", built, config)
    adapter = written = random_adapter(built)
    if wrong == "order of rows":
        written = without_order(adapter, head_dim=16)
    if wrong == "ratio of alphas":
        written = Adapter({path: replace(pair, alpha=16.0) for path, pair in adapter.pairs.items()})
    gguf_form.write(tmp_path / "lora.gguf", written, config, "f32")
    if wrong == "alpha":
        with_alpha(tmp_path / "lora.gguf", 32.0)
    if wrong == "no alpha":
        with_alpha(tmp_path / "lora.gguf", 0.0)  # as if the key were missing
    actual = llama_logits(base, tmp_path / "lora.gguf", scale=2.0 if wrong == "user scale" else 1.0)
    error = difference(actual, mlx_logits(built, adapter))
    print("error", error)
    assert error < 1e-4 if wrong == "nothing" else error > 0.5


# SmolLM2


@pytest.fixture(scope="module")
def smollm2_float32(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as an F32 file (538 MB), for this module only."""
    path = gguf_files.as_float32(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "f32.gguf")
    yield path
    path.unlink()


@pytest.mark.slow
def test_smollm2_with_an_adapter_in_llama_cpp(
    smollm2_gguf: Path, smollm2_float32: Path, smollm2_folder: Path, tmp_path: Path
) -> None:
    base = model.load(Model(path=str(smollm2_folder)))
    adapter = random_adapter(base.model, (8,), (16.0,), 0.02)
    for dtype in ("f32", "f16"):
        assert gguf_form.write(tmp_path / f"{dtype}.gguf", adapter, base.config, dtype) == []
    tokens = LlamaCpp(smollm2_gguf).tokenize("The capital of France is Paris, and the capital of Spain is Madrid. " * 2)
    plain, adapted = (mlx_logits(base.model, values, mx.array([tokens])) for values in (None, adapter))
    assert difference(plain, adapted) > 2
    errors = {}
    for file in (smollm2_float32, smollm2_gguf):
        errors[file, "none"] = difference(LlamaCpp(file).logits(tokens), plain)
        for dtype in ("f32", "f16"):
            logits = LlamaCpp(file, [(tmp_path / f"{dtype}.gguf", 1.0)]).logits(tokens)
            errors[file, dtype] = difference(logits, adapted)
    for (file, dtype), error in errors.items():
        print(f"{file.name}, adapter {dtype}: {error:.3g}")
    assert errors[smollm2_float32, "none"] < 1e-3
    assert errors[smollm2_float32, "f32"] < 1e-3
    assert errors[smollm2_float32, "f16"] < 2e-2
    # On a quantised base llama.cpp quantises the activations as well: the error is the base's own.
    for dtype in ("f32", "f16"):
        assert errors[smollm2_gguf, dtype] < 2 * errors[smollm2_gguf, "none"]


# The file


def test_the_file_holds_four_keys_and_the_pairs(tmp_path: Path) -> None:
    built, config = random_model("qwen2_moe")
    adapter = random_adapter(built, (8,), (16.0,))
    gguf_form.write(tmp_path / "lora.gguf", adapter, config)
    reader = GGUFReader(tmp_path / "lora.gguf")
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in fields.items()} == {
        "general.architecture": "qwen2moe",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    assert fields["adapter.lora.alpha"].types == [GGUFValueType.FLOAT32]
    shapes = {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    assert len(shapes) == 2 * len(adapter.pairs)
    pairs = {
        "token_embd": ((128, 8), (64, 8)),
        "output": ((8, 64), (128, 8)),
        "blk.1.attn_k": ((8, 64), (32, 8)),
        "blk.0.ffn_gate_inp": ((8, 64), (4, 8)),
        "blk.0.ffn_down_exps": ((4, 8, 32), (4, 64, 8)),
        "blk.0.ffn_up_shexp": ((8, 64), (48, 8)),
        "blk.0.ffn_gate_inp_shexp": ((8, 64), (1, 8)),
    }
    for name, (a, b) in pairs.items():
        assert (shapes[f"{name}.weight.lora_a"], shapes[f"{name}.weight.lora_b"]) == (a, b)


@pytest.mark.parametrize("dtype", ["f16", "f32", "bf16", "q8_0"])
def test_equal_adapters_give_equal_bytes(tmp_path: Path, dtype: str) -> None:
    built, config = random_model("llama")
    adapter = random_adapter(built)
    other = Adapter(dict(reversed(adapter.pairs.items())), metadata={"a": "b"})
    gguf_form.write(tmp_path / "one.gguf", adapter, config, dtype)
    gguf_form.write(tmp_path / "two.gguf", other, config, dtype)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


# What is refused


Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.switch_mlp.up_proj"
Change = Callable[[Adapter], Adapter]


def filled(path: str, value: float) -> Change:
    return lambda adapter: changed(adapter, path, lora_a=mx.full(adapter.pairs[path].lora_a.shape, value))


def moved(path: str, to: str) -> Change:
    return lambda adapter: replace(adapter, pairs=adapter.pairs | {to: adapter.pairs[path]})


def with_arrays(path: str, a: tuple[int, ...], b: tuple[int, ...]) -> Change:
    return lambda adapter: changed(adapter, path, lora_a=mx.ones(a), lora_b=mx.ones(b))


def with_pair_alpha(alpha: float) -> Change:
    return lambda adapter: changed(adapter, Q, alpha=alpha)


REFUSALS: list[tuple[str, Change, dict[str, Any], str]] = [
    ("llama", lambda adapter: adapter, {"model_type": "gpt2"}, "type gpt2; known: llama, mistral, qwen2, qwen3,"),
    ("llama", lambda adapter: adapter, {"model_type": None}, "type None; known"),
    ("llama", lambda adapter: Adapter({}), {}, "adapts no module"),
    ("llama", lambda adapter: adapter, {"tie_word_embeddings": True}, "embed_tokens and lm_head: .*merged-gguf"),
    ("qwen2, tied", moved(Q, "model.embed_tokens"), {}, "^model.embed_tokens: .*merged-gguf"),
    ("llama", moved(Q, "model.layers.0.self_attn.qkv_proj"), {}, "no update to model.layers.0.self_attn.qkv_proj in"),
    ("llama", moved(Q, "model.layers.0.input_layernorm"), {}, "no update to model.layers.0.input_layernorm in"),
    ("qwen3", moved(Q, "model.layers.0.self_attn.q_norm"), {}, "no update to model.layers.0.self_attn.q_norm in"),
    ("llama", moved(Q, "model.norm"), {}, "no update to model.norm in a model of type llama; .*merged-gguf"),
    ("llama", moved(Q, "model.layers.0.mlp.gate"), {}, "no update to model.layers.0.mlp.gate in"),
    ("llama", moved(Q, "model.layers.0.mlp.switch_mlp.up_proj"), {}, "no update to model.layers.0.mlp.switch_mlp.up_p"),
    ("qwen3_moe", moved(Q, "model.layers.0.mlp.up_proj"), {}, "no update to model.layers.0.mlp.up_proj in"),
    (
        "qwen2_moe",
        lambda adapter: adapter,
        {"model_type": "qwen2"},
        "mlp.gate, .* and 13 more in a model of type qwen2",
    ),
    ("qwen3_moe", lambda adapter: adapter, {"num_experts": 8}, "has 4 experts, the base has 8"),
    ("qwen3_moe", with_arrays(EXPERTS, (3, 2, 64), (3, 32, 2)), {}, "up_proj has 3 experts, the base has 4"),
    ("qwen3_moe", with_arrays(EXPERTS, (64, 2), (2, 32)), {}, "up_proj has arrays of 2 dimensions"),
    ("llama", with_arrays(Q, (4, 2, 64), (4, 64, 2)), {}, "q_proj has arrays of 3 dimensions"),
    ("llama", with_arrays(Q, (64, 2), (2, 60)), {}, "60 outputs, which are no heads of size 16"),
    ("llama", lambda adapter: adapter, {"num_attention_heads": None}, "config.json: head_dim, or hidden_size and"),
    ("llama", with_pair_alpha(float("nan")), {}, "alpha nan"),
    ("llama", with_pair_alpha(float("-inf")), {}, "alpha -inf"),
    ("llama", with_pair_alpha(1e39), {}, r"alpha 1e\+39"),
    ("llama", filled(Q, float("nan")), {}, "q_proj has values that are not finite"),
    ("llama", filled(Q, float("inf")), {}, "q_proj has values that are not finite"),
    ("llama", filled(Q, 65520.0), {}, r"q_proj has values up to 6.55e\+04, too large for F16; use f32 or bf16"),
]


@pytest.mark.parametrize(("name", "change", "settings", "words"), REFUSALS)
def test_what_llama_cpp_cannot_hold_is_refused(
    tmp_path: Path, name: str, change: Change, settings: dict[str, Any], words: str
) -> None:
    built, config = random_model(name)
    adapter = random_adapter(built)
    with pytest.raises(InputError, match=words):
        gguf_form.write(tmp_path / "new.gguf", change(adapter), config | settings)
    assert list(tmp_path.iterdir()) == []
    if "too large" not in words:
        with pytest.raises(InputError, match=words):
            gguf_form.check(change(adapter), config | settings)
    gguf_form.write(tmp_path / "old.gguf", adapter, config)  # without the change it is written
    before = (tmp_path / "old.gguf").read_bytes()
    with pytest.raises(InputError):
        gguf_form.write(tmp_path / "old.gguf", change(adapter), config | settings)
    assert (tmp_path / "old.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_what_one_type_cannot_hold_others_do(tmp_path: Path, dtype: str) -> None:
    built, config = random_model("llama")
    adapter = filled(Q, 3.4e38)(random_adapter(built))
    with pytest.raises(InputError, match=f"too large for {dtype.upper()}"):
        gguf_form.write(tmp_path / "lora.gguf", adapter, config, dtype)
    assert list(tmp_path.iterdir()) == []
    gguf_form.write(tmp_path / "lora.gguf", adapter, config, "f32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "lora.gguf").tensors}
    assert (tensors["blk.0.attn_q.weight.lora_a"] == np.float32(3.4e38)).all()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    built, config = random_model("qwen2")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'none' / 'lora.gguf'}: cannot be written")):
        gguf_form.write(tmp_path / "none" / "lora.gguf", random_adapter(built), config)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    built, config = random_model("qwen2")
    gguf_form.write(tmp_path / "lora.gguf", random_adapter(built), config)
    before = (tmp_path / "lora.gguf").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'lora.gguf'}: cannot be written")):
            gguf_form.write(tmp_path / "lora.gguf", random_adapter(built, (8,)), config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "lora.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora.gguf"]
