"""axolotl's YAML → ours.

Facts from axolotl 0.19 (utils/schemas/, core/builders/base.py, utils/data/sft.py): most names stand for
Hugging Face's, with other defaults; `sample_packing` fills rows of `sequence_len` tokens, of which a batch has
`micro_batch_size`; `train_on_inputs` learns prompts too; rows above `sequence_len` are dropped; warmup is 3 % of the
steps; `val_set_size` above 1 counts rows; without `adapter` all weights are trained.
"""

from typing import Any

from mlx_lora.config_forms import hugging_face
from mlx_lora.config_forms.translation import Translation, rows

SIGNS = {
    "base_model", "datasets", "micro_batch_size", "sequence_len", "val_set_size", "sample_packing", "adapter",
    "lora_target_linear", "evals_per_epoch", "saves_per_epoch", "train_on_inputs", "lr_scheduler", "lora_model_dir",
}  # fmt: skip
NAMES = {  # Hugging Face's for axolotl's
    "base_model": "model_name_or_path",
    "revision_of_model": "revision",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layers_to_transform": "layers_to_transform",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
}
DEFAULTS: dict[str, Any] = hugging_face.PEFT | {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": None,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "seed": 42,
}
ROWS = {  # how a row may be written, where it is read here too: as messages, or as sharegpt's conversations
    "field": ("text",),
    "text_column": ("text",),
    "field_messages": ("messages", "conversations"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
}
TOO_LONG = {"drop": "drop", "truncate": "truncate", "raise": "error"}


def translate(options: Translation) -> None:
    """Sets ours from axolotl's."""
    options.rename(NAMES)
    for name in ("rl", "reward_model", "process_reward_model"):
        if name in options:
            raise options.fault(name, f"{options.take(name)} has no counterpart: only what to write is learned here")
    if "learning_rate" not in options:
        raise options.fault("learning_rate", "is missing, which axolotl needs")
    if options.take("adapter") not in ("lora", "qlora"):
        options.lost.append("full fine-tuning (LoRA in its place; its learning rate is another)")
    hugging_face.model(options)
    hugging_face.quantize(options)
    linear = options.take("lora_target_linear", False)
    hugging_face.lora(options, DEFAULTS)
    if linear:
        options.set("lora.target_modules", "all-linear", of="lora_target_linear")
    start = options.take("lora_model_dir", None, str)
    if start:
        options.set("lora.start_from", start, of="lora_model_dir")
    _data(options)
    ratio = options.take("cosine_min_lr_ratio", 0.0, float)
    hugging_face.train(options, DEFAULTS)
    if ratio:
        low = ratio * options.options["train.learning_rate"][0]
        options.set("train.schedule.min_lr", low, f"{ratio:g} of the rate", "cosine_min_lr_ratio")
    options.drop(dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), "a number of steps here: see --dry-run"))
    hugging_face.steps(options, str(options.take("eval_strategy", "steps") or "no"))
    patience = options.take("early_stopping_patience", None, int)
    if patience and options.options["data.valid"][0] == 0:
        options.lose("early_stopping_patience", patience, "needs validation rows: set data.valid")
    elif patience:
        options.set("eval.early_stopping", patience, of="early_stopping_patience")
    options.set("output_dir", options.take("output_dir", "./model-out", str), of="output_dir")
    for name in ("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model"):
        options.take(name)  # config.json says so too


def _data(options: Translation) -> None:
    texts = "pretraining_dataset" in options
    sets = _sets(options, "pretraining_dataset") if texts else _sets(options, "datasets")
    kind = _set(options, "data.train", sets, "datasets")
    valid = _sets(options, "test_datasets")
    share = options.take("val_set_size", 0.0, float)
    if valid:
        _set(options, "data.valid", valid, "test_datasets")
    elif share > 1:
        options.lose("val_set_size", f"{share:g}", "a number of rows; data.valid is a share of them, or a file")
        options.set("data.valid", 0.05, "a share: see val_set_size above", "val_set_size")
    else:
        options.set("data.valid", share, of="val_set_size")
    if options.take("train_on_inputs", False) or texts or kind == "completion":
        options.set("data.loss_on", "all", of="train_on_inputs")
    length = options.take("sequence_len", 512, int)
    options.set("data.max_seq_length", length, of="sequence_len")
    too_long = options.take("excess_length_strategy", "drop", str)
    if too_long not in TOO_LONG:
        raise options.fault("excess_length_strategy", f"is drop, truncate or raise, got {too_long}")
    options.set("data.on_overflow", TOO_LONG[too_long], of="excess_length_strategy")
    packed = options.take("sample_packing", False)
    options.take("eval_sample_packing")
    if packed:
        why = "rows of one length share a batch; train.batch_size counts rows, not packs: raise it"
        options.lose("sample_packing", packed, why)
    if options.take("shuffle_merged_datasets", True) is False:
        options.lost.append("shuffle_merged_datasets: False (rows are always shuffled)")
    template = options.take("chat_template", "tokenizer_default")
    if template != "tokenizer_default":
        options.lose("chat_template", template, "the model's own is used")
    for name in ("dataset_prepared_path", "skip_prepare_dataset"):
        options.take(name)  # about a copy of the rows


def _sets(options: Translation, name: str) -> list[dict[str, Any]]:
    """A list of data sets, each a group."""
    found = options.take(name, [])
    found = [{"path": found}] if isinstance(found, str) else [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise options.fault(name, "is a list of groups such as {path: rows.jsonl}")
    return found


def _set(options: Translation, key: str, sets: list[dict[str, Any]], name: str) -> str:
    """Sets `key` to the first data set, lists what else was said, and returns its type."""
    first, *others = sets or [{}]
    given = Translation(options.path, first, {})
    files = given.take("data_files")
    path = given.take("path", None, str)
    file = files[0] if isinstance(files, list) and files else files or path
    kind = str(given.take("type", ""))
    given.take("ds_type")
    comment = f"{kind} rows there" if kind not in ("", "chat_template", "completion") else ""
    comment = comment if file else "the file names no rows: name yours"
    source = rows(str(file or "data/train.jsonl"))
    if source.startswith("hub:"):
        configuration, split = given.take("name"), given.take("split")
        source += (f"@{configuration}" if configuration else "") + (f":{split}" if split else "")
    options.set(key, source, comment, name)
    for inner, known in ROWS.items():
        if (value := given.take(inner)) not in known:
            options.lose(f"{name}: {inner}", value)
    if given.take("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        options.lost.append(f"{name}: roles_to_train (assistant is what is learned)")
    if (template := given.take("chat_template", "tokenizer_default")) != "tokenizer_default":
        options.lose(f"{name}: chat_template", template, "the model's own is used")
    for inner, value in given.left():
        options.lose(f"{name}: {inner}", value)
    for other in others:
        options.lose(name, other.get("path"), "put the rows in one file")
    return kind
