"""What each technique of a training step gives: its time and memory over those of the same step without it.

    python benchmarks/techniques.py [--techniques NAME...] [--rounds 5] [--updates 4] [--tiny] [--json FILE]

SmolLM2's shape with 8 blocks and rows of 32 to 512 tokens, 45 % of them supervised, four in a batch. Both ways of a
technique compute the first updates of an epoch in one process and in turn; all else is as it is in use. Medians of
`rounds`. Times are per real token, since ways may lay out rows differently; memory is MLX's peak above what is there
before an update, without what a kept prefix takes outside MLX. Ratios are with / without.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cases import CASES, Case, build, examples  # imports mlx_lora before MLX
from cases import tiny as tiny_case
from our_step import default_dtype

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import batches, config_file, lora, memory, model, planning
from mlx_lora.batches import train_batches
from mlx_lora.config import Config
from mlx_lora.data import Example
from mlx_lora.errors import exit_code
from mlx_lora.optim import make_optimizer
from mlx_lora.prefix import PrefixCache
from mlx_lora.step import Step, prepared

MLXS_CACHE = 32 * 2**20  # bytes of freed buffers that MLX keeps on a CPU

CASE = replace(
    CASES["e"], title="SmolLM2's shape, 8 blocks, 4 rows of 32 to 512 tokens, 45 % supervised", shortest=32,
    longest=512, supervised=0.45, rows=32,
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How updates are computed: training options, and what is in use though no option names it."""

    options: dict[str, Any] = field(default_factory=dict)
    layers: str = "all"
    sorted: bool = True  # rows of about one length share a batch
    supervised_only: bool = True  # logits at supervised positions alone
    parts: bool = True  # of the logits, at a time
    held_back: bool = True  # MLX's scheduler
    cached: bool = True  # freed buffers, beyond what MLX keeps by itself
    compiled: bool = True
    kept_prefix: bool = False


IN_USE = Way()
TECHNIQUES = {
    "rows of one length in a batch": (IN_USE, replace(IN_USE, sorted=False)),
    "batch_tokens: 512": (Way({"batch_tokens": 512}), IN_USE),
    "logits at supervised positions only": (IN_USE, replace(IN_USE, supervised_only=False)),
    "logits in parts": (IN_USE, replace(IN_USE, parts=False)),
    "recomputed: selective": (IN_USE, Way({"gradient_checkpointing": False})),
    "recomputed: mlp": (Way({"gradient_checkpointing": "mlp"}), Way({"gradient_checkpointing": False})),
    "recomputed: every second block": (Way({"gradient_checkpointing": 2}), Way({"gradient_checkpointing": False})),
    "recomputed: every block": (Way({"gradient_checkpointing": True}), Way({"gradient_checkpointing": False})),
    "scheduler held back": (IN_USE, replace(IN_USE, held_back=False)),
    "freed buffers kept": (IN_USE, replace(IN_USE, cached=False)),
    "frozen prefix kept, top half adapted": (Way(layers="last:4", kept_prefix=True), Way(layers="last:4")),
    "compiled": (IN_USE, replace(IN_USE, compiled=False)),
    "plan: auto, three quarters of the memory": (Way({"plan": "auto"}), IN_USE),
}


class _Freely(memory.NoFurtherAhead):
    """Lets MLX's scheduler allocate what it likes."""

    @contextmanager
    def allowed(self) -> Iterator[None]:
        yield


