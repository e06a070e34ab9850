"""Adapters combined into one, against PEFT's add_weighted_adapter and closed formulas in float64."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from peft.utils import merge_utils

from mlx_lora import adapter_files, combine, lora, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.config import Lora, Model
from mlx_lora.errors import InputError, exit_code
from mlx_lora.live import LiveAdapters
from mlx_lora.lora import Adapter, Pair
from mlx_lora.lora.combination import check_bases, concatenate, dare, linear, norm, svd, ties

# PEFT 0.21 asks transformers 5.23 under the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.usefixtures("one_torch_thread"),
]

WEIGHTS = [0.7, -1.3, 0.4]
# Modules of their own, and three scales.
OPTIONS: list[dict[str, Any]] = [
    {"lora_alpha": 8, "target_modules": {"q_proj", "v_proj", "down_proj", "embed_tokens"}},
    {"lora_alpha": 4, "target_modules": {"q_proj", "v_proj", "up_proj"}},
    {"lora_alpha": 6, "target_modules": {"q_proj", "down_proj", "embed_tokens"}},
]
SAME_RANKS, RANKS = (4, 4, 4), (4, 2, 3)


def theirs(ranks: tuple[int, ...]) -> peft.PeftModel:
    """A random Llama of PEFT with random adapters "0", "1" and "2"."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    options = [peft.LoraConfig(r=rank, **each) for rank, each in zip(ranks, OPTIONS, strict=True)]
    network = peft.get_peft_model(transformers.LlamaForCausalLM(config), options[0], adapter_name="0")
    for number, each in enumerate(options[1:], 1):
        network.add_adapter(str(number), each)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def read(network: peft.PeftModel, name: str) -> Adapter:
    """One of PEFT's adapters, taken from its modules."""
    pairs = {}
    for path, module in network.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            sides: list[Any] = [None, None]
            if name in module.lora_A:
                sides = [module.lora_A[name].weight, module.lora_B[name].weight]
            elif name in module.lora_embedding_A:
                sides = [module.lora_embedding_A[name], module.lora_embedding_B[name]]
            if sides[0] is not None:
                a, b = (mx.array(side.detach().numpy()) for side in sides)
                pairs[path] = Pair.of_factors(a, b, module.scaling[name] * a.shape[0])
    return Adapter(pairs)


def combined_by_peft(ranks: tuple[int, ...], method: str, **options: Any) -> tuple[list[Adapter], Adapter]:
    network = theirs(ranks)
    network.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "all", method, **options)
    return [read(network, str(number)) for number in range(3)], read(network, "all")


def delta(pair: Pair) -> np.ndarray:
    """The update, (…, out, in), in float64."""
    a, b = (np.array(factor).astype(np.float64) for factor in pair.factors())
    return pair.alpha / pair.rank * (b @ a)


def summed(adapters: list[Adapter], weights: list[float], path: str) -> np.ndarray:
    terms = [
        weight * delta(adapter.pairs[path])
        for adapter, weight in zip(adapters, weights, strict=True)
        if path in adapter.pairs
    ]
    return np.sum(terms, axis=0)


def furthest(one: Adapter, other: Adapter) -> float:
    """The largest difference between the updates of two adapters of the same modules."""
    assert one.pairs.keys() == other.pairs.keys()
    return max(np.abs(delta(one.pairs[path]) - delta(other.pairs[path])).max() for path in one.pairs)


