"""Live adapters: what is on is the exact weighted sum, off is the base bit for bit, and the base never moves."""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlx_lora import lora
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Lora, Model
from mlx_lora.errors import InputError
from mlx_lora.live import LiveAdapters, Source
from mlx_lora.lora import Adapter


def quantized(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=4)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": tiny.llama,
    "untied": lambda: tiny.qwen3(tie_word_embeddings=False),
    "experts": tiny.qwen3_moe,
    "quantized": lambda: quantized(tiny.qwen2()),
    "quantized experts": lambda: quantized(tiny.qwen3_moe()),
    "float16": lambda: in_float16(tiny.llama()),
}
# Different ranks, scales and modules; the last two have modules of their own.
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"},
    "b": {"rank": 2, "alpha": 3.0, "target_modules": ["all-linear", "embed_tokens"]},
    "c": {"rank": 3, "alpha": -6.0, "target_modules": ["q_proj", "o_proj"], "layers": "last:1"},
}
BLENDS: list[dict[str, float]] = [
    {"a": 1.0},
    {"b": 0.37},
    {"a": 0.5, "b": 0.25},
    {"c": 1.0, "a": -0.75},
    {"a": 1 / 3, "b": 2.0, "c": -0.1},
]


def in_float16(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.float16)
    return model


def random_adapter(model: nn.Module, seed: int = 0, **options: Any) -> Adapter:
    """An adapter of the model's shapes that changes the output; the model stays as it is."""
    alpha = options.pop("alpha")
    lora.attach(model, Lora(alpha=abs(alpha), **options), seed)
    tiny.randomize(model, seed)
    adapter = lora.attached(model)
    lora.detach(model)
    return replace(adapter, pairs={path: replace(pair, alpha=alpha) for path, pair in adapter.pairs.items()})


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(tiny.tokens()).astype(mx.float32))


def delta(pair: lora.Pair) -> np.ndarray:
    """The update in float64, in the shape of the weight of a linear layer or of experts."""
    a, b = (np.array(factor).astype(np.float64) for factor in pair.factors())
    return pair.alpha / pair.rank * (b @ a)


@dataclass
class Place:
    """A model, its adapters by name, loaded, and what the bare base gives and is."""

    model: nn.Module
    adapters: dict[str, Adapter]
    live: LiveAdapters
    base_logits: np.ndarray
    weights: dict[str, np.ndarray]

    def assert_bare(self) -> None:
        assert logits(self.model).tobytes() == self.base_logits.tobytes()

    def assert_weights_unchanged(self) -> None:
        self.live.use(None)
        tiny.assert_identical(tiny.copies(self.model), self.weights)


def place(kind: str) -> Place:
    model = MODELS[kind]()
    mx.eval(model.parameters())
    weights, base_logits = tiny.copies(model), logits(model)
    adapters = {
        name: random_adapter(model, seed, **options) for seed, (name, options) in enumerate(ADAPTERS.items(), 1)
    }
    live = LiveAdapters(model)
    for name, adapter in adapters.items():
        live.add(name, adapter)
    return Place(model, adapters, live, base_logits, weights)


