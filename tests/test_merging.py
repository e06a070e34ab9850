"""Merged models, against float64 sums, transformers, mlx-lm and MLX's own quantization."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import tiny
import torch
import transformers

from mlx_lora import lora, merged_folder, merging, model
from mlx_lora.config import Lora, Model, Quantize
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter, Pair

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
}
PROMPTS = ("A short prompt.", "Another one, a little longer than the first.")
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    """Writes a tiny random model as transformers saves it, with biases that are not zero."""

    def made(kind: str = "llama", dtype: str = "float32", bits: int | None = None, **more: Any) -> Path:
        settings = {
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            **FAMILIES[kind],
            **more,
        }
        folder = tmp_path / f"{kind}-{dtype}"
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
        for name, array in network.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(array, std=0.3)
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
        network.to(getattr(torch, dtype)).save_pretrained(folder)
        return quantized(folder, bits) if bits else folder

    return made


def quantized(source: Path, bits: int) -> Path:
    """What mlx-lm makes of a folder: `bits` in groups of 32."""
    folder = source.with_name(f"{source.name}-{bits}")
    network, config = mlx_lm.utils.load_model(source, model_config=model._changes(model._config(source), source))
    network, config = mlx_lm.utils.quantize_model(network, config, group_size=32, bits=bits)
    mlx_lm.utils.save(folder, str(source), network, mlx_lm.utils.load_tokenizer(source), config)
    return folder


def load(folder: Path, **options: Any) -> model.Base:
    return merging.load_base(Model(path=str(folder), **options))


def adapter(base: model.Base, size: float = 0.05, targets: str | list[str] = "all-linear", rank: int = 4) -> Adapter:
    """A random adapter of deviation `size` in B."""
    lora.attach(base.model, Lora(rank=rank, alpha=2.0 * rank, target_modules=targets))
    tiny.randomize(base.model, size=size)
    made = lora.attached(base.model)
    lora.detach(base.model)
    return made


def everywhere(base: model.Base) -> list[str]:
    return ["all-linear", "embed_tokens", *(["lm_head"] if "lm_head" in base.model else [])]


def arrays(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        found |= mx.load(str(file))
    return found


def delta64(pair: Pair, embedding: bool) -> np.ndarray:
    """scale · B A in float64, (out, in), (vocabulary, dims) or (E, out, in)."""
    a, b = tiny.float64(pair.lora_a), tiny.float64(pair.lora_b)
    if pair.experts:
        return pair.alpha / a.shape[1] * np.einsum("eor,eri->eoi", b, a)
    product = np.einsum("ir,ro->io", a, b) * (pair.alpha / a.shape[1])
    return product if embedding else product.T


def expected64(stored: dict[str, mx.array], made: Adapter, sign: float = 1.0) -> dict[str, np.ndarray]:
    """Every tensor of the merged folder by Hugging Face's names, in float64, unrounded."""
    merged = {name: tiny.float64(array) for name, array in stored.items()}
    for path, pair in made.pairs.items():
        change = sign * delta64(pair, path.endswith("embed_tokens"))
        if pair.experts:
            for number, own in enumerate(change):
                merged[f"{path.replace('switch_mlp', f'experts.{number}')}.weight"] += own
        else:
            merged[f"{path}.weight"] += change
    return merged