# ---- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ranks", "options", "ours"),
    [
        ("cat", RANKS, {}, lambda adapters: concatenate(adapters, WEIGHTS)),
        ("svd", RANKS, {}, lambda adapters: svd(adapters, WEIGHTS)),
        ("svd", RANKS, {"svd_rank": 2}, lambda adapters: svd(adapters, WEIGHTS, 2)),
        ("svd", RANKS, {"svd_rank": 7}, lambda adapters: svd(adapters, WEIGHTS, 7)),
        ("linear", SAME_RANKS, {}, lambda adapters: linear(adapters, WEIGHTS)),
        ("ties", SAME_RANKS, {"density": 0.5}, lambda adapters: ties(adapters, WEIGHTS, 0.5)),
        ("ties", SAME_RANKS, {"density": 0.13}, lambda adapters: ties(adapters, WEIGHTS, 0.13)),
    ],
)
def test_a_combination_equals_pefts(
    method: str, ranks: tuple[int, ...], options: dict[str, Any], ours: Callable[[list[Adapter]], Adapter]
) -> None:
    adapters, expected = combined_by_peft(ranks, method, **options)
    got = ours(adapters)
    assert len(got.pairs) == 9  # the modules of any
    assert furthest(got, expected) < 1e-5
    assert furthest(got, concatenate(adapters[:1] + adapters[2:] + adapters[1:2], WEIGHTS)) > 0.05  # weights swapped


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_dare_takes_the_sums_that_pefts_dare_takes(density: float) -> None:
    """The masks are random on both sides, but an entry can only be one of the four sums of what is kept."""
    adapters = [read(theirs(SAME_RANKS), str(number)) for number in (0, 1)]
    weights = WEIGHTS[:2]
    got = dare(adapters, weights, density, seed=5)
    path = "model.layers.1.self_attn.q_proj"
    scales = [weight * adapter.pairs[path].scale for weight, adapter in zip(weights, adapters, strict=True)]
    for side, factors in (
        (0, [math.copysign(math.sqrt(abs(scale)), scale) for scale in scales]),
        (1, [math.sqrt(abs(scale)) for scale in scales]),
    ):
        arrays = [np.array(adapter.pairs[path].factors()[side]) for adapter in adapters]
        sums = np.array(
            [
                first * factors[0] * arrays[0] / density + second * factors[1] * arrays[1] / density
                for first in (0, 1)
                for second in (0, 1)
            ]
        )
        reference = merge_utils.dare_linear([torch.tensor(array) for array in arrays], torch.tensor(factors), density)
        for each in (np.array(got.pairs[path].factors()[side]), reference.numpy()):
            off = np.abs(sums - each)
            assert off.min(axis=0).max() < 1e-6
            if density == 1:
                assert off[3].max() < 1e-6


@pytest.mark.parametrize("density", [0.25, 0.8])
def test_dare_keeps_the_share_divides_by_it_and_is_a_function_of_the_seed(density: float) -> None:
    base = tiny.llama()
    lora.attach(base, Lora(rank=8, alpha=8, target_modules="all-linear"))
    tiny.randomize(base)
    adapter = lora.attached(base)
    got = dare([adapter], [1.0], density, seed=3)
    arrays, before = got.arrays(), adapter.arrays()
    kept = {name: np.array(array) != 0 for name, array in arrays.items()}
    for name, mask in kept.items():
        expected = np.where(mask, np.array(before[name]) / np.float32(density), 0)
        assert np.abs(np.array(arrays[name]) - expected).max() < 1e-6
        deviation = math.sqrt(density * (1 - density) / mask.size)
        assert abs(mask.mean() - density) < 5 * deviation
    # A and B of a module, and the modules of two blocks, have masks of their own.
    a, b = (kept[f"model.layers.0.self_attn.o_proj.{side}"] for side in ("lora_a", "lora_b"))
    assert abs((a.reshape(-1) == b.reshape(-1)).mean() - (density**2 + (1 - density) ** 2)) < 0.15
    assert (a != kept["model.layers.1.self_attn.o_proj.lora_a"]).any()
    tiny.assert_identical(tiny.copies(dare([adapter], [1.0], density, seed=3).arrays()), tiny.copies(arrays))
    other = dare([adapter], [1.0], density, seed=4).arrays()
    assert all((np.array(other[name]) != 0).tobytes() != mask.tobytes() for name, mask in kept.items())


