"""SwiGLU that keeps its two inputs for the backward pass and nothing else; see Shazeer, 2020, arXiv:2002.05202."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from mlx_lora.exponential import exp
from mlx_lora.substitution import substitute


def install(model: nn.Module) -> None:
    """Makes the modules of `model` that call mlx-lm's `swiglu` call this one."""
    substitute(model, "swiglu", activations.swiglu, swiglu)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate · sigmoid(gate) · up, of any equal shapes. Autodiff would keep the sigmoid and its products too."""
    return gate * _sigmoid(gate) * up


@swiglu.vjp
def _gradients(inputs: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    gate = mx.depends(gate, cotangent)  # or mx.compile would take the sigmoid of the forward pass, and so keep it
    sigmoid = _sigmoid(gate)
    by_gate = cotangent * up * sigmoid * (1 + gate * (1 - sigmoid))
    return by_gate.astype(gate.dtype), (cotangent * gate * sigmoid).astype(up.dtype)


def _sigmoid(values: mx.array) -> mx.array:
    return 1 / (1 + exp(-values))
