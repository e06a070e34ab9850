"""RMS normalization on a CPU, where MLX's own takes as long as a small matrix product; see Zhang and Sennrich, 2019,
arXiv:1910.07467."""

import mlx.core as mx
import mlx.nn as nn


def install(model: nn.Module) -> None:
    """Makes the `nn.RMSNorm`s of `model` compute by `rms_norm`, on a CPU."""
    if mx.default_device() == mx.cpu:
        for module in model.modules():
            if type(module) is nn.RMSNorm:
                module.__class__ = _RMSNorm


class _RMSNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """weight · x / sqrt(mean(x²) + eps), the mean over the last axis: `mx.fast.rms_norm` in a third of its time."""

    @mx.custom_function
    def normalized(x: mx.array, weight: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return (wide * _root(wide, eps)).astype(mx.result_type(x, weight)) * weight

    @normalized.vjp
    def gradients(inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = inputs
        wide, by_scaled = x.astype(mx.float32), (cotangent * weight).astype(mx.float32)
        root = _root(wide, eps)
        along = root * root * root * _sum(by_scaled * wide) / x.shape[-1]
        by_weight = (cotangent * wide * root).reshape(-1, weight.size).sum(axis=0)
        return (by_scaled * root - wide * along).astype(x.dtype), by_weight.astype(weight.dtype)

    return normalized(x, weight)


def _root(x: mx.array, eps: float) -> mx.array:
    """1 / sqrt(mean(x²) + eps), (..., 1). Contiguous, or mx.compile would take the root again for every element."""
    return mx.contiguous(mx.rsqrt(_sum(x * x) / x.shape[-1] + eps))


def _sum(x: mx.array) -> mx.array:
    """Over the last axis, which is kept: MLX adds a row on a CPU one by one, but rows with each other at once."""
    if x.shape[-1] % 16 == 0:
        x = mx.unflatten(x, -1, (-1, 16)).sum(axis=-2)
    return x.sum(axis=-1, keepdims=True)