def rounding(got: dict[str, mx.array], want: dict[str, np.ndarray]) -> float:
    """The largest difference, in halves of a unit in the last place."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, array in got.items():
        half = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8}[array.dtype]
        # and what the float32 products and sums round
        allowed = half * 2.0 ** np.floor(np.log2(np.abs(want[name]) + 1e-30)) + 2.0**-22
        worst = max(worst, float((np.abs(tiny.float64(array) - want[name]) / allowed).max()))
    return worst


IDS = np.random.default_rng(0).integers(3, 259, (2, 24))


def logits(network: nn.Module, ids: np.ndarray = IDS) -> np.ndarray:
    return np.array(network(mx.array(ids)).astype(mx.float32))


def transformers_logits(folder: Path) -> np.ndarray:
    network, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert [about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set()] * 3
    with torch.no_grad():
        return network(torch.tensor(IDS)).logits.numpy()


def mlx_logits(folder: Path) -> np.ndarray:
    """By plain mlx-lm, which knows nothing of what our loader puts right."""
    network, _ = mlx_lm.load(str(folder))
    network.set_dtype(mx.float32)
    return logits(network)


def unmerged_logits(folder: Path, made: Adapter, **options: Any) -> np.ndarray:
    base = model.load(Model(path=str(folder), **options))
    lora.attach_adapter(base.model, made)
    return logits(base.model)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    """Sets keys of a folder's config.json; ``...`` removes one."""
    content = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# ---- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "tied"),  # mlx-lm's qwen2_moe knows no tied embeddings
    [
        (kind, tied)
        for kind in FAMILIES
        if kind != "mixtral"
        for tied in (False, True)
        if not (tied and kind == "qwen2_moe")
    ],
)
def test_a_dense_merge(make: Make, tmp_path: Path, kind: str, dtype: str, tied: bool) -> None:
    folder, out = make(kind, dtype, tie_word_embeddings=tied), tmp_path / "out"
    base = load(folder)
    made = adapter(base, targets=everywhere(base))
    report = merging.measure(base, made, prompts=PROMPTS)
    merged_folder.write(out, report)

    got = arrays(out)
    assert {array.dtype for array in got.values()} == {getattr(mx, dtype)}
    assert rounding(got, expected64(arrays(folder), made)) <= 1
    assert rounding(got, expected64(arrays(folder), made, sign=-1.0)) > 100
    assert sum(array.nbytes for array in got.values()) == report.bytes
    assert config_of(out)["dtype"] == dtype

    theirs, plain, ours = transformers_logits(out), mlx_logits(out), unmerged_logits(folder, made)
    assert distance(plain, theirs) < 1e-4
    effect = distance(ours, logits(model.load(Model(path=str(folder))).model))
    assert effect > 1
    # A rounded router may choose another expert for a token, which is no small change.
    if dtype == "float32":
        assert distance(theirs, ours) < 1e-4
    elif "moe" not in kind:
        assert distance(theirs, ours) < effect / 10


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_of_other_names(make: Make, tmp_path: Path, bits: int | None) -> None:
    """Mixtral's are w1, w2 and w3 on the disk: the merged model has mlx-lm's names, and mlx-lm reads it."""
    folder, out = make("mixtral", bits=bits), tmp_path / "out"
    base = load(folder)
    made = adapter(base, targets=everywhere(base))
    merged_folder.write(out, merging.measure(base, made, "none", prompts=PROMPTS))
    assert distance(mlx_logits(out), unmerged_logits(folder, made)) < 1e-4


def test_what_is_not_adapted_is_untouched(make: Make, tmp_path: Path) -> None:
    """Tensors (those that mlx-lm leaves out too), the tokenizer, the template, the generation settings."""
    folder, out = make(dtype="bfloat16", tie_word_embeddings=True), tmp_path / "out"
    stored = arrays(folder)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.arange(8, dtype=mx.float32),
        "lm_head.weight": stored["model.embed_tokens.weight"],  # a copy of the tied embeddings
    }
    mx.save_safetensors(str(folder / "model.safetensors"), stored | extra, {"format": "pt"})
    (folder / "adapter_config.json").write_text("{}")
    (folder / "evil.py").write_text("")
    base = load(folder)
    merged_folder.write(out, merging.measure(base, adapter(base, targets=["q_proj", "embed_tokens"]), prompts=PROMPTS))
    got, want = tiny_copies(out), tiny_copies(folder)
    assert want.keys() - got.keys() == {"lm_head.weight"}
    changed = {name for name in got if got[name].tobytes() != want[name].tobytes()}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)} | {"model.embed_tokens.weight"}
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in out.iterdir()} == names | {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }


