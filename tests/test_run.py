"""Whole runs on a tiny model: what they leave on disk, exact resume, signals, and other tools reading the result."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_lora import adapter_files, checkpoint, config, config_file, files, finetune, lora, metrics, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import train_batches
from mlx_lora.data import Example
from mlx_lora.errors import InputError
from mlx_lora.files import LOCK

ROOT = Path(__file__).parents[1]
COLOURS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]
THINGS = ["cat", "house", "car", "boat", "tree"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    chats = [
        [{"role": "user", "content": f"A {thing}, {colour}"}, {"role": "assistant", "content": f"{colour} {thing}"}]
        for colour in COLOURS
        for thing in THINGS
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture
def options(tiny_model, rows, tmp_path) -> dict:
    return {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"max_steps": 8, "epochs": None, "batch_size": 4, "gradient_accumulation_steps": 2}
        | {"learning_rate": 1e-2},
        "eval": {"every": 3},
        "checkpoint": {"every": 2},
        "log": {"every": 2},
        "output_dir": str(tmp_path / "run"),
    }


def write(options: dict, path: Path) -> Path:
    path.write_text(json.dumps(options))  # JSON is YAML
    return path


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(path)).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    """Adapter and optimizer of two checkpoints differ by exactly 0."""
    for name in (mlx_form.WEIGHTS, checkpoint.OPTIMIZER):
        ones, others = arrays(first / name), arrays(second / name)
        assert ones.keys() == others.keys()
        assert max(np.abs(ones[key].astype(np.float64) - others[key]).max() for key in ones) == 0


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / metrics.FILE).read_text().splitlines()]


def story(run: Path) -> list[tuple]:
    return [
        (event["event"], event["step"], event.get("loss"))
        for event in events(run)
        if event["event"] not in metrics.OF_PROCESS
    ]


def newest(run: Path) -> Path:
    return checkpoint.complete(run)[-1]


# ---- what a run does and leaves ----------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_the_folder_of_the_design(options, tmp_path):
    result = finetune(options)
    run = tmp_path / "run"
    names = [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "adapters.safetensors",
        "adapter_config.json",
        "checkpoints",
    ]
    assert sorted(path.name for path in run.iterdir()) == sorted([*names, LOCK])
    assert [path.name for path in checkpoint.complete(run)] == ["00000004", "00000006", "00000008"]
    assert (result.steps, result.output_dir) == (8, run)
    losses = [event["loss"] for event in events(run) if event["event"] == "eval"]
    assert [event["step"] for event in events(run) if event["event"] == "eval"] == [0, 3, 6, 8]
    assert losses[-1] < losses[0] - 0.1
    assert (result.final_loss, result.best_loss) == (losses[-1], min(losses))
    reports = [event for event in events(run) if event["event"] == "train"]
    assert [report["step"] for report in reports] == [2, 4, 6, 8]
    assert reports[-1]["tokens"] == result.tokens
    assert 0 < reports[-1]["supervised_tokens"] == result.supervised_tokens < result.tokens
    expected = [config_file.parse(options), config_file.load(run / "config.yaml")]
    assert expected[0] == expected[1]


def test_epochs_end_after_every_row_was_seen(options):
    changed = options | {"train": {"epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 3}}
    result = finetune(changed)
    assert result.epochs == 2
    used = int((Path(options["output_dir"]) / "config.yaml").read_text().split("train rows: ")[1].split(",")[0])
    assert used < 40
    assert result.steps == 2 * math.ceil(math.ceil(used / 4) / 3)


def test_the_best_adapter_is_kept_and_patience_ends_the_run(options):
    """A rate far too high: the loss goes up, so the best adapter is an early one."""
    changed = options | {"eval": {"every": 1, "early_stopping": 2}, "checkpoint": {"every": 1, "keep": 100}}
    changed["train"] = changed["train"] | {"learning_rate": 3.0, "max_steps": 30, "schedule": {"warmup": 0}}
    result = finetune(changed)
    run = Path(options["output_dir"])
    evaluations = {event["step"]: event["loss"] for event in events(run) if event["event"] == "eval"}
    best = min(evaluations, key=evaluations.get)
    assert (result.best_step, result.best_loss) == (best, evaluations[best])
    assert result.steps == best + 2 < 30
    if best > 0:
        kept = arrays(run / "checkpoints" / f"{best:08d}" / mlx_form.WEIGHTS)
    else:
        kept = arrays(run / mlx_form.WEIGHTS)
        assert all(not value.any() for name, value in kept.items() if name.endswith("lora_b"))
    for name, value in arrays(run / mlx_form.WEIGHTS).items():
        np.testing.assert_array_equal(value, kept[name])


def test_evaluating_and_reporting_more_often_changes_nothing_that_is_learned(options, tmp_path):
    finetune(options)
    often = options | {
        "eval": {"every": 1, "samples": ["A red cat"]},
        "log": {"every": 1},
        "checkpoint": {"every": 100},
        "output_dir": str(tmp_path / "often"),
    }
    finetune(often)
    assert_same_bits(newest(tmp_path / "run"), newest(tmp_path / "often"))
    samples = [event for event in events(tmp_path / "often") if event["event"] == "sample"]
    assert {event["prompt"] for event in samples} == {"A red cat"}
    assert len(samples) == 9


def test_samples_show_the_base_s_answer_beside_the_adapter_s(options, tiny_model, tmp_path):
    """Both against mlx-lm's own generation, also after a resume, which asks the base no more."""
    changed = options | {"eval": {"every": 4, "samples": ["A red cat"], "sample_tokens": 12}}
    finetune(changed)
    run = tmp_path / "run"
    shutil.rmtree(newest(run))
    whole = [event for event in events(run) if event["event"] == "sample"]
    finetune(changed, resume=True)
    samples = [event for event in events(run) if event["event"] == "sample"]
    assert [sample["step"] for sample in samples] == [0, 4, 8]
    assert [(one["base"], one["answer"]) for one in samples] == [(one["base"], one["answer"]) for one in whole]

    def answer(adapter: str | None) -> str:
        model, tokenizer = mlx_lm.load(str(tiny_model), adapter_path=adapter)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "A red cat"}], add_generation_prompt=True)
        return mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)

    assert {sample["base"] for sample in samples} == {answer(None)}
    assert samples[0]["answer"] == answer(None)
    assert samples[-1]["answer"] == answer(str(newest(run)))
    assert samples[-1]["answer"] != samples[0]["answer"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(options, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(options, [f"output_dir={tmp_path / name}", f"train.seed={seed}"])
    assert_same_bits(newest(tmp_path / "a"), newest(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same_bits(newest(tmp_path / "a"), newest(tmp_path / "c"))


def test_another_seed_orders_the_rows_otherwise(options):
    examples = [Example(np.arange(n, dtype=np.int32), np.arange(n) > 1, f"row {n}") for n in range(4, 44)]
    orders = []
    for seed in (1, 1, 2):
        batches = train_batches(config_file.parse(options, [f"train.seed={seed}"]), examples)
        orders.append([batch.rows for micro in batches.steps(0, 5) for batch in micro])
    assert orders[0] == orders[1] != orders[2]


def test_the_adapter_carries_its_story(options):
    finetune(options, ["notes={dataset: 'colours, v1'}"])
    run = Path(options["output_dir"])
    _, metadata = mx.load(str(run / mlx_form.WEIGHTS), return_metadata=True)
    assert metadata["notes.dataset"] == "colours, v1"
    assert float(metadata["valid_loss"]) == min(event["loss"] for event in events(run) if event["event"] == "eval")
    assert metadata["base_name"] == options["model"]
    assert len(metadata["base_digest"]) == len(metadata["train_rows"]) == 64
    assert 0 < float(metadata["learning_rate"]) <= 1e-2
    _, metadata = mx.load(str(newest(run) / mlx_form.WEIGHTS), return_metadata=True)
    assert metadata["step"] == "8"


def test_a_run_without_validation_keeps_the_last_adapter(options):
    result = finetune(options, ["data.valid=0"])
    run = Path(options["output_dir"])
    assert (result.best_loss, [event for event in events(run) if event["event"] == "eval"]) == (None, [])
    for name, value in arrays(run / mlx_form.WEIGHTS).items():
        np.testing.assert_array_equal(value, arrays(newest(run) / mlx_form.WEIGHTS)[name])


# ---- other tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"layers": "last:1"},
        {"layers": "0-0", "target_modules": ["q_proj", "*.mlp.down_proj"]},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": ["*.layers.0.self_attn.q_proj", "*.layers.1.self_attn.v_proj"]},
    ],
)
def test_mlx_lm_loads_the_run_folder_with_the_same_logits(options, choice):

    finetune(options | {"lora": options["lora"] | choice})
    prompt = mx.array([[1, 90, 198, 83, 35, 253, 56]])
    theirs, _ = mlx_lm.load(options["model"], adapter_path=options["output_dir"])
    base = model.load(config.Model(path=options["model"]))
    before = base.model(prompt)
    adapter = adapter_files.load(base.model, options["output_dir"])
    ours = base.model(prompt)
    assert np.abs(np.array(ours) - np.array(theirs(prompt))).max() < 1e-5
    assert np.abs(np.array(ours) - np.array(before)).max() > 0.01
    assert list(lora.layers(base.model)) == sorted(adapter.pairs)


def test_an_adapter_that_does_not_fit_is_refused(options, tmp_path):
    finetune(options)
    run = Path(options["output_dir"])
    weights = arrays(run / mlx_form.WEIGHTS)
    base = model.load(config.Model(path=options["model"]))
    name = next(iter(weights))
    for changed, words in (
        ({key: value for key, value in weights.items() if key != name}, "is missing"),
        (weights | {"model.norm.lora_a": weights[name]}, "is missing"),
        (weights | {name.replace("layers.0", "layers.7"): value for name, value in weights.items()}, "has no place"),
        (weights | {"model.norm.weight": weights[name]}, "is no array of a LoRA adapter"),
        (weights | {name: weights[name][:-1]}, "has shape"),
    ):
        mx.save_safetensors(str(run / mlx_form.WEIGHTS), {key: mx.array(value) for key, value in changed.items()})
        with pytest.raises(InputError, match=words):
            adapter_files.load(base.model, run)
        assert not lora.layers(base.model)


def test_commands_answer_and_score_with_the_run(options, run_command):
    finetune(options, ["train.max_steps=30"])
    run, prompt = options["output_dir"], "A boat, red"
    ours = run_command("generate", "--adapter", run, prompt, "--max-tokens", "8")
    assert ours.returncode == 0, ours.stderr
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", options["model"], "--adapter-path", run]
    command += ["--prompt", prompt, "--max-tokens", "8", "--temp", "0", "--verbose", "False"]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ours.stdout.strip() == theirs.stdout.strip()
    assert ours.stdout.strip()

    scored = run_command("evaluate", "--adapter", run, "--answers", "3")
    assert scored.returncode == 0, scored.stderr
    final = [event for event in events(Path(run)) if event["event"] == "eval"]
    best = min(event["loss"] for event in final)
    base, tuned = (line for line in scored.stdout.splitlines() if "perplexity" in line)
    assert f"loss {final[0]['loss']:.4f}" in base
    assert f"loss {best:.4f}" in tuned
    assert tuned.count("of 3 (") == 1


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Starts the training command as a process."""
    started = []

    def start(options: dict, *more: str) -> subprocess.Popen:
        path = write(options, tmp_path / "config.yaml")
        command = [sys.executable, "-m", "mlx_lora.train", "--config", str(path), *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_resume_after_kill_9_equals_the_uninterrupted_run_bit_for_bit(options, start, tmp_path):
    """Dropout, accumulation and a cosine schedule are on."""
    changed = options | {"train": options["train"] | {"max_steps": 24}}
    process = start(changed)
    wait_for(tmp_path / "run" / "checkpoints" / "00000006", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = int(newest(tmp_path / "run").name)
    assert 6 <= killed_at < 24
    resumed = start(changed, "--resume")
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert f"resuming {tmp_path / 'run'} at step" in output

    finetune(changed | {"output_dir": str(tmp_path / "whole")})
    assert_same_bits(newest(tmp_path / "run"), newest(tmp_path / "whole"))

    assert story(tmp_path / "run") == story(tmp_path / "whole")


def test_a_kill_between_a_checkpoint_and_its_note_leaves_no_gap_in_the_log(options, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    finetune(options | {"output_dir": str(whole)}, ["checkpoint.keep=9"])
    shutil.copytree(whole, run)
    for lost in checkpoint.complete(run)[2:]:
        shutil.rmtree(lost)
    lines = (run / metrics.FILE).read_text().splitlines(keepends=True)
    noted = [(event["event"], event["step"]) for event in events(run)].index(("saved", 4))
    (run / metrics.FILE).write_text("".join(lines[:noted]))
    finetune(options, ["checkpoint.keep=9"], resume=True)
    assert story(run) == story(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(options, start, tmp_path, number, code):
    changed = options | {"train": options["train"] | {"max_steps": 300}, "checkpoint": {"every": 1000}}
    process = start(changed)
    wait_for(tmp_path / "run" / metrics.FILE, process)
    while not any(event["event"] == "train" for event in events(tmp_path / "run")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "--resume" in errors
    assert "Traceback" not in errors
    step = int(newest(tmp_path / "run").name)
    assert f"step {step} of 300" in errors

    ended = start(changed, "--resume", "--set", "log.every=1")
    wait_for(newest(tmp_path / "run"), ended)
    while events(tmp_path / "run")[-1]["step"] <= step:
        assert ended.poll() is None
        time.sleep(0.01)
    ended.kill()


def test_resuming_a_finished_run_changes_nothing(options, capsys):
    first = finetune(options)
    run = Path(options["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    second = finetune(options, resume=True)
    assert first == second
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert "ended already" in capsys.readouterr().out


def test_resuming_without_a_checkpoint_starts_at_the_beginning(options):
    assert finetune(options, resume=True).steps == 8


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("lora.rank=8", "lora.rank: was 4, is 8"),
        ("train.schedule.name=linear", 'train.schedule.name: was "cosine", is "linear"'),
        ("train.max_steps=9", "train.max_steps: was 8, is 9"),
        ("train.seed=1", "train.seed: was 0, is 1"),
        ("data.loss_on=all", 'data.loss_on: was "assistant", is "all"'),
        ("model.dtype=bfloat16", 'model.dtype: was "auto", is "bfloat16"'),
    ],
)
def test_resuming_another_run_names_the_difference(options, override, difference):
    finetune(options)
    with pytest.raises(InputError) as caught:
        finetune(options, [override], resume=True)
    assert difference in str(caught.value)
    assert newest(Path(options["output_dir"])).name in str(caught.value)


def test_resuming_with_other_rows_or_another_model_names_the_difference(options, rows, tiny_model, tmp_path):
    mine = tmp_path / "mine.jsonl"
    shutil.copy(rows, mine)
    shutil.copytree(tiny_model, tmp_path / "model")
    changed = options | {"model": str(tmp_path / "model"), "data": {"train": str(mine), "valid": 0.2}}
    finetune(changed)
    mine.write_text(mine.read_text() + mine.read_text().splitlines()[0].replace("red", "purple") + "\n")
    with pytest.raises(InputError, match="train_rows: was"):
        finetune(changed, resume=True)
    shutil.copy(rows, mine)
    weights = mx.load(str(tmp_path / "model" / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"base: was"):
        finetune(changed, resume=True)


def test_options_that_change_no_number_may_change(options):
    finetune(options)
    assert finetune(options, ["log.every=1", "checkpoint.keep=1", "eval.every=1"], resume=True).steps == 8


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(options, capsys, tmp_path):
    finetune(options)
    run = Path(options["output_dir"])
    damaged = newest(run) / checkpoint.OPTIMIZER
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    finetune(options, resume=True)
    assert f"{newest(run)}: {checkpoint.OPTIMIZER} is damaged" in capsys.readouterr().out
    finetune(options | {"output_dir": str(tmp_path / "whole")})
    assert_same_bits(newest(run), newest(tmp_path / "whole"))


def test_a_resume_past_damaged_checkpoints_keeps_its_own(options, tmp_path, capsys):
    """The damaged ones have later steps: they must not push out what is saved now."""
    finetune(options, ["checkpoint.keep=9"])
    run = Path(options["output_dir"])
    for folder in checkpoint.complete(run)[-2:]:
        (folder / checkpoint.PROGRESS).write_text("{}")
    finetune(options, ["checkpoint.keep=1", "checkpoint.every=1"], resume=True)
    assert capsys.readouterr().out.count("passed over") == 2
    assert checkpoint.latest(run)[0].name == "00000008"
    finetune(options | {"output_dir": str(tmp_path / "whole")})
    assert_same_bits(checkpoint.latest(run)[0], newest(tmp_path / "whole"))


def test_a_resume_without_any_good_checkpoint_touches_nothing(options):
    finetune(options)
    run = Path(options["output_dir"])
    for folder in checkpoint.complete(run):
        (folder / checkpoint.PROGRESS).write_text("{}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}
    with pytest.raises(InputError, match="no checkpoint to go on from is left"):
        finetune(options, resume=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint to go on from is left"):
        finetune(options, resume=True)
    kept = {path: content for path, content in before.items() if "checkpoints" not in path.parts}
    assert all(path.read_bytes() == content for path, content in kept.items() if path.name != files.LOCK)


def test_the_best_adapter_is_that_of_the_steps_that_count(options, start, tmp_path):
    """Where a crash lost the steps in which the best adapter was found, the best of the kept steps takes its place."""
    run = tmp_path / "run"
    finetune(options, ["train.max_steps=200", "eval.every=5", "checkpoint.keep=100"])
    for lost in checkpoint.complete(run)[3:]:
        shutil.rmtree(lost)
    process = start(
        options | {"train": options["train"] | {"max_steps": 200}, "eval": {"every": 1000}, "log": {"every": 1}},
        "--resume",
    )
    while not 7 <= events(run)[-1]["step"] < 200:
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    assert process.wait() == 143
    progress, _ = checkpoint.read_progress(newest(run))
    _, metadata = mx.load(str(run / mlx_form.WEIGHTS), return_metadata=True)
    assert progress.best_step <= 6
    assert (int(metadata["step"]), float(metadata["valid_loss"])) == (progress.best_step, progress.best_loss)


def test_a_checkpoint_is_an_adapter_with_its_runs_base(options, run_command):
    finetune(options, ["model.quantize={bits: 8, group_size: 32}"])
    folder = newest(Path(options["output_dir"]))
    assert adapter_files.base_of(folder) == config.Model(
        path=options["model"], quantize=config.Quantize(bits=8, group_size=32)
    )
    scored = run_command("evaluate", "--adapter", folder, "--data", options["data"]["train"])
    assert scored.returncode == 0, scored.stderr
    assert "40 used" in scored.stdout


# ---- a start from another adapter -----------------------------------------------------------------------------------


def test_training_goes_on_from_an_adapter(options, tmp_path):
    """The first evaluation of the second run is the last of the first, and its zeroth step trains from there."""
    finetune(options, ["data.valid=0.2", "eval.every=100", "train.schedule.name=constant"])
    first = tmp_path / "run"
    result = finetune(options, [f"lora.start_from={newest(first)}", f"output_dir={tmp_path / 'more'}"])
    runs = (first, tmp_path / "more")
    losses = [[event["loss"] for event in events(run) if event["event"] == "eval"] for run in runs]
    assert losses[1][0] == losses[0][-1] != losses[0][0]
    assert result.best_loss < losses[0][-1]


def test_a_start_of_any_alpha_is_the_alpha_that_it_was_saved_with(options, tmp_path):
    odd = ["lora.rank=49", "lora.alpha=1.0", "train.max_steps=1"]
    finetune(options, odd)
    finetune(options, [*odd, f"lora.start_from={tmp_path / 'run'}", f"output_dir={tmp_path / 'more'}"])
    assert adapter_files.read(tmp_path / "more").uniform == (49, 1.0)


def test_a_resumed_run_needs_its_start_no_more(options, tmp_path):
    finetune(options, ["train.max_steps=1", f"output_dir={tmp_path / 'first'}"])
    more = [f"lora.start_from={tmp_path / 'first'}"]
    finetune(options, more)
    shutil.rmtree(checkpoint.complete(tmp_path / "run")[-1])
    shutil.rmtree(tmp_path / "first")
    assert finetune(options, more, resume=True).steps == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rank=8", "set lora.rank to 4 and lora.alpha to 8"),
        ("lora.alpha=9.0", "set lora.rank to 4 and lora.alpha to 8"),
        ("lora.target_modules=q_proj", r"adapts .* set lora.target_modules to \[down_proj, gate_proj"),
        ("lora.layers=last:1", r"lora.layers to \[0, 1\]"),
    ],
)
def test_a_start_that_does_not_fit_says_what_to_set(options, tmp_path, override, words):
    finetune(options, ["train.max_steps=1"])
    more = [f"lora.start_from={tmp_path / 'run'}", f"output_dir={tmp_path / 'more'}", override]
    with pytest.raises(InputError, match=words):
        finetune(options, more)
    assert not (tmp_path / "more").exists()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_a_run_is_never_written_over(options):
    finetune(options)
    before = {path: path.read_bytes() for path in Path(options["output_dir"]).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        finetune(options)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("resume", [False, True])
def test_another_tools_adapter_is_never_written_over(options, resume):
    """Such as mlx-lm's, in a folder that has no config.yaml of ours."""
    folder = Path(options["output_dir"])
    folder.mkdir(parents=True)
    (folder / "adapters.safetensors").write_bytes(b"theirs")
    with pytest.raises(InputError, match="holds an adapter that is no run of ours"):
        finetune(options, resume=resume)
    assert (folder / "adapters.safetensors").read_bytes() == b"theirs"


def test_bad_input_is_one_message_and_exit_code_2(options, tmp_path, run_command):
    faulty = write(options | {"lorra": {}}, tmp_path / "faulty.yaml")
    for arguments in (["--config", faulty], ["--config", tmp_path / "none.yaml"], []):
        ended = run_command("train", *arguments)
        assert ended.returncode == 2
        assert ended.stderr
        assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "hi"], "give --adapter"),
        (["generate", "--model", "", "hi"], "give --adapter"),
        (["generate", "--adapter", "{tmp}", "hi"], "holds no adapter"),
        (["generate", "--adapter", "{tmp}", "--dtype", "float32", "hi"], "go with --model"),
        (["generate", "--model", "{model}", "--raw", "--system", "x", "hi"], "--raw prompt"),
        (["generate", "--model", "{model}", b"a\xff"], "not valid Unicode"),
        (["generate", "--model", "{model}", "--raw", ""], "the prompt is empty"),
        (["generate", "--model", "{tmp}", "hi"], "no model folder"),
        (["generate", "--model", "{model}", "--seed", str(2**64), "hi"], "is not between"),
        (["generate", "--model", "{model}", "--top-p", "5", "hi"], "is not between"),
        (["evaluate", "--adapter", "{tmp}"], "config.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_one_message(arguments, words, tiny_model, tmp_path, run_command):
    filled = [
        part if isinstance(part, bytes) else part.format(tmp=tmp_path, model=tiny_model) for part in arguments[1:]
    ]
    command = [sys.executable, "-m", f"mlx_lora.{arguments[0]}", *filled]
    ended = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr


def test_a_reader_that_goes_away_does_not_end_a_run(options, tmp_path):
    path = write(options, tmp_path / "config.yaml")
    command = f"{sys.executable} -m mlx_lora.train --config {path} | head -n 1"
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=True, cwd=ROOT)
    assert newest(tmp_path / "run").name == "00000008"


