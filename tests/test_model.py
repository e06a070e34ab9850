"""Loading a base model, against transformers, mlx-lm and MLX's own quantization."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_lora import blas, lora, model
from mlx_lora.config import Lora, Model, Quantize
from mlx_lora.errors import InputError

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LENGTH = 256  # max_position_embeddings of the tiny models
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CASES = [(kind, rope) for kind in ("llama", "qwen2", "qwen3") for rope in ROPES] + [("qwen3_moe", "default")]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes with a chat template: 257 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<eos>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template
    ).save_pretrained(folder)
    return folder


class Maker:
    """Writes folders of tiny random models as transformers saves them."""

    def __init__(self, place: Path, tokenizer: Path) -> None:
        self.place, self.tokenizer = place, tokenizer

    def __call__(self, kind: str = "llama", rope: dict[str, Any] | None = None, **more: Any) -> Path:
        """With weights large enough for positions to matter much."""
        settings = {
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": LENGTH,
            "initializer_range": 0.15,
            "rope_parameters": rope or {"rope_type": "default", "rope_theta": 5000.0},
            "bos_token_id": None,
            "pad_token_id": None,
            "eos_token_id": 256,
            **({} if kind == "qwen2" else {"head_dim": 16}),
            **(EXPERTS if kind == "qwen3_moe" else {}),
            **more,
        }
        folder = self.place / kind
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        shutil.copytree(self.tokenizer, folder, dirs_exist_ok=True)
        return folder


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Maker:
    return Maker(tmp_path, tokenizer_folder)


def edit(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; ``...`` removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def load(folder: Path, weights: bool = True, **options: Any) -> model.Base:
    return model.load(Model(path=str(folder), **options), weights)


def arrays(folder: Path) -> dict[str, mx.array]:
    found = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(found)
    return found


def ids(length: int = LENGTH * 2 // 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, length))


def logits(network: nn.Module, tokens: np.ndarray) -> np.ndarray:
    return np.array(network(mx.array(tokens)).astype(mx.float32))


def reference(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers, from the same folder."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return network(torch.tensor(tokens)).logits.numpy()


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


def refusal(folder: Path | str, *words: str, weights: bool = True, **options: Any) -> None:
    """Loading must raise InputError with one line that holds `words`."""
    with pytest.raises(InputError) as error:
        model.load(Model(path=str(folder), **options), weights)
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert [word for word in words if word not in text] == [], text


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rope"), CASES)
def test_logits_equal_transformers(make: Maker, kind: str, rope: str) -> None:
    folder = make(kind, {"rope_type": rope, "rope_theta": 5000.0, **ROPES[rope]})
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config
    assert "rope_theta" not in config
    want = reference(folder, ids())
    base = load(folder)
    assert distance(logits(base.model, ids()), want) < 1e-4
    if kind in ("llama", "qwen2"):  # whose code in mlx-lm does not read rope_parameters: what this guards against
        unchanged, _ = mlx_lm.load(str(folder))
        assert distance(logits(unchanged, ids()), want) > 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", ["yarn", "llama3"])
def test_original_length_falls_back_to_the_models(make: Maker, kind: str, rope: str) -> None:
    folder = make(kind, {"rope_type": rope, "rope_theta": 5000.0, **ROPES[rope]})
    written = json.loads((folder / "config.json").read_text())["rope_parameters"]
    before = reference(folder, ids())
    del written["original_max_position_embeddings"]
    edit(folder / "config.json", rope_parameters=written)
    want = reference(folder, ids())
    assert distance(want, before) > 0.1
    assert distance(logits(load(folder).model, ids()), want) < 1e-4


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize(("kind", "rope"), [case for case in CASES if case[0] != "qwen3"])
def test_folders_of_older_transformers(make: Maker, kind: str, rope: str, key: str) -> None:
    """rope_theta and rope_scaling at the top level."""
    folder = make(kind, {"rope_type": rope, "rope_theta": 5000.0, **ROPES[rope]})
    scaling = {key: rope, **ROPES[rope]} if rope != "default" else None
    edit(folder / "config.json", rope_parameters=..., rope_theta=5000.0, rope_scaling=scaling)
    assert distance(logits(load(folder).model, ids()), reference(folder, ids())) < 1e-4


def test_rope_scaling_comes_before_rope_parameters(make: Maker) -> None:
    folder = make("llama", {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0})
    edit(folder / "config.json", rope_theta=5000.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert distance(logits(load(folder).model, ids()), reference(folder, ids())) < 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, "'proportional' is not supported"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}, "'longrope'"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, "attention_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "truncate"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "mscale"),
        ({"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_type": "linear"}, "'factor' is missing"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "per kind of layer"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_rope_that_would_be_computed_wrongly_is_refused(
    make: Maker, change: dict[str, Any], reason: str, weights: bool
) -> None:
    folder = make()
    edit(folder / "config.json", rope_parameters={"rope_theta": 5000.0, **change})
    refusal(folder, str(folder), reason, weights=weights)


def test_partial_rotation_at_the_top_level_is_refused(make: Maker) -> None:
    folder = make()
    edit(folder / "config.json", partial_rotary_factor=0.5)
    refusal(folder, "config.json", "partial_rotary_factor 0.5")


def test_partial_rotation_where_the_models_code_knows_it(make: Maker) -> None:
    """transformers 5 writes it into rope_parameters, mlx-lm reads it at the top level (and would take 1)."""
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    folder = make("glm4", rope, attention_bias=True)
    assert "partial_rotary_factor" not in json.loads((folder / "config.json").read_text())
    assert distance(logits(load(folder).model, ids()), reference(folder, ids())) < 1e-4


def test_rope_scaling_that_the_models_code_ignores_is_refused(make: Maker) -> None:
    """mlx-lm's qwen3_moe takes rope_scaling and does not use it."""
    folder = make("qwen3_moe", {"rope_type": "yarn", "rope_theta": 5000.0, **ROPES["yarn"]})
    refusal(folder, "config.json", "'yarn'", "qwen3_moe")
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    load(folder)