def test_dare_is_linear_on_average() -> None:
    adapters = [read(theirs(SAME_RANKS), str(number)) for number in (0, 1)]
    expected, path = linear(adapters, WEIGHTS[:2]), "model.layers.0.self_attn.q_proj"
    draws = np.stack(
        [np.array(dare(adapters, WEIGHTS[:2], 0.5, seed).pairs[path].lora_a) for seed in range(400)]
    ).astype(np.float64)
    spread = draws.std(axis=0) / math.sqrt(len(draws))
    off = np.abs(draws.mean(axis=0) - np.array(expected.pairs[path].lora_a))
    assert (off < 5 * spread + 1e-6).all()


# ---- against closed formulas ---------------------------------------------------------------------------------------


def random_adapter(rank: int, alpha: float, seed: int, kind: str = "qwen3_moe", targets: Any = None) -> Adapter:
    base = tiny.BUILDERS[kind]()
    chosen = targets or ["all-linear", "embed_tokens"]
    lora.attach(base, Lora(rank=rank, alpha=alpha, target_modules=chosen), seed)
    tiny.randomize(base, seed)
    return lora.attached(base)


def test_concatenation_is_exact_for_experts_embeddings_and_any_ranks() -> None:
    adapters = [random_adapter(4, 8, 1), random_adapter(2, 3, 2), random_adapter(3, 6, 3, targets="q_proj")]
    got = concatenate(adapters, WEIGHTS)
    assert got.pairs.keys() == adapters[0].pairs.keys()
    for path, pair in got.pairs.items():
        assert pair.rank == sum(adapter.pairs[path].rank for adapter in adapters if path in adapter.pairs)
        assert np.abs(delta(pair) - summed(adapters, WEIGHTS, path)).max() < 1e-6
    folded = got.folded()
    assert folded.uniform is not None
    assert furthest(folded, got) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5, 6, 40])
def test_svd_has_the_least_error_that_a_rank_can_have(rank: int) -> None:
    """Eckart and Young: the root of the sum of squares of the singular values that are left out, per expert."""
    adapters, weights = [random_adapter(4, 8, 1), random_adapter(2, 3, 2)], [0.7, -1.3]
    got = svd(adapters, weights, rank)
    for path, pair in got.pairs.items():
        exact = summed(adapters, weights, path)
        most = min(6, *exact.shape[-2:])
        assert pair.rank == min(rank, most)
        assert pair.alpha == pair.rank
        values = np.linalg.svd(exact, compute_uv=False)
        least = np.sqrt((values[..., rank:] ** 2).sum(axis=-1))
        error = np.sqrt(((delta(pair) - exact) ** 2).sum(axis=(-2, -1)))
        size = np.sqrt((exact**2).sum(axis=(-2, -1)))
        assert (np.abs(error - least) < 1e-6 * size).all()
        assert rank >= most or (least > 1e-3 * size).all()
        a, b = (np.array(factor).astype(np.float64) for factor in pair.factors())
        gram_a, gram_b = a @ a.swapaxes(-1, -2), b.swapaxes(-1, -2) @ b
        assert np.abs(gram_a - gram_b).max() < 1e-5  # both have the roots of the singular values


def test_the_rank_of_an_svd_is_by_default_the_largest_and_never_more_than_a_matrix_has() -> None:
    adapters = [random_adapter(40, 8, 1, "llama", "k_proj"), random_adapter(3, 8, 2, "llama", "k_proj")]
    got = svd(adapters, [1.0, 1.0])
    assert {pair.rank for pair in got.pairs.values()} == {32}  # k_proj is (32, 64)
    for path, pair in got.pairs.items():
        assert np.abs(delta(pair) - summed(adapters, [1.0, 1.0], path)).max() < 1e-6


def test_the_norm_is_that_of_the_whole_update() -> None:
    adapter = random_adapter(4, 8.0, 1)
    exact = math.sqrt(sum((delta(pair) ** 2).sum() for pair in adapter.pairs.values()))
    assert norm(adapter) == pytest.approx(exact, rel=1e-12)


