"""Our training step on a case, made as the training loop makes it (without its cache of the frozen blocks)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Case, write_model, write_rows  # imports mlx_lora before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import config_file, data, lora, model
from mlx_lora.batches import Batch, Batches, train_batches
from mlx_lora.config import Config
from mlx_lora.data import Example
from mlx_lora.optim import make_optimizer
from mlx_lora.step import Outcome, State, Step, prepare


@dataclass
class Training:
    """A model with a fresh adapter, its rows, and the state that updates go on from."""

    network: nn.Module
    options: Config
    batches: Batches
    step: Step
    state: State

    def updates(self, most: int) -> list[list[Batch]]:
        """What the first updates of the first epoch are made of, at most so many."""
        return list(self.batches.steps(0, min(most, self.batches.steps_per_epoch)))

    def update(self, batches: list[Batch]) -> Outcome:
        self.state, outcome = self.step(self.state, batches, self.options.train.learning_rate, 0)
        return outcome


def start(case: Case, network: nn.Module, rows: Sequence[Example], loss_chunk: int | None = None) -> Training:
    """Attaches the case's adapter to a network; everything is evaluated."""
    options = _options(case, loss_chunk=loss_chunk)
    lora.attach(network, options.lora)
    mx.eval(network.parameters())
    attention = prepare(network, options.train)
    batches = train_batches(options, rows)
    step = Step(network, make_optimizer(options.train), options.train, model.can_compile(), attention)
    return Training(network, options, batches, step, step.initial_state())


def load(case: Case, folder: Path, dtype: str) -> tuple[nn.Module, Sequence[Example]]:
    """The case's model and training rows, both through files that are written into `folder`."""
    path = write_model(case, folder / "model", dtype)
    file, _ = write_rows(case, folder / "rows")
    options = _options(case, {"path": str(path), "dtype": dtype}, str(file))
    base = model.load(options.model)
    return base.model, data.tokenize(data.read(file), base.tokenizer, options.data).examples


def default_dtype() -> str:
    """float32 on a CPU, where MLX multiplies it fastest; bfloat16 elsewhere."""
    return "float32" if mx.default_device() == mx.cpu else "bfloat16"


def _options(
    case: Case, base: str | dict[str, str] = "none", rows: str = "none", loss_chunk: int | None = None
) -> Config:
    return config_file.parse(
        {
            "model": base,
            "data": {"train": rows, "max_seq_length": max(case.longest, 2048)},
            "lora": {"rank": case.rank, "alpha": case.alpha, "layers": f"last:{case.layers}"},
            "train": {"batch_size": case.batch_size, "learning_rate": case.learning_rate, "loss_chunk": loss_chunk},
            "output_dir": "none",
        }
    )
