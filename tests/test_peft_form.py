"""PEFT's adapters in and out, against PEFT and transformers themselves."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from tiny import randomize

from mlx_lora import adapter_files, config, lora, model
from mlx_lora.adapter_files import peft_form
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter, Pair

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # What PEFT 0.21 and transformers 5.23 say of one another, and of what the tests mean to do.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "deep": {"model_type": "llama", "num_hidden_layers": 12},  # blocks 1, 10 and 11
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, **EXPERTS},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40, **EXPERTS},
}
EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]
TOKENS = np.random.default_rng(5).integers(3, 259, (2, 10))
TOLERANCE = 1e-4  # on logits in float32, which an adapter here moves by more than a thousand times that


@dataclass
class Base:
    folder: Path
    network: nn.Module
    config: dict[str, Any]

    def logits(self) -> np.ndarray:
        return np.array(self.network(mx.array(TOKENS)))

    def torch(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def attach(self, targets: str | list[str], layers: str = "all", rank: int = 4, alpha: float = 10.0) -> Adapter:
        """A new random adapter, attached."""
        lora.attach(
            self.network, config.Lora(rank=rank, alpha=alpha, target_modules=targets, layers=layers, dropout=0.1)
        )
        randomize(self.network, size=0.3)
        return lora.attached(self.network)


@pytest.fixture(scope="module")
def make_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(name: str) -> Base:
        if name not in made:
            folder = tmp_path_factory.mktemp("bases") / name
            torch.manual_seed(0)
            settings = transformers.AutoConfig.for_model(**{**SHAPE, **BASES[name]})
            transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
            for file in tiny_model.glob("*token*"):
                shutil.copy(file, folder)
            loaded = model.load(config.Model(path=str(folder)))
            made[name] = Base(folder, loaded.model, json.loads((folder / "config.json").read_text()))
        return made[name]

    return make


@pytest.fixture
def base(request: pytest.FixtureRequest, make_base: Callable[[str], Base]) -> Iterator[Base]:
    found = make_base(request.param)
    yield found
    lora.detach(found.network)


def torch_logits(network: Any) -> np.ndarray:
    with torch.no_grad():
        return network.eval()(torch.tensor(TOKENS)).logits.numpy()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def make_peft(base: Base, **options: Any) -> Any:
    """A PEFT model whose adapter does something."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    network = peft.get_peft_model(base.torch(), peft.LoraConfig(**settings))
    random = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_" in name and isinstance(settings.get("init_lora_weights", True), bool):
            torch.nn.init.normal_(parameter, std=0.3, generator=random)
    return network.eval()


def save(network: Any, folder: Path, **options: Any) -> Path:
    network.save_pretrained(folder, **options)
    return folder


