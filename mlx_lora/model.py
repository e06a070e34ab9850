"""The base model and its tokenizer, from a hub id, a folder or a GGUF file, loaded through mlx-lm."""

import hashlib
import inspect
import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora import blas, chat, gguf_base
from mlx_lora.config import Model
from mlx_lora.errors import InputError
from mlx_lora.gguf_layout import ARCHITECTURES

# Everything that a model folder needs; never *.py.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
WEIGHTS = ["model*.safetensors"]
# The small files that decide a run's numbers.
DIGESTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"} | {
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
# Rope settings that mlx-lm computes as transformers does (its longrope uses the long factors for short rows too).
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass
class Base:
    """A frozen model with its tokenizer (mlx-lm's wrapper), where it came from, and what tells it from others."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    identity: dict[str, str]
    other_template: bool = False  # the tokenizer's chat template is not the one in the folder


def load(options: Model, weights: bool = True, as_stored: bool = False, evaluated: bool = True) -> Base:
    """Loads the base and its tokenizer.

    Nothing that a model ships is executed. With `weights` false the model has its structure only (random, unevaluated
    weights) and no weight file is downloaded or read, for `--dry-run`. With `as_stored`, arrays keep the type that they
    are stored in on a CPU too (but for a base that is quantized on load: it is the one that training saw). With
    `evaluated` false, the weights are left to `evaluate`.
    Raises InputError naming the model and what is wrong with it.
    """
    folder = resolve(options, weights)
    config = _config(folder)
    changes = _changes(config, folder)
    try:
        if weights:
            model, config = mlx_lm.utils.load_model(folder, lazy=True, model_config=changes, trust_remote_code=False)
        else:
            model, config = _structure(folder, changes)
    except InputError:
        raise
    except Exception as error:  # models raise anything at all for a config that does not suit them
        raise InputError(f"model: {options.path} cannot be loaded: {_words(error)}") from None
    _check_rope(model, config, folder)
    tokenizer = load_tokenizer(folder, config, options)
    _set_precision(model, options, config, mx.default_device() == mx.cpu, as_stored)
    model.freeze()
    model.eval()
    if weights and evaluated:
        evaluate(model)
    changed = options.chat_template is not None or bool(options.template_kwargs)
    return Base(model, tokenizer, config, folder, _identity(options, folder, weights), changed)


def structure(options: Model, folder: Path, on_cpu: bool) -> nn.Module:
    """The frozen model that a folder's config.json describes: random, unevaluated arrays of the right shapes and types.

    No other file is needed. `on_cpu`: whether it is to compute on a CPU, perhaps another machine's. Raises InputError
    naming the model and what is wrong with it.
    """
    config = _config(folder)
    try:
        model, config = _structure(folder, _changes(config, folder))
    except InputError:
        raise
    except Exception as error:  # models raise anything at all for a config that does not suit them
        raise InputError(f"model: {options.path} cannot be loaded: {_words(error)}") from None
    _check_rope(model, config, folder)
    _set_precision(model, options, config, on_cpu, False)
    model.freeze()
    model.eval()
    return model


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None, options: Model | None = None) -> Any:
    """mlx-lm's tokenizer of a model folder, with the chat template of `options`. Raises InputError where it cannot be
    read or wants to run code."""
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=(config or {}).get("eos_token_id")
        )
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = _words(error)
        if "trust_remote_code" in reason:
            reason = "it asks to run code of its own, which is never done here"
        raise InputError(f"model: the tokenizer in {folder} cannot be loaded: {reason}") from None
    if options is not None:
        chat.configure(tokenizer, options.chat_template, options.template_kwargs)
    return tokenizer


def resolve(options: Model, weights: bool = True) -> Path:
    """The local folder of a model: a GGUF file is converted once, a hub id is downloaded once."""
    path = Path(options.path)
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"model: {options.path} cannot be used ({error.strerror})") from None
    local = is_local(options.path)
    if local and options.revision is not None:
        raise InputError(f"model.revision: {options.path} is local and has no revisions; remove it")
    if file := gguf_file(options):
        return gguf_base.convert(file, weights=weights)
    if local:
        if not (path / "config.json").is_file():
            raise InputError(f"model: {options.path} is no model folder (it has no config.json)")
        return path
    try:
        return Path(
            huggingface_hub.snapshot_download(
                options.path,
                revision=options.revision,
                allow_patterns=SMALL_FILES + (WEIGHTS if weights else []),
            )
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError) as error:
        raise InputError(
            f"model: {options.path} is neither a local path nor available on the hub: {_words(error)}"
        ) from None


def is_local(path: str) -> bool:
    """Whether a model's path means a file or folder of this machine, there or not, and no hub id."""
    return path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1 or Path(path).exists()