def test_longrope_is_not_what_transformers_computes(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is refused; should this fail, mlx-lm has learned it and `ROPE_TYPES` can name it."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "original_max_position_embeddings": 64}
    folder = make("llama", {"rope_type": "longrope", "rope_theta": 5000.0, "factor": 4.0, **factors})
    monkeypatch.setattr(model, "ROPE_TYPES", (*model.ROPE_TYPES, "longrope"))
    assert distance(logits(load(folder).model, ids(50)), reference(folder, ids(50))) > 1


# ---- code in the folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def trap(make: Maker, tmp_path: Path) -> tuple[Path, Path]:
    """A model folder with a module that writes a file when it is imported, and that file."""
    folder, canary = make(), tmp_path / "canary"
    (folder / "evil.py").write_text(
        f"__import__('pathlib').Path({str(canary)!r}).write_text('run')\n"
        "from mlx_lm.models.llama import Model, ModelArgs\n"
        "from transformers import LlamaConfig as Config, PreTrainedTokenizerFast as Tokens\n"
    )
    return folder, canary


def test_a_model_file_is_never_run(trap: tuple[Path, Path]) -> None:
    folder, canary = trap
    edit(folder / "config.json", model_file="evil.py", trust_remote_code=True)
    refusal(folder, "config.json", "model_file")
    refusal(folder, "config.json", "model_file", weights=False)
    assert not canary.exists()
    mlx_lm.utils.load_model(folder, lazy=True, trust_remote_code=True)
    assert canary.exists()  # the trap works


def test_an_auto_map_is_never_followed(trap: tuple[Path, Path]) -> None:
    folder, canary = trap
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, trust_remote_code=True)
    refusal(folder, "config.json", "auto_map")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["Tokens", "PreTrainedTokenizerFast"])