def test_ties_by_hand() -> None:
    """Two adapters of one row: the smaller half goes, signs are elected, the mean is of those that agree."""
    rows = [[4.0, -1.0, 3.0, 0.5, -2.0, 0.1], [-1.0, -3.0, 2.5, 0.2, 3.0, 0.3]]
    column = mx.array([[2.0], [-1.0]])
    adapters = [Adapter({"x": Pair.of_factors(mx.array([row]), column, 1.0)}) for row in rows]
    pair = ties(adapters, [1.0, 4.0], 0.5).pairs["x"]
    # kept: 4, -, 3, -, -2, - and -, -3, 2.5, -, 3, -; weights: sqrt(1) and sqrt(4)
    assert pair.factors()[0].tolist() == [[4.0, -6.0, (3.0 + 5.0) / 2, 0.0, 6.0, 0.0]]
    assert pair.factors()[1].tolist() == [[(2.0 + 4.0) / 2], [0.0]]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_other_ranks_or_shapes_are_refused() -> None:
    four, two = random_adapter(4, 8, 1, "llama"), random_adapter(2, 4, 1, "llama")
    for method in (linear, lambda *given: ties(*given, 0.5), lambda *given: dare(*given, 0.5)):
        with pytest.raises(InputError, match=r"model.embed_tokens: the adapters have the ranks 4, 2 and this method"):
            method([four, two], [1.0, 1.0])
    wide = tiny.llama(hidden_size=32)
    lora.attach(wide, Lora(rank=4, target_modules="all-linear"))
    for method in (concatenate, svd, linear):
        with pytest.raises(InputError, match=r"down_proj has several shapes .*\(1, 96, 32\), \(1, 96, 64\)"):
            method([four, lora.attached(wide)], [1.0, 1.0])


def test_adapters_without_modules_have_a_nearest_one_without() -> None:
    assert svd([Adapter({}), Adapter({})], [1.0, 1.0]).pairs == {}


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_weights_that_say_nothing_are_refused(weight: float) -> None:
    with pytest.raises(InputError, match="must be finite and not 0"):
        concatenate([random_adapter(2, 4, 1, "llama")] * 2, [1.0, weight])


def known(path: str | None, digest: str | None) -> Adapter:
    return Adapter({}, base=Model(path=path) if path else None, metadata={"base_digest": digest} if digest else {})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (known("m", "1"), known("m", "1"), True),
        (known("m", "1"), known("elsewhere/m", "1"), True),
        (known("m", "1"), known("m", "2"), False),
        (known("m", "1"), known("m", None), True),
        (known("m", "1"), known("n", None), False),
        (known("m", None), known("n", None), False),
        (known(None, None), known("n", None), True),
        (known(None, "1"), known("n", None), True),
        (known(None, "1"), known(None, "2"), False),
    ],
)
def test_bases_must_be_one_as_far_as_they_are_known(one: Adapter, other: Adapter, same: bool) -> None:
    blank = known(None, None)
    if same:
        check_bases({"one": one, "blank": blank, "other": other})
        return
    with pytest.raises(InputError, match="one and other were trained on different bases"):
        check_bases({"one": one, "blank": blank, "other": other})


def test_a_base_is_the_same_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "n").mkdir()
    monkeypatch.chdir(tmp_path)
    check_bases({"one": known("m", None), "other": known(str(tmp_path / "m"), None)})
    with pytest.raises(InputError, match="different bases"):
        check_bases({"one": known("m", None), "other": known(str(tmp_path / "n"), None)})


