"""Hugging Face's arguments → ours: PEFT's adapter_config.json, `trl sft --config`, an Unsloth notebook's arguments or
`unsloth train --config`, in YAML or JSON, flat or in groups.

Facts from transformers 5.23 (training_args.py), PEFT 0.21 (tuners/lora/config.py, utils/constants.py), TRL 1.16
(sft_config.py, model_config.py) and Unsloth 2026.10 (unsloth_cli/config.py): `max_steps` above 0 overrides epochs; a
rank-stabilized scale is alpha / sqrt(rank); the rate decays to 0; `constant` has no warmup; `max_grad_norm: 0` does not
clip; `report_to` takes W&B's project from the environment, as we do; TRL learns whole conversations unless
`assistant_only_loss`, and trains all weights unless `use_peft`; it evaluates the split `dataset_test_split`; a
`chat_template_path` that ends in .jinja or .j2 is a file, another one a tokenizer whose tokens are added too.
"""

import math
import re
from typing import Any

from mlx_lora.config_forms.translation import Translation, columns, data_set, report, rows
from mlx_lora.errors import InputError

SIGNS = {
    "peft_type", "base_model_name_or_path", "r", "target_modules", "use_rslora", "per_device_train_batch_size",
    "num_train_epochs", "lr_scheduler_type", "optim", "model_name", "model_name_or_path", "max_length", "dataset_name",
    "dataset_text_field", "random_state", "random_seed", "use_gradient_checkpointing", "assistant_only_loss",
    "completion_only_loss", "local_dataset", "training_type", "train_on_completions", "use_peft", "chat_template_path",
}  # fmt: skip
GROUPS = re.compile(r"(model|data|dataset|train|training|trainer|lora|peft|sft|logging)(_(args|arguments|config))?")
NAMES = {  # one name for what the tools call differently
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "base_model_name_or_path": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "model_revision": "revision",
    "torch_dtype": "dtype",
    "local_dataset": "dataset_name",
    "dataset": "dataset_name",
    "max_seq_length": "max_length",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "random_seed": "seed",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
}
TRAINING: dict[str, Any] = {  # of transformers' TrainingArguments
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "seed": 42,
}
PEFT: dict[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
UNSLOTH: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "max_length": 2048,
    "gradient_checkpointing": True,
    "load_in_4bit": True,
}
UNCUT = 2**20  # tokens: longer than any row
SFT: dict[str, Any] = {"learning_rate": 2e-5, "max_length": 1024, "gradient_checkpointing": True}
TOOLS: dict[str, dict[str, Any]] = {  # what each takes where nothing is said; PEFT's modules are Llama's and Qwen's
    "PEFT": PEFT,
    "SFTConfig": TRAINING | PEFT | SFT,
    "trl sft": TRAINING | PEFT | SFT | {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "Unsloth": TRAINING | UNSLOTH,
    "unsloth train": TRAINING
    | UNSLOTH
    | {"r": 64, "learning_rate": 2e-4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    | {"warmup_steps": 5, "weight_decay": 0.01, "seed": 3407},
}
USUAL = {  # of TRL, where these values say what is done here
    "average_tokens_across_devices": True,
    "bnb_4bit_quant_type": "nf4",
    "lora_task_type": "CAUSAL_LM",
    "loss_type": "nll",
    "packing_strategy": "bfd",
    "remove_unused_columns": True,
    "train_sampling_strategy": "random",
    "truncation_mode": "keep_start",
}
SWITCHED = ("megatron_core", "qalora_group_size")  # of PEFT: without a meaning unless something else is switched on
OPTIMIZER = re.compile(
    r"(?:paged_|flash_|ao_|optimi_)?(adamw|adam|sgd|lion|adafactor)"
    r"((?:_(?:torch|hf|fused|xla|npu|apex|anyprecision|bnb|\d+bit|fp8))*)"
)
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def flat(path: str, raw: dict[str, Any], where: dict[tuple[str, ...], str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of a file without the groups that they may stand in, and the place of each."""
    options: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, value in raw.items():
        grouped = isinstance(value, dict) and GROUPS.fullmatch(str(name)) is not None
        for inner, content in value.items() if grouped else [(name, value)]:
            place = where.get((str(name), str(inner)) if grouped else (str(name),), path)
            if str(inner) in options:
                raise InputError(f"{place}: {inner} stands in two groups; keep one")
            options[str(inner)], places[str(inner)] = content, place
    return options, places


def translate(options: Translation) -> None:
    """Sets ours from theirs, with the defaults of the tool whose arguments they are."""
    options.form = tool = _tool({name for name, _ in options.left()})
    defaults = TOOLS[tool]
    options.rename(NAMES)
    if (kind := options.take("peft_type", "LORA")) != "LORA":
        raise options.fault("peft_type", f"{kind} has no counterpart here, only LORA")
    whole = [options.take("training_type", "lora") != "lora", options.take("full_finetuning", False)]
    if any(whole) or not options.take("use_peft", tool != "trl sft"):
        options.lost.append("full fine-tuning (LoRA in its place; its learning rate is another)")
    model(options)
    quantize(options, defaults.get("load_in_4bit", False))
    lora(options, defaults)
    if tool == "PEFT":
        options.set("data.train", "data/train.jsonl", "the file names no rows: name yours")
        options.set("output_dir", "runs/from-peft", "the file names none: name yours")
        return
    for name, usual in USUAL.items():
        if (given := options.take(name)) != usual:
            options.lose(name, given)
    evaluation = _data(options, defaults)
    train(options, defaults)
    steps(options, evaluation)
    _reports(options)
    options.set("output_dir", options.take("output_dir", "runs/from-trainer", str), of="output_dir")


def _tool(names: set[str]) -> str:
    if names & {"training_type", "train_on_completions", "format_type", "random_seed", "use_loftq"}:
        return "unsloth train"
    if names & {"model_name", "random_state", "use_gradient_checkpointing", "full_finetuning"}:
        return "Unsloth"
    if names & {"use_peft", "lora_r", "lora_target_modules"}:
        return "trl sft"
    return "SFTConfig" if names & {*TRAINING, "max_steps", "max_length", "dataset_name", "output_dir"} else "PEFT"


def model(options: Translation) -> None:
    """Sets the base."""
    name = options.take("model_name_or_path", None, str)
    comment = "the file names no model: name yours" if name is None else ""
    if name is not None and "bnb" in name:
        comment = "bitsandbytes' weights are not read here: name the model that they were made from"
    options.set("model.path", name or "Qwen/Qwen3-0.6B", comment, "model_name_or_path")
    revision = options.take("revision", None, str)
    if revision not in (None, "main"):
        options.set("model.revision", revision, of="revision")
    dtype = str(options.take("dtype", "auto")).removeprefix("torch.")
    if dtype in ("float32", "bfloat16", "float16"):
        options.set("model.dtype", dtype, of="dtype")


def quantize(options: Translation, default: bool = False) -> None:
    """Sets the base's quantization on load."""
    four, eight = options.take("load_in_4bit", default), options.take("load_in_8bit", False)
    options.take("load_in_16bit")
    if four or eight:
        bits = 4 if four else 8
        comment = "MLX's form, not bitsandbytes'; remove this where the model is quantized already"
        options.set("model.quantize", {"bits": bits}, comment, f"load_in_{bits}bit")


def lora(options: Translation, defaults: dict[str, Any]) -> None:
    """Sets the adapter's options."""
    rank = options.take("r", defaults["r"], int)
    alpha = options.take("lora_alpha", defaults["lora_alpha"], float)
    options.set("lora.rank", rank, of="r")
    options.set("lora.alpha", alpha, of="lora_alpha")
    if options.take("use_rslora", False) and rank > 0:
        comment = f"rank-stabilized: {alpha:g} x sqrt({rank})"
        options.set("lora.alpha", alpha * math.sqrt(rank), comment, "use_rslora")
    options.set("lora.dropout", options.take("lora_dropout", defaults["lora_dropout"], float), of="lora_dropout")
    targets = options.take("target_modules", defaults["target_modules"])
    options.set("lora.target_modules", _patterns(options, targets), of="target_modules")
    start = options.take("init_lora_weights", True)
    if start == "gaussian":
        options.set("lora.init", "gaussian", of="init_lora_weights")
    elif start is not True:
        options.lost.append(f"init_lora_weights: {start} (lora_a starts at random, lora_b at zero)")
    layers, last = options.take("layers_to_transform"), options.take("finetune_last_n_layers", None, int)
    if last:
        options.set("lora.layers", f"last:{last}", of="finetune_last_n_layers")
    elif layers is not None:
        options.set("lora.layers", [layers] if isinstance(layers, int) else layers, of="layers_to_transform")
    options.drop(
        {
            "rank_pattern": "one rank for all",
            "alpha_pattern": "one alpha for all",
            "modules_to_save": "adapt them: name them in lora.target_modules",
        }
    )
    for name in ("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"):
        if options.take(name, True) is False:
            options.lost.append(f"{name}: False (choose with lora.target_modules)")
    for name in ("task_type", "inference_mode", "auto_mapping", "peft_version", *SWITCHED):
        options.take(name)  # say nothing about training


def _patterns(options: Translation, targets: Any) -> str | list[str]:
    """PEFT's target_modules in our words: a text is an expression for whole paths, a list has ends of them."""
    if isinstance(targets, str):
        if targets == "all-linear":
            return targets
        if not re.fullmatch(r"\w+(\s*,\s*\w+)*", targets):
            return f"re:{targets}"
        targets = re.split(r"\s*,\s*", targets)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise options.fault("target_modules", "is all-linear, an expression or a list of names")
    return [rf"re:(.*\.)?{re.escape(target)}" if "." in target else target for target in dict.fromkeys(targets)]


def _data(options: Translation, defaults: dict[str, Any]) -> str:
    """Sets the rows, and returns when there are evaluations."""
    evaluation = options.take("eval_strategy", "no") or "no"  # YAML takes no for false
    if evaluation == "no":
        options.set("data.valid", 0.0, "no evaluation there; 0.05 holds out a twentieth", "eval_strategy")
    names, mixture = options.take("dataset_name"), options.take("datasets")
    if mixture:
        options.lose("dataset_name", names, "datasets is what is read")
        _mixture(options, mixture)
    else:
        _named(options, names if isinstance(names, list) else [names] if names else [], evaluation != "no")
    text = options.take("dataset_text_field", "text", str)
    columns(options, [{"text": text}], "dataset_text_field")
    template = options.take("chat_template_path", None, str)
    if template is not None and template.endswith((".jinja", ".j2")):
        options.set("model.chat_template", template, of="chat_template_path")
    else:
        options.lose("chat_template_path", template, "a tokenizer's template, with its tokens: name a template's file")
    completion = options.take("completion_only_loss")
    if options.take("assistant_only_loss", False) or options.take("train_on_completions", False):
        options.set("data.loss_on", "assistant")
    elif completion:
        options.set("data.loss_on", "completion", of="completion_only_loss")
    else:
        options.set("data.loss_on", "all", "as there; where rows hold prompt and completion: completion")
    options.take("format_type")  # what a row holds is seen here
    uncut = options.is_null("max_length")
    length = UNCUT if uncut else options.take("max_length", defaults.get("max_length"), int)
    options.set("data.max_seq_length", length, "null there: no row is cut" if uncut else "", of="max_length")
    if options.take("packing", False):
        options.set("data.packing", True, "a batch is batch_size rows here, max_length tokens each there", "packing")
    return str(evaluation)


def _named(options: Translation, names: list[Any], evaluated: bool) -> None:
    """Sets the rows by what `datasets` calls a data set, or by files."""
    if not all(isinstance(name, str) for name in names):
        raise options.fault("dataset_name", "is the name of a data set or file")
    configuration = options.take("dataset_config", None, str)
    split, other = options.take("dataset_train_split", "train", str), options.take("dataset_test_split", "test", str)
    sources = [rows(name, configuration, None if split == "train" else split) for name in names]
    comment = "" if names else "the file names no rows: name yours"
    found = sources[0] if len(sources) == 1 else sources or "data/train.jsonl"
    options.set("data.train", found, comment, "dataset_name")
    first = next((name for name, source in zip(names, sources, strict=True) if source.startswith("hub:")), None)
    if first is None:
        options.lose("dataset_config", configuration, "of data sets of the hub")
        options.lose("dataset_train_split", split if split != "train" else None, "files are read whole")
    elif evaluated and options.form in ("trl sft", "SFTConfig"):
        comment = "of the first alone" if len(names) > 1 else ""
        options.set("data.valid", rows(first, configuration, other), comment, "dataset_test_split")


def _mixture(options: Translation, mixture: Any) -> None:
    """Sets the rows by TRL's `datasets`, which are read one after the other."""
    if not isinstance(mixture, list) or not all(isinstance(one, dict) for one in mixture):
        raise options.fault("datasets", "is a list of groups such as {path: owner/name}")
    sources = []
    for one in mixture:
        given = Translation(options.path, one, {})
        split = given.take("split", "train", str)
        sources += data_set(options, "datasets", given, None if split == "train" else split)
        share = given.take("fraction")
        options.lose("datasets: fraction", share, "a weight here is how often a row is seen: 0.5 for half of the rows")
        for name, value in given.left():
            options.lose(f"datasets: {name}", value)
    options.set("data.train", sources[0] if len(sources) == 1 else sources, of="datasets")
    if (share := options.take("test_split_size", None, float)) is not None:
        options.set("data.valid", share, of="test_split_size")


def _reports(options: Translation) -> None:
    """Sets who is told. Unsloth's command has a switch for each."""
    names = options.take("report_to", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise options.fault("report_to", "is a name or a list of names")
    switched = {name: options.take(f"enable_{name}", False) for name in ("tensorboard", "wandb")}
    names = [name for name in names if name != "none"] + [name for name, on in switched.items() if on]
    report(options, names, "report_to", {"project": options.take("wandb_project")})
    folder = options.take("tensorboard_dir")
    options.lose("tensorboard_dir", folder if switched["tensorboard"] else None, "below output_dir here")
    options.drop({"run_name": "output_dir names the run"})


def train(options: Translation, defaults: dict[str, Any]) -> None:
    """Sets how it is trained."""
    _epochs(options, defaults["num_train_epochs"])
    size = options.take("per_device_train_batch_size", defaults["per_device_train_batch_size"], int)
    options.set("train.batch_size", size, of="per_device_train_batch_size")
    batches = options.take("gradient_accumulation_steps", defaults["gradient_accumulation_steps"], int)
    options.set("train.gradient_accumulation_steps", batches, of="gradient_accumulation_steps")
    rate = options.take("learning_rate", defaults["learning_rate"], float)
    options.set("train.learning_rate", rate, of="learning_rate")
    _schedule(options, rate, defaults)
    _optimizer(options, defaults)
    norm = None if options.is_null("max_grad_norm") else options.take("max_grad_norm", 1.0, float)
    options.set("train.max_grad_norm", norm or None, "0 or null there: never" if not norm else "", "max_grad_norm")
    if smoothing := options.take("label_smoothing_factor", 0.0, float):
        options.set("train.label_smoothing", smoothing, of="label_smoothing_factor")
    recomputed = options.take("gradient_checkpointing", defaults["gradient_checkpointing"])
    if recomputed not in (False, "none", "false"):
        options.set("train.gradient_checkpointing", True, "selective recomputes less", "gradient_checkpointing")
    seed, other = options.take("seed", None, int), options.take("random_state", None, int)
    options.set("train.seed", next(one for one in (seed, other, defaults["seed"]) if one is not None), of="seed")
    if None not in (seed, other) and seed != other:
        options.lose("random_state", other, "one seed for all")


def _epochs(options: Translation, default: float) -> None:
    number, most = options.take("num_train_epochs", default, float), options.take("max_steps", -1, int)
    if most > 0:
        options.set("train.epochs", None, "max_steps has the last word")
        options.set("train.max_steps", most, of="max_steps")
        return
    if not math.isfinite(number):
        raise options.fault("num_train_epochs", f"is a number, got {number}")
    comment = "" if number.is_integer() else f"{number:g} there; train.max_steps ends a run within an epoch"
    options.set("train.epochs", math.ceil(number), comment, "num_train_epochs")


def _schedule(options: Translation, rate: float, defaults: dict[str, Any]) -> None:
    name = options.take("lr_scheduler_type", defaults["lr_scheduler_type"], str)
    if name not in SCHEDULES:
        options.lose("lr_scheduler_type", name, "cosine in its place")
    steps, share = options.take("warmup_steps", None, float), options.take("warmup_ratio", None, float)
    source = "warmup_steps" if steps else "warmup_ratio"
    warmup = steps or share or (defaults["warmup_steps"] if steps is None and share is None else 0)
    if name == "constant" and warmup:
        options.lose(source, f"{warmup:g}", "constant has no warmup there; constant_with_warmup has")
        warmup = 0
    settings = Translation(options.path, options.take("lr_scheduler_kwargs", {}, dict), {})
    low = settings.take("min_lr_rate", 0.0, float) * rate
    low = settings.take("min_lr", low, float)
    options.set("train.schedule.name", SCHEDULES.get(name, "cosine"), of="lr_scheduler_type")
    options.set("train.schedule.warmup", int(warmup) if 1 <= warmup < 2**53 else warmup, of=source)
    options.set("train.schedule.min_lr", low, of="lr_scheduler_kwargs")
    for key, value in settings.left():
        options.lose(f"lr_scheduler_kwargs.{key}", value)


def _optimizer(options: Translation, defaults: dict[str, Any]) -> None:
    name = options.take("optim", defaults["optim"], str)
    family = OPTIMIZER.fullmatch(name)
    ours = family[1] if family else "adamw"
    if family is None:
        options.lose("optim", name, "adamw in its place")
    comment = f"{name} there; float32 states here" if family and re.search("_[48]bit|fp8", name) else ""
    options.set("train.optimizer.name", ours, comment, "optim")
    decay = options.take("weight_decay", defaults["weight_decay"], float)
    if ours == "adam":
        options.lose("weight_decay", decay, "adamw has it")
    else:
        options.set("train.optimizer.weight_decay", decay, of="weight_decay")
    one, two = options.take("adam_beta1", None, float), options.take("adam_beta2", None, float)
    if ours in ("adamw", "adam", "lion") and (one, two) != (None, None):
        options.set("train.optimizer.betas", [0.9 if one is None else one, 0.999 if two is None else two])
    eps = options.take("adam_epsilon", None, float)
    if ours in ("adamw", "adam") and eps is not None:
        options.set("train.optimizer.eps", eps, of="adam_epsilon")


def steps(options: Translation, evaluation: str = "steps") -> None:
    """Sets what is counted in steps, which are updates there too; a share of all steps has no counterpart."""
    save, log = options.take("save_strategy", "steps") or "no", options.take("logging_strategy", "steps")
    for name, key, strategy in (
        ("eval_steps", "eval.every", evaluation),
        ("save_steps", "checkpoint.every", save),
        ("logging_steps", "log.every", log),
    ):
        count = options.take(name, None, float)
        if strategy in ("epoch", "best"):
            options.lose(name.replace("steps", "strategy"), strategy, f"{key} counts steps: see --dry-run")
        elif count is not None and count >= 1:
            options.set(key, int(count) if math.isfinite(count) else count, of=name)
        elif count:
            options.lose(name, f"{count:g}", f"{key} counts steps: see --dry-run")
    if keep := options.take("save_total_limit", None, int):
        options.set("checkpoint.keep", keep, of="save_total_limit")
    if options.take("load_best_model_at_end"):  # as always here, by the validation loss
        options.take("metric_for_best_model")
