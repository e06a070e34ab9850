"""The benchmarks run and say what they measured on what; how fast is no matter of tests."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.tuner.datasets import create_dataset

from mlx_lora import config_file, data, lora, model, page
from mlx_lora.config import Data, Lora
from mlx_lora.data import Example
from mlx_lora.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and the figures that it wrote."""
    file = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / name), *options, "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["device"] == model.device()
    assert f"{model.device()}, mlx {mx.__version__}" in result.stdout
    return result.stdout, figures


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def positive(*numbers: float) -> bool:
    return all(math.isfinite(number) and number > 0 for number in numbers)


def test_lora_layer(tmp_path: Path) -> None:
    text, figures = run("lora_layer.py", tmp_path, "--sizes", "32", "64", "--tokens", "1", "8", "--repeats", "3")
    assert [(row["tokens"], row["size"]) for row in figures["rows"]] == [(1, 32), (1, 64), (8, 32), (8, 64)]
    for row in figures["rows"]:
        assert positive(*row.values())
        assert row["forward_ratio"] == pytest.approx(row["adapted_forward"] / row["base_forward"])
        assert row["backward_ratio"] == pytest.approx(row["adapted_backward"] / row["base_backward"])
        assert f"{row['base_forward']:.1f}" in text
        assert f"{row['adapted_backward']:.1f}" in text
    heads, *lines = text.splitlines()[2:]
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(heads)}


def test_live_adapters(tmp_path: Path, tiny_model: Path) -> None:
    text, figures = run("live_adapters.py", tmp_path, str(tiny_model), "--repeats", "3", "--cycles", "20")
    assert positive(*figures["milliseconds"].values())
    assert figures["memory"][0] == figures["memory"][1]
    assert f"{figures['milliseconds']['swap']:.2f}" in text


# ---- floor -----------------------------------------------------------------------------------------------------------


def graph_operations(network: nn.Module, ids: mx.array, positions: mx.array) -> int:
    """Operations of the matrix products in MLX's own graph of a loss and its gradient; attention's half, as causal."""
    records: list[dict[str, Any]] = []

    def loss(adapter: dict[str, mx.array]) -> mx.array:
        lora.set_parameters(network, adapter)
        hidden = network.model(ids)
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
        logits = network.lm_head(hidden) if "lm_head" in network else network.model.embed_tokens.as_linear(hidden)
        return mx.logsumexp(logits, axis=-1).sum()

    def gradients(**adapter: mx.array) -> list[mx.array]:
        return list(mx.grad(loss)(adapter).values())

    adapter = lora.parameters(network)
    mx.disable_compile()  # fused operations cannot be exported
    try:
        mx.export_function(records.append, gradients, adapter)
    finally:
        mx.enable_compile()
    lora.set_parameters(network, adapter)
    found = 0
    for record in records:
        if record.get("name") in ("Matmul", "AddMM", "QuantizedMatmul"):
            left, out = record["inputs"][0][1], record["outputs"][0][1]
            found += 2 * math.prod(out) * left[-1] // (1 if len(out) < 4 else 2)
    return found


def test_saving(tmp_path: Path) -> None:
    text, figures = run("saving.py", tmp_path, "--tiny", "--updates", "12")
    assert "share of the time" in text
    saves, notes = figures["written"].values()
    assert saves["times"] == 3  # the first evaluation's adapter, the last one's, the last checkpoint
    assert notes["times"] >= 3
    for row in (saves, notes):
        assert positive(*row.values())
        assert row["share"] == pytest.approx(row["seconds"] / figures["seconds"])
    assert figures["bytes of a checkpoint"] > 0


@pytest.mark.parametrize(
    ("shape", "more"), [("QWEN", {}), ("SMOL", {"tie_word_embeddings": False}), ("SMOL", {"bits": 4})]
)
@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", "all"),
        ("all-linear", "last:1"),
        (["v_proj"], "all"),
        (["q_proj"], "last:2"),
        (["q_proj", "k_proj"], [1]),
        (["o_proj", "up_proj"], "all"),
        (["up_proj", "down_proj"], "0-1"),
        (["down_proj"], "last:1"),
    ],
)
def test_the_products_of_a_step_are_those_of_its_graph(
    benchmark: Callable[[str], ModuleType],
    shape: str,
    targets: str | list[str],
    layers: str | list[int],
    more: dict[str, Any],
) -> None:
    cases, matrix_products = benchmark("cases"), benchmark("matrix_products")
    network = cases.build(getattr(cases, shape) | cases.TINY | {"num_hidden_layers": 3} | more)
    if "bits" in more:
        nn.quantize(network, 32, 4)
    lora.attach(network, Lora(rank=4, target_modules=targets, layers=layers))
    rows, tokens, at_head = 2, 6, 5
    made = matrix_products.products(network, rows, tokens, at_head)
    ids = mx.random.randint(0, 512, (rows, tokens))
    assert made.operations() == graph_operations(network, ids, mx.arange(at_head))
    made.run()  # the shapes fit


