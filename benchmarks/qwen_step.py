"""A training step of the shape of Qwen2.5-0.5B, against the same step with mlx-lm's own LoRA layers and loss.

    python benchmarks/qwen_step.py [--dtype float32] [--layers 24] [--tokens 128] [--repeats 5] [--json FILE]

24 blocks, hidden 896, 14 heads and 2 key-value heads, feed-forward 4864, vocabulary 151,936, tied; rank 8 on q_proj and
v_proj; AdamW; 2 rows of 128 tokens, all supervised. The weights are random: time does not depend on them, and nothing
is downloaded. Both steps share the base's weights and are compiled (where a compiler is); every repeat times one of
each in turn and a figure is the median, after one untimed step each. Ours also clips and guards the gradient, mlx-lm's
does not. "forward" is the loss alone; "forward and backward" and "update" are the two halves of our step.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  (loads OpenBLAS on Linux before MLX is imported)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_lm.models.qwen2 as qwen2
import numpy as np
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lora import config_file, lora, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import Batch
from mlx_lora.head import logits_function
from mlx_lora.loss import Arrays, arrays, batch_loss
from mlx_lora.optim import make_optimizer
from mlx_lora.step import Step

OPTIONS = config_file.parse(
    {
        "model": "Qwen2.5-0.5B (random weights)",
        "data": {"train": "random"},
        "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "train": {"batch_size": 2, "learning_rate": 1e-4},
        "output_dir": "none",
    }
)
ROWS, TOKENS = 2, 128


def build(layers: int) -> nn.Module:
    """The model, unevaluated."""
    return qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=896,
            num_hidden_layers=layers,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=151_936,
            tie_word_embeddings=True,
        )
    )


def ours(network: nn.Module, batch: Batch, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What can be timed of our step: its parts and the whole."""
    step = Step(network, make_optimizer(OPTIONS.train), OPTIONS.train, compiled)
    state = step.initial_state()
    inputs, logits = arrays(batch), logits_function(network)
    share, key, rate = mx.array(1 / batch.supervised), mx.random.key(0), mx.array(OPTIONS.train.learning_rate)
    zeros = {name: mx.zeros_like(array) for name, array in state.adapter.items()}
    gradients = {name: array + 1e-3 for name, array in zeros.items()}

    def loss(inputs: Arrays) -> mx.array:
        return share * batch_loss(logits, inputs)

    forward = mx.compile(loss) if compiled else loss

    def whole() -> None:
        nonlocal state
        state, _ = step(state, [batch], OPTIONS.train.learning_rate, 0)

    return {
        "forward": lambda: mx.eval(forward(inputs)),
        "forward and backward": lambda: mx.eval(
            step._accumulate(state.adapter, mx.array(0.0), zeros, inputs, share, key)
        ),
        "update": lambda: mx.eval(*step._update(state.adapter, state.optimizer, gradients, rate)[:2]),
        "step": whole,
    }


def mlx_lms(network: nn.Module, batch: Batch, compiled: bool) -> Callable[[], None]:
    """One iteration of mlx_lm.tuner.trainer.train, as it stands there."""
    optimizer = mlx.optimizers.AdamW(OPTIONS.train.learning_rate)
    state = [network.state, optimizer.state, mx.random.state]
    tokens = mx.array(np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1))
    lengths = mx.array([[0, batch.inputs.shape[1]]] * ROWS)
    value_and_grad = nn.value_and_grad(network, default_loss)

    def iteration(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradient = value_and_grad(network, tokens, lengths)
        optimizer.update(network, gradient)
        return loss, count

    step = partial(mx.compile, inputs=state, outputs=state)(iteration) if compiled else iteration
    return lambda: mx.eval(state, step(tokens, lengths))


def measure(layers: int, tokens: int, dtype: str, repeats: int) -> dict[str, Any]:
    """All figures; times are in seconds."""
    network, theirs = build(layers), build(layers)
    network.set_dtype(getattr(mx, dtype))
    theirs.update(network.parameters())
    lora.attach(network, OPTIONS.lora)
    counts = lora.count(network)
    theirs.freeze()
    linear_to_lora_layers(
        theirs,
        layers,
        {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]},
    )
    mx.eval(network.parameters(), theirs.parameters())
    rows = np.random.default_rng(0).integers(0, 151_936, (ROWS, tokens + 1)).astype(np.int32)
    batch = Batch(rows[:, :-1], rows[:, 1:], np.ones((ROWS, tokens), np.float32), tuple(range(ROWS)), rows.size)

    compiled = model.can_compile()
    calls = ours(network, batch, compiled) | {"mlx-lm step": mlx_lms(theirs, batch, compiled)}
    peaks = {}
    for name in ("step", "mlx-lm step"):
        mx.clear_cache()
        mx.reset_peak_memory()
        calls[name]()
        peaks[name] = mx.get_peak_memory()
    times = _medians(repeats, calls)
    with tempfile.TemporaryDirectory() as folder:
        settings = mlx_form.settings(lora.attached(network), len(network.layers))
        mlx_form.save(Path(folder), lora.parameters(network), settings, {})
        size = (Path(folder) / mlx_form.WEIGHTS).stat().st_size
    return {
        "device": model.device(),
        "mlx": mx.__version__,
        "dtype": dtype,
        "layers": layers,
        "tokens": tokens,
        "repeats": repeats,
        "compiled": compiled,
        "trainable": counts.trainable,
        "parameters": counts.total,
        "adapter_bytes": size,
        "seconds": times,
        "ratio": times["step"] / times["mlx-lm step"],
        "peak_memory": peaks,
    }


def _medians(repeats: int, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first one traces
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def report(figures: dict[str, Any]) -> str:
    """Lines for a person."""
    seconds, peaks = figures["seconds"], figures["peak_memory"]
    compiled = "compiled" if figures["compiled"] else "not compiled"
    return "\n".join(
        [
            f"{figures['device']}, mlx {figures['mlx']}; {figures['dtype']}, {compiled}",
            f"{figures['layers']} blocks of Qwen2.5-0.5B's shape, {ROWS} x {figures['tokens']} tokens, "
            f"rank 8 on q_proj and v_proj: {figures['trainable']:,} of {figures['parameters']:,} parameters train",
            f"adapter file            {figures['adapter_bytes'] / 1e6:10.2f} MB",
            *(f"{name:24}{seconds[name]:10.3f} s" for name in ("forward", "forward and backward", "update", "step")),
            f"{'mlx-lm step':24}{seconds['mlx-lm step']:10.3f} s",
            f"step / mlx-lm step      {figures['ratio']:10.3f}",
            f"peak memory             {peaks['step'] / 1e9:10.2f} GB (mlx-lm {peaks['mlx-lm step'] / 1e9:.2f} GB)",
        ]
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step of Qwen2.5-0.5B's shape.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the base")
    parser.add_argument("--layers", type=int, default=24, help="blocks")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens in each of the two rows")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median is taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    for note in model.prepare_device():
        print(note)
    figures = measure(options.layers, options.tokens, options.dtype, options.repeats)
    print(report(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