@pytest.mark.parametrize(
    "override",
    [
        "lora.layers=last:99999999999",
        "lora.layers=0-9999999999",
        'data.train="a\\0b"',
        f"output_dir={'x' * 300}",
        f"model.path={'x' * 300}",
        "model.path=~nosuchuser/x",
        "lora.rank=100000000000",
    ],
)
def test_absurd_values_are_refused(options, override, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError):
        finetune(options, [override])


@pytest.mark.parametrize(
    "change",
    [
        {"rank": True},
        {"rank": 10**30},
        {"rank": "4"},
        {"scale": float("nan")},
        {"scale": True},
        {"dropout": "x"},
    ],
)
def test_adapter_settings_of_the_wrong_kind_are_refused(change, tmp_path, tiny_model):
    good = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (tmp_path / mlx_form.SETTINGS).write_text(json.dumps({"num_layers": 2, "lora_parameters": good | change}))
    with pytest.raises(InputError, match=r"adapter_config.json: (rank|scale|dropout) is"):
        adapter_files.read(tmp_path)


def test_an_output_folder_that_cannot_be_made_is_named(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .* cannot be written"):
        finetune(options | {"output_dir": str(tmp_path / "file" / "run")})


def test_a_dry_run_shows_the_plan_and_writes_nothing(options, tmp_path, run_command):
    ended = run_command("train", "--config", write(options, tmp_path / "c.yaml"), "--dry-run", "--set", "lora.rank=2")
    assert ended.returncode == 0, ended.stderr
    for words in ("rank: 2", "q_proj", "2 x 32 -> 32", "learning rate (cosine, 1 steps of warmup)", "steps: 8"):
        assert words in ended.stdout
    per_block = 2 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32 + 3 * (32 + 64))
    assert f"{2 * per_block:,} of" in ended.stdout
    assert not (tmp_path / "run").exists()


