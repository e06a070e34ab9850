"""Training here against training with torch and PEFT: the same weights, rows and settings give the same numbers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from mlx_lora import config_file, data, lora, model
from mlx_lora.adapter_files import mlx_form
from mlx_lora.batches import Batches, train_batches
from mlx_lora.config import Config, Lora, Model
from mlx_lora.data import Example
from mlx_lora.optim import learning_rate, make_optimizer
from mlx_lora.step import Step

# PEFT 0.21 asks transformers 5.23 under the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("one_torch_thread"),
]

TEXT = "the river runs under an old stone bridge where two boats wait for rain and nobody counts hours"


@dataclass
class Trained:
    """Of each step the loss and the gradient's norm; of the adapter its arrays before and after, as PEFT has them."""

    losses: list[float]
    norms: list[float]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def settings(rank: int, targets: str | list[str], **train: Any) -> Config:
    return config_file.parse(
        {
            "model": "base",
            "data": {"train": "rows.jsonl"},
            "lora": {"rank": rank, "alpha": 2 * rank, "target_modules": targets},
            "train": {
                "learning_rate": 1e-3,
                "schedule": {"name": "constant", "warmup": 0, "min_lr": 0},
                # With a small eps, where a gradient is near 0 its sign, and so a whole step, is rounding's choice.
                "optimizer": {"name": "adamw", "weight_decay": 0.01, "betas": [0.9, 0.98], "eps": 1e-4},
                "max_grad_norm": 1.0,
                "seed": 3,
                **train,
            },
            "output_dir": "run",
        }
    )


def as_peft(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """PEFT's names and shapes: the transposes."""
    names = {"lora_a": "lora_A", "lora_b": "lora_B"}
    return {
        f"base_model.model.{path}.{names[side]}": np.array(array).T
        for (path, _, side), array in ((name.rpartition("."), array) for name, array in arrays.items())
    }


def train_here(network: nn.Module, options: Config, batches: Batches, steps: int) -> Trained:
    """As the training loop does."""
    lora.attach(network, options.lora, options.train.seed)
    step = Step(network, make_optimizer(options.train), options.train)
    state = step.initial_state()
    before, losses, norms = as_peft(state.adapter), [], []
    for number, micro in enumerate(batches.steps(0, steps)):
        state, outcome = step(state, micro, learning_rate(options.train, number, steps), number)
        losses.append(outcome.loss.item())
        norms.append(outcome.gradient_norm.item())
    lora.set_parameters(network, state.adapter)
    return Trained(losses, norms, before, as_peft(state.adapter))


def attach_peft(folder: Path, options: Lora, paths: list[str]) -> Any:
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=paths, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(network, wanted)


def trainable(network: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.removesuffix(".default.weight"): parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def padded(rows: list[Example]) -> dict[str, torch.Tensor]:
    """What transformers' own loss takes: ragged rows padded on the right, -100 where nothing is learned."""
    width = max(row.tokens.size for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
    }
    for place, row in enumerate(rows):
        tokens = torch.tensor(row.tokens.astype(np.int64))
        batch["input_ids"][place, : tokens.numel()] = tokens
        batch["attention_mask"][place, : tokens.numel()] = 1
        batch["labels"][place, : tokens.numel()] = torch.where(torch.tensor(row.supervised), tokens, -100)
    return batch


def train_with_peft(
    network: Any, options: Config, batches: Batches, steps: int, start: dict[str, np.ndarray]
) -> Trained:
    """The same rows of each step, from `start`; the loss is transformers' own."""
    parameters = trainable(network)
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(start[name]))
    adamw: Any = options.train.optimizer
    optimizer = torch.optim.AdamW(
        parameters.values(),
        options.train.learning_rate,
        tuple(adamw.betas),
        adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    losses, norms = [], []
    for micro in batches.steps(0, steps):
        parts = [padded([batches.examples[row] for row in batch.rows]) for batch in micro]
        supervised = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
        optimizer.zero_grad()
        total = 0.0
        for part, count in zip(parts, supervised, strict=True):
            loss = network(**part).loss * count / sum(supervised)
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), options.train.max_grad_norm).item())
        optimizer.step()
        losses.append(total)
    return Trained(losses, norms, start, {name: parameter.detach().numpy() for name, parameter in parameters.items()})


def furthest(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any array, over that array's largest value."""
    assert got.keys() == want.keys()
    return max(float(np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()) for name in want)


def roughly(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest root mean square of the differences of any array, over that of the array's values."""
    assert got.keys() == want.keys()
    return max(float(np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])) for name in want)


def report(ours: Trained, theirs: Trained) -> None:
    """Read with ``pytest -rP``."""
    print("loss", max(abs(a / b - 1) for a, b in zip(ours.losses, theirs.losses, strict=True)), end=" ")
    print("gradient norm", max(abs(a / b - 1) for a, b in zip(ours.norms, theirs.norms, strict=True)), end=" ")
    print(
        "adapter",
        furthest(ours.after, theirs.after),
        roughly(ours.after, theirs.after),
        "losses",
        ours.losses[0],
        ours.losses[-1],
    )


