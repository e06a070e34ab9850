"""The folder of a merged model: weights, config.json, and the base's tokenizer and settings."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import files, model
from mlx_lora.errors import InputError
from mlx_lora.merging import Merge, Report, type_name

SHARD_BYTES = 5 << 30
# Entries of config.json that mlx-lm reads, while transformers 5 writes others or none; `model.load` puts them right.
MLX_ENTRIES = ("num_experts", "partial_rotary_factor", "rope_scaling", "rope_theta", "tie_word_embeddings")
# Small files of the base that describe its weights, or an adapter, and would be wrong beside the merged ones.
NOT_COPIED = ("config.json", "*.index.json", "hf_quant_config.json", "quantize_config.json", "adapter*.json")


def write(folder: Path, report: Report, force: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the merged model that `report` measured: weights, config.json, and the base's tokenizer and settings.

    The folder is whole or absent. Raises InputError where the merge is refused (and not forced), or the folder is
    there already, or cannot be written.
    """
    if report.refused and not force:
        raise InputError(report.refusal())
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: is there already; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.new_folder(folder) as temporary:
            _fill(temporary, report.merge, shard_bytes)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        raise InputError(f"{folder}: cannot be written ({error})") from None


def _fill(folder: Path, merge: Merge, shard_bytes: int) -> None:
    parameters = merge.parameters()
    dense = not any(name.endswith(".scales") for name in parameters)
    weights = _per_expert(merge, _stored_names(merge, parameters)) if dense else parameters
    files.write_json(folder / "config.json", _config(merge, weights, dense))
    for pattern in model.SMALL_FILES:
        for file in merge.base.folder.glob(pattern):
            if not any(file.match(other) for other in NOT_COPIED):
                shutil.copyfile(file, folder / file.name)
    if merge.base.other_template and isinstance(merge.base.tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(merge.base.tokenizer.chat_template, encoding="utf-8")
    del parameters
    _save(folder, weights, "pt" if dense else "mlx", shard_bytes)


def _config(merge: Merge, weights: dict[str, mx.array], dense: bool) -> dict[str, Any]:
    """The base's config.json with what has changed, and with the entries that mlx-lm would miss."""
    known = merge.base.config
    config = json.loads((merge.base.folder / "config.json").read_text(encoding="utf-8"))
    config |= {key: known[key] for key in MLX_ENTRIES if key in known}
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    if not dense and "quantization" in known and merge.keeps_forms:
        config["quantization"] = config["quantization_config"] = known["quantization"]
    elif not dense:
        forms = Counter(json.dumps(form) for form in merge.forms.values() if form)
        common = json.loads(forms.most_common(1)[0][0])
        others = {path: form for path, form in merge.forms.items() if form and form != common}
        config["quantization"] = config["quantization_config"] = common | others
    types: Counter[str] = Counter()
    for array in weights.values():
        types[type_name(array.dtype)] += array.nbytes * mx.issubdtype(array.dtype, mx.floating)
    return config | {key: types.most_common(1)[0][0] for key in ("dtype", "torch_dtype") if key in config and dense}


def _stored_names(merge: Merge, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """A dense base's own tensors, names included (mlx-lm renames some and leaves some out), with the merged ones in
    their places; where those have none, `parameters` as they are.

    What mlx-lm's `sanitize` passes on is found again by its identity.
    """
    base = merge.base
    if "quantization" in base.config or "quantization_config" in base.config:
        return parameters
    stored: dict[str, mx.array] = {}
    for file in sorted(base.folder.glob("model*.safetensors")):
        stored |= mx.load(str(file))
    places = {id(array): name for name, array in stored.items()}
    loaded = _sanitized(base.model, stored)
    used = {places.get(id(array)) for array in loaded.values()}
    # A second copy of tied embeddings would no longer be equal to the first.
    weights = {name: array for name, array in stored.items() if name in used or not name.endswith("lm_head.weight")}
    changed = set(merge.changed)
    for path, array in loaded.items():
        if place := places.get(id(array)):
            weights[place] = parameters[path]
        elif path.rpartition(".")[0] in changed:
            experts = _experts(path, parameters[path])
            if not experts.keys() <= stored.keys():
                return parameters
            weights |= experts
    return weights


def _per_expert(merge: Merge, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts that mlx-lm stacks, one by one as transformers reads them, where mlx-lm reads them so too."""
    apart: dict[str, mx.array] = {}
    for name, array in weights.items():
        apart |= _experts(name, array)
    together = _sanitized(merge.base.model, weights)
    return apart if _sanitized(merge.base.model, apart).keys() == together.keys() else weights


def _experts(name: str, array: mx.array) -> dict[str, mx.array]:
    """model.layers.0.mlp.switch_mlp.up_proj.weight (E, out, in) → model.layers.0.mlp.experts.0.up_proj.weight, …"""
    stem, found, rest = name.partition(".switch_mlp.")
    if not found:
        return {name: array}
    return {f"{stem}.experts.{number}.{rest}": array[number] for number in range(len(array))}


def _sanitized(network: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """What mlx-lm makes of the tensors of a file, unevaluated."""
    return network.sanitize(dict(weights)) if hasattr(network, "sanitize") else weights


def _save(folder: Path, weights: dict[str, mx.array], form: str, shard_bytes: int) -> None:
    """Safetensors files and their index; each array is computed, written and dropped."""
    total = sum(array.nbytes for array in weights.values())
    shards = list(_shards(weights, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights.pop(name) for name in names}, {"format": form})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    files.write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: dict[str, mx.array], limit: int) -> Iterator[list[str]]:
    """Names of arrays that fit into a file together; one that is larger gets its own."""
    names: list[str] = []
    size = 0
    for name, array in weights.items():
        if names and size + array.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    yield names
