"""The optimizer, as MLX has it, and the learning rate as a function of the step."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optim

from mlx_lora.config import SGD, Adafactor, Adam, AdamW, Schedule, Train


def make_optimizer(config: Train) -> mlx_optim.Optimizer:
    """MLX's optimizer for `train.optimizer`; Adam and AdamW with bias correction (MLX's default is without).

    The learning rate is set at every step by the training step.
    """
    options, rate = config.optimizer, config.learning_rate
    if isinstance(options, AdamW):
        return mlx_optim.AdamW(rate, options.betas, options.eps, options.weight_decay, bias_correction=True)
    if isinstance(options, Adam):
        return mlx_optim.Adam(rate, options.betas, options.eps, bias_correction=True)
    if isinstance(options, SGD):
        return mlx_optim.SGD(rate, options.momentum, options.weight_decay)
    if isinstance(options, Adafactor):
        return mlx_optim.Adafactor(
            rate,
            weight_decay=options.weight_decay,
            scale_parameter=options.scale_parameter,
            relative_step=False,
        )
    return mlx_optim.Lion(rate, options.betas, options.weight_decay)


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps of the warmup in a run of `steps`."""
    return min(steps, int(schedule.warmup) if schedule.warmup >= 1 else math.ceil(round(schedule.warmup * steps, 6)))


def learning_rate(config: Train, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) in a run of `steps`.

    Warmup over w steps rises evenly from min_lr, which it never takes, to the full rate at step w. From there
    ``constant`` stays, ``linear`` and ``cosine`` fall to min_lr, which they would reach at step `steps`.
    """
    schedule = config.schedule
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        share = (step + 1) / (warmup + 1)
    else:
        progress = (step - warmup) / max(1, steps - warmup)
        share = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[schedule.name]
    return schedule.min_lr + (config.learning_rate - schedule.min_lr) * share


def initial_state(optimizer: mlx_optim.Optimizer, parameters: dict[str, mx.array]) -> dict[str, Any]:
    """The optimizer's state before the first update: ``step``, ``learning_rate`` and a slot dict per parameter."""
    optimizer.init(parameters)
    return optimizer.state


def flatten_state(state: dict[str, Any]) -> dict[str, mx.array]:
    """The state as flat arrays, slots named ``parameter/slot``: what a checkpoint holds."""
    flat: dict[str, mx.array] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{slot}": array for slot, array in value.items() if isinstance(array, mx.array)}
        else:
            flat[name] = value
    return flat


def restore_state(state: dict[str, Any], flat: dict[str, mx.array]) -> dict[str, Any]:
    """An `initial_state` with the arrays of a checkpoint. Raises KeyError where one is missing."""
    return {
        name: {slot: flat[f"{name}/{slot}"] if isinstance(array, mx.array) else array for slot, array in value.items()}
        if isinstance(value, dict)
        else flat[name]
        for name, value in state.items()
    }