def test_a_tokenizers_code_is_never_run(trap: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder, canary = trap
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Tokens"]},
        tokenizer_class=name,
        trust_remote_code=True,
    )
    if name == "Tokens":
        refusal(folder, "the tokenizer", str(folder), "code of its own")
    else:
        assert load(folder).tokenizer.encode("ab") == load(folder).tokenizer.encode("ab")
    assert not canary.exists()
    trusting = (
        f"import transformers; transformers.AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )
    result = run(trusting, HF_HOME=str(tmp_path / "hub"))
    assert result.returncode == 0, result.stderr
    assert canary.exists()  # the trap works


def test_python_files_are_not_downloaded() -> None:
    assert not any(Path("evil.py").match(pattern) for pattern in model.SMALL_FILES + model.WEIGHTS)
    assert all(
        any(Path(name).match(pattern) for pattern in model.SMALL_FILES)
        for name in ("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model")
    )


# ---- precision -------------------------------------------------------------------------------------------------------


def dtypes(network: nn.Module) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(network.parameters())}


def test_auto_is_float32_on_a_cpu(make: Maker) -> None:
    folder = make()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: array.astype(mx.bfloat16) for name, array in arrays(folder).items()}
    )
    wanted = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert dtypes(load(folder).model) == {wanted}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_honoured(make: Maker, name: str) -> None:
    folder, dtype = make(), getattr(mx, name)
    loaded = dict(tree_flatten(load(folder, dtype=name).model.parameters()))
    assert {array.dtype for array in loaded.values()} == {dtype}
    stored = arrays(folder)
    assert loaded.keys() == stored.keys()
    assert all(mx.array_equal(loaded[path], stored[path].astype(dtype)) for path in stored)
    assert dtypes(load(folder, weights=False, dtype=name).model) == {dtype}


def test_everything_is_frozen_and_in_evaluation(make: Maker) -> None:
    base = load(make())
    assert tree_flatten(base.model.trainable_parameters()) == []
    assert not base.model.training


@pytest.fixture
def quantized(make: Maker, tmp_path: Path) -> Path:
    """A folder that mlx-lm quantized: 4 bits in groups of 32."""
    folder, source = tmp_path / "quantized", make("qwen3")
    network, config = mlx_lm.utils.load_model(source)
    network, config = mlx_lm.utils.quantize_model(network, config, group_size=32, bits=4)
    mlx_lm.utils.save(folder, str(source), network, mlx_lm.utils.load_tokenizer(source), config)
    return folder


def test_a_quantized_folder_stays_quantized(quantized: Path) -> None:
    base = load(quantized)
    layer = base.model.layers[0].self_attn.q_proj
    assert (layer.bits, layer.group_size, layer.weight.dtype) == (4, 32, mx.uint32)
    want, _ = mlx_lm.load(str(quantized))
    assert np.array_equal(logits(base.model, ids(20)), logits(want, ids(20)))
    refusal(quantized, "model.quantize", "quantized already", quantize=Quantize(bits=4))
    refusal(quantized, "model.quantize", "quantized already", quantize=Quantize(bits=4), weights=False)


def test_other_quantized_folders_are_not_quantized_again(make: Maker) -> None:
    folder = make()
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    refusal(folder, "model.quantize", "quantized already", quantize=Quantize(group_size=32), weights=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantizing_on_load_equals_quantizing_the_whole(make: Maker, bits: int, group: int) -> None:
    """Layers whose rows do not divide into groups stay as they are."""
    folder = make(hidden_size=128, intermediate_size=96)
    whole = load(folder).model
    nn.quantize(
        whole,
        group,
        bits,
        class_predicate=lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[1] % group == 0,
    )
    base = load(folder, quantize=Quantize(bits=bits, group_size=group))
    want, got = dict(tree_flatten(whole.parameters())), dict(tree_flatten(base.model.parameters()))
    assert want.keys() == got.keys()
    assert ("model.layers.0.mlp.down_proj.scales" in got) == (group == 32)
    assert all(mx.array_equal(want[path], got[path]) for path in want)


def test_quantizing_on_load_follows_the_model_where_it_asks_for_more_bits(make: Maker) -> None:
    """mlx-lm's MoE models ask for 8 bits in their routers."""
    base = load(make("qwen3_moe", hidden_size=64), quantize=Quantize(bits=4, group_size=32))
    mlp = base.model.layers[0].mlp
    assert (mlp.gate.bits, mlp.switch_mlp.up_proj.bits) == (8, 4)


def test_a_group_size_that_divides_nothing_is_refused(make: Maker) -> None:
    refusal(make(), "model.quantize.group_size", "128", quantize=Quantize(group_size=128))


@pytest.mark.parametrize(
    ("dtype", "quantize", "as_stored", "cpu", "gpu"),
    [
        ("auto", None, False, mx.float32, None),
        ("auto", None, True, None, None),
        ("auto", Quantize(), False, mx.float32, mx.bfloat16),
        ("auto", Quantize(), True, mx.float32, mx.bfloat16),
        ("float16", None, False, mx.float16, mx.float16),
        ("float16", Quantize(), True, mx.float16, mx.float16),
    ],
)
def test_what_a_base_computes_in(dtype: Any, quantize: Quantize | None, as_stored: bool, cpu: Any, gpu: Any) -> None:
    options = Model(path="x", dtype=dtype, quantize=quantize)
    assert model.compute_type(options, True, as_stored) == cpu
    assert model.compute_type(options, False, as_stored) == gpu


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_base_quantized_on_load_is_not_in_float16(make: Maker, stored: str) -> None:
    folder = make()
    cast = {name: array.astype(getattr(mx, stored)) for name, array in arrays(folder).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), cast)
    wanted = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert dtypes(load(folder, quantize=Quantize(group_size=32)).model) == {mx.uint32, wanted}


