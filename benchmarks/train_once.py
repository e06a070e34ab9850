"""One training run of one side of vs_mlx_lm.py, in this process alone.

    python benchmarks/train_once.py mlx-lm|ours SPEC.json FIGURES.json

Each side is what its command runs (mlx_lm.lora.run, mlx_lora.finetune), watched at three points: the base is loaded, a
batch goes in, an epoch has ended. A side imports nothing of the other's, but that OpenBLAS is loaded for both.
"""

import json
import resource
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lora  # loads OpenBLAS on Linux before MLX is imported

# isort: split
import mlx.core as mx
import numpy as np


class Watch:
    """What a run did: memory, tokens, and the time at which each epoch ended.

    Inputs are tokens that the model reads: all of a row but its last. `padded` counts them with the padding, and
    `padding_targets` those targets of the loss that are padding. `filling` is how long it took to fill the cache of the
    frozen blocks, and `kept` what that holds outside MLX's memory.
    """

    def __init__(self) -> None:
        self.weights = self.peak = self.kept = 0
        self.filling = 0.0
        self.inputs = self.padded = self.supervised = self.padding_targets = 0
        self.sizes: list[int] = []  # inputs of each batch
        self.started = 0.0
        self.epoch_ends: list[float] = []
        self._reset = mx.reset_peak_memory

    def loaded(self) -> None:
        self.weights = mx.get_active_memory()
        self._reset()
        mx.reset_peak_memory = self.forget_nothing

    def forget_nothing(self) -> None:
        """What a run does to the peak, without losing what was before."""
        self.peak = max(self.peak, mx.get_peak_memory())
        self._reset()

    def batch(self, inputs: int, padded: int, supervised: int, padding_targets: int = 0) -> None:
        self.started = self.started or time.time()
        self.inputs += inputs
        self.padded += padded
        self.supervised += supervised
        self.padding_targets += padding_targets
        self.sizes.append(inputs)

    def figures(self) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {name: value for name, value in vars(self).items() if name != "_reset"} | {
            "peak": max(self.peak, mx.get_peak_memory()) + self.kept,
            "resident": peak if sys.platform == "darwin" else peak * 1024,
            "epoch_seconds": np.diff([self.started, *self.epoch_ends]).tolist(),
        }


def mlx_lms(spec: dict[str, Any], watch: Watch) -> None:
    """mlx_lm.lora as shipped; its AdamW with bias correction, as ours (and everybody else's) is."""
    import mlx_lm.lora
    from mlx.utils import tree_flatten
    from mlx_lm.tuner import trainer

    load = mlx_lm.lora.load
    start = str(Path(spec["start"]) / "adapters.safetensors")

    def watched_load(*arguments: Any, **options: Any) -> Any:
        loaded = load(*arguments, **options)
        watch.loaded()
        return loaded

    def watched_batches(*arguments: Any, **options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch, spans in trainer.iterate_batches(*arguments, **options):
            (rows, width), (offsets, lengths) = batch.shape, np.array(spans).T
            targets = lengths - np.maximum(offsets, 1)
            beyond = int((lengths < width).sum())  # trainer.default_loss: steps <= lengths, one too many
            watch.batch(int((lengths - 1).sum()), rows * (width - 1), int(targets.sum()), beyond)
            yield batch, spans

    class EpochEnds(trainer.TrainingCallback):
        def on_train_loss_report(self, _: dict[str, Any]) -> None:
            watch.epoch_ends.append(time.time())

    def watched_train(model: Any, **options: Any) -> None:
        adapted = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert adapted == mx.load(start).keys(), "mlx-lm adapts other layers than the starting adapter"
        options |= {"iterate_batches": watched_batches, "training_callback": EpochEnds()}
        trainer.train(model=model, **options)

    mlx_lm.lora.load = watched_load
    mlx_lm.lora.train = watched_train
    batches = spec["rows"] // spec["batch_size"]
    options = {
        "model": spec["model"],
        "train": True,
        "data": str(Path(spec["train"]).parent),
        "mask_prompt": spec["chats"],
        "max_seq_length": spec["max_seq_length"],
        "num_layers": spec["layers"],
        "lora_parameters": {"rank": spec["rank"], "dropout": 0.0, "scale": spec["alpha"] / spec["rank"]},
        "resume_adapter_file": start,
        "batch_size": spec["batch_size"],
        "iters": batches * spec["epochs"],
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"bias_correction": True}},
        "learning_rate": spec["learning_rate"],
        "steps_per_report": batches,
        "seed": spec["seed"],
        "adapter_path": spec["output"],
    }
    mlx_lm.lora.run(types.SimpleNamespace(**mlx_lm.lora.CONFIG_DEFAULTS | options))


