"""Adapted layers: a frozen base layer plus a low-rank update, y = base(x) + alpha / rank · (x A) B.

Parameters are stored as mlx-lm stores them and under its names: lora_a (in, rank), lora_b (rank, out), for experts
(E, rank, in) and (E, out, rank); PEFT's lora_A and lora_B are the transposes. They stay float32 and are used in the
type of the activations, so that no float32 copy of a bfloat16 activation is kept for the backward pass.

LoRA: Hu et al., 2021, arXiv:2106.09685.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora.recomputation import remember


class LoRALayer(nn.Module):
    """What the adapted layers share: the update's parameters, scale and dropout, and being on, off or merged.

    ``base_name`` is the attribute that holds the base layer. Dropout is applied only while ``dropout_key`` is set
    (the training step sets it), so evaluation needs no mode and a recomputed forward pass draws the same mask.
    """

    base_name = "linear"

    def __init__(self, base: nn.Module, lora_a: mx.array, lora_b: mx.array, alpha: float, dropout: float) -> None:
        super().__init__()
        self[self.base_name] = base
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.alpha = alpha
        self.dropout = dropout
        self.enabled = True
        self._dropout_key: mx.array | None = None
        self._unmerged: tuple[nn.Module, ...] = ()  # the base layer while it is merged; a tuple is no child module

    @property
    def base(self) -> nn.Module:
        return self[self.base_name]

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    @property
    def active(self) -> bool:
        """Whether the forward pass adds the update itself."""
        return self.enabled and not self._unmerged

    def set_dropout_key(self, key: mx.array | None) -> None:
        self._dropout_key = key

    def delta(self) -> mx.array:
        """The update as a full float32 weight, of the shape of the base's weight."""
        return self.scale * (self.lora_b.T @ self.lora_a.T)

    def merged_weight(self) -> mx.array:
        """base + delta as a full float32 weight; a quantized base is dequantized."""
        return dense_weight(self.base) + self.delta()

    def merge(self) -> None:
        """Puts a dense layer with base + delta in the place of the base, which is kept for `unmerge`.

        The sum is formed in float32 and rounded once to the base's type. A quantized base is not quantized again,
        which would erase small updates: the merged layer is dense.
        """
        if not self.merged:
            base = self.base
            merged = _dense_type(base)
            merged.weight = self.merged_weight().astype(_dense_dtype(base))
            if "bias" in base:
                merged.bias = base.bias
            merged.freeze()
            self._unmerged = (base,)
            self[self.base_name] = merged

    def unmerge(self) -> None:
        """Puts the kept base layer back, bit for bit."""
        if self.merged:
            self[self.base_name] = self._unmerged[0]
            self._unmerged = ()

    def _sum(self, y: mx.array, update: mx.array) -> mx.array:
        return y + (self.scale * update).astype(y.dtype)

    def _drop(self, x: mx.array) -> mx.array:
        if self.dropout == 0 or self._dropout_key is None:
            return x
        keep = 1 - self.dropout
        return mx.where(mx.random.bernoulli(keep, x.shape, key=self._dropout_key), x / keep, 0).astype(x.dtype)


