"""mlx-lm's options (`mlx_lm.lora --config`, and the adapter_config.json that it writes) → ours.

Facts from mlx-lm 0.32.2 (lora.py; trainer.py, utils.py and datasets.py in tuner/): `iters` counts batches, of which
`grad_accumulation_steps` make an update (a rest makes none), and reports, evaluations and saves count batches too; the
schedule counts updates. Rows that hold prompt_feature and completion_feature are these, else chat_feature, else
text_feature; the parts of `hf_dataset` are read one after the other, of which each says its splits. `scale` is alpha /
rank. Without `mask_prompt` every token is learned, with it the last answer. Nothing is clipped, and Adam is without
bias correction.
"""

import json
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.config_forms.translation import Translation, columns, data_set, report, rows

SIGNS = {
    "lora_parameters", "iters", "num_layers", "fine_tune_type", "adapter_path", "steps_per_report", "steps_per_eval",
    "save_every", "mask_prompt", "grad_checkpoint", "grad_accumulation_steps", "lr_schedule", "val_batches",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {  # mlx-lm's, as far as they are asked for below
    "model": "Qwen/Qwen3-0.6b",
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "data": "mlx-community/WikiSQL",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "adapter_path": "adapters",
    "save_every": 100,
    "max_seq_length": 2048,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
}
FORMS = {  # what a row may hold, in the order in which mlx-lm looks: our names for what its features name
    "completion": {"prompt": "prompt_feature", "completion": "completion_feature"},
    "messages": {"messages": "chat_feature"},
    "text": {"text": "text_feature"},
}
WHOLE_MODEL = ("model.", "language_model.")  # how a path that is none within a block begins
OPTIMIZERS = {  # name: its options that are ours too
    "adam": ("betas", "eps"),
    "adamw": ("betas", "eps", "weight_decay"),
    "sgd": ("momentum", "weight_decay"),
    "adafactor": ("weight_decay", "scale_parameter"),
}


def translate(options: Translation) -> None:
    """Sets ours from mlx-lm's, its defaults included."""
    options.set("model.path", _take(options, "model", str), of="model")
    _data(options)
    _lora(options)
    _train(options)
    folder = _take(options, "adapter_path", str)
    if "lora.start_from" in options.options and Path(options.options["lora.start_from"][0]) == Path(folder):
        options.set("output_dir", f"{folder}-continued", f"{folder} keeps what it starts from", "adapter_path")
    else:
        options.set("output_dir", folder, of="adapter_path")
    options.take("train")  # what the command does
    options.take("config")
    project = options.take("project_name", None, str)
    trackers = [name.strip().lower() for name in options.take("report_to", "", str).split(",") if name.strip()]
    report(options, trackers, "report_to", {"project": project})
    options.drop(
        {
            "val_batches": "every evaluation scores all validation rows",
            "test": "mlx-lora evaluate --data FILE",
            "test_batches": "",
            "clear_cache_threshold": "the cache is bounded by itself",
            "trust_remote_code": "code that a model ships is never run",
        }
    )
    if (mode := options.take("training_mode", "normal")) != "normal":
        raise options.fault("training_mode", f"{mode} has no counterpart: only what to write is learned here")


def _take(options: Translation, name: str, kind: type) -> Any:
    return options.take(name, DEFAULTS[name], kind)


def _data(options: Translation) -> None:
    masked, sets = _take(options, "mask_prompt", bool), options.take("hf_dataset")
    forms = [_folder(options)] if not sets else _sets(options, sets)
    if not masked:
        options.set("data.loss_on", "all", "without mask_prompt; assistant: the answers only", "mask_prompt")
    elif forms == ["completion"]:
        options.set("data.loss_on", "completion", "mask_prompt", "mask_prompt")
    elif "completion" in forms:
        options.set("data.loss_on", "assistant", "mask_prompt: of conversations only the last answer", "mask_prompt")
    else:
        comment = "mask_prompt: the last answer; assistant: all of them"
        options.set("data.loss_on", "last", comment, "mask_prompt")
    options.set("data.max_seq_length", _take(options, "max_seq_length", int), of="max_seq_length")


def _folder(options: Translation) -> str:
    """Sets the rows of `data`, a folder or a data set of the hub, and returns their form, as far as it can be told."""
    folder = _take(options, "data", str)
    train, valid = Path(folder, "train.jsonl"), Path(folder, "valid.jsonl")
    if rows(folder) != folder:
        options.set("data.train", rows(folder), "a data set of the hub", "data")
        options.set("data.valid", 0.05, "there its split named valid, where it has one", "data")
    else:
        options.set("data.train", str(train), of="data")
        if files.exists(valid) or not files.exists(train):
            options.set("data.valid", str(valid), "" if files.exists(valid) else "0 where there is none", "data")
        else:
            options.set("data.valid", 0.0, f"there is no {valid}", "data")
    form, names = _form(options, options, _first_row(train), "")
    columns(options, [names], "data")
    if form:
        options.set("data.format", form, "as mlx-lm sees it")
    return form


def _sets(options: Translation, sets: Any) -> list[str]:
    """Sets the rows of `hf_dataset` and returns their forms, each once."""
    sets = [sets] if isinstance(sets, dict) else sets
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        raise options.fault("hf_dataset", "is a group such as {path: owner/name}, or a list of these")
    sources, valid, found = [], [], []
    for one in sets:
        given = Translation(options.path, one, {})
        split, held_out = given.take("train_split", "train[:80%]", str), given.take("valid_split", "train[-10%:]", str)
        given.take("test_split")
        given.take("mask_prompt")  # the whole run's holds
        settings = Translation(options.path, given.take("config", {}, dict) | {"path": given.take("path")}, {})
        sources += data_set(options, "hf_dataset", settings, split)
        valid.append(sources[-1].removesuffix(split) + held_out if sources[-1].startswith("hub:") else "")
        found.append(_form(options, given, {}, "hf_dataset: "))
        for name, value in [*settings.left(), *given.left()]:
            options.lose(f"hf_dataset: {name}", value)
    options.take("data")  # is not read then
    options.set("data.train", sources[0] if len(sources) == 1 else sources, of="hf_dataset")
    if valid[0]:
        options.set("data.valid", valid[0], "" if len(valid) == 1 else "of the first alone", "hf_dataset")
    else:
        options.set("data.valid", 0.1, "there valid_split", "hf_dataset")
    forms = list(dict.fromkeys(form for form, _ in found))
    columns(options, [names for _, names in found], "hf_dataset")
    if len(forms) == 1 and forms[0]:
        options.set("data.format", forms[0], of="hf_dataset")
    return forms


def _form(options: Translation, given: Translation, row: dict[str, Any], of: str) -> tuple[str, dict[str, str]]:
    """The form of rows ("": not known) and the names of their columns, by what `given` says of features; where a row is
    at hand it is looked at as mlx-lm does."""
    said = {feature: given.take(feature, None, str) for features in FORMS.values() for feature in features.values()}
    for form, features in FORMS.items():
        names = {ours: said[feature] or ours for ours, feature in features.items()}
        if row and row.keys() >= set(names.values()):
            return form, names
        if not row and any(said[feature] for feature in features.values()):
            for feature in said.keys() - features.values():
                options.lose(of + feature, said[feature], f"where rows hold no {' and '.join(names.values())}")
            return form, names
    return "", {}


def _first_row(path: Path) -> dict[str, Any]:
    """The first row of a file of rows, where there is one."""
    try:
        with path.open(encoding="utf-8") as stream:
            row = json.loads(stream.readline())
    except (OSError, ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _lora(options: Translation) -> None:
    kind, found = _take(options, "fine_tune_type", str), _take(options, "lora_parameters", dict)
    if kind != "lora":
        options.lose("fine_tune_type", kind, "LoRA in its place; its learning rate is another")
    given = Translation(options.path, found, {})
    rank = given.take("rank", None, int)
    scale = given.take("scale", None, float)
    if rank is None or scale is None:
        raise options.fault("lora_parameters", f"{'rank' if rank is None else 'scale'} is missing, which mlx-lm needs")
    options.set("lora.rank", rank, of="lora_parameters")
    options.set("lora.alpha", scale * rank, f"scale {scale:g} x rank {rank}", "lora_parameters")
    options.set("lora.dropout", given.take("dropout", 0.0, float), of="lora_parameters")
    keys = given.take("keys", None, list)
    if keys is not None:
        if not all(isinstance(key, str) for key in keys):
            raise options.fault("lora_parameters", "keys is a list of names")
        patterns = [key if "." not in key or key.startswith(WHOLE_MODEL) else f"*.{key}" for key in keys]
        everywhere = [key for key in keys if "." not in key and not key.startswith(WHOLE_MODEL)]
        comment = f"{', '.join(everywhere)}: in every block (mlx-lm finds such names nowhere)" if everywhere else ""
        options.set("lora.target_modules", patterns, comment, "lora_parameters")
    for name, value in given.left():
        options.lose(f"lora_parameters.{name}", value)
    layers = _take(options, "num_layers", int)
    if layers > 0:
        options.set("lora.layers", f"last:{layers}", of="num_layers")
    start = options.take("resume_adapter_file", None, str)
    if start is not None and Path(start).name == "adapters.safetensors":
        options.set("lora.start_from", str(Path(start).parent), of="resume_adapter_file")
    else:
        why = "copy it into a folder as adapters.safetensors, beside adapter_config.json: lora.start_from names that"
        options.lose("resume_adapter_file", start, why)


def _train(options: Translation) -> None:
    batches = _take(options, "grad_accumulation_steps", int)
    iters = _take(options, "iters", int)
    if batches < 1 or iters < batches:
        raise options.fault("iters", f"{iters} batches with {batches} an update are no update")
    updates = iters // batches
    options.set("train.epochs", None, "until max_steps")
    comment = f"iters: {iters} batches, {batches} an update" if batches > 1 else "iters"
    options.set("train.max_steps", updates, comment, "iters")
    options.set("train.batch_size", _take(options, "batch_size", int), of="batch_size")
    options.set("train.gradient_accumulation_steps", batches, of="grad_accumulation_steps")
    _schedule(options, updates)
    _optimizer(options)
    options.set("train.max_grad_norm", None, "mlx-lm does not clip; 1.0 is usual")
    if _take(options, "grad_checkpoint", bool):
        options.set("train.gradient_checkpointing", True, "selective recomputes less", "grad_checkpoint")
    options.set("train.seed", _take(options, "seed", int), of="seed")
    for name, key in (
        ("steps_per_eval", "eval.every"),
        ("save_every", "checkpoint.every"),
        ("steps_per_report", "log.every"),
    ):
        count = _take(options, name, int)
        options.set(key, max(1, count // batches), f"{count} batches there" if batches > 1 else "", name)


def _schedule(options: Translation, updates: int) -> None:
    """The learning rate. Of `lr_schedule`, arguments are positional: the first is the rate."""
    rate = _take(options, "learning_rate", float)
    found = options.take("lr_schedule", None, dict)
    options.set("train.learning_rate", rate, of="learning_rate")
    if found is None:
        options.set("train.schedule.name", "constant", "without lr_schedule")
        options.set("train.schedule.warmup", 0)
        options.set("train.schedule.min_lr", 0.0)
        return
    name, arguments, warmup = found.get("name"), found.get("arguments"), found.get("warmup", 0)
    length = {"cosine_decay": (2, 3), "linear_schedule": (3, 3), "exponential_decay": (2, 2), "step_decay": (3, 3)}
    if not isinstance(name, str) or name not in length:
        raise options.fault("lr_schedule", f"name is one of {', '.join(length)}, got {name!r}")
    if not isinstance(arguments, list) or not length[name][0] <= len(arguments) <= length[name][1]:
        raise options.fault("lr_schedule", f"arguments is no list that {name} takes: {arguments!r}")
    if not all(_finite(value) for value in [*arguments, warmup]):
        raise options.fault("lr_schedule", "arguments and warmup are numbers")
    rate, low, steps = float(arguments[0]), 0.0, updates
    if name == "cosine_decay":
        shape, steps, low = "cosine", int(arguments[1]), float(arguments[2] if len(arguments) > 2 else 0.0)
    elif name == "linear_schedule":
        shape, steps, low = "linear", int(arguments[2]), float(arguments[1])
    else:
        shape = "constant"
        options.lose("lr_schedule", f"{name} {arguments}", "constant in its place")
    if low > rate:
        options.lose("lr_schedule", f"{name} {arguments}", "only in warmup does the rate rise; constant in its place")
        shape, low = "constant", 0.0
    options.set("train.learning_rate", rate, "of lr_schedule, which has the last word", "lr_schedule")
    ends = int(warmup) + steps
    differs = shape != "constant" and ends != updates
    comment = f"at its lowest after {ends} updates there, at the run's end ({updates}) here" if differs else ""
    options.set("train.schedule.name", shape, comment, "lr_schedule")
    options.set("train.schedule.warmup", int(warmup), "updates" if warmup else "", "lr_schedule")
    options.set("train.schedule.min_lr", low, of="lr_schedule")
    start = found.get("warmup_init", 0.0)
    if warmup and start != low:
        options.lose("lr_schedule.warmup_init", start, "warmup rises from min_lr")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _optimizer(options: Translation) -> None:
    name = _take(options, "optimizer", str).lower()
    every = options.take("optimizer_config", {}, dict)
    given = every.get(name) or {}
    if not isinstance(given, dict):
        raise options.fault("optimizer_config", f"{name} is a group")
    if name not in OPTIMIZERS:
        options.lose("optimizer", name, "adamw in its place")
        return
    uncorrected = name.startswith("adam") and not given.get("bias_correction")
    comment = "with bias correction, which is off there" if uncorrected else ""
    options.set("train.optimizer.name", name, comment, "optimizer")
    if name == "adafactor":
        options.set("train.optimizer.scale_parameter", True, "mlx-lm's default", "optimizer")
        if given.get("relative_step", True):
            why = "there the rate is 1/sqrt(step), at most 0.01; here it is train.learning_rate"
            options.lose("optimizer_config.adafactor.relative_step", True, why)
    for key, value in given.items():
        if key in OPTIMIZERS[name]:
            options.set(f"train.optimizer.{key}", value, of="optimizer_config")
        elif key not in ("bias_correction", "relative_step"):
            options.lose(f"optimizer_config.{name}.{key}", value)