class Measured:
    """The first updates of an epoch, computed in one way, again and again."""

    def __init__(self, way: Way, tiny: bool, dtype: str, most: int) -> None:
        case = replace(tiny_case(CASE), shortest=4, rows=CASE.rows) if tiny else CASE
        self.way = way
        self.network = build({**(case.shape or {}), "num_hidden_layers": 8})
        self.network.set_dtype(getattr(mx, dtype))
        rows = examples(case)
        config = _config(case, way)
        lora.attach(self.network, config.lora)
        mx.eval(self.network.parameters())
        if way.options.get("plan") == "auto":
            config = _planned(config, self.network, rows)
        self.options = config.train
        window, batches.WINDOW = batches.WINDOW, batches.WINDOW if way.sorted else 1
        laid_out = train_batches(config, rows)
        with prepared(self.network, self.options) as attention:
            prefix = PrefixCache(self.network, laid_out) if way.kept_prefix else None
            most = min(most, laid_out.steps_per_epoch)
            self.updates = list(laid_out.steps(0, most, prefix.inputs if prefix else None))
            optimizer, compiled = make_optimizer(self.options), way.compiled and model.can_compile()
            ahead = memory.NoFurtherAhead() if way.held_back else _Freely()
            self.step = Step(self.network, optimizer, self.options, compiled, attention, prefix, ahead)
        batches.WINDOW = window
        if not way.supervised_only:
            self.updates = [[replace(batch, positions=None) for batch in update] for update in self.updates]
        if not way.parts:
            self.step.output = replace(self.step.output, at_once="for comparison")
        self.tokens = sum(batch.tokens for update in self.updates for batch in update)
        self.state = self.step.initial_state()
        self.run()  # compiles, and finds out how much memory is needed

    def run(self) -> tuple[float, int]:
        """Seconds per real token, and the peak in bytes above what is there before."""
        gc.collect()
        mx.clear_cache()
        with prepared(self.network, self.options), memory.limits(memory.available()) as limits:
            mx.set_cache_limit(limits.cache if self.way.cached else MLXS_CACHE)
            self.state, _ = self.step(self.state, self.updates[0], 1e-4, 0)  # fills the cache
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            begin = time.perf_counter()
            for update in self.updates:
                self.state, _ = self.step(self.state, update, 1e-4, 0)
            seconds = time.perf_counter() - begin
            return seconds / self.tokens, mx.get_peak_memory() - before


def _config(case: Case, way: Way) -> Config:
    return config_file.parse(
        {
            "model": "none",
            "data": {"train": "none"},
            "lora": {"rank": case.rank, "alpha": case.alpha, "layers": way.layers},
            "train": {"batch_size": case.batch_size, **way.options},
            "output_dir": "none",
        }
    )


def _planned(config: Config, network: nn.Module, rows: Sequence[Example]) -> Config:
    """With what the plan chooses for three quarters of what the largest batch takes otherwise."""
    compiled = model.can_compile()
    needed = planning.measured(config.train, network, train_batches(config, rows).largest(), compiled).memory
    options, lines = planning.choose(config, network, rows, int(0.75 * needed / planning.SHARE), compiled)
    print(lines[-1], file=sys.stderr)
    return config.model_copy(update={"train": options})


def measure(name: str, rounds: int, tiny: bool, dtype: str, updates: int) -> dict[str, Any]:
    """One technique: medians of both ways and their ratios."""
    ways = [Measured(way, tiny, dtype, updates) for way in TECHNIQUES[name]]
    runs = [[way.run() for way in ways] for _ in range(rounds)]
    seconds = [statistics.median(run[side][0] for run in runs) for side in (0, 1)]
    peaks = [statistics.median(run[side][1] for run in runs) for side in (0, 1)]
    return {
        "name": name,
        "seconds_per_token": seconds,
        "peak": peaks,
        "time": seconds[0] / seconds[1],
        "memory": peaks[0] / peaks[1],
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description="What each technique of a training step gives.")
    names = list(TECHNIQUES)
    parser.add_argument("--techniques", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--updates", type=int, default=4, help="of an epoch's eight, in a round")
    parser.add_argument("--tiny", action="store_true", help="a narrow model and short rows: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    dtype = default_dtype()
    figures: dict[str, Any] = {
        "device": model.device(),
        "mlx": mx.__version__,
        "dtype": dtype,
        "techniques": [],
    }
    print(f"{model.device()}, mlx {mx.__version__}; {dtype}, medians of {options.rounds}")
    print(f"{CASE.title}; with / without")
    print(f"\n{'':40} {'time':>7} {'memory':>7} {'MB with':>8} {'without':>8}", flush=True)
    for name in options.techniques:
        found = measure(name, options.rounds, options.tiny, dtype, options.updates)
        figures["techniques"].append(found)
        megabytes = " ".join(f"{peak / 1e6:8.1f}" for peak in found["peak"])
        print(f"{name:40} {found['time']:7.2f} {found['memory']:7.2f} {megabytes}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(_main))