class LoRALinear(LoRALayer):
    """An adapted ``nn.Linear`` or ``nn.QuantizedLinear``: (..., in) → (..., out)."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.active:
            return self.base(x)
        z = remember(lambda x, a: self._drop(x) @ a.astype(x.dtype), x, self.lora_a)
        return remember(lambda x, z, b: self._sum(self.base(x), z @ b.astype(x.dtype)), x, z, self.lora_b)


class LoRAEmbedding(LoRALayer):
    """An adapted ``nn.Embedding`` or ``nn.QuantizedEmbedding``: lora_a (vocabulary, rank), lora_b (rank, dims).

    As the output head of a model with tied weights (`as_linear`) the same update is applied transposed.
    """

    base_name = "embedding"

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.base(ids)
        if not self.active:
            return y
        z = self.lora_a[ids].astype(y.dtype) @ self.lora_b.astype(y.dtype)
        return self._sum(y, self._drop(z))

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., dims) → logits (..., vocabulary)."""
        y = self.base.as_linear(x)
        if not self.active:
            return y
        return self._sum(y, (self._drop(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype))

    def delta(self) -> mx.array:
        return self.scale * (self.lora_a @ self.lora_b)


class LoRASwitchLinear(LoRALayer):
    """Adapted experts (mlx-lm's ``SwitchLinear``, plain or quantized): one pair per expert, lora_a (E, rank, in),
    lora_b (E, out, rank)."""

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        def base(x: mx.array) -> mx.array:
            return self.base(x, indices, sorted_indices=sorted_indices)

        def product(x: mx.array, weight: mx.array) -> mx.array:
            weight = weight.swapaxes(-1, -2).astype(x.dtype)
            return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

        if not self.active:
            return base(x)
        z = remember(lambda x, a: product(self._drop(x), a), x, self.lora_a)
        return remember(lambda x, z, b: self._sum(base(x), product(z, b)), x, z, self.lora_b)

    def delta(self) -> mx.array:
        return self.scale * (self.lora_b @ self.lora_a)


def layer_type(module: nn.Module) -> type[LoRALayer] | None:
    """The adapted counterpart of a layer; None where there is none."""
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        return LoRALinear
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return LoRAEmbedding
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return LoRASwitchLinear
    return None


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight as if it were not quantized: (out, in), (vocabulary, dims) or (E, out, in)."""
    *outer, packed = module.weight.shape
    return (*outer, packed * 32 // module.bits if _quantized(module) else packed)


def adapt(base: nn.Module, rank: int, alpha: float, dropout: float, init: str, key: mx.array) -> LoRALayer:
    """The adapted form of a layer: lora_a random, lora_b zero, so that the output is the base's.

    `init`: ``kaiming_uniform`` draws lora_a within ±1/sqrt(in), ``gaussian`` with deviation 1/rank, both as PEFT.
    """
    kind = layer_type(base)
    a_shape, b_shape = factor_shapes(base, rank)
    inputs = a_shape[-1] if kind is LoRASwitchLinear else a_shape[0]
    if init == "gaussian":
        lora_a = mx.random.normal(a_shape, scale=1 / rank, key=key)
    else:
        lora_a = mx.random.uniform(-(inputs**-0.5), inputs**-0.5, a_shape, key=key)
    assert kind is not None
    return kind(base, lora_a, mx.zeros(b_shape), alpha, dropout)


def factor_shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of lora_a and lora_b for a base layer."""
    kind = layer_type(base)
    if kind is None:
        raise ValueError(f"{type(base).__name__} has no adapted form")
    *experts, outputs, inputs = weight_shape(base)
    if kind is LoRASwitchLinear:
        return (*experts, rank, inputs), (*experts, outputs, rank)
    if kind is LoRAEmbedding:  # a table of (vocabulary, dims) is applied to one-hot rows
        inputs, outputs = outputs, inputs
    return (inputs, rank), (rank, outputs)


def _quantized(module: nn.Module) -> bool:
    return isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear))


def dense_weight(module: nn.Module) -> mx.array:
    """A layer's weight in float32. Scales are widened before they are used: a code times a bfloat16 scale is no
    bfloat16 number."""
    if not _quantized(module):
        return module.weight.astype(mx.float32)
    scales, biases = module.scales, module.get("biases")
    if mx.issubdtype(scales.dtype, mx.floating):  # bytes in mxfp4 and its kind
        scales = scales.astype(mx.float32)
    if biases is not None:
        biases = biases.astype(mx.float32)
    return mx.dequantize(
        module.weight, scales, biases, module.group_size, module.bits, mode=module.mode, dtype=mx.float32
    )


def _dense_dtype(module: nn.Module) -> mx.Dtype:
    dtype: mx.Dtype = module.get("scales", module.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def _dense_type(module: nn.Module) -> Any:
    """An empty dense layer of the kind of a plain or quantized one; its weight is set by the caller."""
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        return nn.Linear(1, 1, bias=False)
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return nn.Embedding(1, 1)
    return SwitchLinear(1, 1, 1, bias=False)
