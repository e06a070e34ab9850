"""However a step is computed, its loss and gradient are those of mlx-lm's own loss where that is right: on single rows
without padding, weighted by their supervised tokens."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.tuner.trainer import default_loss

from mlx_lora import lora
from mlx_lora.batches import Batches
from mlx_lora.config import Lora, Train
from mlx_lora.data import Example
from mlx_lora.optim import make_optimizer
from mlx_lora.prefix import PrefixCache
from mlx_lora.step import Step, prepared

RATE = 1024.0  # of the SGD that shows gradients: the update dwarfs the parameters, so that none of it is rounded off
LENGTHS = [9, 17, 30, 41, 41, 52, 60, 75]
WAYS = {
    "as it stands": {},
    "uncompiled": {"compiled": False},
    "micro-batches": {"batch_size": 2, "accumulate": 4},
    "batch_tokens": {"batch_tokens": 160},
    "packed": {"packing": True},
    "packed in lines": {"packing": True, "batch_tokens": 130},
    "logits in chunks": {"chunk": 5},
    "vocabulary in parts": {"part": 48},
    "vocabulary in parts, logits in chunks": {"part": 48, "chunk": 50},
    "untied head": {"shape": {"tie_word_embeddings": False}, "part": 48},
    "adapted head": {"shape": {"tie_word_embeddings": False}, "patterns": ["q_proj", "lm_head"]},
    "4 bits": {"bits": 4, "part": 48},
    "nothing recomputed": {"level": False},
    "blocks recomputed": {"level": True},
    "every second block recomputed": {"level": 2},
    "MLPs recomputed": {"level": "mlp"},
    "packed, recomputed, in chunks": {"packing": True, "level": True, "chunk": 16},
    "prefix kept": {"prefix": True, "layers": "last:1"},
    "prefix kept, packed, recomputed": {"prefix": True, "layers": "last:1", "packing": True, "level": True},
    "prefix kept in a file": {"prefix": True, "layers": "last:1", "file": True, "batch_tokens": 160},
}


def rows() -> list[Example]:
    """Prompts that are not learned, and answers that are."""
    random = np.random.default_rng(0)
    return [
        Example(random.integers(1, 128, length).astype(np.int32), np.arange(length) >= length // 2, "rows")
        for length in LENGTHS
    ]


def adapted(name: str, options: dict[str, Any]) -> nn.Module:
    model = tiny.BUILDERS[name](num_hidden_layers=4, **options.get("shape", {}))
    if "bits" in options:
        nn.quantize(model, group_size=32, bits=options["bits"])
    model.freeze()
    patterns = options.get("patterns", "all-linear")
    lora.attach(model, Lora(rank=4, alpha=8.0, target_modules=patterns, layers=options["layers"]), seed=1)
    tiny.randomize(model)
    return model


def mlx_lms(model: nn.Module) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss per supervised token, and its gradient by path."""
    value_and_grad = nn.value_and_grad(model, default_loss)
    loss, tokens, gradient = 0.0, 0, None
    for row in rows():
        offset = int(np.argmax(row.supervised))
        ids, lengths = mx.array(row.tokens[None]), mx.array([[offset, row.tokens.size]])
        (value, count), slopes = value_and_grad(model, ids, lengths)
        weight = count.item()
        assert weight == row.supervised.sum()
        found = {path: weight * tiny.float64(array) for path, array in nn.utils.tree_flatten(slopes)}
        gradient = found if gradient is None else {path: gradient[path] + found[path] for path in gradient}
        loss, tokens = loss + weight * value.item(), tokens + weight
    assert gradient is not None
    return loss / tokens, {path: array / tokens for path, array in gradient.items()}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_loss_and_gradient_are_mlx_lms(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 8, "accumulate": 1, "layers": "all", **WAYS[way]}
    model = adapted(name, options)
    loss, gradient = mlx_lms(model)
    if "part" in options:
        monkeypatch.setattr("mlx_lora.loss.part_size", lambda positions: options["part"])

    config = Train(
        learning_rate=RATE,
        optimizer={"name": "sgd"},
        max_grad_norm=None,
        loss_chunk=options.get("chunk"),
        gradient_checkpointing=options.get("level", "selective"),
    )
    layout = {key: options[key] for key in ("accumulate", "batch_tokens", "packing") if key in options}
    batches = Batches(rows(), options["batch_size"], 0, **layout)
    with prepared(model, config) as attention:
        prefix = PrefixCache(model, batches, tmp_path if "file" in options else None) if "prefix" in options else None
        step = Step(model, make_optimizer(config), config, options.get("compiled", True), attention, prefix)
        [update] = batches.steps(0, 1, prefix.inputs if prefix else None)
        before = step.initial_state()
        after, outcome = step(before, update, RATE, 0)

    assert outcome.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient.keys() == before.adapter.keys()
    for path, expected in gradient.items():
        ours = (tiny.float64(before.adapter[path]) - tiny.float64(after.adapter[path])) / RATE
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("level", ["selective", "mlp", True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_in_a_step_no_packed_document_moves_another_by_one_bit(name: str, level: bool | str) -> None:
    """Only one document is supervised; all tokens of the others are exchanged."""
    config = Train(learning_rate=1e-3, gradient_checkpointing=level)
    model = adapted(name, {"layers": "all"})
    for kept in (0, 3, 7):
        found = []
        for seed in (1, 2):
            random = np.random.default_rng(seed)
            examples = rows()
            for number, row in enumerate(examples):
                if number != kept:
                    tokens = random.integers(1, 128, row.tokens.size).astype(np.int32)
                    examples[number] = Example(tokens, np.zeros(tokens.size, np.bool_), "rows")
            with prepared(model, config) as attention:
                step = Step(model, make_optimizer(config), config, True, attention)
                [update] = Batches(examples, len(examples), 0, packing=True).steps(0, 1)
                after, outcome = step(step.initial_state(), update, 1e-3, 0)
            assert outcome.applied.item()
            found.append({"loss": np.array(outcome.loss), **tiny.copies(after.adapter)})
        tiny.assert_identical(*found)