def sentence(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(random.choice(TEXT.split(), random.integers(least, most)))


@pytest.mark.slow
def test_twenty_steps_of_a_real_model_equal_peft(smollm2_folder: Path) -> None:
    options = settings(8, ["q_proj", "v_proj"], batch_size=4)
    base = model.load(Model(path=str(smollm2_folder), dtype="float32"))
    random = np.random.default_rng(0)
    rows = [
        data.Row({"prompt": sentence(random, 2, 14), "completion": sentence(random, 6, 30)}, f"rows:{number}")
        for number in range(80)
    ]
    base.tokenizer.chat_template = None  # whose system message would double the length of the rows
    examples = data.tokenize(rows, base.tokenizer, options.data).examples
    lengths = [example.tokens.size for example in examples]
    assert min(lengths) < 16
    assert max(lengths) > 36
    batches, steps = train_batches(options, examples), 20
    assert batches.steps_per_epoch == steps
    assert any((batch.mask.sum(1) != batch.mask.shape[1]).any() for [batch] in batches.steps(0, steps))

    ours = train_here(base.model, options, batches, steps)
    network = attach_peft(smollm2_folder, options.lora, list(lora.layers(base.model)))
    theirs = train_with_peft(network, options, batches, steps, ours.before)

    report(ours, theirs)
    assert ours.losses[-1] < ours.losses[0] - 0.5  # something is learned
    assert max(ours.norms) > 1  # clipping acts
    moved = {name: array for name, array in ours.after.items() if "lora_A" in name}
    assert roughly(moved, {name: ours.before[name] for name in moved}) > 0.02
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    np.testing.assert_allclose(ours.norms, theirs.norms, rtol=1e-3)
    assert furthest(ours.after, theirs.after) < 1e-3


# ---- tiny models -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    more = {} if request.param == "qwen2" else {"head_dim": 16}
    torch.manual_seed(0)
    wanted = transformers.AutoConfig.for_model(
        request.param,
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 if request.param == "llama" else 1e6},
        **more,
    )
    transformers.AutoModelForCausalLM.from_config(wanted).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def ragged(count: int) -> list[Example]:
    """Rows of 2 to 40 tokens, part of each supervised."""
    random, examples = np.random.default_rng(1), []
    for number in range(count):
        length = int(random.integers(2, 41))
        supervised = np.arange(length) >= random.integers(0, max(1, length // 2)) + (length > 2)
        examples.append(Example(random.integers(0, 260, length).astype(np.int32), supervised, f"rows:{number}"))
    return examples


def test_accumulation_over_ragged_rows_equals_peft(tiny: Path) -> None:
    """Micro-batches of unequal numbers of supervised tokens, and a last update of fewer micro-batches."""
    options = settings(4, "all-linear", batch_size=3, gradient_accumulation_steps=3, max_grad_norm=0.6)
    batches = train_batches(options, ragged(22))
    steps = 3 * batches.steps_per_epoch
    updates = list(batches.steps(0, steps))
    counts = [sum(len(batch.rows) for batch in update) for update in updates]
    assert (len(counts), sum(counts), max(counts)) == (9, 3 * 22, 9)
    assert max(counts[2::3]) <= 6
    assert all(len({batch.supervised for batch in update}) > 1 for update in updates)

    network, _ = mlx_lm.utils.load_model(tiny)
    ours = train_here(network, options, batches, steps)
    theirs = train_with_peft(
        attach_peft(tiny, options.lora, list(lora.layers(network))), options, batches, steps, ours.before
    )

    report(ours, theirs)
    assert max(ours.norms) > 0.6  # clipping acts
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-6)
    np.testing.assert_allclose(ours.norms, theirs.norms, rtol=1e-5)
    assert furthest(ours.after, theirs.after) < 1e-3


def test_a_saved_adapter_in_pefts_shape_gives_the_same_logits(tiny: Path, tmp_path: Path) -> None:
    options = settings(4, "all-linear", batch_size=4)
    network, _ = mlx_lm.utils.load_model(tiny)
    ids = np.random.default_rng(2).integers(0, 260, (2, 50))
    without = np.array(network(mx.array(ids)))
    batches = train_batches(options, ragged(20))
    train_here(network, options, batches, 10)
    ours = np.array(network(mx.array(ids)))
    described = mlx_form.settings(lora.attached(network), len(network.layers))
    mlx_form.save(tmp_path, lora.parameters(network), described, {})

    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    arrays = safetensors.numpy.load_file(tmp_path / "adapters.safetensors")
    folder = tmp_path / "peft"
    folder.mkdir()
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    tensors = {
        f"base_model.model.{path}.{names[side]}": np.ascontiguousarray(array.T)
        for (path, _, side), array in ((name.rpartition("."), array) for name, array in arrays.items())
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": saved["rank"],
        "lora_alpha": saved["scale"] * saved["rank"],
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in lora.layers(network)}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))

    torch_base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(torch_base, folder)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(ours - without).max() > 0.1  # the adapter does something
    assert math.isfinite(np.abs(want).max())
    assert np.abs(ours - want).max() < 1e-4