@pytest.mark.parametrize("kind", list(MODELS))
def test_off_is_the_base_bit_for_bit_whatever_went_before(kind: str) -> None:
    here = place(kind)
    here.assert_bare()  # loading alone changes nothing
    for blend in BLENDS:
        here.live.use(blend)
        on = logits(here.model)
        assert np.abs(on - here.base_logits).max() > 1e-3
        here.live.disable()
        here.assert_bare()
        assert here.live.active == {}
        here.live.enable()
        assert logits(here.model).tobytes() == on.tobytes()
        assert here.live.active == blend
        here.live.merge()
        assert here.live.merged
        here.live.unmerge()
        assert not here.live.merged
        assert logits(here.model).tobytes() == on.tobytes()
        here.live.merge()
        here.live.disable()
        here.assert_bare()
        here.live.enable()
        assert logits(here.model).tobytes() == on.tobytes()
    here.live.merge()
    here.live.use(None)
    here.assert_bare()
    here.assert_weights_unchanged()


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("blend", BLENDS, ids=str)
def test_a_blend_is_the_weighted_sum_of_the_updates(kind: str, blend: dict[str, float]) -> None:
    here = place(kind)
    here.live.use(blend)
    layers = lora.layers(here.model)
    assert layers.keys() == {path for name in blend for path in here.adapters[name].pairs}
    for path, layer in layers.items():
        terms = [
            weight * delta(here.adapters[name].pairs[path])
            for name, weight in blend.items()
            if path in here.adapters[name].pairs
        ]
        got = tiny.float64(layer.delta())
        if isinstance(layer, lora.LoRAEmbedding):
            got = got.T
        assert np.abs(got - sum(terms)).max() < 1e-6
        assert np.abs(got - sum(terms[1:], np.zeros(got.shape))).max() > 1e-3  # a term less is another update


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_a_blend_gives_the_logits_of_a_model_with_the_sum_in_its_weights(kind: str) -> None:
    """The sum is formed in float64 and put into the plain weights of another instance of the model."""
    here, blend = place(kind), BLENDS[-1]
    plain = MODELS[kind]()
    for name, weight in blend.items():
        for path, pair in here.adapters[name].pairs.items():
            module = dict(plain.named_modules())[path]
            update = weight * delta(pair)
            update = update.T if isinstance(module, nn.Embedding) else update
            module.weight = mx.array((tiny.float64(module.weight) + update).astype(np.float32))
    expected = logits(plain)
    here.live.use(blend)
    on = logits(here.model)
    here.live.merge()
    merged = logits(here.model)
    assert np.abs(on - expected).max() < 1e-5
    assert np.abs(merged - expected).max() < 1e-5
    assert np.abs(here.base_logits - expected).max() > 0.01
    here.assert_weights_unchanged()


def test_a_swap_equals_a_fresh_attachment_and_does_not_remember_the_last() -> None:
    here = place("tied")
    for name in ("a", "b", "a", "c"):
        here.live.use(name)
        fresh = MODELS["tied"]()
        lora.attach_adapter(fresh, here.adapters[name])
        assert logits(here.model).tobytes() == logits(fresh).tobytes()
        assert here.live.active == {name: 1.0}
    assert lora.layers(here.model)["model.layers.1.self_attn.q_proj"].lora_a is (
        here.adapters["c"].pairs["model.layers.1.self_attn.q_proj"].lora_a
    )  # one adapter alone is not copied


def test_swapping_while_merged_leaves_the_new_blend_alone_and_unmerged() -> None:
    here = place("quantized")
    here.live.use("b")
    expected = logits(here.model)
    here.live.use("a")
    here.live.merge()
    here.live.use("b")
    assert not here.live.merged
    assert logits(here.model).tobytes() == expected.tobytes()


def test_a_swap_switches_on_and_the_bare_base_stays_bare() -> None:
    here = place("tied")
    here.live.use("a")
    on = logits(here.model)
    here.live.disable()
    here.live.use("a")
    assert logits(here.model).tobytes() == on.tobytes()
    here.live.disable()
    here.live.use(None)
    here.live.enable()
    assert here.live.active == {}
    here.assert_bare()


def test_what_is_in_use_already_stays_as_it_is() -> None:
    here = place("tied")
    here.live.use("a")
    layers = lora.layers(here.model)
    here.live.merge()
    here.live.use({"b": 0.0, "a": 1.0})
    assert here.live.merged
    assert all(layer is layers[path] for path, layer in lora.layers(here.model).items())


def test_the_order_of_a_blend_changes_no_bit() -> None:
    """Neither what a call names first nor what was in use before."""
    here, outputs = place("tied"), []
    for blend in ({"c": 0.3, "a": 0.7, "b": 1.1}, {"b": 1.1, "c": 0.3, "a": 0.7}):
        here.live.use(None)
        here.live.use(blend)
        outputs.append(logits(here.model))
    assert outputs[0].tobytes() == outputs[1].tobytes()
    assert list(here.live.active) == ["a", "b", "c"]


def test_the_largest_weight_gives_finite_logits() -> None:
    here = place("tied")
    here.live.use({"a": 1e6, "c": -1e6})
    assert np.isfinite(logits(here.model)).all()


def test_weight_0_is_as_good_as_none() -> None:
    here = place("tied")
    here.live.use({"a": 1.0, "b": 0.0})
    assert here.live.active == {"a": 1.0}
    here.live.use({"a": 0.0})
    assert here.live.active == {}
    here.assert_bare()


