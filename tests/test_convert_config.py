"""Configs of other tools: what they become here, checked against these tools where they are at hand."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import tiny
import yaml
from fuzz import Fuzzer
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers

from mlx_lora import config, config_file, config_forms, convert_config, data, finetune
from mlx_lora.config import Config, Lora, Train
from mlx_lora.config_forms import hugging_face
from mlx_lora.config_forms import mlx_lm as mlx_lm_form
from mlx_lora.errors import InputError
from mlx_lora.lora.targets import select
from mlx_lora.optim import learning_rate

# mlx-lm's examples/lora_config.yaml, without its comments.
MLX_LM = """
model: "mlx_model"
train: true
fine_tune_type: lora
training_mode: normal
optimizer: adamw
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""
SCHEDULE = """
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""
# axolotl's examples/mistral/qlora.yml and examples/llama-3/lora-1b.yml of July 2026, without their comments.
AXOLOTL_QLORA = """
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 8192
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
"""
AXOLOTL_LORA = """
base_model: NousResearch/Llama-3.2-1B
datasets: [{path: teknium/GPT4-LLM-Cleaned, type: alpaca}]
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
"""
# The arguments of Unsloth's notebooks, as keywords of from_pretrained, get_peft_model and SFTConfig.
UNSLOTH = {
    "model_name": "unsloth/llama-3-8b-bnb-4bit",
    "max_seq_length": 2048,
    "dtype": None,
    "load_in_4bit": True,
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 16,
    "lora_dropout": 0,
    "bias": "none",
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "use_rslora": False,
    "loftq_config": None,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_steps": 60,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "output_dir": "outputs",
    "report_to": "none",
}
# `unsloth train --config`, in its groups, and `trl sft --config`, flat.
UNSLOTH_TRAIN = """
model: unsloth/Qwen3-4B
data: {local_dataset: [rows.jsonl], format_type: chatml}
training: {training_type: lora, max_steps: 0, num_epochs: 2, train_on_completions: true}
lora: {use_rslora: true, target_modules: "q_proj,v_proj"}
logging: {enable_wandb: true}
"""
TRL = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: <|im_end|>
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
assistant_only_loss: true
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
max_grad_norm: 0
"""


@pytest.fixture
def convert(tmp_path):
    """The config that a file becomes, as it is loaded, and its text."""

    def convert(content: str | dict[str, Any], name: str = "") -> tuple[Config, str]:
        name = name or ("theirs.yaml" if isinstance(content, str) else "theirs.json")
        path, ours = tmp_path / name, tmp_path / "ours.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent="\t"))
        raw, where = config_file.read(path)
        text = convert_config._text(config_forms.translate(str(path), raw, where, None))
        ours.write_text(text)
        return config_file.load(ours), text

    return convert