def tiny_copies(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        for name, array in arrays(folder).items()
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_are_right_in_plain_mlx_lm(make: Make, tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    """Which reads nothing of the rope_parameters that transformers 5 writes."""
    folder, out = make(kind, rope_parameters={"rope_theta": 5000.0, **rope}), tmp_path / "out"
    base = load(folder)
    made = adapter(base, size=0.01)
    merged_folder.write(out, merging.measure(base, made, prompts=PROMPTS))
    want = transformers_logits(out)
    assert distance(mlx_logits(out), want) < 1e-4
    assert distance(logits(model.load(Model(path=str(out))).model), want) < 1e-4
    assert distance(mlx_logits(folder), transformers_logits(folder)) > 1
    assert config_of(out)["rope_parameters"] == config_of(folder)["rope_parameters"]


def test_heads_are_untied_in_plain_mlx_lm(make: Make, tmp_path: Path) -> None:
    """Which ties them where the config does not say, unlike transformers."""
    folder, out = make(), tmp_path / "out"
    edit(folder, tie_word_embeddings=...)
    base = load(folder)
    merged_folder.write(out, merging.measure(base, adapter(base, targets=everywhere(base)), prompts=PROMPTS))
    assert distance(mlx_logits(out), transformers_logits(out)) < 1e-4


def test_shards(make: Make, tmp_path: Path) -> None:
    base = load(make("qwen3_moe"))
    report = merging.measure(base, adapter(base), prompts=PROMPTS)
    merged_folder.write(tmp_path / "whole", report)
    (tmp_path / "split").mkdir()  # an empty folder may be there
    merged_folder.write(tmp_path / "split", report, shard_bytes=50_000)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert {name: set(mx.load(str(tmp_path / "split" / name))) for name in set(index["weight_map"].values())} == {
        file.name: {name for name, place in index["weight_map"].items() if place == file.name} for file in files
    }
    assert index["metadata"]["total_size"] == report.bytes
    assert all(sum(array.nbytes for array in mx.load(str(file)).values()) <= 70_000 for file in files)
    tiny.assert_identical(tiny_copies(tmp_path / "split"), tiny_copies(tmp_path / "whole"))
    assert np.array_equal(transformers_logits(tmp_path / "split"), transformers_logits(tmp_path / "whole"))
    assert np.array_equal(mlx_logits(tmp_path / "split"), mlx_logits(tmp_path / "whole"))


def test_another_type(make: Make, tmp_path: Path) -> None:
    """A bfloat16 base merged into float32 keeps everything; the model's own dtype option does the same."""
    folder = make("qwen3", "bfloat16")
    base = load(folder)
    made = adapter(base)
    merged_folder.write(tmp_path / "a", merging.measure(base, made, dtype="float32", prompts=PROMPTS))
    merged_folder.write(tmp_path / "b", merging.measure(load(folder, dtype="float32"), made, prompts=PROMPTS))
    assert rounding(arrays(tmp_path / "a"), expected64(arrays(folder), made)) <= 1
    tiny.assert_identical(tiny_copies(tmp_path / "a"), tiny_copies(tmp_path / "b"))
    for out in (tmp_path / "a", tmp_path / "b"):
        assert config_of(out)["dtype"] == "float32"
        assert distance(transformers_logits(out), unmerged_logits(folder, made)) < 1e-4


# ---- quantized -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_keeping_bits(make: Make, tmp_path: Path, kind: str) -> None:
    """Adapted modules become what MLX quantizes base + delta to; the others stay bit for bit."""
    folder, out = make(kind, "bfloat16", bits=8), tmp_path / "out"
    base = load(folder)
    targets = ["v_proj", "down_proj", "embed_tokens"]
    made = adapter(base, size=0.2, targets=targets)
    report = merging.measure(base, made, prompts=PROMPTS)
    merged_folder.write(out, report)
    got, want = tiny_copies(out), tiny_copies(folder)
    assert got.keys() == want.keys()
    changed = {name.rpartition(".")[0] for name in got if got[name].tobytes() != want[name].tobytes()}
    assert changed == made.pairs.keys()
    assert config_of(out)["quantization"] == config_of(folder)["quantization"]

    for path, pair in made.pairs.items():
        (before, *_), (after, step, offset) = (dequantized64(arrays(place), path) for place in (folder, out))
        change = delta64(pair, path.endswith("embed_tokens"))
        # half a step, and weights, scales and biases in bfloat16
        bound = 0.51 * step + 2.0**-8 * (np.abs(before + change) + 255 * step + np.abs(offset))
        assert (np.abs(after - (before + change)) <= bound).all()
        assert not (np.abs(after - (before - change)) <= bound).all()
    effect = distance(logits(model.load(Model(path=str(folder))).model), unmerged_logits(folder, made))
    assert distance(mlx_logits(out), unmerged_logits(folder, made)) < effect / 2  # a router may choose otherwise
    assert not report.refused


def dequantized64(stored: dict[str, mx.array], path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values of an 8-bit weight in groups of 32, and of each the step and the offset of its group."""
    step, offset = (tiny.float64(stored[f"{path}.{name}"]).repeat(32, axis=-1) for name in ("scales", "biases"))
    codes = np.array(stored[f"{path}.weight"]).view(np.uint8).astype(np.float64)
    return codes * step + offset, np.abs(step), offset


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "qwen3_moe"])
def test_dequantizing(make: Make, tmp_path: Path, kind: str) -> None:
    folder, out = make(kind, "bfloat16", bits=4), tmp_path / "out"
    base = load(folder)
    made = adapter(base, targets=everywhere(base))
    merged_folder.write(out, merging.measure(base, made, "none", "float32", prompts=PROMPTS))
    assert not {"quantization", "quantization_config"} & config_of(out).keys()
    want = unmerged_logits(folder, made)
    assert distance(transformers_logits(out), want) < 1e-4
    assert distance(mlx_logits(out), want) < 1e-4
    assert any(".experts.3.up_proj" in name for name in arrays(out)) == ("moe" in kind)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_dense_base_to_bits(make: Make, tmp_path: Path, kind: str) -> None:
    """Is what `model.quantize` makes of the dense merge."""
    folder = make(kind, hidden_size=128)
    base = load(folder)
    made = adapter(base, size=0.2)
    merged_folder.write(tmp_path / "dense", merging.measure(base, made, prompts=PROMPTS))
    want = model.load(Model(path=str(tmp_path / "dense"), quantize=Quantize(bits=6)))
    merged_folder.write(tmp_path / "bits", merging.measure(base, made, 6, prompts=PROMPTS), force=True)
    tiny.assert_identical(tiny_copies(tmp_path / "bits"), tiny.copies(want.model))
    assert config_of(tmp_path / "bits")["quantization"] == {
        "group_size": 64,
        "bits": 6,
        "mode": "affine",
        **(
            {f"model.layers.{n}.mlp.gate": {"group_size": 64, "bits": 8, "mode": "affine"} for n in (0, 1)}
            if "moe" in kind
            else {}
        ),
    }
    assert distance(mlx_logits(tmp_path / "bits"), logits(want.model)) < 1e-4


def test_other_bits_for_a_quantized_base(make: Make, tmp_path: Path) -> None:
    folder, out = make("qwen3", bits=4), tmp_path / "out"
    base = load(folder)
    made = adapter(base, size=0.2)
    report = merging.measure(base, made, 8, prompts=PROMPTS)
    merged_folder.write(out, report)
    assert config_of(out)["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    effect = distance(logits(model.load(Model(path=str(folder))).model), unmerged_logits(folder, made))
    assert distance(mlx_logits(out), unmerged_logits(folder, made)) < effect / 4


def test_a_base_that_is_quantized_on_load(make: Make, tmp_path: Path) -> None:
    """Is merged into as training saw it."""
    folder, out = make("qwen2", "bfloat16"), tmp_path / "out"
    options = {"quantize": Quantize(bits=8, group_size=32)}
    base = load(folder, **options)
    made = adapter(base, size=0.2)
    tiny.assert_identical(tiny.copies(base.model), tiny.copies(model.load(Model(path=str(folder), **options)).model))
    merged_folder.write(out, merging.measure(base, made, prompts=PROMPTS))
    assert config_of(out)["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    want = unmerged_logits(folder, made, **options)
    effect = distance(logits(base.model), want)
    assert distance(mlx_logits(out), want) < effect / 4
    merged_folder.write(tmp_path / "none", merging.measure(base, made, "none", "float32", prompts=PROMPTS))
    assert distance(transformers_logits(tmp_path / "none"), want) < 1e-4


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_scales_of_bytes(make: Make, tmp_path: Path, mode: str) -> None:
    source = make("llama", "bfloat16")
    folder, out = tmp_path / mode, tmp_path / "out"
    network, config = mlx_lm.utils.load_model(source)
    network, config = mlx_lm.utils.quantize_model(network, config, None, None, mode)
    mlx_lm.utils.save(folder, str(source), network, mlx_lm.utils.load_tokenizer(source), config)
    base = load(folder)
    made = adapter(base, size=0.5)
    merged_folder.write(out, merging.measure(base, made, prompts=PROMPTS), force=True)
    assert config_of(out)["quantization"]["mode"] == mode
    assert arrays(out)["model.layers.0.mlp.up_proj.scales"].dtype == mx.uint8
    merged_folder.write(tmp_path / "none", merging.measure(base, made, "none", prompts=PROMPTS))
    assert {array.dtype for array in arrays(tmp_path / "none").values()} == {mx.bfloat16}
    effect = distance(logits(base.model), unmerged_logits(folder, made))
    assert distance(transformers_logits(tmp_path / "none"), unmerged_logits(folder, made)) < effect / 4


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_survival_equals_float64(make: Make, tmp_path: Path) -> None:
    """Cosine, norm and share, of each module and the whole."""
    folder, out = make("qwen3_moe", "bfloat16"), tmp_path / "out"
    base = load(folder)
    made = adapter(base, size=0.002, targets=everywhere(base))
    report = merging.measure(base, made, prompts=PROMPTS)
    merged_folder.write(out, report, force=True)
    before, after = (expand(arrays(place)) for place in (folder, out))
    sums = np.zeros(3)
    for survival in report.survivals:
        d = delta64(made.pairs[survival.path], survival.path.endswith("embed_tokens"))
        a = after[survival.path] - before[survival.path]
        own = np.array([(a * d).sum(), (a * a).sum(), (d * d).sum()])
        assert_survival(survival, own)
        sums += own
    assert_survival(report.overall, sums)
    assert 0.001 < report.overall.lost < 0.999


def expand(stored: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """Tensors by module, those of experts stacked."""
    found = {name.removesuffix(".weight"): tiny.float64(array) for name, array in stored.items()}
    for name in [name for name in found if ".experts.0." in name]:
        parts = [found[name.replace(".experts.0.", f".experts.{number}.")] for number in range(4)]
        found[name.replace(".experts.0.", ".switch_mlp.")] = np.stack(parts)
    return found


def assert_survival(got: merging.Survival, sums: np.ndarray) -> None:
    product, applied, intended = sums
    want = [product / np.sqrt(applied * intended), np.sqrt(applied / intended), abs(1 - product / intended)]
    assert [got.cosine, got.norm, got.lost] == pytest.approx(want, rel=1e-4, abs=1e-5)


def on_a_grid(folder: Path, size: float, bits: int = 4) -> tuple[model.Base, Adapter]:
    """A base whose q_proj lies on the 4-bit grid from -8 to 7 (times 2^-4), quantized to it, and an adapter that adds
    `size` steps to every weight but the two ends of each group, so that MLX finds the same grid again."""
    stored = arrays(folder)
    path = "model.layers.0.self_attn.q_proj"
    grid = np.random.default_rng(0).integers(-6, 6, (64, 64))
    grid[:, ::32], grid[:, 1::32] = -8, 7
    stored[f"{path}.weight"] = mx.array(grid / 16).astype(mx.float32)
    mx.eval(stored)
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "pt"})
    base = load(quantized(folder, bits))
    free = np.ones((64, 1), np.float32)
    free[::32] = free[1::32] = 0
    return base, Adapter({path: Pair(mx.array(free), mx.full((1, 64), size / 16), 1.0)})


@pytest.mark.parametrize(("kind", "size"), [("llama", 0.02), ("llama", 0.49), ("qwen3_moe", 0.3)])
def test_four_bits_swallow_an_adapter_whole(make: Make, tmp_path: Path, kind: str, size: float) -> None:
    """Less than half a step of the grid: nothing at all is left."""
    base, made = on_a_grid(make(kind), size)
    report = merging.measure(base, made, prompts=PROMPTS)
    assert (report.overall.cosine, report.overall.norm, report.overall.lost) == (0, 0, 1)
    assert report.refused
    assert report.divergence.mean == pytest.approx(report.divergence.adapter, rel=1e-3)
    with pytest.raises(InputError, match=r"would lose 100.0% of the adapter .*Better: --quantize"):
        merged_folder.write(tmp_path / "out", report)
    assert not list(tmp_path.glob("*out*"))
    merged_folder.write(tmp_path / "out", report, force=True)
    tiny.assert_identical(tiny_copies(tmp_path / "out"), tiny_copies(base.folder))

    passing = [
        choice for choice in (5, 6, 8, "none") if not merging.measure(base, made, choice, prompts=PROMPTS).refused
    ]
    assert str(report.better).startswith(f"--quantize {passing[0]} ")
    whole = merging.measure(base, made, "none", prompts=PROMPTS)
    assert whole.overall.lost < 1e-6
    assert whole.divergence.max < 1e-9


def test_more_than_half_a_step_survives_as_a_whole_one(make: Make) -> None:
    base, made = on_a_grid(make(), 0.8)
    report = merging.measure(base, made, prompts=PROMPTS)
    assert report.overall.norm == pytest.approx(1 / 0.8, rel=1e-5)
    assert report.overall.cosine == pytest.approx(1, rel=1e-5)
    assert report.overall.lost == pytest.approx(0.25, rel=1e-5)


def test_a_large_adapter_survives_eight_bits(make: Make) -> None:
    base = load(make(bits=4))
    report = merging.measure(base, adapter(base, size=0.2), 8, prompts=PROMPTS)
    assert report.overall.lost < 0.01
    assert report.overall.cosine > 0.99


def test_bfloat16_swallows_tiny_adapters_too(make: Make) -> None:
    """Where the base's own type is too coarse, float32 is named."""
    base = load(make(dtype="bfloat16"))
    report = merging.measure(base, adapter(base, size=1e-5), prompts=PROMPTS)
    assert report.refused
    assert "--quantize none --dtype f32" in str(report.better)
    assert merging.measure(base, adapter(base, size=1e-5), max_loss=1.0, prompts=PROMPTS).better is None


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_zeros(make: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    folder = make(kind, dtype)
    base = load(folder)
    report = merging.measure(base, adapter(base, size=0.0, targets=everywhere(base)), prompts=PROMPTS)
    assert vars(report.divergence) == {
        "mean": 0,
        "max": 0,
        "adapter": 0,
        "positions": sum(len(base.tokenizer.encode(prompt)) for prompt in PROMPTS),
    }
    assert report.overall.as_json() == {"cosine": 1, "norm": 1, "lost": 0}
    merged_folder.write(tmp_path / "out", report)
    tiny.assert_identical(tiny_copies(tmp_path / "out"), tiny_copies(folder))


@pytest.mark.parametrize(("kind", "bits"), [("qwen2", None), ("llama", 4), ("qwen3_moe", 4)])
def test_divergence_equals_numpy(make: Make, tmp_path: Path, kind: str, bits: int | None) -> None:
    """Against the logits of the folder that was written, position by position."""
    folder, out = make(kind, "bfloat16", bits=bits), tmp_path / "out"
    base = load(folder)
    made = adapter(base, targets=everywhere(base))
    report = merging.measure(base, made, prompts=PROMPTS)
    merged_folder.write(out, report, force=True)
    before, after = model.load(Model(path=str(folder))).model, model.load(Model(path=str(out))).model
    found, moved = [], []
    for prompt in PROMPTS:
        ids = np.array([base.tokenizer.encode(prompt)])
        plain, merged = logits(before, ids)[0], logits(after, ids)[0]
        lora.attach_adapter(before, made)
        unmerged = logits(before, ids)[0]
        lora.detach(before)
        found += [kl(p, q) for p, q in zip(unmerged, merged, strict=True)]
        moved += [kl(p, q) for p, q in zip(unmerged, plain, strict=True)]
    got = report.divergence
    assert [got.mean, got.max, got.adapter] == pytest.approx([np.mean(found), np.max(found), np.mean(moved)], rel=1e-3)
    assert got.positions == len(found)
    assert got.mean > 1e-6


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(softmax p ‖ softmax q), term by term."""
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (p, q))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def test_measuring_changes_nothing(make: Make) -> None:
    for folder in (make("llama", "bfloat16"), make("qwen3_moe", "bfloat16", bits=4)):
        base = load(folder)
        made = adapter(base, targets=everywhere(base))
        before, modules = tiny.copies(raw(base.model)), [type(module) for module in base.model.modules()]
        merging.measure(base, made, 8 if "4" in folder.name else "keep", prompts=PROMPTS)
        tiny.assert_identical(tiny.copies(raw(base.model)), before)
        assert [type(module) for module in base.model.modules()] == modules


def raw(network: nn.Module) -> dict[str, mx.array]:
    """Parameters that numpy can hold: bfloat16 as its bits."""
    flat = dict(nn.utils.tree_flatten(network.parameters()))
    return {name: array.view(mx.uint16) if array.dtype == mx.bfloat16 else array for name, array in flat.items()}


def test_the_report(make: Make) -> None:
    base = load(make("qwen3_moe", "bfloat16", bits=4))
    report = merging.measure(base, adapter(base), prompts=PROMPTS)
    lines = report.lines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 5 + 8  # four of attention, the router, three of experts
    shares = [float(line[41:].split()[0].rstrip("%")) for line in lines[5:]]
    assert shares == sorted(shares, reverse=True)
    written = json.loads(json.dumps(report.as_json()))
    assert written["modules"].keys() == {survival.path for survival in report.survivals}
    assert written["overall"]["lost"] == report.overall.lost
    assert written["refused"] == report.refused
    assert "4 bits in groups of 32" in lines[0]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_numbers_beyond_float16(make: Make) -> None:
    base = load(make(), dtype="float16")
    path = "model.layers.1.mlp.up_proj"
    made = Adapter({path: Pair(mx.full((64, 1), 300.0), mx.full((1, 96), 300.0), 1.0)})
    with pytest.raises(InputError, match=rf"{path}: base \+ adapter is no finite float16"):
        merging.measure(base, made, prompts=PROMPTS)
    assert merging.measure(base, made, dtype="bfloat16", prompts=PROMPTS).overall.lost < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantize": 7}, "quantize: 7 is not keep, none or one of 2, 3, 4, 5, 6, 8 bits"),
        ({"quantize": "all"}, "quantize: all is not"),
        ({"prompts": []}, "a token each"),
        ({"prompts": ["one", ""]}, "a token each"),
        ({"adapter": Adapter({})}, "no modules to merge"),
        ({"adapter": Adapter({"x": Pair(mx.ones((2, 1)), mx.ones((1, 2)), 1.0)})}, "x has no place in this model"),
    ],
)
def test_what_cannot_be_measured(make: Make, change: dict[str, Any], words: str) -> None:
    base = load(make())
    with pytest.raises(InputError) as error:
        merging.measure(base, **{"adapter": adapter(base), "prompts": PROMPTS, **change})
    assert words in str(error.value)


def test_groups_that_divide_nothing(make: Make) -> None:
    base = load(make(hidden_size=48, intermediate_size=96, head_dim=12))
    with pytest.raises(InputError, match="groups of 64 divide no layer of this model; choose none"):
        merging.measure(base, adapter(base), 4, prompts=PROMPTS)


def test_folders_that_cannot_be_written(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    base = load(folder)
    report = merging.measure(base, adapter(base), prompts=PROMPTS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("kept")
    for place in (folder, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=str(place)):
            merged_folder.write(place, report)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "file").read_text() == "kept"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(InputError, match="No space left"):
        merged_folder.write(tmp_path / "out", report)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_smollm2(smollm2_folder: Path, tmp_path: Path) -> None:
    """A real model: bfloat16 keeps an adapter of ordinary size, its 4-bit form does not."""
    base = load(smollm2_folder, dtype="bfloat16")
    made = adapter(base, size=0.01, rank=8)
    report = merging.measure(base, made)
    assert report.overall.lost < 0.02
    assert report.divergence.mean < report.divergence.adapter / 10
    merged_folder.write(tmp_path / "out", report)
    stored = {name: array.astype(mx.bfloat16) for name, array in arrays(smollm2_folder).items()}
    assert rounding(arrays(tmp_path / "out"), expected64(stored, made)) <= 1
    network, config = mlx_lm.utils.load_model(smollm2_folder)
    network, config = mlx_lm.utils.quantize_model(network, config, group_size=64, bits=4)
    mlx_lm.utils.save(tmp_path / "4", str(smollm2_folder), network, base.tokenizer, config)
    report = merging.measure(load(tmp_path / "4"), made, max_loss=1.0)
    assert report.overall.lost > 0.5
    assert report.overall.cosine < 0.1
