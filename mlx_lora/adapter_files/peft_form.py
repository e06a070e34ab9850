"""PEFT's form of an adapter: adapter_model.safetensors and adapter_config.json.

Facts from PEFT 0.21 (tuners/lora/layer.py, utils/other.py, utils/transformers_weight_conversion.py) and vLLM 0.30
(vllm/lora/peft_helper.py, lora_model.py, lora_weights.py). Names are `base_model.model.`, the module's path in
Hugging Face's model, and `lora_A.weight` (rank, in), `lora_B.weight` (out, rank) or, of an embedding,
`lora_embedding_A` (rank, vocabulary), `lora_embedding_B` (dims, rank).

Experts have two forms: modules for each (`experts.3.gate_proj`), as transformers 4 had them and vLLM wants them, and
PEFT's for the fused parameters of transformers 5, where A (E · rank, in) has E outermost and B (out, rank · E) has E
innermost. PEFT turns the first into the second when it loads it, so the first is written and both are read.
"""

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import files, lora
from mlx_lora.adapter_files.reading import arrays_of, base_named, finite_number, positive_whole, settings_of
from mlx_lora.errors import InputError
from mlx_lora.gguf_layout import ARCHITECTURES
from mlx_lora.lora import Adapter, Pair

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
EXPERT_MODELS = ("qwen2_moe", "qwen3_moe")  # whose experts PEFT takes under these names
EXPERTS = ".switch_mlp."  # in mlx-lm's paths
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
EXPERT = re.compile(rf"(.+)\.experts\.(\d+)\.({'|'.join(EXPERT_NAMES)})")
FUSED = re.compile(r"(.+)\.experts(\.base_layer)?")
# The adapter's own name ("default") is not in files that save_pretrained writes, but in plain state dicts.
KEY = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")

# Starts that leave the base's weights as they are; the others store only what differs from a changed base.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
CONVERTIBLE_STARTS = ("pissa", "olora", "corda", "lora_ga")
# Settings under which an adapter is more, or other, than a LoRA pair for each module.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MERGE = "merge it into its base with PEFT (merge_and_unload) and use that as the base"

Factors = tuple[mx.array, mx.array]  # lora_A (rank, in) and lora_B (out, rank)
Update = tuple[mx.array, mx.array, float]  # the same, of experts with E in front, and alpha


def read(folder: Path) -> Adapter:
    """The adapter in `folder`; what is adapted is told by the arrays.

    Raises InputError naming the file and what is wrong with it, or what is not supported and the way out.
    """
    path, config = folder / WEIGHTS, settings_of(folder / SETTINGS)
    _check_settings(folder / SETTINGS, config)
    dropout = finite_number(folder / SETTINGS, "lora_dropout", config.get("lora_dropout", 0.0), 0, 1)
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise InputError(f"{folder / 'adapter_model.bin'}: pickle files are not read: convert it to {WEIGHTS}")
    loaded, metadata = arrays_of(path)
    updates = _updates(folder, config, _factors(path, loaded))
    try:
        arrays = {f"{name}.lora_a": a if a.ndim == 3 else a.T for name, (a, _, _) in updates.items()}
        arrays |= {f"{name}.lora_b": b if b.ndim == 3 else b.T for name, (_, b, _) in updates.items()}
        pairs = lora.pairs_of(arrays, {name: alpha for name, (_, _, alpha) in updates.items()})
        lora.check_finite(pairs.items())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if config.get("ensure_weight_tying") and {EMBEDDING, HEAD} <= pairs.keys() and _tied(pairs[EMBEDDING], pairs[HEAD]):
        del pairs[HEAD]  # with tied weights, an adapted embedding is adapted as the output head too
    return Adapter(
        pairs,
        dropout,
        base_named(folder / SETTINGS, config.get("base_model_name_or_path"), config.get("revision")),
        metadata,
    )


def check_tying(folder: Path, adapter: Adapter, tied: bool) -> None:
    """Raises InputError where the base's weights are `tied` and `leaves_head_out`."""
    if tied and leaves_head_out(folder, adapter):
        raise InputError(
            f"{folder / SETTINGS}: ensure_weight_tying is not set: {EMBEDDING} is adapted without the output head that "
            f"has the same weight, which is not supported; {MERGE}"
        )