@pytest.mark.parametrize("adapted", [1, 3, 5])
def test_the_products_add_up_to_the_formulas(benchmark: Callable[[str], ModuleType], adapted: int) -> None:
    """F_fwd and F_train of floor's docstring, less what the lowest adapted block does not need."""
    cases, matrix_products = benchmark("cases"), benchmark("matrix_products")
    blocks, hidden, width, key_value, rank = 5, 64, 128, 32, 4
    rows, tokens, at_head = 3, 100, 270  # of which the head takes 256 at a time
    network = cases.build(cases.SMOL | cases.TINY | {"num_hidden_layers": blocks})
    lora.attach(network, Lora(rank=rank, layers=f"last:{adapted}"))
    made = matrix_products.products(network, rows, tokens, at_head)

    sizes = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
    sizes += [(hidden, width), (hidden, width), (width, hidden)]
    block_weights = blocks * sum(inputs * outputs for inputs, outputs in sizes)
    head_weights, share, attention = hidden * 512, at_head / (rows * tokens), tokens * hidden * blocks
    forward = 2 * block_weights + 2 * share * head_weights + 2 * attention
    training = forward + adapted / blocks * (2 * block_weights + 4 * attention) + 2 * share * head_weights
    training += 6 * rank * adapted * sum(inputs + outputs for inputs, outputs in sizes)
    unneeded = sum(2 * inputs * outputs + 2 * rank * inputs for inputs, outputs in sizes[:3])
    assert made.operations(forward_only=True) == pytest.approx(rows * tokens * forward, rel=1e-12)
    assert made.operations() == pytest.approx(rows * tokens * (training - unneeded), rel=1e-12)


def test_floor(tmp_path: Path) -> None:
    options = ["--tiny", "--cases", "b", "d", "--rounds", "1", "--updates", "1", "--peak-size", "64", "--peak", "1000"]
    text, figures = run("floor.py", tmp_path, *options)
    assert [case["case"] for case in figures["cases"]] == ["b", "d"]
    for case in figures["cases"]:
        assert positive(*(case[name] for name in ("step", "products", "prefill", "host", "operations")))
        assert case["host"] < case["step"]
        assert case["step_over_products"] == pytest.approx(case["step"] / case["products"])
        assert case["rate"] == pytest.approx(case["operations"] / case["step"])
        assert case["share_of_peak"] == pytest.approx(case["rate"] / 1000e12)
        assert case["real"] <= case["positions"] == sum(rows * tokens for rows, tokens in case["shapes"])
        more_work = case["operations"] / case["forward_operations"]
        assert 2 < more_work < 4
        assert case["e_prefill"] == pytest.approx(more_work * case["training_tokens"] / case["prefill_tokens"])
        assert f"{case['step_over_products']:.3f}" in text
        assert f"{case['e_prefill']:.3f}" in text
    operations = {name: large["operations"] for name, large in figures["large"].items()}
    half, four = operations.values()
    assert 2048 * 4 * 0.49e9 < half < 2048 * 4 * 0.6e9  # 4 operations for each of Qwen2.5-0.5B's weights, and attention
    assert 2048 * 4 * 4.0e9 < four < 2048 * 4 * 4.6e9
    for large in figures["large"].values():
        assert large["host_share"] == pytest.approx(large["host"] * 1000e12 / large["operations"])


