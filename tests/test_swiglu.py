"""SwiGLU against its closed form in float64; and that putting it into one model leaves all others alone."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import activations
from mlx_lm.models.llama import MLP

from mlx_lora import swiglu
from mlx_lora.exponential import exp


def sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))


@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradients_are_the_closed_form_in_float64(compiled):
    random = np.random.default_rng(0)
    gate, up, cotangent = (random.normal(0, 4, (5, 301)) for _ in range(3))
    gate[0, :6] = [0, 1e-6, -90, 90, -1e4, 1e4]

    def weighted(gate, up, cotangent):
        return (swiglu.swiglu(gate, up) * cotangent).sum()

    function = mx.grad(weighted, argnums=(0, 1))
    arrays = [mx.array(array.astype(np.float32)) for array in (gate, up, cotangent)]
    gate, up, cotangent = (np.array(array).astype(np.float64) for array in arrays)
    by_gate, by_up = (mx.compile(function) if compiled else function)(*arrays)
    s = sigmoid(gate)
    np.testing.assert_allclose(swiglu.swiglu(*arrays[:2]), gate * s * up, rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(by_gate, cotangent * up * s * (1 + gate * (1 - s)), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(by_up, cotangent * gate * s, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_half_precision_is_mlx_lms_to_its_last_digit(kind):
    gate, up = (mx.random.normal((4, 300)).astype(kind) for _ in range(2))
    ours, theirs = swiglu.swiglu(gate, up), activations.swiglu(gate, up)
    assert ours.dtype == kind
    digits = 7 if kind == mx.bfloat16 else 10
    difference = tiny.float64(ours) - tiny.float64(theirs)
    assert np.abs(difference / (np.abs(tiny.float64(theirs)) + 1e-3)).max() <= 2 ** (2 - digits)


def test_exp_is_numpys_in_float64():
    values = np.linspace(-87.3, 88.3, 200_001).astype(np.float32)
    expected = np.exp(values.astype(np.float64))
    error = np.array(exp(mx.array(values))) / expected - 1
    assert np.abs(error).max() < (2e-7 if mx.default_device() == mx.cpu else 1e-5)
    np.testing.assert_allclose(
        exp(mx.array([-np.inf, -1e30, -88.0, 0.0, 90.0, np.inf, np.nan])),
        [0, 0, 0, 1, np.inf, np.inf, np.nan],
        atol=1e-37,
    )


def test_only_the_given_model_uses_it():
    """Another model of the same class, and the class itself, stay as they were; names too."""
    changed, other = tiny.llama(), tiny.llama()
    mlps = [block.mlp for block in changed.layers]
    swiglu.install(changed)
    assert all(type(mlp) is not MLP and isinstance(mlp, MLP) and type(mlp).__name__ == "MLP" for mlp in mlps)
    assert all(type(block.mlp) is MLP for block in other.layers)
    ids = tiny.tokens()
    np.testing.assert_allclose(np.array(changed(ids)), np.array(other(ids)), rtol=1e-5, atol=1e-5)


def test_a_compiled_step_keeps_less_of_it():
    """The sigmoid is computed again in the backward pass, where mx.compile would rather keep it."""
    arrays = [mx.random.normal((256, 1000)) for _ in range(9)]
    mx.eval(arrays)

    def peak(function):
        def loss(x, ups):
            for up in ups:
                x = function(x, up)
            return x.sum()

        step = mx.compile(mx.grad(loss))
        mx.eval(step(arrays[0], arrays[1:]))
        return tiny.peak(lambda: step(arrays[0], arrays[1:]))

    assert peak(swiglu.swiglu) < 0.9 * peak(lambda gate, up: gate * mx.sigmoid(gate) * up)
