"""A merged model: base + adapter in one folder for mlx-lm and transformers, and how much of the adapter is left in it.

Weights are rounded when they are written, to bfloat16 or to a few bits. Where the base lies on the grid that it is
rounded to, a change smaller than the grid's step vanishes: 4 bits swallow most adapters whole. So every merge is
measured before it is written, and one that loses too much is refused.

With d the intended change of a weight (scale · B A) and a the applied one (what was written, dequantized, minus the
base's weight as training saw it), over one module or all:

    cosine = a·d / (|a| |d|)      norm = |a| / |d|      lost = |1 - a·d / d·d| = |1 - cosine · norm|

`lost` is the share of d that is missing from a. What rounding adds at right angles to d is not counted as lost: it is
the price of the type and not of the merge, it lowers the cosine, and the logits show what it does.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora import lora, model
from mlx_lora.config import Model
from mlx_lora.errors import InputError
from mlx_lora.lora import Adapter, Pair
from mlx_lora.lora.layers import factor_shapes, layer_type
from mlx_lora.model import Base

Form = dict[str, Any] | None  # group_size, bits and mode of a quantized layer; None: dense
Dtype = Literal["float32", "bfloat16", "float16"]

BITS = (2, 3, 4, 5, 6, 8)
DTYPES: dict[str, Dtype] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
MAX_LOSS = 0.1
PROMPTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Q: If a train leaves at 9:40 and arrives at 11:15, how long does the journey take?\nA:",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "Dear customer, thank you for your message. We are sorry that your parcel has not arrived yet.",
    "Wasser kocht auf Meereshöhe bei hundert Grad, auf hohen Bergen schon bei deutlich weniger.",
)


def load_base(options: Model) -> Base:
    """The base to merge into, in the types that it is stored in."""
    return model.load(options, as_stored=True)


@dataclass(frozen=True)
class Survival:
    """How much of an adapter is in the merged weights of one module, or of several: a·d, a·a and d·d."""

    path: str
    product: float
    applied: float
    intended: float

    @property
    def cosine(self) -> float:
        """1 where nothing was intended, as for `norm`."""
        lengths = sqrt(self.applied) * sqrt(self.intended)
        return self.product / lengths if lengths else float(not self.intended)

    @property
    def norm(self) -> float:
        return sqrt(self.applied / self.intended) if self.intended else 1.0

    @property
    def lost(self) -> float:
        return abs(1 - self.product / self.intended) if self.intended else 0.0

    def as_json(self) -> dict[str, float]:
        return {"cosine": self.cosine, "norm": self.norm, "lost": self.lost}


def _together(path: str, parts: Iterable[Survival]) -> Survival:
    sums = np.array([[part.product, part.applied, part.intended] for part in parts]).reshape(-1, 3).sum(axis=0)
    return Survival(path, *sums.tolist())


@dataclass(frozen=True)
class Divergence:
    """KL(unmerged ‖ merged) in nats over the positions of some prompts, and for scale KL(unmerged ‖ base): how far
    the adapter itself moves the base there (mean)."""

    mean: float
    max: float
    adapter: float
    positions: int


@dataclass(frozen=True)
class Merge:
    """A base and an adapter, and the form of each layer of the result. Layers are computed anew each time they are
    asked for, so that no second model is in memory."""

    base: Base
    adapter: Adapter
    forms: dict[str, Form]
    dtype: mx.Dtype | None
    modules: dict[str, nn.Module]  # the base's, copied: what happens to the model does not change them
    activations: mx.Dtype  # the type of a quantized base whose scales are bytes (mxfp4 and others)

    @property
    def changed(self) -> list[str]:
        """Paths of the layers that differ from the base's."""
        return [
            path
            for path, form in self.forms.items()
            if path in self.adapter.pairs
            or form != _form(self.modules[path])
            or self.type(path) != self._stored_type(path)
        ]

    def type(self, path: str) -> mx.Dtype:
        """The type of a layer's dense weight, or of its scales."""
        return self.dtype or self._stored_type(path)

    def _stored_type(self, path: str) -> mx.Dtype:
        module = self.modules[path]
        own: mx.Dtype = module.get("scales", module.weight).dtype
        return own if mx.issubdtype(own, mx.floating) else self.activations

    def layer(self, path: str) -> nn.Module:
        """A layer that differs from the base's, unevaluated: base + delta in float32, rounded once to the type of the
        base's arrays (or `dtype`), and quantized from there."""
        module, form, pair = self.modules[path], self.forms[path], self.adapter.pairs.get(path)
        if pair is None and _form(module) in (None, form):
            layer = copy.copy(module)
            if self.dtype is not None:
                layer.set_dtype(self.dtype)
        else:
            layer = _dense(module, pair)
            layer.weight = layer.weight.astype(self.type(path))
            if "bias" in module:
                layer.bias = module.bias
        return layer if form is None or form == _form(layer) else layer.to_quantized(**form)

    def parameters(self) -> dict[str, mx.array]:
        """Every array of the merged model under mlx-lm's names, unevaluated."""
        changed = dict.fromkeys(self.changed)
        arrays = {
            name: array
            for name, array in tree_flatten(self.base.model.parameters())
            if name.rpartition(".")[0] not in changed
        }
        for path in changed:
            arrays |= {f"{path}.{name}": array for name, array in tree_flatten(self.layer(path).parameters())}
        if self.dtype is not None:
            arrays = {name: _cast(array, self.dtype) for name, array in arrays.items()}
        return arrays

    def survival(self, path: str) -> Survival:
        """Of one adapted module. Sums of rows are in float32, those over rows in float64.

        Raises InputError where the merged weight is not finite."""
        module = self.modules[path]
        intended = _adapted(module, self.adapter.pairs[path]).delta()
        applied = _dense(self.layer(path)).weight - _dense(module).weight
        pairs = ((applied, intended), (applied, applied), (intended, intended))
        product, applied_square, intended_square = (
            float(np.array((x * y).sum(axis=-1)).sum(dtype=np.float64)) for x, y in pairs
        )
        if not mx.isfinite(applied).all().item():
            name = type_name(self.type(path))
            raise InputError(f"{path}: base + adapter is no finite {name}; merge with dtype bfloat16 or float32")
        return Survival(path, product, applied_square, intended_square)

    def survivals(self) -> list[Survival]:
        return [self.survival(path) for path in self.adapter.pairs]

    @property
    def keeps_forms(self) -> bool:
        """Whether every layer keeps the form that the base has it in."""
        return all(form == _form(self.modules[path]) for path, form in self.forms.items())

    def words(self) -> str:
        """The form of most of the weights, for people."""
        forms = Counter({_words(form): 0 for form in self.forms.values()})
        for path, form in self.forms.items():
            forms[_words(form)] += prod(lora.weight_shape(self.modules[path]))
        return forms.most_common(1)[0][0] or type_name(self.type(next(iter(self.adapter.pairs))))