def leaves_head_out(folder: Path, adapter: Adapter) -> bool:
    """Whether the adapter in `folder` is PEFT's and, on a base with tied weights, adapts the embedding but not the
    output head: mlx-lm's models have one module for both. Nothing in the adapter itself tells."""
    config = settings_of(folder / SETTINGS)
    return EMBEDDING in adapter.pairs and "peft_type" in config and not config.get("ensure_weight_tying")


def write(folder: Path, adapter: Adapter, config: dict[str, Any]) -> list[str]:
    """Writes both files into `folder`, as PEFT and vLLM take them; `config` is the base's config.json. Returns what a
    person should know.

    vLLM takes each module's rank from its arrays but one scale for all, lora_alpha / r. So this is every module's
    scale, and where scales differ, lora_B takes what differs. Raises InputError for what PEFT has no form for.
    """
    kind, notes, pairs = config.get("model_type"), [], adapter.pairs
    experts = [path for path in pairs if EXPERTS in path]
    if experts and kind not in EXPERT_MODELS:
        raise InputError(f"{experts[0]}: PEFT has no form for experts of {kind}; export gguf or merged instead")
    tied = EMBEDDING in pairs and HEAD not in pairs and bool(config.get("tie_word_embeddings", True))
    if tied:
        pairs = pairs | {HEAD: _head(pairs[EMBEDDING])}
    scales = [pair.scale for pair in pairs.values()]
    scale = statistics.mode([one for one in scales if one] or scales)
    if others := {path: pair for path, pair in pairs.items() if pair.scale != scale}:
        pairs = pairs | {path: pair.with_rank(pair.rank, scale * pair.rank) for path, pair in others.items()}
        notes.append(f"{len(others)} of {len(pairs)} modules had another alpha / rank, which their lora_B took over")
    if experts:  # of which PEFT and vLLM fuse gate and up, or all
        pairs = Adapter(_whole_experts(pairs)).folded().pairs
        notes.append("PEFT takes the experts with transformers 5 only")
    arrays = {name: array for path, pair in pairs.items() for name, array in _named(path, pair).items()}
    with files.new_file(folder / SETTINGS) as file:
        files.write_json(file, _settings(replace(adapter, pairs=pairs), config, tied))
    with files.new_file(folder / WEIGHTS) as file:
        mx.save_safetensors(str(file), arrays, {"format": "pt"})
    if kind not in {known.model_type for known in ARCHITECTURES}:
        notes.append(f"module names are mlx-lm's; whether transformers has the same ones for {kind} was not checked")
    if EMBEDDING in pairs or HEAD in pairs:
        notes.append("vLLM takes embed_tokens and lm_head only for models whose class lists them as embedding_modules")
    if (rank := max(pair.rank for pair in pairs.values())) > 16:
        notes.append(f"vLLM needs --max-lora-rank {rank} or more (it knows none above 512)")
    return notes