def ours(spec: dict[str, Any], watch: Watch) -> None:
    """mlx_lora.train; without clipping, which mlx-lm does not have."""
    from mlx_lora import data, metrics, model
    from mlx_lora.batches import Batches
    from mlx_lora.prefix import PrefixCache
    from mlx_lora.step import Step

    load, load_rows, step, fill = model.load, data.load, Step.__call__, PrefixCache.__init__
    examples: list[data.Example] = []

    def watched_load(*arguments: Any, **options: Any) -> Any:
        base = load(*arguments, **options | {"evaluated": True})  # by then the weights are to be in memory
        watch.loaded()
        return base

    def watched_rows(*arguments: Any, **options: Any) -> tuple[data.Dataset, data.Dataset | None]:
        train, valid = load_rows(*arguments, **options)
        examples.extend(train.examples)
        return train, valid

    def watched_step(self: Step, state: Any, batches: list[Any], *rest: Any, **options: Any) -> Any:
        for batch in batches:
            rows = [examples[row] for row in batch.rows]
            inputs, supervised = sum(row.tokens.size - 1 for row in rows), sum(row.supervised[1:].sum() for row in rows)
            watch.batch(inputs, batch.inputs.size, int(supervised))
        return step(self, state, batches, *rest, **options)

    def watched_fill(self: PrefixCache, *arguments: Any, **options: Any) -> None:
        begin = time.time()
        fill(self, *arguments, **options)
        watch.filling, watch.kept = time.time() - begin, self._kept.nbytes

    def mlx_lms_epoch(self: Batches, number: int) -> list[list[np.ndarray]]:
        """mlx-lm's updates (trainer.iterate_batches): rows as they stand in the file (what it sorts by is the number of
        a row's keys), in batches that stay, in a new order."""
        rows, size = np.arange(len(self.examples)), self.batch_size
        batches = [rows[first : first + size] for first in range(0, rows.size - size + 1, size)]
        random = np.random.RandomState(spec["seed"])
        order = [random.permutation(len(batches)) for _ in range(number + 1)][-1]
        return [[batches[batch]] for batch in order]

    if spec["same_batches"]:
        Batches._epoch = mlx_lms_epoch  # type: ignore[method-assign]
    PrefixCache.__init__ = watched_fill  # type: ignore[method-assign]
    model.load, data.load, Step.__call__ = watched_load, watched_rows, watched_step  # type: ignore[method-assign]
    config = {
        "model": spec["model"],
        "data": {"train": spec["train"], "valid": 0, "max_seq_length": spec["max_seq_length"]},
        "lora": {
            "rank": spec["rank"],
            "alpha": spec["alpha"],
            "layers": f"last:{spec['layers']}",
            "start_from": spec["start"],
        },
        "train": {
            "epochs": spec["epochs"],
            "batch_size": spec["batch_size"],
            "learning_rate": spec["learning_rate"],
            "schedule": {"name": "constant", "warmup": 0},
            "max_grad_norm": None,
            "seed": spec["seed"],
        },
        "log": {"every": -(-spec["rows"] // spec["batch_size"])},
        "output_dir": spec["output"],
    }
    mlx_lora.finetune(config, spec["overrides"])
    events = [event for _, event in metrics.events(Path(spec["output"]) / metrics.FILE)]
    watch.epoch_ends = [event["time"] for event in events if event["event"] == "train"]


def _main() -> None:
    side, spec, figures = sys.argv[1:]
    watch = Watch()
    {"mlx-lm": mlx_lms, "ours": ours}[side](json.loads(Path(spec).read_text(encoding="utf-8")), watch)
    Path(figures).write_text(json.dumps(watch.figures()), encoding="utf-8")


if __name__ == "__main__":
    _main()
