"""TensorBoard and Weights & Biases, optional extras: a run's events as each of them takes them."""

import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_lora.errors import InputError


class Tracker(Protocol):
    """Something that a run reports to."""

    def event(self, event: dict[str, Any]) -> None:
        """Takes an event of metrics.jsonl."""

    def close(self) -> None:
        """Writes what is waiting; nothing is taken afterwards."""


def check(names: Sequence[str]) -> None:
    """Raises InputError where a package is missing; called before a run loads anything."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f'log.report_to: {name} is not installed; pip install "mlx-lora[{name}]"')


def start(name: str, run: Path, identity: str, config: dict[str, Any], step: int) -> Tracker:
    """Begins to report, from after `step`, the run in the folder `run`; `identity` is the same after a resume."""
    return TensorBoard(run, step) if name == "tensorboard" else WandB(run, identity, config)


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, run: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._scalar, self._text, self._event = scalar_pb, text_pb, Event
        self._writer = EventFileWriter(str(run / "tensorboard"))
        # What an interrupted run told of later steps is void.
        began = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=step + 1, wall_time=time.time(), session_log=began))

    def event(self, event: dict[str, Any]) -> None:
        summaries = [self._scalar(tag, value) for tag, value in scalars(event).items()]
        summaries += [self._text(tag, value) for tag, value in texts(event).items()]
        for summary in summaries:
            self._writer.add_event(self._event(step=event["step"], wall_time=event["time"], summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project WANDB_PROJECT, or mlx_lora, with its files in the folder `wandb`."""

    def __init__(self, run: Path, identity: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mlx_lora"),
            name=run.resolve().name,
            id=identity,
            resume="allow",
            dir=str(run),
            config=config,
            settings=wandb.Settings(console="off", silent=True),  # the terminal is ours
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def event(self, event: dict[str, Any]) -> None:
        if values := {**scalars(event), **texts(event)}:
            self._run.log({"step": event["step"], **values})

    def close(self) -> None:
        self._run.finish()


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The figures of a report or an evaluation, by ``train/…`` and ``eval/…``."""
    if event["event"] not in ("train", "eval"):
        return {}
    return {
        f"{event['event']}/{name}": float(value)
        for name, value in event.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def texts(event: dict[str, Any]) -> dict[str, str]:
    """What an event says in words."""
    kind = event["event"]
    if kind == "sample":
        return {f"sample/{event['prompt'][:60]}": f"base: {event['base']}\n\ntuned: {event['answer']}"}
    return {f"events/{kind}": event["text"]} if "text" in event else {}
