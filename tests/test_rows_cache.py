"""Tokenized rows on the disk: the same rows and batches as without, whatever changes tokenized anew, nothing half."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_lora import data, files, finetune
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import train_batches, valid_batches
from mlx_lora.config import Config, Source
from mlx_lora.data import cache
from mlx_lora.errors import InputError
from mlx_lora.model import load_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"Number {n}"}, {"role": "assistant", "content": "x" * (n % 37)}]}
    for n in range(300)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, for rows of any number."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    return tmp_path / "cache" / "rows"


@pytest.fixture
def byte_tokenizer(tiny_model):
    return load_tokenizer(tiny_model, {"eos_token_id": 2})


@pytest.fixture
def options(tmp_path, tiny_model):
    """A config of 300 rows, with changes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def options(**changes) -> Config:
        source = {"train": str(tmp_path / "rows.jsonl"), "valid": 0.1, "max_seq_length": 60}
        train = {"batch_size": 4, "max_steps": 6, "epochs": None, "gradient_accumulation_steps": 2}
        chosen = {"model": str(tiny_model), "data": source | changes, "train": train, "log": {"every": 1}}
        return Config.model_validate(chosen | {"output_dir": str(tmp_path / "run")})

    return options


def contents(dataset) -> list:
    return [(e.tokens.tolist(), e.supervised.tolist(), e.place, e.ends) for e in dataset.examples]


def of_batches(batches) -> list:
    return [
        [(b.inputs.tolist(), b.targets.tolist(), b.mask.tolist(), b.rows, b.positions) for b in step]
        for step in batches
    ]


@pytest.mark.parametrize("weights", [None, [0.5, 2.5]])
def test_training_meets_the_same_batches_as_without(options, byte_tokenizer, monkeypatch, tmp_path, folder, weights):
    config = options()
    if weights:
        (tmp_path / "more.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("Number", "Figure"))
        names = zip(("rows", "more"), weights, strict=True)
        config = options(train=[{"path": f"{tmp_path}/{name}.jsonl", "weight": weight} for name, weight in names])
    monkeypatch.setattr(cache, "SMALL", 10**9)
    without = data.load(config.data, byte_tokenizer)
    assert not folder.exists()
    monkeypatch.setattr(cache, "SMALL", 0)
    for _ in ("made", "found"):
        cached = data.load(config.data, byte_tokenizer)
        assert len(list(folder.iterdir())) == 1
        assert isinstance(cached[0].rows.arrays["tokens.bin"], np.memmap)
        for ours, theirs in zip(cached, without, strict=True):
            assert contents(ours) == contents(theirs)
            assert ours.digest == theirs.digest
            assert ours.account("rows") == theirs.account("rows")
        ours, theirs = (train_batches(config, side[0].examples) for side in (cached, without))
        steps = 2 * ours.steps_per_epoch
        assert repr(of_batches(ours.steps(0, steps))) == repr(of_batches(theirs.steps(0, steps)))
        held_out = ([list(valid_batches(config, side[1].examples).in_order())] for side in (cached, without))
        assert repr(of_batches(next(held_out))) == repr(of_batches(next(held_out)))


def test_a_run_ends_in_the_same_bits_as_without(options, monkeypatch, tmp_path, folder):
    ends = []
    for size in (10**9, 0, 0):
        monkeypatch.setattr(cache, "SMALL", size)
        finetune(options())
        ends.append(
            {name: np.array(array) for name, array in mx.load(str(tmp_path / "run" / mlx_form.WEIGHTS)).items()}
        )
        shutil.rmtree(tmp_path / "run")
    assert len(list(folder.iterdir())) == 1
    assert all(array.any() for array in ends[0].values())
    for end in ends[1:]:
        tiny.assert_identical(end, ends[0])


def test_rows_are_tokenized_once_for_the_same_content(options, byte_tokenizer, folder, tmp_path):
    first = data.load(options().data, byte_tokenizer)[0]
    (kept,) = folder.iterdir()
    written = (kept / "tokens.bin").stat().st_mtime_ns
    moved = tmp_path / "elsewhere.jsonl"
    shutil.move(tmp_path / "rows.jsonl", moved)
    for changes in ({}, {"valid": 0.3}, {"valid": 0, "train": [Source(path=str(moved), weight=3)]}, {"packing": True}):
        again = data.load(options().data.model_copy(update={"train": str(moved)} | changes), byte_tokenizer)[0]
        assert again.examples[0].place.startswith(f"{moved}:")
    assert list(folder.iterdir()) == [kept]
    assert (kept / "tokens.bin").stat().st_mtime_ns == written
    assert first.examples[0].place.startswith(f"{tmp_path}/rows.jsonl:")


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 59},
        {"loss_on": "all"},
        {"on_overflow": "drop"},
        {"columns": {"messages": "messages"}},
        {"reasoning": "drop"},
        {"format": "messages"},
        "a byte",
        "the template",
        "what ends a turn",
    ],
    ids=str,
)
def test_whatever_changes_the_tokens_makes_them_anew(options, byte_tokenizer, folder, tmp_path, change):
    data.load(options().data, byte_tokenizer)
    if change == "a byte":
        path = tmp_path / "rows.jsonl"
        path.write_text(path.read_text().replace("Number 7", "Number 8", 1))
    elif change == "the template":
        byte_tokenizer.chat_template = byte_tokenizer.chat_template.replace("\n", "\n\n")
    elif change == "what ends a turn":
        byte_tokenizer.eos_token_ids = {0, 2}
    data.load(options(**change if isinstance(change, dict) else {}).data, byte_tokenizer)
    assert len(list(folder.iterdir())) == 2


