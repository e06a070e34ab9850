"""An adapter as a value: its arrays and what gives them meaning, apart from any model."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import mlx.core as mx

from mlx_lora.config import Model
from mlx_lora.errors import InputError


@dataclass(frozen=True)
class Pair:
    """The update of one module, x → alpha / rank · (x A) B, in the shapes of `layers.py`: lora_a (in, rank) and lora_b
    (rank, out), for experts (E, rank, in) and (E, out, rank). Arrays are float32."""

    lora_a: mx.array
    lora_b: mx.array
    alpha: float

    @property
    def experts(self) -> bool:
        return self.lora_a.ndim == 3

    @property
    def rank(self) -> int:
        return self.lora_a.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def inputs(self) -> int:
        return self.lora_a.shape[-1] if self.experts else self.lora_a.shape[0]

    @property
    def outputs(self) -> int:
        return self.lora_b.shape[1]

    def factors(self) -> tuple[mx.array, mx.array]:
        """(A (rank, in), B (out, rank)), for experts with E in front: the form of PEFT and GGUF."""
        return (self.lora_a, self.lora_b) if self.experts else (self.lora_a.T, self.lora_b.T)

    @classmethod
    def of_factors(cls, a: mx.array, b: mx.array, alpha: float) -> "Pair":
        """The pair of A (…, rank, in) and B (…, out, rank)."""
        return cls(a, b, alpha) if a.ndim == 3 else cls(a.T, b.T, alpha)

    def with_rank(self, rank: int, alpha: float) -> "Pair":
        """The same update with another rank, not below this one, and alpha: zeros fill up A and B, and B takes what
        differs in scale, so the result is exact but for one rounding of B."""
        a, b = self.factors()
        more = rank - self.rank
        if more < 0:
            raise ValueError(f"rank {self.rank} does not fit into {rank}")
        factor = self.scale * rank / alpha
        if more:
            a = mx.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)])
            b = mx.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, more)])
        return Pair.of_factors(a, b if factor == 1 else b * factor, alpha)


@dataclass(frozen=True)
class Adapter:
    """Pairs by the path of their module in the model, the dropout of further training, the base that they were
    trained on as far as it is known, and free metadata (of the safetensors file)."""

    pairs: dict[str, Pair]
    dropout: float = 0.0
    base: Model | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def uniform(self) -> tuple[int, float] | None:
        """(rank, alpha) where all pairs have the same, else None."""
        kinds = {(pair.rank, pair.alpha) for pair in self.pairs.values()}
        return kinds.pop() if len(kinds) == 1 else None

    def folded(self) -> "Adapter":
        """The same updates with one rank, the largest, and one alpha: for forms that know no others."""
        if self.uniform is not None:
            return self
        rank = max(pair.rank for pair in self.pairs.values())
        alpha = max((pair.scale for pair in self.pairs.values()), key=abs) * rank or 1.0
        return replace(self, pairs={path: pair.with_rank(rank, alpha) for path, pair in self.pairs.items()})

    def arrays(self) -> dict[str, mx.array]:
        """The arrays by full path, as they are trained and saved."""
        return {
            f"{path}.{name}": array
            for path, pair in self.pairs.items()
            for name, array in (("lora_a", pair.lora_a), ("lora_b", pair.lora_b))
        }


def pairs_of(arrays: dict[str, mx.array], alphas: dict[str, float] | float) -> dict[str, Pair]:
    """The pairs in a flat dictionary of arrays by full path. Raises InputError for what is no pair."""
    paths = sorted({name.rpartition(".")[0] for name in arrays})
    for name in arrays:
        if name.rpartition(".")[2] not in ("lora_a", "lora_b"):
            raise InputError(f"{name} is no array of a LoRA adapter")
    pairs = {}
    for path in paths:
        for name in ("lora_a", "lora_b"):
            if f"{path}.{name}" not in arrays:
                raise InputError(f"{path}.{name} is missing")
        a, b = (arrays[f"{path}.{name}"].astype(mx.float32) for name in ("lora_a", "lora_b"))
        shapes = f"{path}: lora_a {a.shape} and lora_b {b.shape}"
        inner = (1, 2) if a.ndim == 3 else (1, 0)
        if a.ndim not in (2, 3) or b.ndim != a.ndim or 0 in (*a.shape, *b.shape):
            raise InputError(f"{shapes} are no pair of matrices")
        if a.shape[inner[0]] != b.shape[inner[1]] or (a.ndim == 3 and len(a) != len(b)):
            raise InputError(f"{shapes} do not fit one another")
        pairs[path] = Pair(a, b, alphas if isinstance(alphas, float) else alphas[path])
    return pairs


def check_finite(pairs: Iterable[tuple[str, Pair]]) -> None:
    """Raises InputError naming the first module with an array that is not finite."""
    named = [(path, array) for path, pair in pairs for array in (pair.lora_a, pair.lora_b)]
    finite = mx.stack([mx.isfinite(array).all() for _, array in named]).tolist() if named else []
    for (path, _), good in zip(named, finite, strict=True):
        if not good:
            raise InputError(f"{path} has values that are not finite")