@pytest.mark.parametrize(("name", "wanted"), [("bfloat16", "float32"), ("float32", "float32")])
def test_what_a_model_wants_whole_is_not_cast_to_fewer_bits(make: Maker, name: str, wanted: str) -> None:
    """Such as the bias that decides which experts a token goes to; mlx-lm's convert leaves it too."""
    folder = make("glm4_moe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1)
    loaded = dict(tree_flatten(load(folder, dtype=name).model.parameters()))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert loaded[bias].dtype == getattr(mx, wanted)
    assert {array.dtype for path, array in loaded.items() if path != bias} == {getattr(mx, name)}


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_of_loading(folder: Path, **options: Any) -> tuple[int, int]:
    """The peak of memory while a base is loaded, and the bytes of the result."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    base = load(folder, **options)
    assert mx.get_cache_memory() == 0  # no source's buffer is kept
    return mx.get_peak_memory() - before, sum(array.nbytes for _, array in tree_flatten(base.model.parameters()))


@pytest.mark.parametrize(
    ("kind", "stored", "options", "widths"),
    [
        ("llama", "float32", {"quantize": Quantize()}, 4),
        ("llama", "bfloat16", {"quantize": Quantize()}, 2 + 4),  # on a CPU, read and cast
        ("llama", "float32", {"dtype": "bfloat16"}, 4),
        ("llama", "bfloat16", {}, 2),
        ("llama", "float32", {}, 0),
        ("qwen3_moe", "float32", {"quantize": Quantize()}, 4 + 4),  # read, and stacked by mlx-lm
        ("qwen3_moe", "float32", {"dtype": "bfloat16"}, 4 + 4),
        ("qwen3_moe", "float32", {}, 4),
    ],
)
def test_the_peak_of_loading_is_the_result_and_one_layer(
    make: Maker, kind: str, stored: str, options: dict[str, Any], widths: int
) -> None:
    """Of 15 to 60 MB. `widths`: bytes per weight of the largest layer that are there beside the result."""
    experts = {"num_experts": 8, "moe_intermediate_size": 512} if kind == "qwen3_moe" else {}
    folder = make(kind, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=4096, **experts)
    source = {name: array.astype(getattr(mx, stored)) for name, array in arrays(folder).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), source)
    del source
    peak, result = peak_of_loading(folder, **options)
    assert peak <= result + 4096 * 256 * widths + 300_000


def test_the_head_is_read_while_little_else_is_there(make: Maker) -> None:
    folder = make(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=16384)
    head = arrays(folder)["lm_head.weight"].nbytes
    peak, result = peak_of_loading(folder, quantize=Quantize())
    assert head < peak < head + 0.7 * result


def test_the_form_of_a_base_is_told(make: Maker) -> None:
    folder = make("qwen3_moe", hidden_size=256, vocab_size=16384)

    def told(**options: Any) -> tuple[str, str]:
        network = load(folder, **options).model
        size, form = model.describe(network).split(" GB: ")
        assert size == f"{lora.count(network).base_bytes / 1e9:.2f}"
        return size, form

    assert told(dtype="float32") == ("0.03", "float32")
    assert told(dtype="bfloat16") == ("0.02", "bfloat16")
    wanted = "4 bits in groups of 32, 8 bits in groups of 64, the rest bfloat16"
    assert told(dtype="bfloat16", quantize=Quantize(group_size=32)) == ("0.01", wanted)
    base = load(folder, dtype="bfloat16")
    base.model.model.norm.set_dtype(mx.float32)
    assert model.describe(base.model).endswith(": bfloat16 and float32")


# ---- structure only --------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, remove])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "quantized", "quantize"])
def test_counts_need_no_weights(make: Maker, request: pytest.FixtureRequest, damage: Any, kind: str) -> None:
    if kind == "quantized":
        folder = request.getfixturevalue("quantized")
    else:
        folder = make("llama" if kind == "quantize" else kind)
    options = {"quantize": Quantize(bits=4, group_size=32)} if kind == "quantize" else {}
    wanted, choice = load(folder, **options), Lora(rank=4, alpha=8)
    paths = lora.attach(wanted.model, choice)
    damage(folder)
    refusal(folder, str(folder), "cannot be loaded", **options)
    structure = load(folder, weights=False, **options)
    assert lora.attach(structure.model, choice) == paths
    assert lora.count(structure.model) == lora.count(wanted.model)
    assert structure.config == wanted.config
    assert structure.tokenizer.eos_token_ids == wanted.tokenizer.eos_token_ids


# ---- what is wrong with a model --------------------------------------------------------------------------------------


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refusal(tmp_path / "nowhere", "nowhere", "config.json")
    refusal(tmp_path / "config.json", "config.json", "GGUF")
    refusal(tmp_path / "no.gguf", "no.gguf")
    refusal("a/b/c", "a/b/c")
    refusal("no such model", "no such model")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[]", b"1", b"{}", b'{"model_type": 3}', b'{"model_type": null}', b"\xff\xfe{}", b"[" * 100_000],
)
def test_a_broken_config(make: Maker, content: bytes) -> None:
    folder = make()
    (folder / "config.json").write_bytes(content)
    refusal(folder, str(folder / "config.json"))


@pytest.mark.parametrize("name", ["mammoth", "", ".", "../../evil", "base", "switch_layers"])
def test_an_unknown_model_type(make: Maker, name: str) -> None:
    folder = make()
    edit(folder / "config.json", model_type=name)
    refusal(folder, "config.json", "model type", repr(name))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": ...},
        {"hidden_size": "large"},
        {"hidden_size": 10**12},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"quantization": "4 bits"},
        {"quantization": {"bits": 4}},
    ],
)
def test_a_config_that_describes_no_model(make: Maker, change: dict[str, Any]) -> None:
    folder = make()
    edit(folder / "config.json", **change)
    refusal(folder, str(folder), "cannot be loaded")


def test_a_generation_config_that_is_no_mapping(make: Maker) -> None:
    folder = make()
    (folder / "generation_config.json").write_text("[1]")
    refusal(folder, str(folder), "cannot be loaded")


def test_missing_weights(make: Maker) -> None:
    folder = make()
    remove(folder)
    refusal(folder, str(folder), "No safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -100])
def test_truncated_weights(make: Maker, size: int) -> None:
    folder = make()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refusal(folder, str(folder), "cannot be loaded")


def test_weights_that_do_not_fit(make: Maker) -> None:
    folder, path = make(), "model.layers.0.self_attn.q_proj.weight"
    file, kept = str(folder / "model.safetensors"), arrays(folder)
    mx.save_safetensors(file, {name: array for name, array in kept.items() if name not in (path, "model.norm.weight")})
    refusal(folder, str(folder), path, "model.norm.weight")
    mx.save_safetensors(file, kept | {path: kept[path][:32]})
    refusal(folder, path, "(64, 64)", "(32, 64)")
    mx.save_safetensors(file, kept | {"surplus": kept[path]})
    refusal(folder, "surplus")


@pytest.mark.parametrize(
    "content", [None, "{", "{}", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "x"}}']
)
def test_a_missing_or_broken_tokenizer(make: Maker, content: str | None) -> None:
    folder = make()
    if content is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    refusal(folder, "the tokenizer", str(folder))
    refusal(folder, "the tokenizer", str(folder), weights=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template_type": "x"}', '{"tool_parser_type": "../x"}'])
def test_a_broken_tokenizer_config(make: Maker, content: str) -> None:
    folder = make()
    (folder / "tokenizer_config.json").write_text(content)
    refusal(folder, "the tokenizer", str(folder))


def test_local_models_have_no_revision(make: Maker, tmp_path: Path) -> None:
    refusal(make(), "model.revision", revision="main")
    refusal(tmp_path / "x.gguf", "model.revision", revision="main")


# ---- hub -------------------------------------------------------------------------------------------------------------

OFFLINE = """
import pathlib, shutil, sys
from mlx_lora import model
from mlx_lora.config import Model
from mlx_lora.errors import InputError

def attempt(revision):
    try:
        base = model.load(Model(path="me/tiny", revision=revision))
    except InputError as error:
        print("refused", revision, error)
    else:
        print("loaded", revision, base.identity["name"], base.identity["revision"])

commit = "0123456789abcdef0123456789abcdef01234567"
cache = pathlib.Path(sys.argv[1]) / "hub" / "models--me--tiny"
attempt(None)
shutil.copytree(sys.argv[2], cache / "snapshots" / commit)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(commit)
for revision in (None, "main", commit, "v2"):
    attempt(revision)
(cache / "snapshots" / commit / "model.safetensors").unlink()  # as after a dry run, which downloads no weights
attempt(None)
"""


def test_hub_ids_without_a_network(make: Maker, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    result = run(OFFLINE, str(hub), str(make()), HF_HUB_OFFLINE="1", HF_HOME=str(hub))
    assert result.returncode == 0, result.stderr
    commit = "0123456789abcdef0123456789abcdef01234567"
    lines = result.stdout.splitlines()
    assert lines[1:4] == [f"loaded {revision} me/tiny {commit}" for revision in (None, "main", commit)]
    assert [line.split(" is ")[0] for line in lines[:1] + lines[4:5]] == [
        "refused None model: me/tiny",
        "refused v2 model: me/tiny",
    ]
    assert lines[5].startswith("refused None model: me/tiny ")
    assert len(lines) == 6


TRAINED = """
import json, pathlib, shutil, sys
from mlx_lora import finetune
from mlx_lora.adapter_files import base_of

commit = "0123456789abcdef0123456789abcdef01234567"
folder = pathlib.Path(sys.argv[1])
cache = folder / "hub" / "models--me--tiny"
shutil.copytree(sys.argv[2], cache / "snapshots" / commit)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(commit)
(folder / "rows.jsonl").write_text(json.dumps({"text": "Hello there"}) + "\\n")
run = {
    "model": "me/tiny",
    "data": {"train": str(folder / "rows.jsonl"), "valid": 0},
    "train": {"max_steps": 1, "epochs": None},
    "output_dir": str(folder / "run"),
}
finetune(run)
(cache / "refs" / "main").write_text("f" * 40)  # the hub has gone on
print(base_of(folder / "run").revision, (folder / "run" / "config.yaml").read_text().count(f"revision: {commit}"))
shutil.copytree(sys.argv[2], cache / "snapshots" / ("f" * 40))
(cache / "snapshots" / ("f" * 40) / "tokenizer_config.json").write_text('{"tokenizer_class": "Other"}')
finetune(run, resume=True)
print(base_of(folder / "run").revision)
"""


def test_a_run_names_the_commit_that_a_hub_id_led_to(make: Maker, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    result = run(TRAINED, str(hub), str(make()), HF_HUB_OFFLINE="1", HF_HOME=str(hub))
    assert result.returncode == 0, result.stderr
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert f"{commit} 1" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == commit


# ---- identity --------------------------------------------------------------------------------------------------------


def test_identity_tells_models_apart(make: Maker) -> None:
    folder = make()
    first = load(folder).identity
    assert first == load(folder).identity
    assert first["name"] == str(folder)
    seen = {first["digest"]}

    def changed() -> bool:
        digest = load(folder).identity["digest"]
        new = digest not in seen
        seen.add(digest)
        return new

    kept = arrays(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), kept | {name: kept[name] + 1e-3})
    assert changed()
    edit(folder / "tokenizer_config.json", note="other")
    assert changed()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert changed()
    edit(folder / "config.json", note="other")
    assert changed()
    edit(folder / "generation_config.json", eos_token_id=[256, 3])  # decides where answers end
    assert changed()
    (folder / "README.md").write_text("other")
    assert not changed()


# ---- device ----------------------------------------------------------------------------------------------------------

ON_LINUX_CPU = pytest.mark.skipif(
    not sys.platform.startswith("linux") or mx.default_device() != mx.cpu, reason="of MLX on a Linux CPU"
)


def test_the_device_has_a_name() -> None:
    name = model.device()
    assert name.endswith(f"({mx.default_device().type.name})")
    assert str(mx.device_info()["device_name"]) in name


@ON_LINUX_CPU
def test_training_without_a_compiler(make: Maker, tmp_path: Path) -> None:
    """With no g++ in the path (and none of MLX's kernels in the temporary folder) a run trains, and says so."""
    empty = tmp_path / "empty"
    empty.mkdir()
    alone = {"PATH": str(empty), "TMPDIR": str(empty)}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} ", "completion": "abc" * n}) + "\n" for n in range(1, 5)))
    settings = {
        "model": str(make()),
        "data": {"train": str(rows), "valid": 0},
        "train": {"max_steps": 2, "batch_size": 2},
        "output_dir": str(tmp_path / "run"),
    }
    code = (
        "from mlx_lora import finetune, model\nimport mlx.core as mx\n"
        "print('can compile', model.can_compile())\n"
        f"print('steps', finetune({settings!r}).steps)\n"
        f"arrays = mx.load({str(tmp_path / 'run' / 'adapters.safetensors')!r})\n"
        "print('moved', any((array != 0).any().item() for name, array in arrays.items() if name.endswith('lora_b')))\n"
    )
    result = run(code, **alone)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler (g++): steps run uncompiled" in result.stdout
    assert "can compile False" in result.stdout
    assert "steps 2" in result.stdout
    assert "moved True" in result.stdout


WHOSE_SGEMM = """
import ctypes, sys
{before}
preloaded = "openblas" in open("/proc/self/maps").read() and "mlx.core" not in sys.modules
import mlx.core

class Info(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p),
                ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p)]

process, info = ctypes.CDLL(None), Info()
found = process.dladdr(ctypes.cast(process.cblas_sgemm, ctypes.c_void_p), ctypes.byref(info))
print(preloaded, found and info.file.decode())
"""


@ON_LINUX_CPU
def test_openblas_is_loaded_before_mlx() -> None:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        pytest.skip("OpenBLAS is not installed")
    assert blas.loaded
    result = run(WHOSE_SGEMM.format(before="import mlx_lora; assert mlx_lora.blas.loaded"))
    assert result.returncode == 0, result.stderr
    preloaded, library = result.stdout.split(maxsplit=1)
    assert preloaded == "True"
    assert "openblas" in library
    without = run(WHOSE_SGEMM.format(before=""))
    assert "openblas" not in without.stdout
    assert without.stdout.startswith("False") or without.returncode != 0


def test_embeddings_are_untied_where_the_config_does_not_say(tmp_path, tiny_model):
    """As in transformers; mlx-lm alone would use the input embeddings as the head, without a word."""
    torch.manual_seed(1)
    config_of = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config_of, num_key_value_heads=2, vocab_size=260, tie_word_embeddings=False)
    )
    shutil.copytree(tiny_model, tmp_path / "model")
    reference.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}))
    base = model.load(Model(path=str(tmp_path / "model")))
    tokens = [[5, 9, 77, 3]]
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.array(base.model(mx.array(tokens))) - expected).max() < 1e-5
