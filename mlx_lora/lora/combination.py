"""Several adapters → one: exactly, to a rank, or by the recipes that PEFT knows.

With delta_i the update of adapter i and w_i its weight, `concatenate` is Σ w_i delta_i exactly, and `svd` the update of
a given rank that is nearest to it. `linear`, `ties` and `dare` combine the factors A and B on their own, each times
sqrt(|w_i scale_i|), as PEFT's `linear`, `ties` and `dare_linear` do: the product of two sums has cross terms, so they
are only roughly a sum of updates, and are for adapters that are near one another.

A module that only some of the adapters have is combined from those. TIES: Yadav et al., 2023, arXiv:2306.01708;
DARE: Yu et al., 2023, arXiv:2311.03099.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_lora.errors import InputError
from mlx_lora.lora.value import Adapter, Pair, check_finite

Float64 = npt.NDArray[np.float64]
Term = tuple[Pair, float]  # an adapter's pair of a module, and the adapter's weight
# The full name of an array, that array of every adapter, and what each is multiplied by → the combined array.
Rule = Callable[[str, list[mx.array], list[float]], mx.array]


def check_bases(adapters: Mapping[str, Adapter]) -> None:
    """Raises InputError for two adapters that were trained on different bases: by the digests of the bases where both
    know them, else by the paths where both know those."""
    for (name, one), (other_name, other) in combinations(adapters.items(), 2):
        digests = [adapter.metadata.get("base_digest") for adapter in (one, other)]
        if all(digests):
            same = digests[0] == digests[1]
        else:
            same = not one.base or not other.base or _same_path(one.base.path, other.base.path)
        if not same:
            bases = [adapter.base.path if adapter.base else "an unnamed one" for adapter in (one, other)]
            raise InputError(
                f"{name} and {other_name} were trained on different bases ({bases[0]} and {bases[1]}"
                f"{'; their digests differ' if all(digests) else ''}): together they have no meaning"
            )


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ w_i delta_i exactly: ranks add up. A module that one adapter alone has is not copied."""
    return _combined(adapters, weights, lambda _, terms: _stacked(terms))


def svd(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None) -> Adapter:
    """The update of at most `rank` (default: the largest of the adapters') that is nearest to Σ w_i delta_i.

    It is found from the factors, in float64, and no (out, in) matrix is formed. A and B each take the square roots of
    the singular values.
    """
    ranks = [pair.rank for adapter in adapters for pair in adapter.pairs.values()]
    limit = max(ranks, default=1) if rank is None else rank
    if limit < 1:
        raise InputError(f"rank is {rank}; give a whole number above 0")
    exact = concatenate(adapters, weights)
    check_range(exact)
    return replace(exact, pairs={path: _nearest(pair, limit) for path, pair in exact.pairs.items()})