def test_faulty_rows_are_refused_each_time_with_their_places(options, byte_tokenizer, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + '{"text": 1}\n{\n')
    said = []
    for _ in ("made", "found"):
        with pytest.raises(
            InputError, match=r"rows.jsonl:301: holds text(.|\n)*rows.jsonl:302: is not valid JSON"
        ) as it:
            data.load(options().data, byte_tokenizer)
        said.append(str(it.value))
    assert said[0] == said[1]


def test_a_process_that_dies_leaves_nothing_that_is_taken_for_the_whole(options, byte_tokenizer, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() * 200)
    code = (
        "import sys, mlx_lora; from mlx_lora import data; from mlx_lora.config import Data;"
        "from mlx_lora.data import cache;"
        "from mlx_lora.model import load_tokenizer; from pathlib import Path; cache.SMALL = 0;"
        "data.load(Data(train=sys.argv[1]), load_tokenizer(Path(sys.argv[2]), {'eos_token_id': 2}))"
    )
    died = subprocess.Popen([sys.executable, "-c", code, str(path), options().model.path])
    while not list(folder.glob(f"{files.TEMPORARY}*/tokens.bin")) and died.poll() is None:
        time.sleep(0.01)
    died.send_signal(signal.SIGKILL)
    assert died.wait() == -signal.SIGKILL
    (left,) = folder.iterdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data.load(options().data, byte_tokenizer)
    assert len(list(folder.iterdir())) == 2
    long_ago = time.time() - 2 * 86400
    os.utime(left, (long_ago, long_ago))
    data.load(options(loss_on="all").data, byte_tokenizer)
    assert not left.exists()


def test_old_rows_are_forgotten_and_used_ones_are_not(options, byte_tokenizer, folder):
    for loss_on in ("assistant", "all", "last"):
        data.load(options(loss_on=loss_on).data, byte_tokenizer)
        for kept in folder.iterdir():
            if kept.stat().st_mtime > time.time() - 86400:
                then = time.time() - (40 if loss_on == "assistant" else 20) * 86400
                os.utime(kept, (then, then))
    assert len(list(folder.iterdir())) == 2


def truncate(folder):
    os.truncate(folder / "tokens.bin", 100)


def unlearn(folder):
    (folder / "supervised.bin").write_bytes(bytes((folder / "supervised.bin").stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        unlearn,
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: os.truncate(folder / "manifest.json", 30),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "records.bin").unlink(),
    ],
)
def test_what_is_damaged_is_made_again(options, byte_tokenizer, folder, damage):
    before = contents(data.load(options().data, byte_tokenizer)[0])
    (kept,) = folder.iterdir()
    damage(kept)
    assert contents(data.load(options().data, byte_tokenizer)[0]) == before
    assert list(folder.iterdir()) == [kept]


def test_the_same_files_under_other_names_of_sources(options, byte_tokenizer, tmp_path):
    """A folder, or its files with weights, whichever is read first."""
    (tmp_path / "both").mkdir()
    paths = [tmp_path / "both" / name for name in ("a.jsonl", "b.jsonl")]
    for path, rows in zip(paths, (ROWS[:5], ROWS[5:10]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = [Source(path=str(paths[0])), Source(path=str(paths[1]), weight=3.0)]
    together = [Source(path=str(tmp_path / "both"), weight=2.0)]
    for order in ((apart, together), (together, apart)):
        sizes = {
            id(train): len(data.load(options(train=train, valid=0.0).data, byte_tokenizer)[0].order) for train in order
        }
        assert sizes == {id(apart): 5 - 1 + 15, id(together): 2 * (10 - 1)}
        for kept in files.cache_folder("rows").iterdir():
            shutil.rmtree(kept)


def test_a_cache_that_cannot_be_written_is_named(options, byte_tokenizer, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be kept there .*; set MLX_LORA_CACHE"):
        data.load(options().data, byte_tokenizer)