def test_unloading_leaves_the_others_as_they_were() -> None:
    here = place("tied")
    here.live.use({"a": 0.5, "b": 0.25})
    here.live.unload("c")
    assert here.live.active == {"a": 0.5, "b": 0.25}
    here.live.unload("b")
    assert (here.live.names, here.live.active) == (["a"], {"a": 0.5})
    rest = logits(here.model)
    here.live.use({"a": 0.5})
    assert logits(here.model).tobytes() == rest.tobytes()
    here.live.disable()
    here.live.unload("a")
    assert (here.live.names, here.live.active) == ([], {})
    here.assert_bare()
    here.live.add("a", here.adapters["a"])  # the name is free again
    here.live.use("a")
    assert here.live.active == {"a": 1.0}


def test_unloading_while_switched_off_stays_off() -> None:
    here = place("tied")
    here.live.use({"a": 0.5, "b": 0.25})
    here.live.disable()
    here.live.unload("b")
    here.assert_bare()
    here.live.enable()
    assert here.live.active == {"a": 0.5}
    assert np.abs(logits(here.model) - here.base_logits).max() > 1e-3


@pytest.fixture
def exact_memory() -> Iterator[None]:
    """Buffers are not kept for other arrays, for which they may be larger than needed."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


@pytest.mark.usefixtures("exact_memory")
@pytest.mark.parametrize("kind", ["tied", "quantized experts"])
def test_a_thousand_cycles_and_swaps_leave_the_memory_as_it_was(kind: str) -> None:
    here, blend = place(kind), {"a": 0.5, "b": 0.5}
    fourth = random_adapter(here.model, 9, **ADAPTERS["c"])
    here.live.use(blend)
    on = logits(here.model)
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(1000):
        here.live.disable()
        here.live.enable()
    assert mx.get_active_memory() == before
    for _ in range(20):
        here.live.use("c")
        here.live.merge()
        here.live.use(blend)
    assert mx.get_active_memory() == before
    assert logits(here.model).tobytes() == on.tobytes()
    here.live.add("d", fourth)
    here.live.use({**blend, "d": 0.5})
    assert mx.get_active_memory() > before  # more is seen


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda live: live.use("d"), "no adapter is named d; loaded: a, b, c"),
        (lambda live: live.use({"a": 1.0, "d": 0.0}), "no adapter is named d"),
        (lambda live: live.use({"b": math.nan}), "b: its weight is not a number between"),
        (lambda live: live.use({"b": 1.0, "a": -math.inf}), "a: its weight is not a number between"),
        (lambda live: live.use({"b": 1e300}), "b: its weight is not a number between"),
        (lambda live: live.use({"b": -(10**5000)}), "b: its weight is not a number between"),
        (lambda live: live.unload("d"), "no adapter is named d"),
        (lambda live: live.add("a", Adapter({})), "named a already"),
        (lambda live: live.add("", Adapter({})), "needs a name"),
        (lambda live: live.load("b", "nowhere"), "named b already"),
        (lambda live: live.load("d", "nowhere"), "nowhere: holds no adapter"),
    ],
)
def test_an_error_leaves_everything_as_it_was(action: Callable[[LiveAdapters], None], words: str) -> None:
    here = place("tied")
    here.live.use({"a": 0.5, "b": 0.25})
    here.live.merge()
    on = logits(here.model)
    with pytest.raises(InputError, match=words):
        action(here.live)
    assert (here.live.names, here.live.active, here.live.merged) == (["a", "b", "c"], {"a": 0.5, "b": 0.25}, True)
    assert logits(here.model).tobytes() == on.tobytes()


def test_an_adapter_that_does_not_fit_is_refused_even_where_it_replaces_an_active_one() -> None:
    here, wider = place("tied"), tiny.llama(hidden_size=32)
    foreign = random_adapter(wider, rank=4, alpha=8.0, target_modules="all-linear")
    here.live.use("a")
    on = logits(here.model)
    with pytest.raises(InputError, match="has shape"):
        here.live.add("foreign", foreign)
    deeper = random_adapter(tiny.llama(num_hidden_layers=3), rank=4, alpha=8.0, target_modules="q_proj")
    with pytest.raises(InputError, match=r"layers.2.self_attn.q_proj has no place"):
        here.live.add("deeper", deeper)
    assert here.live.names == ["a", "b", "c"]
    assert logits(here.model).tobytes() == on.tobytes()


def test_nothing_active_is_nothing_to_merge() -> None:
    here = place("tied")
    with pytest.raises(InputError, match="nothing to merge"):
        here.live.merge()
    here.live.use("a")
    here.live.disable()
    with pytest.raises(InputError, match="nothing to merge"):
        here.live.merge()


def test_a_model_with_an_adapter_attached_is_refused() -> None:
    model = tiny.llama()
    lora.attach(model, Lora())
    with pytest.raises(ValueError, match="attached already"):
        LiveAdapters(model)


# ---- folders ---------------------------------------------------------------------------------------------------------


def save(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    mlx_form.save(folder, adapter.arrays(), mlx_form.settings(adapter), adapter.metadata)
    return folder


def test_adapters_are_read_from_folders(tmp_path: Path) -> None:
    here = place("experts")
    folder = save(here.adapters["a"], tmp_path / "a")
    read = here.live.load("read", folder)
    assert here.live.names == ["a", "b", "c", "read"]
    tiny.assert_identical(tiny.copies(read.arrays()), tiny.copies(here.adapters["a"].arrays()))
    here.assert_bare()
    here.live.use("a")
    on = logits(here.model)
    (folder / mlx_form.WEIGHTS).write_bytes(b"")  # what was loaded does not hang on the file
    here.live.use("read")
    assert logits(here.model).tobytes() == on.tobytes()


def test_a_folder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = save(random_adapter(tiny.qwen2(), rank=2, alpha=2.0, target_modules="q_proj"), tmp_path / "other")
    live = LiveAdapters(tiny.llama(hidden_size=32))
    with pytest.raises(InputError, match=rf"{folder}: model.layers.0.self_attn.q_proj.lora_a has shape"):
        live.load("other", folder)
    assert live.names == []


def test_an_adapter_of_another_base_of_the_same_shapes_gets_a_note() -> None:
    model = tiny.llama()
    adapter = random_adapter(model, rank=2, alpha=2.0, target_modules="q_proj")
    ours, theirs = (replace(adapter, metadata={"base_digest": digest}) for digest in ("1234", "5678"))
    live = LiveAdapters(model, {"name": "base", "digest": "1234"})
    live.add("unknown", adapter)
    live.add("ours", ours)
    assert live.notes == {}
    live.add("theirs", replace(theirs, base=Model(path="some/model")))
    assert live.notes == {"theirs": "theirs was trained on some/model, whose digest differs from the loaded base's"}
    live.use("theirs")
    live.unload("theirs")
    assert live.notes == {}


@pytest.mark.parametrize(
    ("text", "name", "folder", "weight"),
    [
        ("runs/red", "red", "runs/red", 1.0),
        ("runs/red/", "red", "runs/red", 1.0),
        ("runs/red:0.5", "red", "runs/red", 0.5),
        ("r=runs/red", "r", "runs/red", 1.0),
        ("r=runs/red:-2", "r", "runs/red", -2.0),
        ("r=runs/red:1e-1", "r", "runs/red", 0.1),
        ("odd:1=x", "odd:1=x", "odd:1=x", 1.0),  # a folder that is there
        ("r=odd:1=x", "r", "odd:1=x", 1.0),
        ("r=odd:1=x:3", "r", "odd:1=x", 3.0),
        ("runs/absent:0", "absent", "runs/absent", 0.0),
        ("model.gguf", "model.gguf", "model.gguf", 1.0),  # a folder, whatever its name
    ],
)
def test_an_adapter_on_the_command_line(
    text: str, name: str, folder: str, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("runs/red", "odd:1=x", "model.gguf"):
        (tmp_path / each).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Source.parse(text) == Source(name, Path(folder), weight)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r=runs/red:heavy", "the weight 'heavy' is not a number between"),
        ("r=runs/red:", "'' is not a number"),
        ("runs/red:nan", "'nan' is not a number"),
        ("runs/red:inf", "'inf' is not a number"),
        ("runs/red:-1e7", "'-1e7' is not a number"),
        ("", "names no folder"),
        ("r=", "names no folder"),
    ],
)
def test_a_misspelt_adapter_on_the_command_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Source.parse(text)