def written(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((folder / peft_form.SETTINGS).read_text()), safetensors.numpy.load_file(
        folder / peft_form.WEIGHTS
    )


def rewrite(folder: Path, settings: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None) -> None:
    """Changes entries of an adapter's files."""
    found, kept = written(folder)
    (folder / peft_form.SETTINGS).write_text(json.dumps(found | (settings or {})))
    if arrays is not None:
        safetensors.numpy.save_file(kept | arrays, folder / peft_form.WEIGHTS)


def assert_equal(actual: Adapter, expected: Adapter) -> None:
    """The same pairs, bit for bit."""
    assert actual.pairs.keys() == expected.pairs.keys()
    for path, pair in expected.pairs.items():
        assert actual.pairs[path].alpha == pair.alpha
        for name in ("lora_a", "lora_b"):
            one, other = np.array(getattr(actual.pairs[path], name)), np.array(getattr(pair, name))
            assert one.dtype == other.dtype == np.float32
            assert one.tobytes() == other.tobytes(), f"{path}.{name}"


def resized(adapter: Adapter, ranks: dict[str, int], alphas: dict[str, float]) -> Adapter:
    """The adapter with other ranks and alphas for some modules; arrays are cut."""
    pairs = dict(adapter.pairs)
    for path in ranks.keys() | alphas.keys():
        rank, alpha = ranks.get(path, pairs[path].rank), alphas.get(path, pairs[path].alpha)
        pairs[path] = Pair(pairs[path].lora_a[:, :rank], pairs[path].lora_b[:rank], alpha)
    return replace(adapter, pairs=pairs)


# ---- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "targets", "layers"),
    [
        ("llama", "all-linear", "all"),
        ("qwen2", "all-linear", "0-0"),
        ("qwen3", EVERYTHING, "all"),
        ("qwen3", ["q_proj", "lm_head"], "last:1"),
        ("llama", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.*"], "all"),
        ("deep", ["*.1.self_attn.q_proj", "*.10.mlp.up_proj"], "all"),
        ("tied", ["all-linear", "embed_tokens"], "all"),
        ("tied", ["v_proj", "embed_tokens"], "last:1"),
        ("qwen3_moe", EVERYTHING, "all"),
        ("qwen3_moe", ["q_proj", "*.0.mlp.switch_mlp.up_proj", "*.1.mlp.switch_mlp.down_proj"], "all"),
        ("qwen3_moe", ["*.1.mlp.gate", "*.0.self_attn.v_proj"], "all"),
        ("qwen2_moe", "all-linear", "all"),
        ("qwen2_moe", ["*.shared_expert.*", "k_proj"], "last:1"),
    ],
    indirect=["base"],
)
def test_peft_computes_the_logits_of_a_written_adapter(
    base: Base, targets: str | list[str], layers: str, tmp_path: Path
) -> None:
    plain = base.logits()
    adapter = base.attach(targets, layers)
    peft_form.write(tmp_path, adapter, base.config)
    network = peft.PeftModel.from_pretrained(base.torch(), tmp_path)  # warns, which is an error, of missing arrays
    assert difference(base.logits(), plain) > 1000 * TOLERANCE
    assert difference(torch_logits(network), base.logits()) < TOLERANCE

    settings, _ = written(tmp_path)
    rewrite(tmp_path, {"lora_alpha": 1.2 * settings["lora_alpha"], "alpha_pattern": {}})
    wrong = peft.PeftModel.from_pretrained(base.torch(), tmp_path)
    assert difference(torch_logits(wrong), base.logits()) > 100 * TOLERANCE


@pytest.mark.parametrize("base", ["deep"], indirect=True)
def test_ranks_and_alphas_of_single_modules(base: Base, tmp_path: Path) -> None:
    adapter = base.attach(["q_proj", "v_proj", "down_proj"])
    lora.detach(base.network)
    block = "model.layers.{}.self_attn.{}_proj".format
    ranks = {block(1, "q"): 2, block(10, "v"): 1, "model.layers.1.mlp.down_proj": 3}
    adapter = resized(adapter, ranks, {block(11, "q"): 7.3, block(1, "q"): 5.0, block(10, "v"): 2.5})
    lora.attach_adapter(base.network, adapter)
    notes = peft_form.write(tmp_path, adapter, base.config)
    assert notes == ["2 of 36 modules had another alpha / rank, which their lora_B took over"]
    settings, arrays = written(tmp_path)
    assert settings["rank_pattern"] == ranks
    assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert settings["layers_to_transform"] is None

    network = peft.PeftModel.from_pretrained(base.torch(), tmp_path)
    assert difference(torch_logits(network), base.logits()) < TOLERANCE
    found = {name: module.r["default"] for name, module in network.named_modules() if hasattr(module, "lora_A")}
    assert found == {f"base_model.model.{path}": pair.rank for path, pair in adapter.pairs.items()}

    # vLLM: the rank of the arrays, but one scale for all.
    for path, pair in adapter.pairs.items():
        a, b = (arrays[f"base_model.model.{path}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        assert a.shape[0] == b.shape[1] == pair.rank <= settings["r"]
        expected = pair.scale * (np.array(pair.lora_a, np.float64) @ np.array(pair.lora_b, np.float64)).T
        assert np.allclose(settings["lora_alpha"] / settings["r"] * b @ a, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "*.mlp.gate"], ["q_proj", "*.mlp.gate", "*.switch_mlp.*"]])
@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_ranks_and_alphas_among_experts(base: Base, targets: list[str], tmp_path: Path) -> None:
    adapter = base.attach(targets)
    lora.detach(base.network)
    ranks = {"model.layers.1.mlp.gate": 1, "model.layers.1.self_attn.q_proj": 3}
    lora.attach_adapter(base.network, resized(adapter, ranks, {"model.layers.0.mlp.gate": 3.0}))
    peft_form.write(tmp_path, lora.attached(base.network), base.config)
    network = peft.PeftModel.from_pretrained(base.torch(), tmp_path)
    assert difference(torch_logits(network), base.logits()) < TOLERANCE
    expected = base.logits()
    lora.detach(base.network)
    adapter_files.load(base.network, tmp_path)
    assert difference(base.logits(), expected) < TOLERANCE


@pytest.mark.parametrize("alpha", [16.0, 0.1, 0.0, -3.7, 1 / 3])
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_any_alpha(base: Base, alpha: float, tmp_path: Path) -> None:
    adapter = base.attach(["q_proj"], rank=3)
    adapter = resized(adapter, {}, dict.fromkeys(adapter.pairs, alpha))
    assert peft_form.write(tmp_path, adapter, base.config) == []
    assert repr(written(tmp_path)[0]["lora_alpha"]) == repr(16 if alpha == 16 else 0 if alpha == 0 else alpha)
    assert_equal(peft_form.read(tmp_path), adapter)


@pytest.mark.parametrize(
    ("base", "targets", "ranks"),
    [
        ("qwen3", EVERYTHING, {}),
        ("qwen3", EVERYTHING, {"model.layers.1.self_attn.q_proj": 2, "lm_head": 1}),
        ("tied", ["q_proj", "embed_tokens"], {"model.embed_tokens": 2}),
        ("qwen3_moe", EVERYTHING, {}),
        ("qwen2_moe", "all-linear", {}),
    ],
    indirect=["base"],
)
def test_round_trip_is_bit_for_bit(base: Base, targets: str | list[str], ranks: dict[str, int], tmp_path: Path) -> None:
    adapter = replace(base.attach(targets), base=config.Model(path="someone/base", revision="v2"))
    adapter = resized(adapter, ranks, {path: 2.5 * rank for path, rank in ranks.items()})
    peft_form.write(tmp_path, adapter, base.config)
    again = adapter_files.read(tmp_path)
    assert_equal(again, adapter)
    assert again.base == adapter.base == adapter_files.base_of(tmp_path)
    assert again.metadata == {"format": "pt"}
    assert again.dropout == (0.0 if "moe" in base.config["model_type"] else adapter.dropout)


@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_files_are_those_that_vllm_takes(base: Base, tmp_path: Path) -> None:
    """vLLM's rules (lora_model.py, lora_weights.py): no unknown names, and gate, up and down of each of the experts."""
    peft_form.write(tmp_path, base.attach(["q_proj", "lm_head", "*.1.mlp.switch_mlp.up_proj"], rank=20), base.config)
    settings, arrays = written(tmp_path)
    experts = [f"experts.{number}.{name}_proj" for number in range(4) for name in ("gate", "up", "down")]
    modules = [f"model.layers.1.mlp.{name}" for name in experts]
    modules += ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert arrays.keys() == {f"base_model.model.{m}.lora_{s}.weight" for m in modules for s in "AB"}
    assert {array.shape[0] for name, array in arrays.items() if "lora_A" in name} == {20}
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (20, 10, "none")
    assert not any(settings[key] for key in ("modules_to_save", "use_dora", "use_rslora"))


def test_what_is_told_and_refused(tmp_path: Path) -> None:
    pair = Pair(mx.ones((8, 24)), mx.ones((24, 8)), 24.0)
    head = Pair(mx.ones((8, 24)), mx.ones((24, 99)), 24.0)
    notes = peft_form.write(tmp_path, Adapter({"model.layers.0.a": pair, "lm_head": head}), {"model_type": "phi3"})
    assert [note.split(" ")[0] for note in notes] == ["module", "vLLM", "vLLM"]
    assert "--max-lora-rank 24" in notes[2]
    experts = Pair(mx.ones((2, 4, 8)), mx.ones((2, 8, 4)), 8.0)
    path = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
    with pytest.raises(InputError, match=r"up_proj: PEFT has no form for experts of mixtral; export gguf or merged"):
        peft_form.write(tmp_path, Adapter({path: experts}), {"model_type": "mixtral"})


# ---- in --------------------------------------------------------------------------------------------------------------

DEEP_PATTERNS = {
    "rank_pattern": {r"layers.1.self_attn.q_proj": 2, r"^model\.layers\.\d\d\.mlp\..*": 3, ".*v_proj": 6, "v_proj": 1},
    "alpha_pattern": {"1.self_attn.q_proj": 7, r"model.layers.11.mlp.up_proj": 2.5, "proj": 99},
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("llama", {}),
        ("qwen2", {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "lora_dropout": 0.2}),
        ("qwen2", {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
        ("qwen3", {"target_modules": r".*\.(1\.self_attn\.\w_proj|0\.mlp\.down_proj)|lm_head"}),
        ("qwen3", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "alpha_pattern": {"embed_tokens": 3}}),
        ("deep", DEEP_PATTERNS),
        ("deep", {**DEEP_PATTERNS, "use_rslora": True, "lora_alpha": 4}),
        ("tied", {"target_modules": ["embed_tokens", "k_proj"], "ensure_weight_tying": True}),
        ("qwen3_moe", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": FUSED, "rank_pattern": {"experts.down_proj": 3}}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": FUSED[:1]}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": FUSED[1:], "use_rslora": True}),
        ("qwen3_moe", {"target_modules": ["v_proj", "gate"], "alpha_pattern": {r".*gate\.weight": 3}}),
    ],
    indirect=["base"],
)
def test_mlx_computes_the_logits_of_a_peft_adapter(base: Base, options: dict[str, Any], tmp_path: Path) -> None:
    plain = base.logits()
    network = make_peft(base, **options)
    expected = torch_logits(network)
    folder = save(network, tmp_path / "adapter")
    adapter = adapter_files.load(base.network, folder)
    peft_form.check_tying(folder, adapter, base.config["tie_word_embeddings"])
    assert difference(expected, plain) > 1000 * TOLERANCE
    assert difference(base.logits(), expected) < TOLERANCE
    assert adapter.base == config.Model(path=str(base.folder))
    assert adapter.dropout == options.get("lora_dropout", 0.0)

    lora.detach(base.network)
    rewrite(folder, {"lora_alpha": 12, "alpha_pattern": {}})
    adapter_files.load(base.network, folder)
    assert difference(base.logits(), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_experts_that_peft_fused_come_back(base: Base, tmp_path: Path) -> None:
    """Ours, through PEFT's own conversion, which doubles the rank of gate and up, and back."""
    adapter = base.attach("all-linear")
    expected = base.logits()
    (tmp_path / "ours").mkdir()
    peft_form.write(tmp_path / "ours", adapter, base.config)
    network = peft.PeftModel.from_pretrained(base.torch(), tmp_path / "ours")
    lora.detach(base.network)
    again = adapter_files.load(base.network, save(network, tmp_path / "theirs"))
    assert again.pairs["model.layers.0.mlp.switch_mlp.gate_proj"].rank == 8
    assert again.pairs["model.layers.0.mlp.switch_mlp.down_proj"].rank == 4
    assert difference(base.logits(), expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_pissa_is_read_once_peft_has_converted_it(base: Base, tmp_path: Path) -> None:
    network = make_peft(base, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    network.peft_config["default"].init_lora_weights = True
    save(network, tmp_path / "start")
    network.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    expected = torch_logits(network)
    with pytest.raises(InputError, match="init_lora_weights is pissa, which changes the base's weights; save it again"):
        peft_form.read(save(network, tmp_path / "plain"))
    folder = save(network, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter_files.load(base.network, folder)
    assert difference(base.logits(), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_half_precision_is_read_exactly(base: Base, dtype: torch.dtype, tmp_path: Path) -> None:
    network = make_peft(base, target_modules=["q_proj"]).to(dtype)
    adapter = peft_form.read(save(network, tmp_path))
    for path, pair in adapter.pairs.items():
        module = network.get_submodule(f"base_model.model.{path}")
        for ours, theirs in ((pair.lora_a, module.lora_A), (pair.lora_b, module.lora_B)):
            assert ours.dtype == mx.float32
            assert np.array_equal(np.array(ours), theirs["default"].weight.detach().float().numpy().T)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_names_of_plain_state_dicts_are_read(base: Base, tmp_path: Path) -> None:
    adapter = base.attach(["q_proj", "embed_tokens"])
    peft_form.write(tmp_path, adapter, base.config)
    names = {"lora_A.weight": "lora_A.default.weight", "lora_embedding_B": "lora_embedding_B.default"}
    arrays = {}
    for name, array in written(tmp_path)[1].items():
        for old, new in names.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        arrays[name.removeprefix("base_model.model.")] = array
    safetensors.numpy.save_file(arrays, tmp_path / peft_form.WEIGHTS)
    assert_equal(peft_form.read(tmp_path), adapter)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("base", ["tied"], indirect=True)
def test_an_embedding_without_its_tied_head_is_refused(base: Base, tmp_path: Path) -> None:
    folder = save(make_peft(base, target_modules=["embed_tokens"]), tmp_path)
    adapter = peft_form.read(folder)
    with pytest.raises(InputError, match=r"ensure_weight_tying is not set: model\.embed_tokens is adapted without"):
        peft_form.check_tying(folder, adapter, tied=True)
    peft_form.check_tying(folder, adapter, tied=False)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:UserWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported; merge it"),
        ({"bias": "all"}, "bias is all"),
        ({"bias": "lora_only"}, "bias is lora_only"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights is pissa_niter_2"),
    ],
)
@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_kinds_that_are_no_plain_lora_are_refused(
    base: Base, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network = make_peft(base, target_modules=["q_proj"], **options)
    with pytest.raises(InputError, match=rf"adapter_config\.json: {message}"):
        adapter_files.read(save(network, tmp_path))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_starts_that_leave_the_base_alone_are_read(base: Base, start: str, tmp_path: Path) -> None:
    network = make_peft(base, target_modules=["q_proj"], init_lora_weights=start)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter += 0.3
    adapter_files.load(base.network, save(network, tmp_path))
    assert difference(base.logits(), torch_logits(network)) < TOLERANCE


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_other_methods_and_pickles_are_refused(base: Base, tmp_path: Path) -> None:
    other = peft.get_peft_model(base.torch(), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match=r"adapter_config\.json: peft_type is IA3; only LORA is supported; merge"):
        adapter_files.read(save(other, tmp_path / "other"))
    pickled = save(make_peft(base), tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(InputError, match=r"adapter_model\.bin: pickle files are not read: convert it to adapter_model"):
        adapter_files.read(pickled)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ZEROS = np.zeros((4, 32), np.float32)


@pytest.mark.parametrize(
    ("settings", "arrays", "message"),
    [
        ({"fan_in_fan_out": True}, None, r"config\.json: fan_in_fan_out is True"),
        ({"init_lora_weights": "loftq"}, None, r"config\.json: init_lora_weights is loftq.*merge it"),
        ({"init_lora_weights": ["?"]}, None, r"config\.json: init_lora_weights is \['\?'\]"),
        ({"r": 8}, None, r"model\.safetensors: model.layers.0.self_attn.q_proj has rank 4, adapter_config.json says 8"),
        ({"r": "four"}, None, r"config\.json: r is four, not a positive whole number"),
        ({"rank_pattern": {"q_proj": 0}}, None, r"config\.json: r is 0"),
        ({"lora_alpha": None}, None, r"config\.json: lora_alpha is None, not a number"),
        ({"lora_dropout": 1}, None, r"config\.json: lora_dropout is 1"),
        ({"alpha_pattern": {"q_proj(": 3}}, None, r"config\.json: alpha_pattern is not a mapping of regular"),
        ({"rank_pattern": ["q_proj"]}, None, r"config\.json: rank_pattern is not a mapping"),
        ({"rank_pattern": {"q{99999999999999999999}": 1}}, None, r"config\.json: rank_pattern is not a mapping"),
        ({"target_parameters": 3}, None, r"config\.json: target_parameters is 3, not a list of names"),
        ({"base_model_name_or_path": 3}, None, r"config\.json: the base's name 3 or revision None is no name"),
        ({}, {f"{Q}.lora_magnitude_vector": ZEROS[0]}, r"safetensors: \S+q_proj.lora_magnitude_vector is no lora_A"),
        ({}, {f"{Q}.lora_B.bias": ZEROS[0]}, r"safetensors: \S+q_proj.lora_B.bias is no lora_A"),
        ({}, {"base_model.model.lm_head.weight": ZEROS}, r"safetensors: \S+lm_head.weight is no lora_A"),
        ({}, {"base_model.model.lm_head.base_layer.weight": ZEROS}, r"safetensors: \S+lm_head.base_layer.weight is no"),
        ({}, {f"{Q}.lora_A.default.weight": ZEROS}, r"safetensors: \S+ of shape \(4, 32\) is .* its module's second"),
        ({}, {f"{Q}.lora_A.weight": ZEROS[0]}, r"safetensors: \S+lora_A.weight of shape \(32,\) is no matrix"),
        ({}, {f"{Q}.lora_A.weight": ZEROS[:0]}, r"safetensors: \S+lora_A.weight of shape \(0, 32\) is no matrix"),
        ({}, {"base_model.model.x.lora_A.weight": ZEROS}, r"safetensors: x has lora_A alone"),
        ({}, {f"{Q}.lora_B.weight": np.zeros((32, 5), np.float32)}, r"q_proj: lora_a .* do not fit one another"),
        ({}, {f"{Q}.lora_B.weight": np.full((32, 4), np.nan, np.float32)}, "q_proj has values that are not finite"),
    ],
)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_broken_adapters_are_refused(
    base: Base, settings: dict[str, Any], arrays: dict[str, np.ndarray] | None, message: str, tmp_path: Path
) -> None:
    peft_form.write(tmp_path, base.attach(["q_proj"]), base.config)
    peft_form.read(tmp_path)
    rewrite(tmp_path, settings, arrays)
    with pytest.raises(InputError, match=message) as caught:
        adapter_files.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "arrays", "message"),
    [
        ({"alpha_pattern": {"experts.2.up_proj": 3}}, {}, "switch_mlp.up_proj: not all experts have an update of one"),
        ({}, {"experts.5.up_proj.lora_A.weight": (4, 32), "experts.5.up_proj.lora_B.weight": (24, 4)}, "not all expe"),
        (
            {},
            {"experts.lora_A.weight": (6, 32), "experts.lora_B.weight": (48, 6)},
            "not those of down_proj of rank 4",
        ),
        (
            {},
            {"experts.lora_A.weight": (8, 32), "experts.lora_B.weight": (48, 4)},
            "not those of down_proj of rank 4",
        ),
        (
            {},
            {"experts.lora_A.weight": (8, 32), "experts.lora_B.weight": (47, 8)},
            "not those of down_proj of rank 4",
        ),
    ],
)
@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_broken_experts_are_refused(
    base: Base, settings: dict[str, Any], arrays: dict[str, tuple[int, int]], message: str, tmp_path: Path
) -> None:
    peft_form.write(tmp_path, base.attach(["up_proj"]), base.config)
    block = "base_model.model.model.layers.0.mlp"
    rewrite(tmp_path, settings, {f"{block}.{name}": np.zeros(shape, np.float32) for name, shape in arrays.items()})
    with pytest.raises(InputError, match=message):
        peft_form.read(tmp_path)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_adapter_of_another_model_is_refused(base: Base, tmp_path: Path) -> None:
    peft_form.write(tmp_path, base.attach(["q_proj"]), base.config)
    _, arrays = written(tmp_path)
    arrays = {name.replace("model.layers", "model.language_model.layers"): array for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, tmp_path / peft_form.WEIGHTS)
    lora.detach(base.network)
    with pytest.raises(InputError, match=r"model\.language_model\.layers\.0\.self_attn\.q_proj has no place in this"):
        adapter_files.load(base.network, tmp_path)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    pair = Pair(mx.ones((8, 9)), mx.ones((9, 8)), 6.0)
    peft_form.write(tmp_path, Adapter({"model.layers.0.self_attn.q_proj": pair}), {"model_type": "llama"})
    rewrite(tmp_path, {"use_rslora": True})
    (found,) = peft_form.read(tmp_path).pairs.values()
    assert math.isclose(found.scale, 2.0, rel_tol=1e-15)