@dataclass(frozen=True)
class Report:
    """What a merge would write and what is left of the adapter in it. `better`: another choice, where it loses too
    much."""

    merge: Merge
    survivals: list[Survival]
    divergence: Divergence
    bytes: int
    max_loss: float
    better: str | None

    @property
    def overall(self) -> Survival:
        return _together("all", self.survivals)

    @property
    def refused(self) -> bool:
        return self.overall.lost > self.max_loss

    def refusal(self) -> str:
        """Why, and what to do instead."""
        return (
            f"merging as {self.merge.words()} would lose {self.overall.lost:.1%} of the adapter "
            f"(most that is allowed: {self.max_loss:.1%}). Better: {self.better}"
        )

    def lines(self) -> list[str]:
        """For a terminal of 100 columns: the whole, the logits, and each kind of module, the worst first."""
        overall, logits = self.overall, self.divergence
        less = ", which is less" if logits.adapter < logits.mean else ""
        lines = [
            f"merged as {self.merge.words()}: {self.bytes / 1e6:,.1f} MB",
            f"adapter: {overall.lost:.1%} lost, cosine {overall.cosine:.3f}, norm {overall.norm:.3f} of the intended",
            f"logits:  KL from the unmerged model mean {logits.mean:.2e}, max {logits.max:.2e} nats "
            f"over {logits.positions} positions",
            f"         (the adapter itself moves the base by {logits.adapter:.2e}{less})",
            f"{'module':34} {'blocks':>6} {'lost':>8} {'cosine':>8} {'least':>8} {'norm':>8}",
        ]
        kinds: dict[str, list[Survival]] = {}
        for survival in self.survivals:
            kinds.setdefault(re.sub(r"^.*?layers\.\d+\.", "", survival.path), []).append(survival)
        rows = [(_together(kind, parts), parts) for kind, parts in kinds.items()]
        for whole, parts in sorted(rows, key=lambda row: -row[0].lost):
            cosines = [part.cosine for part in parts]
            lines.append(
                f"{whole.path:34} {len(parts):6} {whole.lost:8.1%} {sum(cosines) / len(cosines):8.3f} "
                f"{min(cosines):8.3f} {whole.norm:8.3f}"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything, module by module."""
        return {
            "form": self.merge.words(),
            "bytes": self.bytes,
            "max_loss": self.max_loss,
            "refused": self.refused,
            "better": self.better,
            "overall": self.overall.as_json(),
            "kl": vars(self.divergence),
            "modules": {survival.path: survival.as_json() for survival in self.survivals},
        }


def measure(
    base: Base,
    adapter: Adapter,
    quantize: Literal["keep", "none"] | int = "keep",
    dtype: Dtype | None = None,
    prompts: Sequence[str] = PROMPTS,
    max_loss: float = MAX_LOSS,
) -> Report:
    """What merging into `load_base`'s base would write, and how much of the adapter would be left; nothing is written
    or changed.

    `quantize`: ``keep`` leaves each layer in the form that the base has it in, ``none`` makes all dense, a number of
    bits quantizes the layers that mlx-lm quantizes (of a quantized base: that are). `dtype` is the type of dense
    weights and of scales, by default the base's own. Raises InputError for what cannot be merged so.
    """
    merge = plan(base, adapter, quantize, dtype)
    survivals = merge.survivals()
    size = sum(array.nbytes for array in merge.parameters().values())
    report = Report(merge, survivals, _divergence(merge, prompts), size, max_loss, None)
    return replace(report, better=_better(merge, max_loss)) if report.refused else report


def plan(
    base: Base, adapter: Adapter, quantize: Literal["keep", "none"] | int = "keep", dtype: Dtype | None = None
) -> Merge:
    """The merge that `measure` describes; nothing is computed yet."""
    if not adapter.pairs:
        raise InputError("the adapter has no modules to merge")
    lora.check_fit(base.model, adapter)
    if (base.config.get("quantization_config") or {}).get("quant_method") == "bitnet":
        raise InputError(f"{base.folder}: a bitnet model cannot be merged into")
    layers = {
        path: copy.copy(module)
        for path, module in base.model.named_modules()
        if hasattr(module, "to_quantized") or "scales" in module
    }
    forms = {path: _form(module) for path, module in layers.items()}
    if quantize != "keep":
        forms = _chosen_forms(base.model, layers, quantize)
    types = [array.dtype for _, array in tree_flatten(base.model.parameters())]
    activations = next(dtype for dtype in types if mx.issubdtype(dtype, mx.floating))
    merge = Merge(base, adapter, forms, getattr(mx, dtype) if dtype else None, layers, activations)
    for path in merge.changed:
        if layers[path].get("global_scale") is not None:
            raise InputError(f"{path}: nvfp4 with a global scale cannot be merged into")
    return merge


def _chosen_forms(network: nn.Module, layers: dict[str, nn.Module], quantize: str | int) -> dict[str, Form]:
    if quantize not in ("none", *BITS):
        raise InputError(f"quantize: {quantize} is not keep, none or one of {', '.join(map(str, BITS))} bits")
    quantized = {path: module for path, module in layers.items() if "scales" in module}
    for path, module in quantized.items():
        if layer_type(module) is None:
            raise InputError(f"{path}: a {type(module).__name__} can only be merged with quantize keep")
    if quantize == "none":
        return dict.fromkeys(layers)
    group_sizes = Counter(module.group_size for module in quantized.values())
    group_size = max(32, group_sizes.most_common(1)[0][0]) if quantized else 64
    dense = {path: _dense(module) for path, module in quantized.items()} or layers
    forms = model.quantized_forms(network, dense, int(quantize), group_size)
    if not forms:
        raise InputError(f"quantize: groups of {group_size} divide no layer of this model; choose none")
    return dict.fromkeys(layers) | forms


# ---- layers ----------------------------------------------------------------------------------------------------------


def _form(module: nn.Module) -> Form:
    if "scales" not in module:
        return None
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def _words(form: Form) -> str:
    if form is None:
        return ""
    mode = "" if form["mode"] == "affine" else f" ({form['mode']})"
    return f"{form['bits']} bits in groups of {form['group_size']}{mode}"


def type_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _wide(module: nn.Module) -> nn.Module:
    """A copy with float32 arrays. Scales are widened before they are used, since a code times a bfloat16 scale is no
    bfloat16 number."""
    wide = copy.copy(module)
    wide.set_dtype(mx.float32)
    return wide


def _adapted(module: nn.Module, pair: Pair) -> lora.LoRALayer:
    """An adapted layer that computes in float32."""
    kind: Any = layer_type(module)
    return kind(_wide(module), pair.lora_a, pair.lora_b, pair.alpha, 0.0)


def _dense(module: nn.Module, pair: Pair | None = None) -> nn.Module:
    """base + delta, or the base alone, as a dense float32 layer."""
    if pair is None and "scales" not in module:
        return _wide(module)
    if pair is None:
        lora_a, lora_b = map(mx.zeros, factor_shapes(module, 1))
        pair = Pair(lora_a, lora_b, 1.0)
    layer = _adapted(module, pair)
    weight = layer.merged_weight()
    layer.merge()
    layer.base.weight = weight  # in float32 for every mode of quantization
    return layer.base


# ---- another choice --------------------------------------------------------------------------------------------------


def _better(merge: Merge, max_loss: float) -> str:
    """The smallest result that keeps the adapter, found by merging into each; else the adapter by itself."""
    bits = Counter(form["bits"] for form in merge.forms.values() if form).most_common(1)
    choices: list[tuple[Literal["none"] | int, Dtype | None]] = [("none", None), ("none", "float32")]
    if bits:
        choices = [(more, None) for more in BITS if more >= 4 and more > bits[0][0]] + choices
    for quantize, dtype in choices:
        try:
            other = plan(merge.base, merge.adapter, quantize, dtype)
            overall = _together("all", other.survivals())
        except InputError:  # this one is not to be had
            continue
        if overall.lost <= max_loss:
            size = sum(array.nbytes for array in other.parameters().values()) / 1e6
            options = f"--quantize {quantize}" + (" --dtype f32" if dtype else "")
            return f"{options} ({other.words()}, {size:,.1f} MB), which loses {overall.lost:.1%}"
    return "keep the adapter apart, in any of its own forms"


# ---- logits ----------------------------------------------------------------------------------------------------------


class _Made(nn.Module):
    """A layer that is made when it is used, and dropped after."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._make()(*args, **kwargs)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._make().as_linear(x)

    @property
    def weight(self) -> mx.array:
        return self._make().weight


def _divergence(merge: Merge, prompts: Sequence[str]) -> Divergence:
    """All three models compute in float32, so that they differ in their weights and not in how these are multiplied."""
    rows = [list(merge.base.tokenizer.encode(prompt)) for prompt in prompts]
    if not rows or not all(rows):
        raise InputError("the prompts that logits are compared on must have a token each")

    def base_layer(path: str) -> nn.Module:
        return _dense(merge.modules[path])

    def unmerged_layer(path: str) -> nn.Module:
        return _dense(merge.modules[path], merge.adapter.pairs.get(path))

    def merged_layer(path: str) -> nn.Module:
        return _dense(merge.layer(path))

    base, unmerged, merged = (_logits(merge, make, rows) for make in (base_layer, unmerged_layer, merged_layer))
    divergences = np.concatenate([_kl(p, q) for p, q in zip(unmerged, merged, strict=True)])
    moved = np.concatenate([_kl(p, q) for p, q in zip(unmerged, base, strict=True)])
    return Divergence(float(divergences.mean()), float(divergences.max()), float(moved.mean()), len(divergences))


def _logits(merge: Merge, make: Callable[[str], nn.Module], rows: list[list[int]]) -> list[np.ndarray]:
    """Of each row (length, vocabulary), by the layers that `make` gives; the model is left as it was. Rows are filled
    up at the end, which no position before it sees."""
    network = merge.base.model
    originals = dict(network.named_modules())
    paths = [
        path for path, module in merge.modules.items() if layer_type(module) and module.get("global_scale") is None
    ]
    width = max(map(len, rows))
    try:
        network.update_modules(tree_unflatten([(path, _Made(partial(make, path))) for path in paths]))
        logits = network(mx.array([row + [0] * (width - len(row)) for row in rows])).astype(mx.float32)
        return [np.array(logits[number, : len(row)]) for number, row in enumerate(rows)]
    finally:
        network.update_modules(tree_unflatten([(path, originals[path]) for path in paths]))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(softmax p ‖ softmax q) of each row, in nats, in float64."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