def linear(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sums of the factors: PEFT's ``linear``. All ranks must be the same."""
    return _by_factors(adapters, weights, lambda _, arrays, factors: _sum(arrays, factors))


def ties(adapters: Sequence[Adapter], weights: Sequence[float], density: float) -> Adapter:
    """PEFT's ``ties``: of each array the share `density` with the largest magnitudes is kept, an entry's sign is that
    of the sum over the adapters, and the mean of those of this sign is taken. All ranks must be the same."""
    _check_density(density)

    def rule(_: str, arrays: list[mx.array], factors: list[float]) -> mx.array:
        kept = mx.stack([_largest(array, density) for array in arrays])
        sign = mx.where(kept.sum(axis=0) >= 0, 1, -1)
        agrees = mx.sign(kept) == sign
        return _sum(list(kept * agrees), factors) / mx.maximum(agrees.sum(axis=0), 1)

    return _by_factors(adapters, weights, rule)


def dare(adapters: Sequence[Adapter], weights: Sequence[float], density: float, seed: int = 0) -> Adapter:
    """PEFT's ``dare_linear``: of each array a random share `density` is kept and divided by it, then the weighted sum
    is taken. What is kept is a pure function of the seed and the modules' paths. All ranks must be the same."""
    _check_density(density)
    names = [f"{path}.{side}" for path in _paths(adapters) for side in ("lora_a", "lora_b")]
    keys = dict(zip(names, mx.random.split(mx.random.key(seed), len(names)), strict=True))

    def rule(name: str, arrays: list[mx.array], factors: list[float]) -> mx.array:
        kept = mx.random.bernoulli(density, (len(arrays), *arrays[0].shape), key=keys[name])
        return _sum(list(mx.where(kept, mx.stack(arrays) / density, 0)), factors)

    return _by_factors(adapters, weights, rule)


def check_range(adapter: Adapter) -> None:
    """Raises InputError for a combination whose arrays float32 cannot hold, or whose scales no file may have."""
    try:
        check_finite(adapter.pairs.items())
        for path, pair in adapter.pairs.items():
            if not abs(pair.scale) < 1e30:
                raise InputError(f"{path} has the scale {pair.scale:g}")
    except InputError as error:
        raise InputError(f"the weights are too large: combined, {error}") from None


def norm(adapter: Adapter) -> float:
    """The Frobenius norm of the whole update, in float64."""
    return math.sqrt(sum(float((_core(pair)[1] ** 2).sum()) for pair in adapter.pairs.values()))


# ---- modules and factors -------------------------------------------------------------------------------------------


def _combined(
    adapters: Sequence[Adapter], weights: Sequence[float], combine: Callable[[str, list[Term]], Pair]
) -> Adapter:
    """The adapter whose modules are those of all adapters, each combined from the ones that have it."""
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise InputError(f"an adapter's weight is {weight}; it must be finite and not 0")
    weighted = list(zip(adapters, weights, strict=True))
    pairs = {}
    for path in _paths(adapters):
        terms = [(adapter.pairs[path], weight) for adapter, weight in weighted if path in adapter.pairs]
        shapes = {(len(pair.lora_a) if pair.experts else 1, pair.inputs, pair.outputs) for pair, _ in terms}
        if len(shapes) > 1:
            raise InputError(
                f"{path} has several shapes (experts, inputs, outputs): {', '.join(map(str, sorted(shapes)))}; "
                "the adapters were trained on different bases"
            )
        pairs[path] = combine(path, terms)
    base = next((adapter.base for adapter in adapters if adapter.base), None)
    known = next((adapter.metadata for adapter in adapters if "base_digest" in adapter.metadata), {})
    return Adapter(pairs, 0.0, base, {key: text for key, text in known.items() if key.startswith("base_")})


def _by_factors(adapters: Sequence[Adapter], weights: Sequence[float], rule: Rule) -> Adapter:
    """The adapter whose A and B are each combined by `rule`."""

    def combine(path: str, terms: list[Term]) -> Pair:
        ranks = [pair.rank for pair, _ in terms]
        if len(set(ranks)) > 1:
            raise InputError(
                f"{path}: the adapters have the ranks {', '.join(map(str, ranks))} and this method needs equal ones; "
                "concatenation and SVD take any"
            )
        scales = [weight * pair.scale for pair, weight in terms]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        a, b = ([pair.factors()[side] for pair, _ in terms] for side in (0, 1))
        a, b = rule(f"{path}.lora_a", a, signed), rule(f"{path}.lora_b", b, roots)
        return Pair.of_factors(a, b, float(ranks[0]))

    return _combined(adapters, weights, combine)


def _paths(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({path for adapter in adapters for path in adapter.pairs})


def _stacked(terms: list[Term]) -> Pair:
    """The sum of weighted pairs as one pair: A's below, B's beside one another, each B with its weight and scale."""
    if len(terms) == 1:
        pair, weight = terms[0]
        return Pair(pair.lora_a, pair.lora_b, weight * pair.alpha)
    a = mx.concatenate([pair.factors()[0] for pair, _ in terms], axis=-2)
    b = mx.concatenate([weight * pair.scale * pair.factors()[1] for pair, weight in terms], axis=-1)
    return Pair.of_factors(a, b, float(a.shape[-2]))


def _nearest(pair: Pair, limit: int) -> Pair:
    """The pair of a rank of at most `limit` whose update is nearest (Eckart and Young)."""
    left, core, right = _core(pair)
    u, values, v = np.linalg.svd(core)
    rank = min(limit, values.shape[-1])
    roots = np.sqrt(values[..., :rank])
    b = left @ (u[..., :, :rank] * roots[..., None, :])
    a = (roots[..., :, None] * v[..., :rank, :]) @ right
    return Pair.of_factors(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), float(rank))


def _core(pair: Pair) -> tuple[Float64, Float64, Float64]:
    """(Q, core, P) with Q core P the update (out, in), where Q's columns and P's rows are orthonormal: so the core,
    small, has the update's singular values. Experts come in front."""
    a, b = (np.array(factor).astype(np.float64) for factor in pair.factors())
    left, upper_b = np.linalg.qr(b)
    right, upper_a = np.linalg.qr(a.swapaxes(-1, -2))
    return left, pair.scale * upper_b @ upper_a.swapaxes(-1, -2), right.swapaxes(-1, -2)


def _sum(arrays: list[mx.array], factors: list[float]) -> mx.array:
    total = arrays[0] * factors[0]
    for array, factor in zip(arrays[1:], factors[1:], strict=True):
        total = total + array * factor
    return total


def _largest(array: mx.array, density: float) -> mx.array:
    """The array with zeros for all but its share `density` (rounded down) of the largest magnitudes."""
    flat = array.reshape(-1)
    dropped = flat.size - int(density * flat.size)
    order = mx.argsort(mx.abs(flat))
    return mx.put_along_axis(flat, order[:dropped], mx.array(0.0), axis=0).reshape(array.shape)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; give the share of the entries that is kept, above 0 and at most 1")


def _same_path(one: str, other: str) -> bool:
    """Whether two bases are one: by name, or by where the files lie."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
