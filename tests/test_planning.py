"""`train.plan: auto` chooses what fits, says so, and changes no result; what it may choose resumes exactly."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlx_lora import checkpoint, config_file, finetune, lora, planning
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import train_batches
from mlx_lora.config import Config
from mlx_lora.data import Example
from mlx_lora.errors import InputError

LARGE = 10**9


@pytest.fixture
def model() -> nn.Module:
    model = tiny.llama(num_hidden_layers=6, hidden_size=128, intermediate_size=512, vocab_size=200)
    model.freeze()
    lora.attach(model, config().lora)
    mx.eval(model.parameters())
    return model


def config(**train) -> Config:
    return config_file.parse(
        {
            "model": "tiny",
            "data": {"train": "rows"},
            "lora": {"rank": 4},
            "train": {"batch_size": 4, "gradient_accumulation_steps": 2, "plan": "auto", **train},
            "output_dir": "run",
        }
    )


def rows() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(1, 200, length).astype(np.int32), np.arange(length) >= length // 2, "rows")
        for length in random.integers(100, 400, 40)
    ]


def test_with_much_memory_nothing_is_changed(model):
    options, lines = planning.choose(config(), model, rows(), LARGE, compiled=False)
    assert options == config().train
    assert "chosen; train.batch_tokens=null, train.loss_chunk=null, train.gradient_checkpointing=selective" in lines[-1]


def test_with_less_memory_batches_get_smaller_and_then_blocks_are_recomputed(model):
    """The steps of what is chosen take no more than there is; what was tried before would have taken more."""
    before = {name: type(module) for name, module in model.named_modules()}
    sizes, levels = [], []
    for available in (LARGE, 80_000_000, 30_000_000):
        options, lines = planning.choose(config(), model, rows(), available, compiled=True)
        chosen = config().model_copy(update={"train": options})
        batch = train_batches(chosen, rows()).largest()
        assert planning.measured(options, model, batch, compiled=True).memory < available
        assert len(lines) == 2 or "too much" in lines[1]
        sizes.append(batch.mask.size)
        levels.append(["selective", "mlp", True].index(options.gradient_checkpointing))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert levels == sorted(levels)
    assert levels[-1] > 0
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_nothing_fits_into_no_memory(model):
    with pytest.raises(InputError, match=r"not even one row.*max_seq_length"):
        planning.choose(config(), model, rows(), 2_000_000, compiled=False)


def test_the_rows_of_an_update_stay_what_they_are(model):
    options, _ = planning.choose(config(), model, rows(), 100_000_000, compiled=False)
    plain = train_batches(config(), rows())
    planned = train_batches(config().model_copy(update={"train": options}), rows())
    assert planned.largest().mask.size < plain.largest().mask.size
    for one, two in zip(plain.steps(0, 10), planned.steps(0, 10), strict=True):
        assert {row for batch in one for row in batch.rows} == {row for batch in two for row in batch.rows}


def test_a_large_vocabulary_is_not_taken_for_long_rows(model):
    """Its logits come in chunks, however short the rows are that the estimate is made from."""
    model = tiny.llama(num_hidden_layers=2, vocab_size=50_000)
    model.freeze()
    lora.attach(model, config().lora)
    mx.eval(model.parameters())
    batch = train_batches(config(), rows()).largest()
    fixed, each = planning._line(config().train, model, batch, compiled=False)
    needed = planning.measured(config().train, model, batch, compiled=False).memory
    assert 0.5 * needed < fixed + each * batch.mask.size < 1.6 * needed


@pytest.mark.parametrize("width", [20, 60, 72, 100])
def test_short_rows_are_not_taken_for_large_ones(model, width):
    """What is there whatever a step holds is most of what they need, and must not be counted for each of them."""
    short = [Example(np.ones(width + 1, np.int32), np.arange(width + 1) > width // 2, "rows")] * 64
    many = config(batch_size=64)
    batch = train_batches(many, short).largest()
    assert batch.mask.shape[0] == 64
    fixed, each = planning._line(many.train, model, batch, compiled=True)
    for lines in (64, 16):
        part = train_batches(config(batch_size=lines), short).largest()
        needed = planning.measured(many.train, model, part, compiled=True).memory
        assert 0.5 * needed < fixed + each * lines * batch.mask.shape[1] < 1.6 * needed


def test_logits_that_exist_at_once_count_with_the_rows():
    model = tiny.llama(num_hidden_layers=2, vocab_size=20_000, tie_word_embeddings=False)
    model.lm_head = nn.Sequential(model.lm_head)
    model.freeze()
    lora.attach(model, config().lora)
    mx.eval(model.parameters())
    batch = train_batches(config(), rows()).largest()
    fixed, each = planning._line(config().train, model, batch, compiled=True)
    assert fixed < 0.3 * each * batch.mask.size


def test_what_a_plan_chooses_cannot_be_set_beside_it():
    with pytest.raises(InputError, match=r"train\.plan: auto chooses train\.loss_chunk itself"):
        config(loss_chunk=8)


# ---- whole runs ------------------------------------------------------------------------------------------------------

WAYS = {
    "plan": ["train.plan=auto"],
    "batch_tokens": ["train.batch_tokens=100", "train.loss_chunk=7"],
    "packing": ["data.packing=true", "train.gradient_checkpointing=mlp"],
    "kept prefix": ["lora.layers=last:1", "train.prefix_cache=disk"],
}


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "Number {n}", "completion": "{f"{n} is it, " * (1 + n % 5)}"}}\n' for n in range(30))
    )
    return {
        "model": str(tiny_model),
        "data": {"train": str(file), "valid": 0.2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"epochs": 3, "batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
        "checkpoint": {"every": 4, "keep": 9},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("way", list(WAYS))
def test_a_run_learns_the_same_in_every_way_and_resumes_exactly(options, way, tmp_path, capsys):
    if way == "kept prefix":
        options["lora"]["layers"] = "last:1"
    without = ["lora.dropout=0.0", "train.prefix_cache=never"]
    plain = finetune(options | {"output_dir": str(tmp_path / "plain")}, without)
    result = finetune(options, [*WAYS[way], "lora.dropout=0.0"])
    assert result.final_loss == pytest.approx(plain.final_loss, rel=1e-4)
    assert result.steps == plain.steps

    capsys.readouterr()
    whole = finetune(options | {"output_dir": str(tmp_path / "whole")}, WAYS[way])
    said = " ".join(capsys.readouterr().out.split())
    words = {
        "plan": "chosen; train.batch_tokens=",
        "batch_tokens": "padding efficiency",
        "packing": "padding efficiency",
        "kept prefix": "what they give is kept in a file",
    }
    assert words[way] in said
    cut = tmp_path / "cut"
    shutil.copytree(whole.output_dir, cut)
    for folder in checkpoint.complete(cut)[1:]:
        shutil.rmtree(folder)
    finetune(options | {"output_dir": str(cut)}, WAYS[way], resume=True)
    for name in (mlx_form.WEIGHTS, checkpoint.OPTIMIZER):
        ones, others = (mx.load(str(checkpoint.complete(run)[-1] / name)) for run in (whole.output_dir, cut))
        for key, array in ones.items():
            assert mx.array_equal(array, others[key]).item(), key


def test_a_run_says_that_its_adapted_head_needs_all_logits_at_once(options, capsys):
    finetune(options | {"lora": {"rank": 4, "target_modules": ["embed_tokens"]}}, ["train.epochs=1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "all logits of a batch are in memory at once: the output head is adapted" in said


def test_a_model_that_takes_no_packed_rows_is_named(options, tiny_model, tmp_path):
    """A Llama whose last block attends to a sliding window only."""
    folder = tmp_path / "sliding"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    blocks = settings["num_hidden_layers"]
    settings |= {"layer_types": ["full_attention"] * (blocks - 1) + ["sliding_attention"], "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"data\.packing: .*sliding takes no packed rows: .*sliding window"):
        finetune(options | {"model": str(folder)}, ["data.packing=true"])