def gguf_file(options: Model) -> Path | None:
    """The GGUF file that a base is made from, if it is."""
    path = Path(options.path)
    return path if path.suffix == ".gguf" or path.is_file() else None


def device() -> str:
    """The name of the device that MLX computes on, for logs and tables."""
    info = mx.device_info()
    return f"{info.get('device_name', 'unknown')} ({mx.default_device().type.name})"


def describe(model: nn.Module) -> str:
    """The size and form of a base without adapter, such as "0.35 GB: 4 bits in groups of 64, the rest bfloat16"."""
    packed: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    for _, module in model.named_modules():
        for name, array in module.items():
            if not isinstance(array, mx.array) or name.startswith("_"):
                continue
            if "scales" in module and name in ("weight", "scales", "biases"):
                kind = "" if module.mode == "affine" else f" ({module.mode})"
                packed[f"{module.bits} bits in groups of {module.group_size}{kind}"] += array.nbytes
            else:
                dense[str(array.dtype).rpartition(".")[2]] += array.nbytes
    forms = [form for form, _ in packed.most_common()]
    if rest := " and ".join(name for name, _ in dense.most_common()):
        forms.append(f"the rest {rest}" if forms else rest)
    return f"{(packed.total() + dense.total()) / 1e9:.2f} GB: " + ", ".join(forms)


def prepare_device() -> list[str]:
    """What a person should know about this machine before a run."""
    if mx.default_device() != mx.cpu or not sys.platform.startswith("linux"):
        return []
    notes = []
    if blas.too_late:
        notes.append("OpenBLAS is not loaded: import mlx_lora before mlx, or matrix products are 25 to 80 times slower")
    elif not blas.loaded:
        notes.append(
            "OpenBLAS is not loaded: matrix products are 25 to 80 times slower. Install it: "
            "apt-get install libopenblas0-pthread (Debian, Ubuntu), dnf install openblas (Fedora)"
        )
    if not can_compile():
        notes.append("no C++ compiler (g++): steps run uncompiled. Install it: apt-get install g++")
    return notes


def can_compile() -> bool:
    """Whether `mx.compile` works: on a Linux CPU, MLX builds its fused kernels with g++."""
    return mx.default_device() != mx.cpu or not sys.platform.startswith("linux") or shutil.which("g++") is not None


# ---- what mlx-lm would get wrong in silence --------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model: {folder / 'config.json'} cannot be read: {_words(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"model: {folder / 'config.json'} names no model_type")
    if config.get("model_file") or config.get("auto_map"):
        key = "model_file" if config.get("model_file") else "auto_map"
        raise InputError(
            f"model: {folder / 'config.json'} asks to run code of its own ({key}), which is never done here; "
            "use a model that mlx-lm supports by itself"
        )
    return config


