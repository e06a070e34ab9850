"""No option is accepted and ignored: changing any one of them changes what a run does or leaves."""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora import checkpoint, config, finetune, metrics
from mlx_lora.adapter_files import mlx_form
from mlx_lora.errors import InputError

CHANGES = {  # option: (what else is set in both runs, the change)
    "model.path": ([], "model.path={tmp}/other-model"),
    "model.revision": ([], "model.revision=main"),
    "model.dtype": ([], "model.dtype=bfloat16"),
    "model.quantize": ([], "model.quantize={bits: 8, group_size: 32}"),
    "model.quantize.bits": (["model.quantize={bits: 8, group_size: 32}"], "model.quantize.bits=4"),
    "model.quantize.group_size": (["model.quantize={bits: 8, group_size: 32}"], "model.quantize.group_size=64"),
    "model.chat_template": ([], "model.chat_template={tmp}/other.jinja"),
    "model.template_kwargs": (["model.chat_template={tmp}/other.jinja"], "model.template_kwargs={name: Ann}"),
    "data.train": ([], "data.train={tmp}/other.jsonl"),
    "data.columns": ([], "data.columns={messages: second}"),
    "data.reasoning": ([], "data.reasoning=drop"),
    "data.valid": ([], "data.valid=0.8"),
    "data.format": ([], "data.format=text"),
    "data.loss_on": ([], "data.loss_on=all"),
    "data.max_seq_length": ([], "data.max_seq_length=42"),
    "data.on_overflow": (["data.max_seq_length=42"], "data.on_overflow=drop"),
    "lora.rank": ([], "lora.rank=3"),
    "lora.alpha": ([], "lora.alpha=3.0"),
    "lora.dropout": ([], "lora.dropout=0.5"),
    "lora.init": ([], "lora.init=gaussian"),
    "lora.start_from": ([], "lora.start_from={tmp}/adapter"),
    "lora.target_modules": ([], "lora.target_modules=v_proj"),
    "lora.layers": ([], "lora.layers=last:1"),
    "train.epochs": (["train.max_steps=null"], "train.epochs=1"),
    "train.max_steps": ([], "train.max_steps=2"),
    "train.batch_size": ([], "train.batch_size=2"),
    "train.gradient_accumulation_steps": ([], "train.gradient_accumulation_steps=2"),
    "train.learning_rate": ([], "train.learning_rate=0.02"),
    "train.schedule.name": ([], "train.schedule.name=linear"),
    "train.schedule.warmup": ([], "train.schedule.warmup=2"),
    "train.schedule.min_lr": ([], "train.schedule.min_lr=0.005"),
    "train.optimizer.name": ([], "train.optimizer.name=lion"),
    "train.optimizer.weight_decay": ([], "train.optimizer.weight_decay=0.5"),
    "train.optimizer.betas": ([], "train.optimizer.betas=[0.5, 0.9]"),
    "train.optimizer.eps": ([], "train.optimizer.eps=0.01"),
    "train.optimizer.betas adam": (["train.optimizer.name=adam"], "train.optimizer.betas=[0.5, 0.9]"),
    "train.optimizer.eps adam": (["train.optimizer.name=adam"], "train.optimizer.eps=0.01"),
    "train.optimizer.momentum sgd": (["train.optimizer.name=sgd"], "train.optimizer.momentum=0.9"),
    "train.optimizer.weight_decay sgd": (["train.optimizer.name=sgd"], "train.optimizer.weight_decay=0.5"),
    "train.optimizer.weight_decay adafactor": (["train.optimizer.name=adafactor"], "train.optimizer.weight_decay=0.5"),
    "train.optimizer.scale_parameter adafactor": (
        ["train.optimizer.name=adafactor"],
        "train.optimizer.scale_parameter=true",
    ),
    "train.optimizer.weight_decay lion": (["train.optimizer.name=lion"], "train.optimizer.weight_decay=0.5"),
    "train.optimizer.betas lion": (["train.optimizer.name=lion"], "train.optimizer.betas=[0.1, 0.9]"),
    "train.max_grad_norm": ([], "train.max_grad_norm=0.001"),
    "train.label_smoothing": ([], "train.label_smoothing=0.3"),
    "train.seed": ([], "train.seed=1"),
    "eval.every": ([], "eval.every=1"),
    "eval.early_stopping": (
        ["eval.every=1", "train.learning_rate=1e-30", "train.schedule.min_lr=0.0"],
        "eval.early_stopping=1",
    ),
    "eval.samples": ([], "eval.samples=[Hello]"),
    "eval.sample_tokens": (["eval.samples=[Hello]", "eval.sample_tokens=4"], "eval.sample_tokens=3"),
    "checkpoint.every": ([], "checkpoint.every=1"),
    "checkpoint.keep": (["checkpoint.every=1"], "checkpoint.keep=1"),
    "log.every": ([], "log.every=1"),
    "log.report_to": ([], "log.report_to=[tensorboard]"),
    "output_dir": ([], "output_dir={tmp}/elsewhere"),
    "notes": ([], "notes={author: me}"),
}
REFUSED = {"model.revision", "data.format"}  # a revision of a local folder, text rows without text
# How an update is computed changes its time and memory only: see test_mlx_lm_parity.py and test_planning.py.
SAME_NUMBERS = {
    "data.packing",
    "train.batch_tokens",
    "train.gradient_checkpointing",
    "train.loss_chunk",
    "train.plan",
    "train.prefix_cache",
    "train.memory_limit",
    "train.prefix_cache_limit",
}