# ---- in --------------------------------------------------------------------------------------------------------------


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    """Raises InputError for a kind of adapter that is no plain LoRA of the unchanged base."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')}; only LORA is supported; {MERGE}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{path}: {key} is {config[key]}, which is not supported; {MERGE}")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {config['bias']}: adapted biases are not supported; {MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        advice = MERGE
        if str(start).startswith(CONVERTIBLE_STARTS):
            advice = "save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA adapter"
        raise InputError(f"{path}: init_lora_weights is {start}, which changes the base's weights; {advice}")


def _factors(path: Path, arrays: dict[str, mx.array]) -> dict[str, Factors]:
    """lora_A (rank, in) and lora_B (out, rank) by the path of their module in Hugging Face's model."""
    found: dict[str, dict[str, mx.array]] = {}
    copies = {}
    for name, array in sorted(arrays.items()):
        if match := KEY.fullmatch(name.removeprefix(PREFIX)):
            if array.ndim != 2 or array.size == 0 or match[2] in found.setdefault(match[1], {}):
                raise InputError(f"{path}: {name} of shape {array.shape} is no matrix, or its module's second one")
            found[match[1]][match[2]] = array.astype(mx.float32)
        else:
            copies[name] = name.removeprefix(PREFIX)
    for name, key in copies.items():  # with adapted embeddings, PEFT stores the base's as well
        if not key.endswith(".base_layer.weight") or key.removesuffix(".base_layer.weight") not in found:
            raise InputError(f"{path}: {name} is no lora_A or lora_B, which is not supported; {MERGE}")
    for module, sides in found.items():
        if len(sides) == 1:
            raise InputError(f"{path}: {module} has lora_{''.join(sides)} alone")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _updates(folder: Path, config: dict[str, Any], factors: dict[str, Factors]) -> dict[str, Update]:
    """(A, B, alpha) by the path of their module in mlx-lm's model, experts stacked."""
    updates: dict[str, Update] = {}
    experts: dict[str, dict[int, Update]] = {}
    targets = _parameters(folder / SETTINGS, config)
    for module, (a, b) in factors.items():
        if fused := FUSED.fullmatch(module):
            # PEFT nests the parameters of a module: gate_up_proj is the inner one, where both are adapted.
            name = "down_proj" if not fused[2] and any(t.endswith("down_proj") for t in targets) else "gate_up_proj"
            rank, alpha = _rank_and_alpha(folder / SETTINGS, config, f"{fused[1]}.experts.{name}")
            if a.shape[0] % rank or a.shape[0] != b.shape[1] or b.shape[0] % 2:
                shapes = f"lora_A {a.shape} and lora_B {b.shape}"
                raise InputError(f"{folder / WEIGHTS}: {module}: {shapes} are not those of {name} of rank {rank}")
            a, b = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1).transpose(2, 0, 1)
            parts = {name: b} if name == "down_proj" else dict(zip(EXPERT_NAMES[:2], mx.split(b, 2, 1), strict=True))
            updates |= {f"{fused[1]}{EXPERTS}{part}": (a, rows, alpha) for part, rows in parts.items()}
            continue
        parameter = any(f".{module}.weight".endswith(f".{target}") for target in targets)
        rank, alpha = _rank_and_alpha(folder / SETTINGS, config, f"{module}.weight" if parameter else module)
        if len(a) != rank:
            raise InputError(f"{folder / WEIGHTS}: {module} has rank {len(a)}, {SETTINGS} says {rank}")
        if one := EXPERT.fullmatch(module):
            experts.setdefault(f"{one[1]}{EXPERTS}{one[3]}", {})[int(one[2])] = (a, b, alpha)
        else:
            updates[module] = (a, b, alpha)
    for path, each in experts.items():
        kinds = {(a.shape, b.shape, alpha) for a, b, alpha in each.values()}
        if sorted(each) != list(range(len(each))) or len(kinds) > 1:
            raise InputError(
                f"{folder / WEIGHTS}: {path}: not all experts have an update of one rank and alpha; {MERGE}"
            )
        a, b = (mx.stack([each[number][side] for number in range(len(each))]) for side in (0, 1))
        updates[path] = (a, b, each[0][2])
    return updates