def test_a_folder_with_checkpoints_is_refused(options):
    manifest = Path(options["output_dir"]) / "checkpoints" / "00000003" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(b"{}")
    with pytest.raises(InputError, match="already holds a run"):
        finetune(options)


def test_a_full_disk_is_one_message_and_what_was_saved_stays(options, tmp_path, run_command):
    """On a real file system of 150 KiB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        changed = options | {"output_dir": str(disk / "run"), "checkpoint": {"every": 1, "keep": 100}}
        ended = run_command("train", "--config", write(changed, tmp_path / "config.yaml"))
        assert ended.returncode == 2
        assert "cannot be written" in ended.stderr
        assert "Traceback" not in ended.stderr
        saved, complaints = checkpoint.latest(disk / "run")
        assert saved is not None
        assert not complaints
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert finetune(changed, resume=True).steps == 8
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_rate_that_breaks_the_adapter_ends_the_run(options, tmp_path):
    with pytest.raises(InputError, match="not finite"):
        finetune(
            options, ["train.learning_rate=1e38", "train.max_grad_norm=null", "train.max_steps=40", "data.valid=0"]
        )
    saved = arrays(newest(tmp_path / "run") / mlx_form.WEIGHTS)
    assert all(np.isfinite(value).all() for value in saved.values())


def test_updates_that_are_not_finite_are_left_out_named_and_end_the_run(options, tmp_path):
    shutil.copytree(options["model"], tmp_path / "broken")
    weights = mx.load(str(tmp_path / "broken" / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"] * float("nan")
    mx.save_safetensors(str(tmp_path / "broken" / "model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(InputError, match="10 updates in a row were not finite"):
        finetune(options | {"model": str(tmp_path / "broken")}, ["train.max_steps=20", "data.valid=0"])
    skipped = [event for event in events(tmp_path / "run") if event["event"] == "skipped"]
    assert len(skipped) == 10
    assert all(str(options["data"]["train"]) in place for event in skipped for place in event["rows"])
    saved = arrays(newest(tmp_path / "run") / mlx_form.WEIGHTS)
    assert all(np.isfinite(value).all() for value in saved.values())