@pytest.fixture(scope="module")
def observe(tiny_model, tmp_path_factory):
    """What a short run does and leaves, times and speeds aside."""
    folder = tmp_path_factory.mktemp("options")
    rows = folder / "rows.jsonl"
    chats = [
        [{"role": "user", "content": f"Number {n}"}, {"role": "assistant", "content": f"{n} is it, " * (1 + n % 2)}]
        for n in range(12)
    ]
    chats[0][1]["content"] = "<think>Zero.</think>" + chats[0][1]["content"]
    pairs = zip(chats, chats[::-1], strict=True)
    rows.write_text("".join(json.dumps({"messages": chat, "second": other}) + "\n" for chat, other in pairs))
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ name }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant {{ name }}\n{% endif %}"
    (folder / "other.jinja").write_text(template)
    (folder / "other.jsonl").write_text(rows.read_text().replace("is it", "was it"))
    shutil.copytree(tiny_model, folder / "other-model")
    weights = mx.load(str(tiny_model / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    mx.save_safetensors(str(folder / "other-model" / "model.safetensors"), weights, {"format": "pt"})
    options = {
        "model": str(tiny_model),
        "data": {"train": str(rows), "valid": 0.3},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"epochs": 2, "max_steps": 4, "batch_size": 3, "learning_rate": 0.01, "schedule": {"warmup": 1}},
    }
    finetune(options | {"output_dir": str(folder / "adapter")}, ["train.max_steps=1", "train.seed=9"])
    seen: dict[tuple[str, ...], object] = {}

    def observe(*overrides: str) -> object:
        if overrides not in seen:
            run = folder / str(len(seen))
            replaced = [override.replace("{tmp}", str(folder)) for override in overrides]
            try:
                result = finetune(options | {"output_dir": str(run)}, replaced)
            except InputError as error:
                seen[overrides] = str(error)
            else:
                seen[overrides] = left(result.output_dir), result.output_dir == run
        return seen[overrides]

    return observe


def left(run: Path) -> object:
    volatile = ("time", "seconds", "tokens_per_second", "supervised_tokens_per_second", "peak_memory", "active_memory")
    events = [event for _, event in metrics.events(run / metrics.FILE) if event["event"] not in metrics.OF_PROCESS]
    weights = checkpoint.complete(run)[-1] / mlx_form.WEIGHTS
    arrays, metadata = mx.load(str(weights), return_metadata=True)
    return (
        [{key: value for key, value in event.items() if key not in volatile} for event in events],
        [path.name for path in checkpoint.complete(run)],
        sorted(path.name for path in run.iterdir()),
        (run / mlx_form.SETTINGS).read_text(),
        {key: value for key, value in metadata.items() if key != "saved"},
        {name: hashlib.sha256(bytes(memoryview(array))).hexdigest() for name, array in arrays.items()},
    )


def test_every_option_has_a_change_below():
    names = set()
    for keys, _, group in config.walk():
        variant = group.model_fields["name"].default if "optimizer" in keys else "adamw"
        if variant == "adamw" or keys[-1] != "name":
            names.add(".".join(keys) + ("" if variant == "adamw" else f" {variant}"))
    assert names == CHANGES.keys() | SAME_NUMBERS


def test_the_same_options_do_the_same(observe):
    assert observe() == observe("train.seed=0")


@pytest.mark.parametrize("name", list(CHANGES))
def test_changing_an_option_changes_something(observe, name):
    given, change = CHANGES[name]
    before, after = observe(*given), observe(*given, change)
    assert before != after
    assert (isinstance(before, str), isinstance(after, str)) == (False, name in REFUSED)