def test_pefts_embedding_without_the_tied_head_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT adapts the tied output head apart from the embedding; here they are one module."""
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    network = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules={"embed_tokens"}))
    network.save_pretrained(tmp_path / "embedding", save_embedding_layers=False)
    live = LiveAdapters(model.load(Model(path=str(tiny_model))).model)
    with pytest.raises(InputError, match="ensure_weight_tying"):
        live.load("embedding", tmp_path / "embedding")
    assert live.names == []
    monkeypatch.setattr(
        sys, "argv", ["combine", "--adapter", str(tmp_path / "embedding"), "--out", str(tmp_path / "out")]
    )
    assert exit_code(combine._main) == 2
    assert "ensure_weight_tying" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the command -----------------------------------------------------------------------------------------------------


def save(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    mlx_form.save(folder, adapter.arrays(), mlx_form.settings(adapter), adapter.metadata)
    return folder


@pytest.fixture
def folders(tmp_path: Path, tiny_model: Path) -> list[Path]:
    """Two adapters of the tiny model, "red" and "blue", of the ranks 4 and 2."""
    found = []
    for seed, (name, rank) in enumerate({"red": 4, "blue": 2}.items(), 1):
        base = model.load(Model(path=str(tiny_model)))
        lora.attach(base.model, Lora(rank=rank, alpha=3 * rank, target_modules="all-linear"), seed)
        tiny.randomize(base.model, seed, size=0.2)
        metadata = {f"base_{key}": text for key, text in base.identity.items()}
        adapter = replace(lora.attached(base.model), base=Model(path=str(tiny_model)), metadata=metadata)
        found.append(save(adapter, tmp_path / name))
    return found


@pytest.mark.parametrize("method", ["concatenate", "svd"])
def test_the_command_writes_an_adapter_that_mlx_lm_loads(
    folders: list[Path], tiny_model: Path, tmp_path: Path, run_command: Any, method: str
) -> None:
    """A rank of 6 is enough for both: mlx-lm's logits are those of the live blend."""
    red, blue = folders
    out = tmp_path / "new" / "both"
    options = ["--rank", "6"] if method == "svd" else []
    ended = run_command(
        "combine", "--adapter", red, "--adapter", f"b={blue}:-0.5", "--method", method, *options, "--out", out
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{out}: 14 modules of rank 6, " in ended.stdout
    off = float(ended.stdout.split("weighted sum by ")[1].split(" %")[0])
    assert off < 1e-3
    base = model.load(Model(path=str(tiny_model)))
    live = LiveAdapters(base.model, base.identity)
    live.load("red", red)
    live.load("blue", blue)
    prompt = mx.array([[1, 90, 198, 83, 35, 253, 56]])
    before = np.array(base.model(prompt))
    live.use({"red": 1.0, "blue": -0.5})
    expected = np.array(base.model(prompt))
    theirs, _ = mlx_lm.load(str(tiny_model), adapter_path=str(out))
    assert np.abs(np.array(theirs(prompt)) - expected).max() < 1e-5
    assert np.abs(before - expected).max() > 0.1
    live.load("both", out)
    live.use("both")
    assert np.abs(np.array(base.model(prompt)) - expected).max() < 1e-5
    assert live.notes == {}
    made = adapter_files.read(out)
    assert made.base == Model(path=str(tiny_model))
    assert made.metadata["base_digest"] == base.identity["digest"]
    assert json.loads(made.metadata["combined_from"]) == [
        {"name": "red", "folder": str(red), "weight": 1.0},
        {"name": "b", "folder": str(blue), "weight": -0.5},
    ]
    assert json.loads(made.metadata["combined_by"])["method"] == method


def test_the_command_says_how_far_a_smaller_rank_is_off(folders: list[Path], tmp_path: Path, run_command: Any) -> None:
    red, blue = folders
    out = tmp_path / "both"
    ended = run_command("combine", "--adapter", red, "--adapter", blue, "--method", "svd", "--rank", "3", "--out", out)
    assert ended.returncode == 0, ended.stderr
    adapters = [adapter_files.read(folder) for folder in folders]
    made = adapter_files.read(out)
    exact = {path: summed(adapters, [1.0, 1.0], path) for path in made.pairs}
    missing = sum(((delta(pair) - exact[path]) ** 2).sum() for path, pair in made.pairs.items())
    share = math.sqrt(missing / sum((update**2).sum() for update in exact.values()))
    assert float(ended.stdout.split("weighted sum by ")[1].split(" %")[0]) == pytest.approx(100 * share, rel=0.01)
    assert share > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "{red}", "--adapter", "{blue}", "--method", "linear"], "ranks 4, 2"),
        (["--adapter", "{red}", "--adapter", "{red}"], "two adapters are named red"),
        (["--adapter", "{red}", "--adapter", "{blue}:0"], "not 0"),
        (["--adapter", "{red}", "--adapter", "{blue}", "--rank", "4"], "--rank goes with --method svd"),
        (["--adapter", "{red}", "--method", "svd", "--rank", "0"], "rank is 0"),
        (["--adapter", "{red}", "--method", "svd", "--seed", "1"], "--seed goes with --method dare"),
        (["--adapter", "{red}", "--method", "dare", "--seed", "-1"], "--seed -1 is not between"),
        (["--adapter", "{red}", "--method", "ties", "--density", "0"], "density is 0.0"),
        (["--adapter", "{red}", "--method", "dare", "--density", "nan"], "density is nan"),
        (["--adapter", "{tmp}/none"], "holds no adapter"),
        (["--adapter", "{tmp}/adapter.gguf"], "a GGUF file is no adapter"),
        (["--adapter", "{red}", "--out", "{tmp}"], "is there already"),
        (["--adapter", "{red}", "--out", "/dev/null/x"], "cannot be written"),
        (["--adapter", "{red}", "--method", "magic"], "invalid choice"),
        ([], "--adapter"),
        (["--adapter", "{red}:1e7"], "the weight '1e7' is not a number between"),
        (["--adapter", "{red}:1e-300", "--adapter", "{blue}:1e-300"], "the combined update is zero"),
        (["--adapter", "{red}:1e-60"], "the combined update is zero"),
        (["--adapter", "{red}", "--method", "ties", "--density", "1e-9"], "the combined update is zero"),
        (["--adapter", "{red}", "--adapter", "x={red}:-1", "--method", "linear"], "the combined update is zero"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    folders: list[Path],
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [text.format(red=folders[0], blue=folders[1], tmp=tmp_path) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["combine", "--out", str(tmp_path / "out"), *filled])
    try:
        code = exit_code(combine._main)
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blue", "red"]


@pytest.mark.parametrize("method", ["concatenate", "svd", "linear", "ties", "dare"])
@pytest.mark.parametrize("others", [[], ["--adapter", "{red}"]], ids=["alone", "with another"])
def test_what_float32_cannot_hold_is_refused(
    folders: list[Path],
    tmp_path: Path,
    method: str,
    others: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The weight and the adapter are each allowed, their product is not."""
    red = adapter_files.read(folders[0])
    huge = {path: replace(pair, lora_b=pair.lora_b * 1e35, alpha=9e29 * pair.rank) for path, pair in red.pairs.items()}
    folder = save(replace(red, pairs=huge), tmp_path / "huge")
    adapters = ["--adapter", f"{folder}:1e6", *(text.format(red=folders[0]) for text in others)]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["combine", *adapters, "--method", method, "--out", str(out)])
    code = exit_code(combine._main)
    assert (code, out.exists()) == (2, False)
    assert "error: the weights are too large: combined, model.layers" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [(-1, 1), (3, -3)])
def test_the_command_says_that_updates_cancel(
    folders: list[Path],
    tmp_path: Path,
    weights: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is left is rounding, of which no share can be told."""
    adapters = ["--adapter", f"{folders[0]}:{weights[0]}", "--adapter", f"x={folders[0]}:{weights[1]}"]
    monkeypatch.setattr(sys, "argv", ["combine", *adapters, "--out", str(tmp_path / "both")])
    assert exit_code(combine._main) == 0
    out = capsys.readouterr().out
    assert "the adapters' updates cancel" in out
    assert "is off" not in out
