"""axolotl's YAML → ours.

Facts from axolotl 0.19 (utils/schemas/, core/builders/base.py, utils/data/, utils/wandb_.py, prompt_strategies/): most
names stand for Hugging Face's, with other defaults; `sample_packing` fills rows of `sequence_len` tokens, of which a
batch has `micro_batch_size`; `train_on_inputs` learns prompts too; rows above `sequence_len` are dropped; warmup is 3 %
of the steps; `val_set_size` above 1 counts rows; without `adapter` all weights are trained. Data sets are read one
after the other, those for tests from the split named test; rows of type `completion` above `sequence_len` are cut into
pieces; alpaca's prompts are texts of axolotl's own. A `wandb_project` switches W&B on, and every `wandb_*` is put into
the environment.
"""

import re
from typing import Any

from mlx_lora.config_forms import hugging_face
from mlx_lora.config_forms.translation import Translation, columns, data_set, report

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
ALPACA = re.compile(r"alpaca(:\w+)?|alpaca_(chat|instruct|w_system)(\.load(_concise|_no_prompt)?)?")
QUESTIONS = {  # types of rows that hold a prompt and a completion by other names
    "alpaca_chat.load_qa": {"prompt": "question", "completion": "answer"},
    "alpaca_chat.load_camel_ai": {"prompt": "message_1", "completion": "message_2"},
}
FIELDS = {  # of a type that is a group: our names, and the columns where it does not say
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
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
    _reports(options)
    patience = options.take("early_stopping_patience", None, int)
    if patience and options.options["data.valid"][0] == 0:
        options.lose("early_stopping_patience", patience, "needs validation rows: set data.valid")
    elif patience:
        options.set("eval.early_stopping", patience, of="early_stopping_patience")
    options.set("output_dir", options.take("output_dir", "./model-out", str), of="output_dir")
    for name in ("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model"):
        options.take(name)  # config.json says so too


def _data(options: Translation) -> None:
    name = "pretraining_dataset" if "pretraining_dataset" in options else "datasets"
    sets = _sets(options, name)
    kinds = _train(options, name, sets)
    texts = name == "pretraining_dataset" or kinds == {"text"}
    tests = _sets(options, "test_datasets")
    share = options.take("val_set_size", 0.0, float)
    if tests:
        found = _test(options, tests, sets)
        options.set("data.valid", found[0], of="test_datasets")
        options.lose("test_datasets", found[1:], "one source validates")
    elif share > 1:
        options.lose("val_set_size", f"{share:g}", "a number of rows; data.valid is a share of them, or a file")
        options.set("data.valid", 0.05, "a share: see val_set_size above", "val_set_size")
    else:
        options.set("data.valid", share, of="val_set_size")
    if options.take("train_on_inputs", False) or texts:
        options.set("data.loss_on", "all", of="train_on_inputs")
    length = options.take("sequence_len", 512, int)
    options.set("data.max_seq_length", length, of="sequence_len")
    too_long = options.take("excess_length_strategy", "drop", str)
    if too_long not in TOO_LONG:
        raise options.fault("excess_length_strategy", f"is drop, truncate or raise, got {too_long}")
    options.set("data.on_overflow", TOO_LONG[too_long], of="excess_length_strategy")
    if name == "pretraining_dataset":
        options.set("data.on_overflow", "truncate", "as there; split reads the rest too")
    elif texts:
        options.set("data.on_overflow", "split", "as there")
    packed = options.take("sample_packing", False)
    options.take("eval_sample_packing")
    if packed:
        why = "rows of one length share a batch; train.batch_size counts rows, not packs: raise it"
        options.lose("sample_packing", packed, why)
    if options.take("shuffle_merged_datasets", True) is False:
        options.lost.append("shuffle_merged_datasets: False (rows are always shuffled)")
    if settings := options.take("chat_template_kwargs", {}, dict):
        options.set("model.template_kwargs", settings, of="chat_template_kwargs")
    for name in ("dataset_prepared_path", "skip_prepare_dataset"):
        options.take(name)  # about a copy of the rows


def _reports(options: Translation) -> None:
    """Sets who is told."""
    project = options.take("wandb_project", None, str)
    told = {"wandb": options.take("use_wandb", False) or project, "tensorboard": options.take("use_tensorboard", False)}
    settings = {name: options.take(f"wandb_{name}") for name in ("entity", "mode")}
    report(options, [name for name, on in told.items() if on], "wandb_project", {"project": project, **settings})
    options.drop({"wandb_name": "output_dir names the run"})


def _sets(options: Translation, name: str) -> list[dict[str, Any]]:
    """A list of data sets, each a group."""
    found = options.take(name, [])
    found = [{"path": found}] if isinstance(found, str) else [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise options.fault(name, "is a list of groups such as {path: rows.jsonl}")
    return found


def _train(options: Translation, name: str, sets: list[dict[str, Any]]) -> set[str]:
    """Sets the sources, the form and columns of their rows and the chat template; returns the forms ("": not known)."""
    sources, found, comments = [], [], []
    template = options.take("chat_template"), options.take("chat_template_jinja")
    for one in sets:
        given = Translation(options.path, one, {})
        split = given.take("split", "train", str)
        sources += data_set(options, name, given, None if split == "train" else split)
        form, names, comment = _rows(options, given, name)
        own = given.take("chat_template"), given.take("chat_template_jinja")
        found.append((form, names, _template(options, *(own if any(own) else template))))
        comments.append(comment)
        given.take("ds_type")
        for inner, value in given.left():
            options.lose(f"{name}: {inner}", value)
    if not found:
        options.set("data.train", "data/train.jsonl", "the file names no rows: name yours")
        found = [("", {}, _template(options, *template))]
    else:
        comment = "; ".join(dict.fromkeys(filter(None, comments)))
        options.set("data.train", sources[0] if len(sources) == 1 else sources, comment, name)
    forms, renamed, templates = zip(*found, strict=True)
    if forms.count(forms[0]) == len(forms) and forms[0]:
        options.set("data.format", forms[0], of=name)
    columns(options, renamed, name)
    if templates.count(templates[0]) != len(templates):
        options.lost.append(f"{name}: chat_template (one holds for all sources)")
    elif templates[0]:
        options.set("model.chat_template", templates[0], of="chat_template")
    return set(forms)


def _test(options: Translation, tests: list[dict[str, Any]], sets: list[dict[str, Any]]) -> list[str]:
    """The sources to validate on; their rows are read as those to train on."""
    sources = []
    for one in tests:
        given = Translation(options.path, one, {})
        sources += data_set(options, "test_datasets", given, given.take("split", "test", str))
        given.take("ds_type")
        for inner, value in given.left():
            if any(other.get(inner) != value for other in sets):
                options.lose(f"test_datasets: {inner}", value, "read as the rows to train on")
    return sources


def _rows(options: Translation, given: Translation, name: str) -> tuple[str, dict[str, str], str]:
    """The form of a data set's rows ("": not known), the names of their columns, and what is to be said of them."""
    kind = given.take("type", "pretrain" if name == "pretraining_dataset" else None)
    own = "without the words that axolotl puts around prompts"
    if isinstance(kind, dict):
        fields = Translation(options.path, kind, {})
        names = {ours: fields.take(theirs, ours, str) for theirs, ours in FIELDS.items() if theirs in fields}
        for inner, value in fields.left():
            options.lose(f"{name}: type: {inner}", value, "the chat template writes prompts")
        return "alpaca", names, own
    if kind == "pretrain":
        return "text", {"text": given.take("text_column", "text", str)}, ""
    if kind == "completion":
        return "text", {"text": given.take("field", "text", str)}, ""
    if kind == "chat_template":
        return _conversations(options, given, name)
    if str(kind).startswith("sharegpt"):
        return "sharegpt", {}, ""
    if ALPACA.fullmatch(str(kind)):
        return "alpaca", {}, f"{kind} rows: {own}"
    if str(kind) in QUESTIONS:
        return "completion", QUESTIONS[str(kind)], f"{kind} rows: {own}"
    options.lose(f"{name}: type", kind, "what the rows hold is seen by their keys")
    return "", {}, ""


def _conversations(options: Translation, given: Translation, name: str) -> tuple[str, dict[str, str], str]:
    """What `_rows` returns of the type `chat_template`."""
    mapped = {"role": "role", "content": "content"} | given.take("message_property_mappings", {}, dict)
    mapped |= {ours: theirs for ours in ("role", "content") if (theirs := given.take(f"message_field_{ours}"))}
    role, content = mapped.pop("role"), mapped.pop("content")
    form, key = ("sharegpt", "conversations") if (role, content) == ("from", "value") else ("messages", "messages")
    if form == "messages" and (role, content) != ("role", "content"):
        options.lose(f"{name}: message_property_mappings", f"{role}, {content}", "role and content, or from and value")
    for ours, theirs in mapped.items():
        options.lose(f"{name}: message_property_mappings: {ours}", theirs if theirs != ours else None)
    if given.take("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        options.lost.append(f"{name}: roles_to_train (assistant is what is learned)")
    if (ends := given.take("train_on_eos", "turn")) != "turn":
        options.lose(f"{name}: train_on_eos", ends, "the end of each answer is learned")
    names = {key: given.take("field_messages", "messages", str)}
    if tools := given.take("field_tools", None, str):
        names["tools"] = tools
    return form, names, ""


def _template(options: Translation, name: Any, text: Any) -> str | None:
    """The chat template by its name and, where that is jinja, by its text or file; None for the model's own."""
    if name == "jinja" or (text and not name):
        return text if isinstance(text, str) else None
    if name not in (None, "tokenizer_default"):
        line = f"chat_template: {name} (the model's own is used; model.chat_template takes a file)"
        options.lost += [line] if line not in options.lost else []
    return None