def _changes(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Entries of config.json in the form that mlx-lm's model reads.

    Folders saved by transformers 5 hold `rope_parameters` in the place of `rope_theta` and `rope_scaling`; models of
    mlx-lm that do not know it would run with a default theta and wrong logits.
    """
    changes: dict[str, Any] = {}
    known = inspect.signature(_arguments_type(config, folder)).parameters
    if "tie_word_embeddings" not in config and config["model_type"] in {known.model_type for known in ARCHITECTURES}:
        # transformers' default is untied; mlx-lm's llama and qwen2 would drop lm_head without a word
        stored = [name for file in folder.glob("model*.safetensors") for name in mx.load(str(file))]
        changes["tie_word_embeddings"] = bool(stored) and "lm_head.weight" not in stored
    if "num_experts" in known and "num_experts" not in config and "num_local_experts" in config:
        changes["num_experts"] = config["num_local_experts"]
    # Where both stand, transformers takes rope_scaling.
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in known:
        return changes
    if any(isinstance(value, dict) for value in rope.values()):
        if "rope_parameters" not in known:
            raise InputError(f"model: {folder / 'config.json'}: rope settings per kind of layer are not supported")
        return changes
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.get("rope_theta", config.get("rope_theta", 1.0))
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        raise InputError(f"model: {folder / 'config.json'}: rope_theta is {theta!r}, not a number")
    if "rope_theta" in rope:
        changes["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in known and "partial_rotary_factor" in rope:
        changes["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    elif "partial_rotary_factor" not in known and "partial_rotary_factor" in config:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    changes["rope_scaling"] = _rope_scaling(rope, config, folder)
    return changes


def _rope_scaling(rope: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    where = f"model: {folder / 'config.json'}: rope scaling {kind!r}"
    if kind not in ROPE_TYPES:
        raise InputError(f"{where} is not supported; known: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where} with partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    if "attention_factor" in rope or rope.get("truncate") is False or ("mscale" in rope) != ("mscale_all_dim" in rope):
        raise InputError(f"{where} with attention_factor, truncate or only one of the two mscales is not supported")
    if kind == "default":
        return None
    if kind in ("yarn", "llama3"):
        # transformers falls back to the model's length, mlx-lm to constants
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope | {"type": kind, "rope_type": kind}


def _check_rope(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Raises InputError where the model's code does not use the scaling that its config asks for."""
    scaling = config.get("rope_scaling")
    kind = scaling.get("rope_type", "default") if isinstance(scaling, dict) else "default"
    plain = [module for module in model.modules() if isinstance(module, nn.RoPE)]
    scaled = any(module.scale != 1 for module in plain)
    scaled = scaled or any(type(module).__module__ == "mlx_lm.models.rope_utils" for module in model.modules())
    if kind != "default" and plain and not scaled:
        raise InputError(
            f"model: {folder / 'config.json'}: rope scaling {kind!r} is not used by mlx-lm's {config['model_type']}; "
            "remove it from the file to run the model without"
        )


def _arguments_type(config: dict[str, Any], folder: Path) -> type:
    try:
        return mlx_lm.utils._get_classes(config)[1]
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f"model: {folder / 'config.json'}: mlx-lm does not know the model type {config['model_type']!r}"
        ) from None