def refusal(convert, content: str | dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        convert(content)
    return str(caught.value)


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------


def test_mlx_lms_example(convert):
    ours, text = convert(MLX_LM)
    assert (ours.model.path, ours.data.train) == ("mlx_model", "/path/to/training/data/train.jsonl")
    assert ours.data.valid == "/path/to/training/data/valid.jsonl"
    assert (ours.lora.rank, ours.lora.alpha / ours.lora.rank, ours.lora.layers) == (8, 20.0, "last:16")
    assert (ours.train.epochs, ours.train.max_steps, ours.train.batch_size) == (None, 1000, 4)
    assert ours.train.schedule == config.Schedule(name="constant", warmup=0, min_lr=0)
    assert (ours.train.optimizer.name, ours.train.max_grad_norm, ours.data.loss_on) == ("adamw", None, "all")
    assert (ours.eval.every, ours.checkpoint.every, ours.log.every) == (200, 100, 10)
    assert ours.output_dir == "adapters"
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any("val_batches: 25" in line for line in head)
    assert any("test_batches: 100" in line for line in head)
    assert not any("resume_adapter_file" in line for line in head)


def test_mlx_lms_defaults_are_its_own():
    theirs = mlx_lm_lora.CONFIG_DEFAULTS
    assert {name: theirs[name] for name in mlx_lm_form.DEFAULTS} == mlx_lm_form.DEFAULTS
    assert theirs.keys() >= mlx_lm_form.SIGNS


def test_every_option_of_mlx_lm_is_known(convert):
    """None of them is listed as if it had no meaning here, but those that have none."""
    _, text = convert({**mlx_lm_lora.CONFIG_DEFAULTS, "data": "rows", "report_to": "wandb"})
    listed = {line.split(":")[0].removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")}
    assert listed <= {"val_batches", "test_batches"}
    assert "report_to: [wandb]" in text


def test_an_iteration_of_mlx_lm_is_a_micro_batch(convert):
    ours, _ = convert(MLX_LM + "grad_accumulation_steps: 3\n")
    assert (ours.train.max_steps, ours.train.gradient_accumulation_steps) == (333, 3)  # the last batch makes no update
    assert (ours.eval.every, ours.checkpoint.every, ours.log.every) == (66, 33, 3)
    assert "no update" in refusal(convert, MLX_LM.replace("iters: 1000", "iters: 2") + "grad_accumulation_steps: 3\n")


@pytest.mark.parametrize("schedule", ["cosine_decay", "linear_schedule"])
def test_rates_are_mlx_lms(convert, schedule):
    """Within 2 % of the peak: mlx-lm's warmup starts a step earlier."""
    theirs = yaml.safe_load(SCHEDULE.replace("1e-", "1.0e-"))
    theirs["lr_schedule"]["name"] = schedule
    theirs["lr_schedule"]["arguments"] = [1e-5, 900, 1e-7] if schedule == "cosine_decay" else [1e-5, 1e-7, 900]
    ours, _ = convert(MLX_LM + yaml.dump(theirs))
    rate = build_schedule(theirs["lr_schedule"])
    for step in (0, 50, 100, 101, 500, 999):
        assert learning_rate(ours.train, step, 1000) == pytest.approx(rate(mx.array(step)).item(), abs=2e-7)


def test_a_schedule_of_another_length_is_said(convert):
    _, text = convert(MLX_LM + SCHEDULE)
    assert "at its lowest after 1100 updates there, at the run's end (1000) here" in text
    assert "warmup_init: 1e-07" not in text  # equal to where ours starts
    assert "constant in its place" in convert(MLX_LM + "lr_schedule: {name: step_decay, arguments: [1e-4, 0.9, 10]}")[1]


@pytest.mark.parametrize(
    ("keys", "layers"),
    [(["self_attn.q_proj", "mlp.down_proj"], 1), (None, 2), (None, -1), (["self_attn.v_proj", "lm_head"], 1)],
)
def test_adapted_modules_are_mlx_lms(convert, keys, layers):
    theirs = {"num_layers": layers, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    if keys:
        theirs["lora_parameters"]["keys"] = keys
    ours, _ = convert({**mlx_lm_lora.CONFIG_DEFAULTS, "data": "rows", **theirs})
    model = tiny.llama(tie_word_embeddings=False)
    chosen = select(model, ours.lora.target_modules, ours.lora.layers)
    linear_to_lora_layers(model, layers, theirs["lora_parameters"])
    assert set(chosen) == {path.removesuffix(".lora_a") for path in tiny.copies(model) if path.endswith(".lora_a")}


@pytest.mark.parametrize(
    ("rows", "masked", "loss_on"),
    [
        ('{"messages": []}', True, "last"),
        ('{"prompt": "", "completion": ""}', True, "completion"),
        ('{"prompt": "", "completion": ""}', False, "all"),
    ],
)
def test_mask_prompt_depends_on_the_rows(convert, tmp_path, rows, masked, loss_on):
    (tmp_path / "train.jsonl").write_text(rows + "\n")
    ours, text = convert({"iters": 10, "mask_prompt": masked, "data": str(tmp_path)})
    assert (ours.data.loss_on, ours.data.valid) == (loss_on, 0)
    assert "there is no" in text


QUESTIONS = [{"question": f"Say {letter}.", "answer": letter, "text": "x"} for letter in "abcd"]
TALKS = [
    {"talk": [{"role": "user", "content": f"Say {letter}."}, {"role": "assistant", "content": letter}]}
    for letter in "abcd"
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "features"),
    [
        (QUESTIONS, {"prompt_feature": "question", "completion_feature": "answer"}),
        (QUESTIONS, {"prompt_feature": "question", "completion_feature": "answer", "chat_feature": "talk"}),
        (QUESTIONS, {"text_feature": "question"}),
        (TALKS, {"chat_feature": "talk"}),
        (TALKS, {"prompt_feature": "question", "completion_feature": "answer", "chat_feature": "talk"}),
        ([row | {"prompt": "a", "completion": "b"} for row in TALKS], {}),
    ],
)
def test_rows_are_read_as_mlx_lm_reads_them(convert, tiny_model, tmp_path, rows, features, masked):
    """Tokens and which of them are learned, of a folder's rows and of the same as `hf_dataset`."""
    if masked and "text_feature" in features:
        pytest.skip("mlx-lm masks no texts")
    halves = [tmp_path / "train.jsonl", tmp_path / "more.jsonl"]
    for half, part in zip(halves, (rows[:2], rows[2:]), strict=True):
        half.write_text("".join(json.dumps(row) + "\n" for row in part))
    theirs = {"model": str(tiny_model), "train": True, "iters": 1, "mask_prompt": masked, "data": str(tmp_path)}
    _assert_same_rows(convert, theirs | features, 2)
    sets = [
        {"path": "json", "train_split": "train", "config": {"data_files": str(half), "cache_dir": str(tmp_path / "hf")}}
        for half in halves
    ]
    if len(features) in (1, 2):  # else nothing tells which of them the rows have, where none is at hand
        _assert_same_rows(convert, theirs | {"hf_dataset": [one | features for one in sets]}, 4)


def _assert_same_rows(convert: Any, theirs: dict[str, Any], number: int) -> None:
    ours, _ = convert(theirs)
    tokenizer = mlx_lm.utils.load_tokenizer(Path(theirs["model"]))
    examples = data.load(ours.data.model_copy(update={"valid": 0.0}), tokenizer)[0].examples
    expected = load_dataset(SimpleNamespace(**mlx_lm_lora.CONFIG_DEFAULTS | theirs), tokenizer)[0]
    assert len(examples) == len(expected) == number
    for example, row in zip(examples, (expected.process(expected[index]) for index in range(number)), strict=True):
        assert example.tokens.tolist() == row[0]
        end = len(row[0]) - (2 if theirs["mask_prompt"] else 1)  # we learn no newline after the end of the turn
        assert example.supervised.tolist()[: end + 1] == [place >= row[1] for place in range(end + 1)]


def test_data_sets_of_the_hub_keep_their_splits(convert):
    one = {"path": "billsum", "prompt_feature": "text", "completion_feature": "summary", "test_split": "test[:9]"}
    ours, text = convert({"iters": 9, "mask_prompt": True, "hf_dataset": one | {"config": {"name": "en"}}})
    assert (ours.data.train, ours.data.valid) == ("hub:billsum@en:train[:80%]", "hub:billsum@en:train[-10%:]")
    assert ours.data.columns == {"prompt": "text", "completion": "summary"}
    assert (ours.data.format, ours.data.loss_on) == ("completion", "completion")
    assert "Without a counterpart" not in text
    other = {"path": "a/b", "train_split": "train", "chat_feature": "talk", "config": {"revision": "v1"}}
    ours, text = convert({"iters": 9, "mask_prompt": True, "hf_dataset": [one, other]})
    assert ours.data.train == ["hub:billsum:train[:80%]", "hub:a/b:train"]
    assert (ours.data.columns, ours.data.format, ours.data.loss_on) == ({}, "auto", "assistant")
    for said in ("columns that differ", "revision: v1", "of the first alone"):
        assert said in text


def test_mlx_lm_reports_to_wandb(convert):
    ours, text = convert({"iters": 9, "report_to": "WandB, swanlab", "project_name": "mine", "num_layers": 4})
    assert ours.log.report_to == ["wandb"]
    assert "with WANDB_PROJECT=mine in the environment" in text
    assert "report_to: swanlab" in text
    assert "project_name" not in text


def test_a_trained_adapter_tells_its_options(convert):
    """The adapter_config.json that mlx-lm leaves beside an adapter is a config too."""
    ours, _ = convert({**mlx_lm_lora.CONFIG_DEFAULTS, "train": True, "data": "rows"}, "adapter_config.json")
    assert (ours.lora.rank, ours.lora.alpha) == (8, 160.0)


TEXTS = [{"text": f"{letter} " * 100} for letter in "abcd"]
ANSWERS = [{"prompt": f"Say {letter}.", "completion": f"{letter} " * 100} for letter in "abcd"]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (
            TEXTS,
            {"optimizer": "adam", "optimizer_config": {"adam": {"bias_correction": True, "betas": [0.8, 0.9]}}}
            | {"grad_accumulation_steps": 2, "iters": 12, "num_layers": 1}
            | {"lr_schedule": {"name": "cosine_decay", "arguments": [0.01, 6, 0.001]}},
        ),
        (
            ANSWERS,
            {"optimizer": "sgd", "optimizer_config": {"sgd": {"momentum": 0.5, "weight_decay": 0.1}}, "iters": 6}
            | {"batch_size": 4, "mask_prompt": True, "num_layers": -1, "learning_rate": 0.1, "grad_checkpoint": True},
        ),
    ],
)
def test_training_is_mlx_lms(convert, tiny_model, tmp_path, rows, settings):
    """mlx-lm trains with a file, and we with what it became, from one adapter: the same losses and the same result.

    The rows are longer than max_seq_length: mlx-lm would learn a token of padding where they end within. All of them
    are in every update, whatever the order.
    """
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    theirs = {"model": str(tiny_model), "data": str(tmp_path), "train": True, "batch_size": 2, "max_seq_length": 64}
    theirs |= {"lora_parameters": parameters, "steps_per_report": 1, "adapter_path": str(tmp_path / "start")} | settings
    _mlx_lm_trains(theirs | {"iters": 2, "grad_accumulation_steps": 1, "learning_rate": 1.0, "lr_schedule": None})
    theirs["resume_adapter_file"] = str(tmp_path / "start" / "adapters.safetensors")
    expected = _mlx_lm_trains(theirs | {"adapter_path": str(tmp_path / "theirs")})

    finetune(convert({**theirs, "adapter_path": str(tmp_path / "ours")})[0])
    lines = map(json.loads, (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    batches = theirs.get("grad_accumulation_steps", 1)
    assert len(losses) == theirs["iters"] // batches
    assert losses == pytest.approx([sum(expected[i : i + batches]) / batches for i in range(0, len(expected), batches)])
    assert losses[0] - losses[-1] > 0.01
    one, other = (mx.load(str(tmp_path / run / "adapters.safetensors")) for run in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert len(one) == 2 * 2 * (1 if settings["num_layers"] == 1 else 2)
    for name in one:
        assert mx.allclose(one[name], other[name], rtol=1e-3, atol=1e-5).item(), name


def _mlx_lm_trains(settings: dict[str, Any]) -> list[float]:
    """mlx-lm's own training with these options; its losses, one for each batch."""

    class Losses(TrainingCallback):
        def __init__(self):
            self.losses = []

        def on_train_loss_report(self, info):
            self.losses.append(info["train_loss"])

    options = SimpleNamespace(**mlx_lm_lora.CONFIG_DEFAULTS | settings)
    model, tokenizer = mlx_lm.load(options.model)
    losses = Losses()
    block = type(model.layers[0])
    call = block.__call__
    try:
        mlx_lm_lora.train_model(options, model, *load_dataset(options, tokenizer)[:2], losses)
    finally:
        block.__call__ = call  # which its grad_checkpoint changes for all models of the process
    return losses.losses


# ---- axolotl ---------------------------------------------------------------------------------------------------------


def test_axolotls_qlora_example(convert):
    ours, text = convert(AXOLOTL_QLORA)
    assert ours.model == config.Model(path="mistralai/Mistral-7B-v0.1", quantize=config.Quantize(bits=4))
    assert (ours.data.valid, ours.data.max_seq_length, ours.data.on_overflow) == (0.1, 8192, "drop")
    assert (ours.data.train, ours.data.loss_on) == ("hub:mhenrichsen/alpaca_2k_test", "assistant")
    assert ours.lora == Lora(rank=32, alpha=16, dropout=0.05, target_modules="all-linear")
    assert (ours.train.epochs, ours.train.batch_size, ours.train.gradient_accumulation_steps) == (1, 2, 4)
    assert ours.train.schedule == config.Schedule(name="cosine", warmup=0.1, min_lr=0)
    assert ours.train.optimizer == config.AdamW(weight_decay=0)
    assert (ours.train.learning_rate, ours.train.gradient_checkpointing, ours.train.seed) == (2e-4, True, 42)
    assert ours.output_dir == "./outputs/qlora-out"
    assert ours.data.format == "alpaca"
    for said in (
        "alpaca rows: without the words that axolotl puts around prompts",
        "sample_packing",
        "loss_watchdog_threshold: 5.0",
        "adamw_bnb_8bit there",
    ):
        assert said in text
    hardware = next(line for line in text.splitlines() if "attn_implementation" in line)
    assert "bf16" in hardware
    for silent in ("wandb_project", "load_in_8bit", "tf32", "model_type"):
        assert silent not in text


def test_axolotls_lora_example(convert):
    ours, text = convert(AXOLOTL_LORA)
    assert ours.lora.target_modules == ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]
    assert ours.model.quantize is None
    assert "special_tokens" in text


@pytest.mark.parametrize("name", ["token", "hf_token", "wandb_api_key", "hub_token", "use_auth_token"])
def test_no_secret_is_copied(convert, name):
    rows = "datasets: [{path: rows.jsonl, type: alpaca}]\n"
    ours, text = convert(f"base_model: a/b\n{name}: SECRET\nadapter: lora\nlearning_rate: 1e-4\n{rows}")
    assert ours.model.path == "a/b"
    assert "SECRET" not in text
    assert name in text


def test_null_cuts_and_clips_nothing(convert):
    ours, _ = convert("model_name_or_path: m\nuse_peft: true\nmax_length: null\nmax_grad_norm: null\noutput_dir: o\n")
    assert ours.data.max_seq_length > 10**6
    assert ours.train.max_grad_norm is None


def test_mlx_lms_adapter_is_gone_on_from_elsewhere(convert):
    ours, _ = convert({"iters": 9, "resume_adapter_file": "adapters/adapters.safetensors", "adapter_path": "adapters"})
    assert (ours.lora.start_from, ours.output_dir) == ("adapters", "adapters-continued")
    ours, text = convert({"iters": 9, "resume_adapter_file": "adapters/0000100_adapters.safetensors"})
    assert (ours.lora.start_from, ours.output_dir) == (None, "adapters")
    assert "resume_adapter_file: adapters/0000100_adapters.safetensors (copy it" in text


def test_axolotls_other_ways(convert):
    ours, text = convert(
        "base_model: a/b\nlearning_rate: 2e-4\ntrain_on_inputs: true\nexcess_length_strategy: raise\n"
        "datasets: [{path: json, ds_type: json, data_files: [rows.jsonl], type: chat_template, "
        "field_messages: dialogue}, {path: more/rows}]\ntest_datasets: [{path: valid.jsonl}]\n"
        "max_steps: 50\nlora_r: 16\nlora_alpha: 8\npeft_use_rslora: true\ncosine_min_lr_ratio: 0.1\n"
        "early_stopping_patience: 3\nlora_model_dir: old\npeft_layers_to_transform: [0, 1]\n"
    )
    assert ours.data.train == ["rows.jsonl", "hub:more/rows"]
    assert (ours.data.valid, ours.data.loss_on) == ("valid.jsonl", "all")
    assert (ours.data.on_overflow, ours.train.epochs, ours.train.max_steps) == ("error", None, 50)
    assert (ours.lora.alpha, ours.lora.start_from, ours.lora.layers) == (32.0, "old", [0, 1])
    assert (ours.train.schedule.min_lr, ours.eval.early_stopping) == (pytest.approx(2e-5), 3)
    assert ours.data.columns == {}
    for said in ("columns that differ", "full fine-tuning", "rank-stabilized: 8 x sqrt(16)"):
        assert said in text


@pytest.mark.parametrize(
    ("one", "form", "columns", "said"),
    [
        ({"type": "alpaca"}, "alpaca", {}, "alpaca rows: without the words that axolotl"),
        ({"type": "alpaca:chat"}, "alpaca", {}, "alpaca:chat rows"),
        ({"type": "alpaca_chat.load_qa"}, "completion", {"prompt": "question", "completion": "answer"}, "load_qa rows"),
        ({"type": "completion", "field": "body"}, "text", {"text": "body"}, ""),
        ({"type": "sharegpt.load_role"}, "sharegpt", {}, ""),
        ({"type": "chat_template"}, "messages", {}, ""),
        ({"type": "chat_template", "field_messages": "talk", "field_tools": "functions"}, "messages",
         {"messages": "talk", "tools": "functions"}, ""),
        ({"type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"}}, "sharegpt", {}, ""),
        ({"type": "chat_template", "message_field_role": "from", "message_field_content": "value"}, "sharegpt",
         {"conversations": "messages"}, ""),
        ({"type": "chat_template", "message_property_mappings": {"role": "who"}}, "messages", {}, ": who, content"),
        ({"type": "chat_template", "train_on_eos": "all"}, "messages", {}, "train_on_eos: all"),
        ({"type": "chat_template", "roles": {"user": ["me"]}}, "messages", {}, "datasets: roles"),
        ({"type": {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction}"}}, "alpaca",
         {"instruction": "q", "output": "a"}, "datasets: type: format: Q: {instruction}"),
        ({"type": "oasst"}, "auto", {}, "datasets: type: oasst"),
    ],
)  # fmt: skip
def test_axolotls_rows(convert, one, form, columns, said):
    ours, text = convert({"base_model": "a/b", "adapter": "lora", "learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 8,
                          "datasets": [{"path": "rows.jsonl", "ds_type": "json", **one}]})  # fmt: skip
    assert (ours.data.train, ours.data.format, ours.data.columns) == ("rows.jsonl", form, columns)
    assert (ours.data.loss_on, ours.data.on_overflow) == (("all", "split") if form == "text" else ("assistant", "drop"))
    assert said in text
    assert ("Without a counterpart" in text) == (": " in said and "rows:" not in said)


def test_axolotls_data_sets(convert):
    """Every one is read, with its configurations and splits; the templates of all have to be one."""
    theirs = {"base_model": "a/b", "adapter": "lora", "learning_rate": 1e-4, "val_set_size": 0.1}
    sets = [
        {"path": "me/rows", "name": ["en", "de"], "split": "train[:500]", "type": "chat_template"},
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "chat_template", "split": "train[:9]"},
    ]
    ours, text = convert(theirs | {"datasets": sets, "test_datasets": [{"path": "me/rows", "type": "oasst"}]})
    assert ours.data.train == ["hub:me/rows@en:train[:500]", "hub:me/rows@de:train[:500]", "a.jsonl", "b.jsonl"]
    assert (ours.data.valid, ours.data.format) == ("hub:me/rows:test", "messages")
    for said in ("datasets: split: train[:9] (files are read whole)", "test_datasets: type: oasst"):
        assert said in text
    other = {"path": "a.jsonl", "type": "chat_template", "field_messages": "conversations"}
    other["message_property_mappings"] = {"role": "from", "content": "value"}
    ours, text = convert(theirs | {"datasets": [sets[0], other]})
    assert (ours.data.format, ours.data.columns, "differ" in text) == ("auto", {}, False)
    jinja = {"chat_template": "jinja", "chat_template_jinja": "my.jinja", "chat_template_kwargs": {"short": True}}
    ours, text = convert(theirs | {"datasets": sets} | jinja)
    assert (ours.model.chat_template, ours.model.template_kwargs) == ("my.jinja", {"short": True})
    ours, text = convert(theirs | {"datasets": [sets[0] | {"chat_template_jinja": "{{ 1 }}"}, sets[1]]})
    assert ours.model.chat_template is None
    assert "datasets: chat_template (one holds for all sources)" in text
    ours, text = convert(theirs | {"datasets": sets, "chat_template": "chatml"})
    assert (ours.model.chat_template, text.count("chat_template: chatml")) == (None, 1)
    ours, _ = convert(theirs | {"pretraining_dataset": [{"path": "me/texts", "text_column": "body"}]})
    assert (ours.data.format, ours.data.columns, ours.data.on_overflow) == ("text", {"text": "body"}, "truncate")


def test_axolotls_trackers(convert):
    ours, text = convert(
        AXOLOTL_LORA + "wandb_project: mine\nwandb_mode: offline\nuse_tensorboard: true\nuse_mlflow: true\n"
    )
    assert ours.log.report_to == ["tensorboard", "wandb"]
    assert "with WANDB_PROJECT=mine WANDB_MODE=offline in the environment" in text
    assert "use_mlflow: True" in text


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def test_unsloths_arguments(convert):
    ours, text = convert(UNSLOTH, "arguments.json")
    assert ours.lora == Lora(rank=16, alpha=16, target_modules=UNSLOTH["target_modules"])
    assert (ours.train.epochs, ours.train.max_steps, ours.train.batch_size) == (None, 60, 2)
    assert ours.train.schedule == config.Schedule(name="linear", warmup=5, min_lr=0)
    assert (ours.train.seed, ours.train.max_grad_norm, ours.data.valid) == (3407, 1.0, 0)
    assert "bitsandbytes' weights are not read here" in text
    assert "Made from" in text
    assert "(Unsloth)" in text


def test_unsloths_config_in_groups(convert):
    ours, text = convert(UNSLOTH_TRAIN)
    assert (ours.model.path, ours.data.train, ours.data.loss_on) == ("unsloth/Qwen3-4B", "rows.jsonl", "assistant")
    assert (ours.lora.rank, ours.lora.alpha, ours.lora.target_modules) == (64, 16 * 8, ["q_proj", "v_proj"])
    assert (ours.train.epochs, ours.train.learning_rate, ours.train.batch_size) == (2, 2e-4, 2)
    assert ours.log.report_to == ["wandb"]
    ours, text = convert(UNSLOTH_TRAIN.replace("[rows.jsonl]", "[a.jsonl, b.csv]").replace(
        "enable_wandb: true", "enable_tensorboard: true, tensorboard_dir: tb, wandb_token: s3cret, hf_token: s3cret"
    ))  # fmt: skip
    assert (ours.data.train, ours.log.report_to) == (["a.jsonl", "b.csv"], ["tensorboard"])
    assert "tensorboard_dir: tb" in text
    assert "s3cret" not in text


def test_trls_config(convert):
    ours, text = convert(TRL)
    assert (ours.lora.rank, ours.lora.alpha, ours.lora.dropout) == (32, 32, 0.05)
    assert ours.lora.target_modules == ["q_proj", "v_proj"]
    assert ours.data.train == "hub:trl-lib/Capybara"
    assert (ours.data.loss_on, ours.data.valid, ours.data.max_seq_length) == (
        "assistant",
        "hub:trl-lib/Capybara:test",
        1024,
    )
    assert (ours.train.schedule.min_lr, ours.train.max_grad_norm, ours.eval.every) == (pytest.approx(2e-5), None, 100)
    assert "eos_token" in text
    assert "full fine-tuning" not in text
    assert convert(TRL.replace("assistant_only_loss: true", ""))[0].data.loss_on == "all"
    assert "full fine-tuning" in convert(TRL.replace("use_peft: true", ""))[1]


def test_trls_data(convert):
    ours, text = convert(
        TRL + "dataset_config: en\ndataset_train_split: train[:50]\ndataset_test_split: train[-50:]\n"
        "dataset_text_field: body\nchat_template_path: my.jinja\nreport_to: [wandb, trackio]\nrun_name: me\n"
    )
    assert ours.data.train == "hub:trl-lib/Capybara@en:train[:50]"
    assert ours.data.valid == "hub:trl-lib/Capybara@en:train[-50:]"
    assert (ours.data.columns, ours.model.chat_template) == ({"text": "body"}, "my.jinja")
    assert ours.log.report_to == ["wandb"]
    for said in ("report_to: trackio", "run_name: me"):
        assert said in text
    ours, text = convert(TRL + "chat_template_path: HuggingFaceTB/SmolLM3-3B\nreport_to: all\n")
    assert (ours.model.chat_template, ours.log.report_to) == (None, [])
    for said in ("chat_template_path: HuggingFaceTB/SmolLM3-3B", "report_to: all"):
        assert said in text


def test_trls_mixtures(convert, tmp_path):
    ours, text = convert(
        TRL.replace("dataset_name: trl-lib/Capybara\n", "")
        + "datasets: [{path: a/b, name: en, split: 'train[:9]', fraction: 0.3}, {path: json, data_files: rows.jsonl}]\n"
        "test_split_size: 0.2\n"
    )
    assert (ours.data.train, ours.data.valid) == (["hub:a/b@en:train[:9]", "rows.jsonl"], 0.2)
    assert "datasets: fraction: 0.3" in text


@pytest.mark.slow  # importing TRL takes seconds
def test_trl_reads_the_same_rows_of_a_mixture(convert, tmp_path):
    from trl import DatasetMixtureConfig, get_dataset

    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, rows in zip(files, (ANSWERS[:3], ANSWERS[3:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = [{"path": "json", "data_files": str(file)} for file in files]
    ours, _ = convert({"model_name_or_path": "a/b", "use_peft": True, "datasets": mixture, "max_steps": 3})
    theirs = get_dataset(DatasetMixtureConfig(datasets=mixture))["train"]
    assert [row.content for path in ours.data.train_paths for row in data.read(path)] == theirs.to_list() == ANSWERS


def test_a_scripts_arguments_have_pefts_defaults(convert):
    """LoraConfig's and SFTConfig's keywords, as a script gives them; `trl sft` has other defaults."""
    ours, text = convert({"r": 4, "model_name_or_path": "a/b", "max_steps": 9, "activation_checkpointing": False})
    assert (ours.lora.rank, ours.lora.alpha, ours.lora.dropout) == (4, 8, 0)
    assert (ours.train.learning_rate, ours.train.gradient_checkpointing) == (2e-5, "selective")
    assert "(SFTConfig)" in text
    assert "Without a counterpart" not in text


def test_transformers_defaults_are_its_own():
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = dict(hugging_face.TRAINING)
    assert theirs.pop("optim").startswith(ours.pop("optim"))
    assert theirs.pop("gradient_checkpointing") in (None, ours.pop("gradient_checkpointing"))
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.slow  # importing TRL takes seconds
def test_trls_defaults_are_its_own(convert):
    from trl import ModelConfig, SFTConfig

    given, cli = ({field.name: field.default for field in dataclasses.fields(one)} for one in (SFTConfig, ModelConfig))
    ours = dict(hugging_face.TOOLS["SFTConfig"])
    assert given["optim"].startswith(ours.pop("optim"))
    assert {name: given[name] for name in ours if name in given} == {name: ours[name] for name in ours if name in given}
    whole = {name: value for name, value in (given | cli).items() if value is not dataclasses.MISSING}
    assert "Without a counterpart" not in convert(json.loads(json.dumps(whole | {"use_peft": True}, default=str)))[1]
    ours = hugging_face.TOOLS["trl sft"]
    assert [cli[f"lora_{name}"] for name in ("r", "alpha", "dropout")] == [
        ours[name] for name in ("r", "lora_alpha", "lora_dropout")
    ]
    assert (cli["use_peft"], cli["lora_target_modules"]) == (False, None)
    names = given.keys() | cli.keys()
    assert {"lora_r", "lora_target_modules", "model_revision", "activation_checkpointing"} <= names
    assert {"assistant_only_loss", "completion_only_loss", "max_length", "packing", "warmup_steps"} <= names


def test_pefts_defaults_are_its_own():
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MODULES

    theirs = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name in ("r", "lora_alpha", "lora_dropout"):
        assert theirs[name] == hugging_face.PEFT[name]
    for kind in ("llama", "qwen2", "qwen3"):
        assert MODULES[kind] == hugging_face.PEFT["target_modules"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers so
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"r": 2, "lora_alpha": 3, "target_modules": r".*layers\.0\.(self_attn|mlp)\.[kg].*"},
        {"r": 2, "lora_alpha": 3, "target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj"]},
        {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
)
def test_pefts_own_file_means_the_same(convert, tmp_path, settings):
    """Modules and scales, as PEFT makes them of the same settings."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LoraConfig(**settings, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/base"}
    ours, text = convert(saved, "adapter_config.json")
    shape = {name: value for name, value in tiny.SHAPE.items() if name != "rope_theta"}
    adapted = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), theirs).named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(select(tiny.llama(), ours.lora.target_modules, ours.lora.layers)) == adapted.keys()
    assert all(scale == pytest.approx(ours.lora.alpha / ours.lora.rank) for scale in adapted.values())
    assert (ours.model.path, ours.lora.dropout) == ("some/base", settings.get("lora_dropout", 0))
    assert ours.lora.init == settings.get("init_lora_weights", "kaiming_uniform")
    assert ours.train == Train()
    assert "Without a counterpart" not in text


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "constant"])
def test_rates_are_transformers(convert, name):
    """Within 1.1 % of the peak: the first update of transformers has the rate 0."""
    import torch
    from transformers import get_scheduler

    theirs = TRL.replace("cosine_with_min_lr", name).replace("{min_lr_rate: 0.1}", "{}")
    ours, _ = convert(theirs + "warmup_steps: 100\n")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=100, num_training_steps=1000)
    for step in range(1000):
        assert learning_rate(ours.train, step, 1000) == pytest.approx(optimizer.param_groups[0]["lr"], abs=2.2e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("adamw_torch_fused", "adamw"),
        ("paged_adamw_8bit", "adamw"),
        ("adamw_torch_npu_fused", "adamw"),
        ("lion_32bit", "lion"),
        ("sgd", "sgd"),
        ("adafactor", "adafactor"),
        ("galore_adamw", None),
        ("schedule_free_adamw", None),
    ],
)
def test_optimizers_by_family(convert, name, ours):
    loaded, text = convert(TRL + f"optim: {name}\n")
    assert loaded.train.optimizer.name == (ours or "adamw")
    assert (f"optim: {name} (adamw in its place)" in text) == (ours is None)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("iters: many\nnum_layers: 4\n", ["theirs.yaml:1: iters: is a whole number, got many"]),
        ("iters: 10\nnum_layers: 4\nlora_parameters: {rank: 8}\n", ["theirs.yaml:3: lora_parameters", "scale"]),
        ("iters: 10\nbatch_size: 0\n", ["theirs.yaml:2: batch_size", "train.batch_size"]),
        ("iters: 10\nlr_schedule: {name: other, arguments: []}\n", ["theirs.yaml:2: lr_schedule", "cosine_decay"]),
        ("iters: 10\ntraining_mode: dpo\n", ["theirs.yaml:2: training_mode", "dpo"]),
        (AXOLOTL_LORA + "rl: dpo\n", ["rl: dpo has no counterpart"]),
        ("base_model: a/b\ndatasets: 3\nlearning_rate: 1e-4\n", ["theirs.yaml:2: datasets", "list of groups"]),
        ("base_model: a/b\ndatasets: []\n", ["learning_rate", "missing"]),
        ("lora_r: 0\nmodel_name_or_path: a/b\n", ["theirs.yaml:1: lora_r", "lora.rank"]),
        ("peft_type: IA3\nr: 8\n", ["theirs.yaml:1: peft_type", "LORA"]),
        ("lora: {r: 8}\nr: 4\n", ["stands in two groups"]),
        ("hello: world\n", ["do not tell whose", "--from"]),
        ("model: a/b\ndata: {train: rows.jsonl}\noutput_dir: run\n", ["ours already"]),
    ],
)
def test_faults_are_named_where_they_stand(convert, content, words):
    message = refusal(convert, content)
    for word in words:
        assert word in message


@pytest.mark.parametrize("number", range(5))
def test_broken_files_are_refused_or_become_configs(convert, tmp_path, number):
    """Neither a traceback nor a config that cannot be loaded, whatever stands in a file."""
    draw, fuzzer, ends = random.Random(number), Fuzzer(tmp_path), Counter()
    theirs = [MLX_LM + SCHEDULE, AXOLOTL_QLORA, json.dumps(UNSLOTH), UNSLOTH_TRAIN, TRL][number]
    for _ in range(60):
        tree = yaml.safe_load(theirs)
        for _ in range(draw.randint(1, 3)):
            fuzzer.break_tree(tree, draw)
        said = ""
        try:
            convert(yaml.safe_dump(tree))
        except InputError as error:
            said = str(error)
        assert "theirs.yaml" in said or not said, (tree, said)
        ends["refused" if said else "accepted"] += 1
    assert min(ends["accepted"], ends["refused"]) > 5


def test_the_command(run_command, tmp_path):
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "new" / "ours.yaml"
    theirs.write_text(MLX_LM)
    printed = run_command("convert_config", theirs)
    assert printed.returncode == 0, printed.stderr
    written = run_command("convert_config", theirs, "--out", ours)
    assert written.returncode == 0, written.stderr
    assert f"mlx-lora train --config {ours} --dry-run" in written.stdout
    assert ours.read_text() == printed.stdout
    assert config_file.load(ours).train.max_steps == 1000
    again = run_command("convert_config", theirs, "--out", ours)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    assert run_command("convert_config", Path("none.yaml")).returncode == 2