def test_floor_prints_nothing_above_the_peak(
    benchmark: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    floor, file = benchmark("floor"), tmp_path / "figures.json"
    options = ["--tiny", "--cases", "d", "--rounds", "1", "--peak-size", "64", "--peak", "1e-9", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["floor.py", *options])
    assert floor.exit_code(floor._main) == 2
    printed = capsys.readouterr()
    assert "% of the peak" in printed.err
    assert "TFLOP/s" not in printed.out
    assert not file.exists()


def test_host_time_is_the_time_outside_evaluation(benchmark: Callable[[str], ModuleType]) -> None:
    floor, kept = benchmark("floor"), mx.eval
    with floor.evaluation() as seconds:
        mx.eval(mx.random.normal((64, 64)) @ mx.random.normal((64, 64)))
        mx.synchronize()
    assert len(seconds) == 2
    assert seconds[0] > 0
    assert mx.eval is kept


# ---- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-0.5, 0, 1, 1.7, 2])
def test_exponent(benchmark: Callable[[str], ModuleType], power: float) -> None:
    exponent = benchmark("scaling").exponent
    sizes = [256, 512, 2048, 8192]
    figures = [3e-4 * size**power for size in sizes]
    assert exponent(sizes, figures) == pytest.approx(power, abs=1e-12)
    noisy = [figure * factor for figure, factor in zip(figures, (1.1, 0.8, 1.3, 0.9), strict=True)]
    assert exponent(sizes, noisy) == pytest.approx(np.polyfit(np.log(sizes), np.log(noisy), 1)[0])


def test_scaling(tmp_path: Path) -> None:
    sizes = {"tokens": [16, 32, 128], "vocabulary": [64, 4096], "layers": [1, 4], "rank": [2, 64], "rows": [1, 4]}
    options = [word for name, values in sizes.items() for word in (f"--{name}", *map(str, values))]
    text, figures = run("scaling.py", tmp_path, *options, "--hidden", "64", "--repeats", "1")
    assert figures["elsewhere"] == {"tokens": 16, "vocabulary": 64, "layers": 4, "rank": 2, "rows": 1}
    assert figures["sweeps"].keys() == sizes.keys()
    for name, sweep in figures["sweeps"].items():
        points = sweep["points"]
        assert [point[name] for point in points] == sizes[name]
        for point in points:
            same = figures["elsewhere"] | {name: point[name]}
            assert {key: point[key] for key in sizes} == same
            assert positive(point["seconds"], point["memory"])
        first, last = points[-2], points[-1]
        for figure, (_, of_last) in sweep["exponents"].items():
            slope = math.log(last[figure] / first[figure]) / math.log(last[name] / first[name])
            assert of_last == pytest.approx(slope)
            assert f"{of_last:.2f}" in text
        assert first["memory"] < last["memory"]
    shared = [
        point["memory"]
        for name, sweep in figures["sweeps"].items()
        for point in sweep["points"]
        if point[name] == figures["elsewhere"][name]
    ]
    assert len(shared) == 5
    assert max(shared) < 2 * min(shared)


# ---- techniques ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_techniques(tmp_path: Path, benchmark: Callable[[str], ModuleType]) -> None:
    text, figures = run("techniques.py", tmp_path, "--tiny", "--rounds", "1", "--updates", "2")
    assert [found["name"] for found in figures["techniques"]] == list(benchmark("techniques").TECHNIQUES)
    for found in figures["techniques"]:
        assert positive(*found["seconds_per_token"], *found["peak"])
        assert found["time"] == pytest.approx(found["seconds_per_token"][0] / found["seconds_per_token"][1])
        assert found["memory"] == pytest.approx(found["peak"][0] / found["peak"][1])
        assert f"{found['name']:40} {found['time']:7.2f} {found['memory']:7.2f}" in text


def test_the_ways_of_a_technique_differ(benchmark: Callable[[str], ModuleType]) -> None:
    """In what they compute: rows, positions, parts of the logits, blocks."""
    techniques = benchmark("techniques")
    ways = techniques.TECHNIQUES

    def both(name: str) -> list[Any]:
        return [techniques.Measured(way, True, "float32", 8) for way in ways[name]]

    def computed(measured: Any) -> int:
        return sum(batch.mask.size for update in measured.updates for batch in update)

    sides = both("rows of one length in a batch")
    assert sides[0].tokens == sides[1].tokens
    assert computed(sides[0]) < computed(sides[1])
    sides = both("logits at supervised positions only")
    assert all(batch.positions is not None for update in sides[0].updates for batch in update)
    assert all(batch.positions is None for update in sides[1].updates for batch in update)
    assert [side.step.output.at_once for side in both("logits in parts")] == [None, "for comparison"]
    sides = both("frozen prefix kept, top half adapted")
    assert [side.updates[0][0].kept is not None for side in sides] == [True, False]


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_choices(tmp_path: Path) -> None:
    options = ["--tiny", "--seeds", "2", "--runs", str(tmp_path / "runs"), "--choices", "learning rate 1e-2"]
    text, figures = run("choices.py", tmp_path, *options)
    *baselines, changed = figures["runs"]
    assert [(found["name"], found["seed"]) for found in baselines] == [("baseline", 0), ("baseline", 1)]
    for key in ("best", "end"):
        assert figures["baseline"][key] == pytest.approx(np.mean([found[key] for found in baselines]))
        assert f"{changed[key] / figures['baseline'][key]:.2f}" in text
    for found in figures["runs"]:
        steps, losses = zip(*found["held_out"], strict=True)
        assert (found["best"], found["end"]) == (min(losses), losses[-1])
        assert found["best_step"] == steps[losses.index(min(losses))]
        assert len(found["train"]) == steps[-1] == 12
    assert baselines[0]["end"] != baselines[1]["end"]
    assert changed["end"] < min(found["end"] for found in baselines)  # so few updates are too few for the lower rate
    assert changed["trainable"] == baselines[0]["trainable"]
    again, same = run("choices.py", tmp_path, *options)  # read, not trained anew
    assert (again, same) == (text, figures)


def test_a_choice_is_the_only_difference(tmp_path: Path, benchmark: Callable[[str], ModuleType]) -> None:
    choices = benchmark("choices")
    rows = [f'{{"text": "{number}"}}' for number in range(120)]
    common = choices.Setting(tmp_path, 30, rows[:96], rows[96:], 24)

    def options(choice: Any) -> dict[str, str]:
        """By name, the rows among them."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        config = config_file.parse(choices.config(choice, 0, common, folder))
        rows = {name: (folder / f"{name}.jsonl").read_text() for name in ("train", "held_out")}
        found = {name: value for name, (value, _) in page._options(config).items()}
        return {name: value for name, value in found.items() if str(folder) not in value} | rows

    base = options(choices.Choice())
    for name, choice in choices.CHOICES.items():
        found = options(choice)
        changed = {"train": choice.rows < 96, "held_out": choice.leak, "lora.layers": choice.last_half}
        expected = {*choice.options, *(option for option, changes in changed.items() if changes)}
        assert {option for option in base if found[option] != base[option]} == expected != set(), name


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vs_peft(tmp_path: Path) -> None:
    text, figures = run("vs_peft.py", tmp_path, "--tiny", "--cases", "b", "--rounds", "1", "--updates", "1")
    [case] = figures["cases"]
    assert positive(*case["seconds"].values())
    assert case["ratio"] == pytest.approx(case["seconds"]["ours"] / case["seconds"]["peft"])
    ours, theirs = case["losses"]["ours"], case["losses"]["peft"]
    assert len(ours) == len(theirs) == 4
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] < ours[0] - 0.01  # something is learned
    assert f"{ours[-1]:.6f}" in text
    assert case["memory"].keys() == ({"ours", "peft"} if sys.platform == "linux" else set())


@pytest.mark.slow
def test_vs_peft_prints_nothing_where_the_losses_differ(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    vs_peft, cases = benchmark("vs_peft"), benchmark("cases")
    monkeypatch.setattr(vs_peft, "AGREEMENT", 1e-12)
    with pytest.raises(InputError, match="did not do the same work"):
        vs_peft.measure_case(cases.tiny(cases.CASES["e"]), 1, 1)


def test_vs_peft_says_what_is_missing(benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    vs_peft = benchmark("vs_peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"the peer needs peft: pip install '\.\[test\]'"):
        vs_peft.measure([], 1, 1)


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b", "d", "e"])
def test_rows_hold_the_tokens_that_a_case_asks_for(
    benchmark: Callable[[str], ModuleType], tmp_path: Path, name: str
) -> None:
    cases = benchmark("cases")
    case = cases.tiny(cases.CASES[name])
    folder, (train, _) = cases.write_model(case, tmp_path / "model"), cases.write_rows(case, tmp_path)
    wanted, rows = cases.examples(case), data.read(train)
    lengths = [row.tokens.size for row in wanted]
    assert (len(lengths), min(lengths), max(lengths)) == (case.rows, case.shortest, case.longest)
    assert sum(row.supervised.sum() for row in wanted) / sum(lengths) == pytest.approx(case.supervised, abs=0.02)
    tokenizer = model.load_tokenizer(folder, {"eos_token_id": cases.END})
    for row, ours in zip(wanted, data.tokenize(rows, tokenizer, Data(train=str(train))).examples, strict=True):
        np.testing.assert_array_equal(ours.tokens, row.tokens)
        np.testing.assert_array_equal(ours.supervised[1:], row.supervised[1:])
    theirs = create_dataset([row.content for row in rows], tokenizer, SimpleNamespace(mask_prompt=case.supervised < 1))
    for place, row in enumerate(wanted):
        tokens, before = theirs.process(theirs[place])
        np.testing.assert_array_equal(tokens, row.tokens)
        assert before == len(tokens) - row.supervised.sum()


@pytest.mark.usefixtures("one_torch_thread")
def test_the_judge_of_held_out_rows(benchmark: Callable[[str], ModuleType]) -> None:
    cases, vs_mlx_lm = benchmark("cases"), benchmark("vs_mlx_lm")
    case = cases.tiny(cases.CASES["b"])
    network, rows = cases.build(case.shape), cases.examples(case)
    logits = [torch.tensor(np.array(network(mx.array(row.tokens[None, :-1]))[0]), dtype=torch.float64) for row in rows]
    targets = [torch.tensor(np.where(row.supervised, row.tokens, -100)[1:], dtype=torch.int64) for row in rows]
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    assert vs_mlx_lm._loss(network, rows) == pytest.approx(expected, rel=1e-7)
    assert vs_mlx_lm._loss(network, []) is None


@pytest.mark.slow
def test_vs_mlx_lm(tmp_path: Path, benchmark: Callable[[str], ModuleType]) -> None:
    text, figures = run("vs_mlx_lm.py", tmp_path, "--tiny", "--cases", "b", "c", "--repeats", "1", "--same-batches")
    cases = benchmark("cases")
    for name, result in figures["cases"].items():
        rows = cases.examples(cases.tiny(cases.CASES[name]))
        inputs, learned = (2 * sum(map(count, rows)) for count in (inputs_of, learned_of))
        for side, own in result["sides"].items():
            assert positive(*own.values())
            assert own["padding"] <= 1
            assert own["held_out"] < result["untrained"] - 0.01  # something is learned
            [repeat] = result["runs"][side]
            watched = repeat["watched"]
            assert (watched["inputs"], watched["supervised"]) == (inputs, learned)  # every row, in both epochs
            assert own["real"] == pytest.approx(inputs / 2 / own["steady"])
            assert own["padding"] == pytest.approx(inputs / watched["padded"])
            assert own["process"] * 2 > sum(watched["epoch_seconds"])
            assert f"{own['held_out']:.4f}" in text
        assert result["ratios"].keys() == result["sides"].keys() - {"mlx-lm"}
        for side, ratios in result["ratios"].items():
            quotients = {key: result["sides"][side][key] / result["sides"]["mlx-lm"][key] for key in ratios}
            assert ratios == pytest.approx(quotients)
            assert ratios["held_out"] == pytest.approx(1, abs=0.02)
            assert f"{ratios['real']:.3f}" in text
    # A single row is the same update on both sides, but for the padding token that mlx-lm learns after it.
    one_row = [own["held_out"] for own in figures["cases"]["c"]["sides"].values()]
    assert one_row == pytest.approx([one_row[0]] * 4, abs=2e-4)
    runs = figures["cases"]["b"]["runs"]
    sizes = {side: repeat["watched"]["sizes"] for side, [repeat] in runs.items()}
    assert sizes["ours, mlx-lm's batches"] == sizes["mlx-lm"] != sizes["ours"]
    assert len(sizes["mlx-lm"]) == 8
    weights = [repeat["watched"]["weights"] for [repeat] in runs.values()]
    assert 0 < max(weights) < 1.01 * min(weights)  # all read before what comes above them is measured
    assert figures["cases"]["c"]["runs"]["mlx-lm"][0]["watched"]["padding_targets"] == 2


def inputs_of(row: Example) -> int:
    return row.tokens.size - 1


def learned_of(row: Example) -> int:
    return int(row.supervised[1:].sum())
