"""RMS normalization and its gradients, against the formulas in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlx_lora import rms_norm

EPS = 1e-5


def closed(x: np.ndarray, weight: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    root = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    y = weight * cotangent
    by_x = root * y - x * root**3 * (x * y).mean(-1, keepdims=True)
    return weight * x * root, by_x, (cotangent * x * root).reshape(-1, weight.size).sum(0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kind", "close"), [(mx.float32, 2e-6), (mx.bfloat16, 2e-2), (mx.float16, 3e-3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_it_is_the_formula(size, kind, close, compiled):
    random = np.random.default_rng(0)
    x = mx.array(size * random.normal(0, 1, (3, 5, 576))).astype(kind)
    weight = mx.array(random.normal(1, 0.3, 576)).astype(kind)
    cotangent = mx.array(random.normal(0, 1, (3, 5, 576))).astype(kind)

    def both(x, weight, cotangent):
        [result], slopes = mx.vjp(lambda x, w: rms_norm.rms_norm(x, w, EPS), [x, weight], [cotangent])
        return result, *slopes

    found = (mx.compile(both) if compiled else both)(x, weight, cotangent)
    for array, expected in zip(found, closed(*map(tiny.float64, (x, weight, cotangent))), strict=True):
        assert array.dtype == kind
        np.testing.assert_allclose(tiny.float64(array), expected, rtol=0, atol=close * np.abs(expected).max())


def test_a_model_gives_what_it_gave():
    model = tiny.llama()
    ids = mx.random.randint(0, 50, (2, 9))
    expected = model(ids)
    rms_norm.install(model)
    assert type(model.model.norm) is not nn.RMSNorm
    np.testing.assert_allclose(model(ids), expected, rtol=1e-5, atol=1e-5)
