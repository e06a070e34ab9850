"""exp, by the way that is fast and exact on the device."""

import math

import mlx.core as mx

_ROUND = 1.5 * 2**23  # added to a small float32 and subtracted again: rounds it to a whole number
_LN2 = 0.693359375, -2.12194440e-4  # two parts of ln 2; the first times any of these whole numbers is exact


@mx.custom_function
def exp(values: mx.array) -> mx.array:
    """e to the power of the values.

    On a CPU MLX's own takes 8 times as long, which would be most of an MLP's time between its products, and is off by
    up to 4e-6 of the result. There it is formed in float32, and in steps that a compiler makes vector instructions of:
    e^x = 2^n e^r with n the whole number nearest to x / ln 2 (Cody and Waite, 1980) and e^r by its series, written so
    that MLX fuses it well; off by 2e-7. Results below 2^-126 can be 0, those above 2^127 inf.
    """
    if mx.default_device() != mx.cpu:
        return mx.exp(values)
    x = mx.clip(values.astype(mx.float32), -88.0, 89.0)  # where 2^n is 0 and inf
    whole = (x * math.log2(math.e) + _ROUND) - _ROUND
    r = (x - whole * _LN2[0]) - whole * _LN2[1]
    r2 = r * r
    lower = (1 + r) + r2 * (1 / 2 + r * (1 / 6))
    upper = (1 / 24 + r * (1 / 120)) + r2 * (1 / 720 + r * (1 / 5040))
    power = ((whole.astype(mx.int32) + 127) << 23).view(mx.float32)  # the bits of 2^n
    return ((lower + r2 * r2 * upper) * power).astype(values.dtype)


@exp.vjp
def _gradient(_: mx.array, cotangent: mx.array, result: mx.array) -> mx.array:
    return cotangent * result
