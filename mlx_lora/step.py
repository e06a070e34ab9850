"""The training step: a pure function of (adapter, optimizer state, micro-batches, learning rate, step number)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim

from mlx_lora import lora, rms_norm, swiglu
from mlx_lora.attention import Attention
from mlx_lora.batches import Batch
from mlx_lora.config import Train
from mlx_lora.gradient_checkpointing import checkpoint_blocks
from mlx_lora.head import output_of
from mlx_lora.loss import Arrays, arrays, batch_loss
from mlx_lora.memory import NoFurtherAhead
from mlx_lora.optim import initial_state
from mlx_lora.prefix import PrefixCache


@dataclass
class State:
    """Everything that training changes: the adapter's arrays by path, and the optimizer's state."""

    adapter: dict[str, mx.array]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Of one update: mean loss per supervised token, gradient norm before clipping, whether it was applied."""

    loss: mx.array
    gradient_norm: mx.array
    applied: mx.array


def prepare(model: nn.Module, config: Train) -> Attention:
    """Makes a model with its adapter compute as training does: attention, SwiGLU and normalization of ours, and blocks
    that recompute what `train.gradient_checkpointing` says."""
    attention = Attention.install(model)
    swiglu.install(model)
    rms_norm.install(model)
    checkpoint_blocks(model, config.gradient_checkpointing)
    return attention


@contextmanager
def prepared(model: nn.Module, config: Train) -> Iterator[Attention]:
    """Inside, the model is as `prepare` makes it; afterwards its modules have the classes that they had."""
    kinds = [(module, type(module)) for module in model.modules()]
    try:
        yield prepare(model, config)
    finally:
        for module, kind in kinds:
            module.__class__ = kind


class Step:
    """One optimizer update of a model that is `prepared`.

    The gradient of the summed token losses of all micro-batches is divided once by their supervised tokens, so it is
    the gradient of the mean over the whole update however rows are split. Both halves are compiled: one trace per
    batch shape and one for the update (`traces` counts them). An update with a gradient or a result that is not
    finite leaves the state as it was.

    Args:
        attention: confines the attention of packed rows to themselves.
        prefix: gives what the blocks below the lowest adapted one give, which then do not run.
        ahead: shared with what else computes during a run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: mlx_optim.Optimizer,
        config: Train,
        compiled: bool = True,
        attention: Attention | None = None,
        prefix: PrefixCache | None = None,
        ahead: NoFurtherAhead | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.traces = 0
        self.output = output_of(model)
        self._attention = attention
        self._prefix = prefix
        self._ahead = ahead or NoFurtherAhead()
        self._accumulate = mx.compile(self._accumulate_eagerly) if compiled else self._accumulate_eagerly
        self._update = mx.compile(self._update_eagerly) if compiled else self._update_eagerly

    def initial_state(self) -> State:
        """The state before the first update, from the model's adapter."""
        adapter = lora.parameters(self.model)
        state = State(adapter, initial_state(self.optimizer, adapter))
        self.optimizer.state = {}  # else it would hold these arrays beside those of every later state
        return state

    def __call__(self, state: State, batches: list[Batch], learning_rate: float, number: int) -> tuple[State, Outcome]:
        """The state after update `number` (from 0), and its figures; all evaluated."""
        with self._ahead.allowed():
            return self._evaluated(state, batches, learning_rate, number)

    def _evaluated(
        self, state: State, batches: list[Batch], learning_rate: float, number: int
    ) -> tuple[State, Outcome]:
        share = mx.array(1 / max(1, sum(batch.supervised for batch in batches)))
        gradients = {name: mx.zeros_like(array) for name, array in state.adapter.items()}
        loss = mx.array(0.0)
        keys = mx.random.split(mx.random.key((self.config.seed << 32) + number + 1), len(batches))  # 0: the start
        for micro, batch in enumerate(batches):
            loss, gradients = self._accumulate(state.adapter, loss, gradients, arrays(batch), share, keys[micro])
            if micro + 1 < len(batches):
                mx.eval(loss, gradients)  # else the graphs of all micro-batches are alive at once
        adapter, optimizer, norm, applied = self._update(
            state.adapter, state.optimizer, loss, gradients, mx.array(learning_rate)
        )
        mx.eval(adapter, optimizer, loss, norm, applied)
        return State(adapter, optimizer), Outcome(loss, norm, applied)

    def _accumulate_eagerly(
        self,
        adapter: dict[str, mx.array],
        loss: mx.array,
        gradients: dict[str, mx.array],
        batch: Arrays,
        share: mx.array,
        key: mx.array,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        self.traces += 1
        kept, output = lora.parameters(self.model), self.output
        if self._prefix is not None:
            output = replace(output, hidden=partial(self._prefix.rest, inputs=batch["kept"]))
        confined: Any = nullcontext()
        if "segments" in batch:
            assert self._attention is not None
            confined = self._attention.packed(batch["segments"], batch["window"])

        def micro_loss(adapter: dict[str, mx.array]) -> mx.array:
            lora.set_parameters(self.model, adapter)
            weighted = batch | {"mask": share * batch["mask"]}
            return batch_loss(output, weighted, self.config.label_smoothing, self.config.loss_chunk)

        lora.set_dropout_key(self.model, key)
        try:
            with confined:
                value, more = mx.value_and_grad(micro_loss)(adapter)
        finally:  # no tracer stays in the model
            lora.set_dropout_key(self.model, None)
            lora.set_parameters(self.model, kept)
        return loss + value, {name: gradients[name] + more[name] for name in gradients}

    def _update_eagerly(
        self,
        adapter: dict[str, mx.array],
        state: dict[str, Any],
        loss: mx.array,
        gradients: dict[str, mx.array],
        learning_rate: mx.array,
    ) -> tuple[dict[str, mx.array], dict[str, Any], mx.array, mx.array]:
        self.traces += 1
        limit = float("inf") if self.config.max_grad_norm is None else self.config.max_grad_norm
        clipped, norm = mlx_optim.clip_grad_norm(gradients, limit)
        kept = self.optimizer.state
        self.optimizer.state = {
            name: dict(value) if isinstance(value, dict) else value for name, value in state.items()
        }
        self.optimizer.learning_rate = learning_rate
        try:
            updated = self.optimizer.apply_gradients(clipped, adapter)
            changed = self.optimizer.state
        finally:
            self.optimizer.state = kept

        finite = mx.isfinite(norm) & mx.isfinite(loss)
        for array in updated.values():
            finite = finite & mx.isfinite(array).all()

        def new_if_finite(new: Any, old: Any) -> Any:
            if isinstance(new, dict):
                return {name: new_if_finite(value, old[name]) for name, value in new.items()}
            return mx.where(finite, new, old) if isinstance(new, mx.array) else new

        return new_if_finite(updated, adapter), new_if_finite(changed, state), norm, finite