def _parameters(path: Path, config: dict[str, Any]) -> list[str]:
    """Names, or ends of names from a dot on, of parameters that PEFT adapts in the place of modules."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{path}: target_parameters is {targets}, not a list of names")
    return targets


def _rank_and_alpha(path: Path, config: dict[str, Any], key: str) -> tuple[int, float]:
    """What PEFT gives the module `key`; the scale is alpha / rank, under use_rslora too."""
    rank = positive_whole(path, "r", _by_pattern(path, config, "rank_pattern", key, config.get("r")))
    alpha = finite_number(path, "lora_alpha", _by_pattern(path, config, "alpha_pattern", key, config.get("lora_alpha")))
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(path: Path, config: dict[str, Any], name: str, key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `key` from a dot on."""
    patterns = config.get(name) or {}
    try:
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)
    except (AttributeError, re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: {name} is not a mapping of regular expressions: {error}") from None


def _head(embedding: Pair) -> Pair:
    """The update of the output head that has its weight from an adapted embedding."""
    return Pair(embedding.lora_b.T, embedding.lora_a.T, embedding.alpha)


def _tied(embedding: Pair, head: Pair) -> bool:
    """Whether the output head's update is the embedding's."""
    same = _head(embedding)
    arrays = ((head.lora_a, same.lora_a), (head.lora_b, same.lora_b))
    return head.alpha == same.alpha and all(mx.array_equal(one, other).item() for one, other in arrays)


# ---- out -------------------------------------------------------------------------------------------------------------


def _whole_experts(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """`pairs`, and updates of zero for what a block's experts lack of gate, up and down."""
    whole = dict(pairs)
    for path, pair in pairs.items():
        if pair.experts:
            block, name = path.rsplit(".", 1)
            for other in EXPERT_NAMES:
                sizes = (pair.inputs, pair.outputs)
                inputs, outputs = sizes if (name == "down_proj") == (other == "down_proj") else sizes[::-1]
                a = mx.zeros((len(pair.lora_a), pair.rank, inputs))
                whole.setdefault(f"{block}.{other}", Pair(a, mx.zeros((len(a), outputs, pair.rank)), pair.alpha))
    return whole


def _settings(adapter: Adapter, config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """adapter_config.json of an adapter of one scale."""
    kind = config.get("model_type")
    targets = {path: _target(path, kind) for path in adapter.pairs}
    modules = [path for path, target in targets.items() if target == path]
    parameters = sorted(set(targets.values()) - set(modules))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, pair in adapter.pairs.items():  # gate and up of experts add up
        target = targets[path]
        ranks[target] = ranks.get(target, 0) + pair.rank
        alphas[target] = alphas.get(target, 0.0) + pair.alpha
    largest = max(adapter.pairs.values(), key=lambda pair: pair.rank)
    odd = [target for target, rank in ranks.items() if rank != largest.rank]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.path if adapter.base else None,
        "revision": adapter.base.revision if adapter.base else None,
        "inference_mode": True,
        "r": largest.rank,
        "lora_alpha": _number(largest.alpha),
        "rank_pattern": {target: ranks[target] for target in odd},
        "alpha_pattern": {target: _number(alphas[target]) for target in odd},
        "lora_dropout": 0.0 if parameters else adapter.dropout,  # PEFT knows none for parameters
        **_chosen(modules, config.get("num_hidden_layers")),
        "target_parameters": parameters or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "ensure_weight_tying": tied,
    }


def _target(path: str, kind: str | None) -> str:
    """The module, or its parameter, that PEFT adapts for `path`. It takes modules of some names for the fused
    parameters of experts wherever they stand, so it is given parameters in their place."""
    block, experts, name = path.rpartition(EXPERTS)
    if experts:
        return f"{block}.experts.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"
    taken = kind in EXPERT_MODELS and path.rsplit(".", 1)[-1] in (*EXPERT_NAMES, "gate")
    return f"{path}.weight" if taken else path


def _chosen(modules: list[str], blocks: int | None) -> dict[str, Any]:
    """The settings that make PEFT adapt exactly `modules`: short names where every block, or every one of some, has the
    same modules adapted, else full paths."""
    inside = [path.split(".", 3)[2:] for path in modules if path.startswith("model.layers.")]
    numbers, names = {int(number) for number, _ in inside}, {name for _, name in inside}
    if len(inside) < len(numbers) * len(names):
        return {"target_modules": modules, "layers_to_transform": None}
    outside = [path for path in modules if not path.startswith("model.layers.")]
    return {
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in names}) + outside,
        "layers_to_transform": sorted(numbers) if numbers and len(numbers) != blocks else None,
    }


def _named(path: str, pair: Pair) -> dict[str, mx.array]:
    """PEFT's names and matrices of a pair."""
    if pair.experts:
        block, _, name = path.rpartition(EXPERTS)
        modules = [f"{block}.experts.{number}.{name}" for number in range(len(pair.lora_a))]
        sides = {"lora_A.weight": pair.lora_a, "lora_B.weight": pair.lora_b}
        return {f"{PREFIX}{module}.{side}": m[i] for side, m in sides.items() for i, module in enumerate(modules)}
    a, b = pair.factors()
    if path == EMBEDDING:
        return {f"{PREFIX}{path}.lora_embedding_A": a, f"{PREFIX}{path}.lora_embedding_B": b}
    return {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}


def _number(alpha: float) -> int | float:
    """A whole number as such: PEFT and vLLM take both, other readers may not."""
    return int(alpha) if alpha == int(alpha) else alpha