def _structure(folder: Path, changes: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model as its config describes it, and the config; no weight file is looked at."""
    config = mlx_lm.utils.load_config(folder) | changes
    kind, arguments = mlx_lm.utils._get_classes(config)
    model = kind(arguments.from_dict(config))
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored in ("float32", "bfloat16", "float16"):
        model.set_dtype(getattr(mx, stored))
    if quantization := config.get("quantization"):
        group = quantization["group_size"]

        def choice(path: str, module: nn.Module) -> Any:
            divides = hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0
            return quantization.get(path, divides)

        nn.quantize(model, group, quantization["bits"], mode=quantization.get("mode", "affine"), class_predicate=choice)
    return model, config


def _words(error: Exception) -> str:
    """An error of another library in one line."""
    text = " ".join(str(error).split())
    return f"{text} is missing" if isinstance(error, KeyError) else text or type(error).__name__


def _set_precision(model: nn.Module, options: Model, config: dict[str, Any], on_cpu: bool, as_stored: bool) -> None:
    """Casts and quantizes, unevaluated."""
    quantized = any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    quantized = quantized or "quantization" in config or "quantization_config" in config
    if options.quantize and quantized:
        raise InputError(f"model.quantize: {options.path} is quantized already; remove model.quantize")
    if dtype := compute_type(options, on_cpu, as_stored):
        _cast(model, dtype)
    if options.quantize:
        layers = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
        forms = quantized_forms(model, layers, options.quantize.bits, options.quantize.group_size)
        if not forms:
            raise InputError(
                f"model.quantize.group_size: {options.quantize.group_size} divides no layer of {options.path}; "
                "use a smaller one"
            )
        nn.quantize(model, class_predicate=lambda path, _: forms.get(path, False))


def compute_type(options: Model, on_cpu: bool, as_stored: bool) -> mx.Dtype | None:
    """What a base is cast to before it is quantized or used; None: it keeps the types that it is stored in.

    A CPU is fast in float32 only. Elsewhere a base that is quantized on load computes in bfloat16 however it is
    stored: float16 overflows in training, and float32 would double the activations of a base made small.
    """
    if options.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, options.dtype)
        return dtype
    if options.quantize:
        return mx.float32 if on_cpu else mx.bfloat16
    return mx.float32 if on_cpu and not as_stored else None


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Casts the floating-point parameters, but none to fewer bits that the model wants whole (as mlx-lm's convert)."""
    chosen = getattr(model, "cast_predicate", None) if dtype != mx.float32 else None

    def cast(path: str, array: mx.array) -> mx.array:
        wanted = mx.issubdtype(array.dtype, mx.floating) and (chosen is None or chosen(path))
        return array.astype(dtype) if wanted else array

    model.update(tree_map_with_path(cast, model.parameters()))


def evaluate(model: nn.Module) -> None:
    """Reads, casts and quantizes the weights one array after the other.

    All at once, many sources would be in memory beside what is made of them. Here the peak is the resulting model and
    one layer's source; the largest layers, the embedding and the head, come first, while little else is there.
    """
    parameters = tree_flatten(model.parameters())
    for _, array in sorted(parameters, key=lambda item: any(part.isdigit() for part in item[0].split("."))):
        mx.eval(array)
    mx.clear_cache()  # buffers of the sources' sizes, which nothing else has


def quantized_forms(
    model: nn.Module, layers: dict[str, nn.Module], bits: int, group_size: int
) -> dict[str, dict[str, Any]]:
    """What quantizing makes of a model's dense `layers`: {path: {group_size, bits, mode}}. Those whose rows do not
    divide into groups, and those that the model leaves out, stay as they are."""
    choice = getattr(model, "quant_predicate", None) or (lambda path, module: True)  # such as routers, at 8 bits
    forms = {}
    for path, module in layers.items():
        chosen = choice(path, module)
        form: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        form |= chosen if isinstance(chosen, dict) else {}
        if chosen and module.weight.shape[-1] % form["group_size"] == 0:
            forms[path] = form
    return forms


def _identity(options: Model, folder: Path, weights: bool) -> dict[str, str]:
    """What a resumed run must find again: the model's name and a digest of its configuration, tokenizer and weights.

    Of each weight file the size and 16 evenly spaced blocks of 64 KiB are digested, header included, which is quick
    for any size and catches every retrained or requantized copy, but not a single changed byte.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name in DIGESTED:
            digest.update(file.name.encode() + file.read_bytes())
        elif weights and file.match("model*.safetensors"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for part in range(16):
                    stream.seek(size * part // 16)
                    digest.update(stream.read(65536))
    identity = {"name": options.path, "digest": digest.hexdigest()}
    # The hub's cache keeps each snapshot in a folder named by its commit.
    if folder.parent.name == "snapshots":
        identity["revision"] = folder.name
    return identity
