"""The training step, against torch and PEFT in float64, finite differences, numpy and itself on the same rows."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_lora import lora
from mlx_lora import step as step_module
from mlx_lora.batches import Batch, Batches
from mlx_lora.config import Lora, Train
from mlx_lora.data import Example
from mlx_lora.gradient_checkpointing import checkpoint_blocks
from mlx_lora.optim import flatten_state, make_optimizer
from mlx_lora.step import Outcome, State, Step

RATE = 1024.0  # of the SGD that shows gradients: the update dwarfs the parameters, so that none of it is rounded off


def adapted(build=tiny.llama, dropout: float = 0.0, patterns="all-linear", b: float = 0.05, **shape) -> nn.Module:
    model = build(**shape)
    lora.attach(model, Lora(rank=4, alpha=8.0, dropout=dropout, target_modules=patterns), seed=1)
    if b:
        tiny.randomize(model, size=b)
    return model


def step_of(model: nn.Module, compiled: bool = False, **options) -> Step:
    config = Train(**{"learning_rate": 1e-2, "max_grad_norm": 1.0, **options})
    return Step(model, make_optimizer(config), config, compiled)


def rows_of(lengths, seed: int = 0, supervised: float = 0.5) -> list[Example]:
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        mask = random.random(length) < supervised
        mask[0], mask[-1] = False, True
        rows.append(Example(random.integers(1, 128, length).astype(np.int32), mask, "rows"))
    return rows


def batch_of(rows: list[Example], width: int | None = None, empty: int = 0, padding: int = 0) -> Batch:
    """Rows padded on the right to `width`, with `empty` wholly masked rows after them."""
    width = width or max(row.tokens.size - 1 for row in rows)
    inputs, targets = (np.full((len(rows) + empty, width), padding, np.int32) for _ in range(2))
    mask = np.zeros((len(rows) + empty, width), np.float32)
    for place, row in enumerate(rows):
        length = row.tokens.size - 1
        inputs[place, :length], targets[place, :length] = row.tokens[:-1], row.tokens[1:]
        mask[place, :length] = row.supervised[1:]
    return Batch(inputs, targets, mask, tuple(range(len(rows))), sum(row.tokens.size for row in rows))


def gradients(model: nn.Module, batches: list[Batch], **options) -> tuple[dict[str, np.ndarray], float, float]:
    """The gradient by path, the loss and the gradient's norm, all as one step sees them."""
    options = {"optimizer": {"name": "sgd"}, "max_grad_norm": None, "learning_rate": RATE, **options}
    step = step_of(model, **options)
    before = step.initial_state()
    after, outcome = step(before, batches, RATE, 0)
    slopes = {name: (array - after.adapter[name]) / RATE for name, array in before.adapter.items()}
    return (
        {name: tiny.float64(array) for name, array in slopes.items()},
        outcome.loss.item(),
        outcome.gradient_norm.item(),
    )


def run(step: Step, updates: list[list[Batch]], rates=None, first: int = 0) -> tuple[State, list[Outcome]]:
    state, outcomes = step.initial_state(), []
    for number, batches in enumerate(updates):
        rate = rates[number] if rates else 1e-2
        state, outcome = step(state, batches, rate, first + number)
        outcomes.append(outcome)
    return state, outcomes


def everything(state: State) -> dict[str, np.ndarray]:
    return tiny.copies(state.adapter) | tiny.copies(flatten_state(state.optimizer))


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Relative to the largest entry of each array."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        largest = np.abs(array).max()
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=tolerance * largest, err_msg=name)


def norm(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays.values())))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_gradient_reaches_b_at_once_and_a_once_b_is_not_zero(name):
    batches = [batch_of(rows_of([30, 40]))]
    for b in (0, 0.05):
        model = adapted(tiny.BUILDERS[name], b=b, patterns=["all-linear", "embed_tokens"])
        slopes = gradients(model, batches)[0]
        assert slopes.keys() == set(lora.parameters(model))
        assert len(slopes) == 2 * len(lora.layers(model)) > 20
        for path, slope in slopes.items():
            assert np.isfinite(slope).all()
            reached = np.abs(slope).max() > 0
            assert reached if b or path.endswith("lora_b") else not reached, path


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor", "lion"])
def test_an_update_moves_every_parameter(optimizer):
    model = adapted()
    step = step_of(model, optimizer={"name": optimizer})
    before = step.initial_state()
    after, outcome = step(before, [batch_of(rows_of([30, 40]))], 1e-2, 0)
    assert outcome.applied.item()
    for name, array in before.adapter.items():
        changed = np.array(array) != np.array(after.adapter[name])
        assert np.isfinite(np.array(after.adapter[name])).all()
        assert changed.mean() > 0.99, name


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers so
def test_loss_and_gradient_are_those_of_transformers_and_peft_in_float64(name, smoothing):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    model = adapted(tiny.BUILDERS[name], tie_word_embeddings=False, patterns=["all-linear", "lm_head"])
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, kind = kinds[name]
    shape = {key: value for key, value in tiny.SHAPE.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": tiny.SHAPE["rope_theta"]}
    theirs = kind(config(**{**shape, "tie_word_embeddings": False}, rope_parameters=rope, use_cache=False)).double()
    base = {
        path.replace(".linear.", "."): torch.tensor(tiny.float64(array))
        for path, array in tree_flatten(model.parameters())
        if "lora_" not in path
    }
    theirs.load_state_dict(base)
    names = sorted({path.rsplit(".", 1)[-1] for path in lora.layers(model)})
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names)).double()
    slots = dict(theirs.named_parameters())

    def slot(path: str) -> "torch.nn.Parameter":
        layer, part = path.rsplit(".", 1)
        return slots[f"base_model.model.{layer}.{part.replace('_a', '_A').replace('_b', '_B')}.default.weight"]

    for path, array in lora.parameters(model).items():
        slot(path).data = torch.tensor(tiny.float64(array).T)

    batches = [batch_of(rows_of([20, 31])), batch_of(rows_of([9], seed=1))]
    slopes, loss, whole = gradients(model, batches, label_smoothing=smoothing)
    total = 0
    for batch in batches:
        logits = theirs(torch.tensor(batch.inputs).long()).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            torch.tensor(batch.targets).long().flatten(),
            reduction="none",
            label_smoothing=smoothing,
        )
        total = total + (each * torch.tensor(batch.mask, dtype=torch.float64).flatten()).sum()
    expected = total / sum(batch.mask.sum() for batch in batches)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    wanted = {path: slot(path).grad.numpy().T for path in slopes}
    assert_close(slopes, wanted, 1e-5)
    np.testing.assert_allclose(whole, norm(wanted), rtol=1e-5)


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_gradient_is_the_finite_difference_of_the_loss(name):
    model = adapted(tiny.BUILDERS[name], b=0.3, patterns=["all-linear", "embed_tokens"])
    batches = [batch_of(rows_of([20, 31]))]
    slopes = gradients(model, batches)[0]
    arrays = lora.parameters(model)
    inputs, targets, mask = (np.array(part) for part in (batches[0].inputs, batches[0].targets, batches[0].mask))

    def loss(path: str, place: tuple[int, ...], change: float) -> float:
        moved = np.array(arrays[path])
        moved[place] += change
        lora.set_parameters(model, {**arrays, path: mx.array(moved)})
        logits = tiny.float64(model(mx.array(inputs)))  # the loss itself in float64
        logits = logits - logits.max(-1, keepdims=True)
        each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (each * mask).sum() / mask.sum()

    checked = [path for path in slopes if path.split(".")[-2] in ("q_proj", "down_proj", "embed_tokens")]
    assert len(checked) == 10
    for path in checked:
        place = np.unravel_index(np.abs(slopes[path]).argmax(), slopes[path].shape)
        size = 3e-3
        difference = (loss(path, place, size) - loss(path, place, -size)) / (2 * size)
        np.testing.assert_allclose(slopes[path][place], difference, rtol=0.01, atol=1e-4, err_msg=f"{path} {place}")


# ---- how rows are laid out -------------------------------------------------------------------------------------------

LENGTHS = [6, 33, 12, 27, 18, 9]


def layouts() -> dict[str, list[Batch]]:
    rows = rows_of(LENGTHS)
    order = np.random.default_rng(2).permutation(len(rows))
    by_length = sorted(rows, key=lambda row: row.tokens.size)
    return {
        "wider": [batch_of(rows, width=64)],
        "padded with another token": [batch_of(rows, padding=77)],
        "empty rows": [batch_of(rows, empty=3)],
        "another order": [batch_of([rows[place] for place in order])],
        "one row each": [batch_of([row]) for row in rows],
        "by length": [batch_of(by_length[:2]), batch_of(by_length[2:4]), batch_of(by_length[4:])],
        "uneven parts": [batch_of(rows[:1], width=40), batch_of(rows[1:])],
        "an empty part": [batch_of(rows), batch_of(rows[:1], width=8, empty=1, padding=3)],
    }


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("layout", layouts())
def test_loss_and_gradient_do_not_depend_on_how_rows_are_laid_out(layout, name):
    model, batches = adapted(tiny.BUILDERS[name]), layouts()[layout]
    if layout == "an empty part":
        batches[1].mask[:] = 0
    slopes, loss, _ = gradients(model, batches)
    expected, expected_loss, _ = gradients(model, [batch_of(rows_of(LENGTHS))])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_close(slopes, expected, 1e-5)


def test_parts_hold_uneven_numbers_of_supervised_tokens():
    """Else the mean of means would pass the test above."""
    counts = {name: [batch.supervised for batch in batches] for name, batches in layouts().items()}
    assert all(len(set(counts[name])) > 1 for name in ("one row each", "by length", "uneven parts"))


def test_accumulated_update_equals_that_of_one_large_batch():
    rows = rows_of(LENGTHS)
    whole, parts = [batch_of(rows)], [batch_of(rows[:2]), batch_of(rows[2:5]), batch_of(rows[5:])]
    options = {"optimizer": {"name": "sgd", "momentum": 0.9}, "max_grad_norm": 0.1}
    one, first = run(step_of(adapted(), **options), [whole] * 4, [3.0] * 4)
    other, second = run(step_of(adapted(), gradient_accumulation_steps=3, **options), [parts] * 4, [3.0] * 4)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.loss.item(), b.loss.item(), rtol=1e-6)
        np.testing.assert_allclose(a.gradient_norm.item(), b.gradient_norm.item(), rtol=1e-5)
    start = tiny.copies(lora.parameters(adapted()))
    one, other = tiny.copies(one.adapter), tiny.copies(other.adapter)
    assert_close(
        {name: one[name] - start[name] for name in one}, {name: other[name] - start[name] for name in one}, 1e-4
    )


def test_fewer_parts_than_configured_are_averaged_over_their_own_tokens():
    rows = rows_of(LENGTHS)
    expected, loss, _ = gradients(adapted(), [batch_of(rows[:2])])
    slopes, partial, _ = gradients(adapted(), [batch_of(rows[:2])], gradient_accumulation_steps=8)
    assert partial == loss
    tiny.assert_identical(slopes, expected)


def test_loss_of_collated_rows_is_the_mean_over_their_supervised_tokens():
    rows = rows_of([40, 9, 23, 5, 31])
    batches = Batches(rows, 3, seed=0)
    model = adapted()
    micro = [batch for step in batches.steps(0, 2) for batch in step]
    assert sorted(len(batch.rows) for batch in micro) == [2, 3]
    assert len({batch.inputs.shape for batch in micro}) == 2
    _, loss, _ = gradients(model, micro, gradient_accumulation_steps=2)
    losses = []
    for row in rows:  # alone, in float64
        logits = tiny.float64(model(mx.array(row.tokens[None, :-1])))[0]
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        each = -np.log(chances[np.arange(row.tokens.size - 1), row.tokens[1:]])
        losses += each[row.supervised[1:]].tolist()
    assert len(losses) == sum(batch.supervised for batch in micro)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)


def test_nothing_supervised_changes_nothing_but_the_count_of_steps():
    batch = batch_of(rows_of([9, 12]))
    batch.mask[:] = 0
    step = step_of(adapted(), optimizer={"name": "sgd"})
    before = step.initial_state()
    after, outcome = step(before, [batch], 1e-2, 0)
    assert (outcome.loss.item(), outcome.gradient_norm.item(), outcome.applied.item()) == (0, 0, True)
    tiny.assert_identical(tiny.copies(after.adapter), tiny.copies(before.adapter))


# ---- clipping --------------------------------------------------------------------------------------------------------


def test_gradient_is_clipped_to_its_global_norm_and_the_norm_before_is_told():
    model, batches = adapted(), [batch_of(rows_of([20, 31]))]
    whole, _, told = gradients(model, batches)
    np.testing.assert_allclose(told, norm(whole), rtol=1e-6)
    for limit in (told / 10, told * 0.99):
        clipped, _, again = gradients(model, batches, max_grad_norm=limit)
        assert again == told
        np.testing.assert_allclose(norm(clipped), limit, rtol=1e-5)
        assert_close(clipped, {name: slope * limit / told for name, slope in whole.items()}, 1e-5)
    for limit in (told * 1.01, 1e9, None):
        tiny.assert_identical(gradients(model, batches, max_grad_norm=limit)[0], whole)


# ---- frozen, compiled, traced ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("bits", [None, 4])
def test_base_gets_no_gradient_and_is_bit_identical_after_training(name, bits):
    model = tiny.BUILDERS[name](tie_word_embeddings=False)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    base = tiny.copies(model)
    lora.attach(model, Lora(rank=4, target_modules=["all-linear", "embed_tokens", "lm_head"]))
    batch = batch_of(rows_of([20, 31]))
    if not bits or name == "llama":
        inputs = mx.array(batch.inputs)
        slopes = nn.value_and_grad(model, lambda ids: model(ids).square().mean())(inputs)[1]
        assert {path for path, _ in tree_flatten(slopes)} == set(lora.parameters(model))
    state, outcomes = run(step_of(model), [[batch]] * 5)
    assert outcomes[-1].loss.item() < outcomes[0].loss.item()
    assert state.adapter.keys() == lora.parameters(model).keys()
    lora.set_parameters(model, state.adapter)
    lora.detach(model)
    tiny.assert_identical(tiny.copies(model), base)


def shapes() -> list[list[Batch]]:
    """Ten updates of one to three micro-batches in two shapes."""
    small = [batch_of(rows_of([14, 16], seed=seed), width=16) for seed in range(4)]
    large = [batch_of(rows_of([30, 20], seed=seed), width=32) for seed in range(4)]
    return [[small[step % 4], *[large[step % 4], small[(step + 1) % 4]][: step % 3]] for step in range(10)]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": {"name": "adamw"}},
        {"optimizer": {"name": "sgd", "momentum": 0.9}, "max_grad_norm": None},
        {"optimizer": {"name": "lion", "weight_decay": 0.1}},
        pytest.param({"optimizer": {"name": "adafactor"}, "label_smoothing": 0.1}, marks=pytest.mark.slow),
    ],
    ids=lambda options: options["optimizer"]["name"],
)
def test_compiled_step_is_the_eager_one(options):
    """Slow where MLX's compiled kernels are not in its cache yet: the C++ compiler makes them."""
    rates = [1e-2 / (step + 1) for step in range(10)]
    one, first = run(step_of(adapted(dropout=0.3), True, **options), shapes(), rates)
    other, second = run(step_of(adapted(dropout=0.3), False, **options), shapes(), rates)
    tiny.assert_identical(everything(one), everything(other))
    assert [outcome.loss.item() for outcome in first] == [outcome.loss.item() for outcome in second]
    assert len({outcome.loss.item() for outcome in first}) == 10


def test_one_trace_for_each_shape_and_one_for_the_update():
    step = step_of(adapted(dropout=0.1), True)
    state = step.initial_state()
    counts = []
    for number, batches in enumerate(shapes()):
        state, _ = step(state, batches, 1e-2 / (number + 1), number)
        counts.append(step.traces)
    assert counts == [2, *[3] * 9]  # the first update holds one shape, all others no more than both
    state, _ = step(state, [batch_of(rows_of([30, 20, 7]), width=32)], 1e-3, 10)
    assert step.traces == 4


# ---- dropout and gradient checkpointing ------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_and_step():
    batches = [[batch_of(rows_of([20, 31]))]] * 2

    def losses(seed: int, first: int, dropout: float = 0.3) -> list[float]:
        model = adapted(dropout=dropout, b=0.3)
        mx.random.seed(first * 1000 + seed)  # the global state must not matter
        step = step_of(model, optimizer={"name": "sgd"}, seed=seed)
        state = step.initial_state()
        return [step(state, batch, 1e-2, first + number)[1].loss.item() for number, batch in enumerate(batches)]

    one = losses(5, 10)
    assert one == losses(5, 10)
    assert one[0] != one[1]
    assert losses(5, 11)[0] == one[1]
    assert len({*one, *losses(6, 10), *losses(6, 11), losses(5, 12)[0]}) == 6
    assert len({*losses(5, 10, 0.0), *losses(6, 12, 0.0)}) == 1


def test_dropout_of_each_micro_batch_is_its_own_and_of_no_other_step():
    batch, model = batch_of(rows_of([20, 31])), adapted(dropout=0.3, b=0.3)
    step = step_of(model, gradient_accumulation_steps=3)
    state = step.initial_state()

    def loss(count: int, number: int) -> float:
        return step(state, [batch] * count, 1e-2, number)[1].loss.item()

    first, second, third = loss(1, 0), 2 * loss(2, 0) - loss(1, 0), 3 * loss(3, 0) - 2 * loss(2, 0)
    draws = [first, second, third, loss(1, 1), loss(1, 2)]
    for place, one in enumerate(draws):
        assert all(abs(one - other) > 1e-4 for other in draws[:place])


def test_dropout_is_off_outside_the_step():
    ids = tiny.tokens()
    model, expected = adapted(dropout=0.5, b=0.3), adapted(dropout=0.0, b=0.3)(ids)
    assert mx.array_equal(model(ids), expected)
    run(step_of(model, True), [[batch_of(rows_of([20, 31]))]])
    assert mx.array_equal(model(ids), expected)


@pytest.mark.parametrize(("name", "compiled"), [("llama", False), ("llama", True), ("qwen3_moe", False)])
def test_gradient_checkpointing_changes_no_bit(name, compiled):
    kept, recomputed = (adapted(tiny.BUILDERS[name], dropout=0.3) for _ in range(2))
    checkpoint_blocks(recomputed)
    updates = [[batch_of(rows_of([20, 31], seed=seed)), batch_of(rows_of([12, 9]), width=16)] for seed in range(3)]
    options = {"gradient_accumulation_steps": 2}
    one, first = run(step_of(kept, compiled, **options), updates)
    other, second = run(step_of(recomputed, compiled, **options), updates)
    assert [outcome.loss.item() for outcome in first] == [outcome.loss.item() for outcome in second]
    tiny.assert_identical(everything(other), everything(one))
    assert mx.array_equal(kept(tiny.tokens()), recomputed(tiny.tokens())).item()


def test_gradient_checkpointing_changes_only_the_blocks_of_its_model():
    other, model = adapted(), adapted()
    kinds = [type(block) for block in other.layers]
    call = kinds[0].__call__
    checkpoint_blocks(model)
    assert [type(block) for block in other.layers] == kinds
    assert kinds[0].__call__ is call
    assert all(
        type(block) is not kind and isinstance(block, kind) for block, kind in zip(model.layers, kinds, strict=True)
    )
    assert all(type(block) in kinds for block in tiny.llama().layers)
    assert set(lora.parameters(model)) == set(lora.parameters(other))


def test_no_two_batches_draw_the_same_dropout():
    """However many batches there are in an update: their keys, as the step hands them to the model."""
    step, keys = step_of(adapted(dropout=0.3), gradient_accumulation_steps=2), []
    accumulate = step._accumulate

    def noting(*arguments):
        keys.append(tuple(np.array(arguments[-1]).tolist()))
        return accumulate(*arguments)

    step._accumulate = noting
    batch = batch_of(rows_of([9, 12]))
    run(step, [[batch] * number for number in (3, 1, 2, 5)])
    assert len(set(keys)) == len(keys) == 11


def peak_of_a_step(model: nn.Module, batch: Batch, compiled: bool) -> int:
    """Bytes above what is there before."""
    step = step_of(model, compiled)
    state = step.initial_state()
    mx.eval(model.parameters(), state.adapter, state.optimizer)
    return tiny.peak(lambda: step(state, [batch], 1e-2, 0))


def test_gradient_checkpointing_keeps_less_memory():
    batch = batch_of(rows_of([257] * 4), width=256)
    peaks = []
    for checkpointed in (False, True):
        model = adapted(num_hidden_layers=8)
        if checkpointed:
            checkpoint_blocks(model)
        peaks.append(peak_of_a_step(model, batch, compiled=True))
    assert peaks[1] < 0.6 * peaks[0]


def test_another_checkpointed_block_adds_its_input_to_a_step_that_is_not_compiled():
    """Not all that was recomputed: what its adapter's gradients need is let go before the blocks below start."""
    batch = batch_of(rows_of([201] * 4))
    peaks = []
    for blocks in (8, 24):
        model = adapted(num_hidden_layers=blocks)
        checkpoint_blocks(model)
        peaks.append(peak_of_a_step(model, batch, compiled=False))
    assert (peaks[1] - peaks[0]) / 16 < 2 * 4 * batch.inputs.size * model.args.hidden_size


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "compiled"),
    [("adamw", False), ("adamw", True), ("sgd", False), ("adafactor", False), ("lion", False)],
)
def test_update_with_a_gradient_that_is_not_finite_leaves_the_state_bit_for_bit(optimizer, compiled):
    model = adapted(b=0.05)
    table = np.array(model.model.embed_tokens.weight)
    table[99] = np.nan
    model.model.embed_tokens.weight = mx.array(table)
    bad = batch_of(rows_of([20, 31]))
    good = [batch_of(rows_of([20, 31], seed=seed)) for seed in range(3)]
    for batch in [bad, *good]:
        batch.inputs[batch.inputs == 99] = 98
        batch.targets[:] = np.minimum(batch.targets, 98)
    bad.inputs[0, 3] = 99
    # tied: a NaN row of the table makes that logit NaN everywhere, so the head must be another
    model.args.tie_word_embeddings = False
    mx.random.seed(0)
    model.lm_head = nn.Linear(64, 128, bias=False)
    model.lm_head.freeze()

    step = step_of(model, compiled, optimizer={"name": optimizer})
    state, _ = step(step.initial_state(), [good[0]], 1e-2, 0)
    before = everything(state)
    for batches in ([bad], [good[1], bad], [bad, good[1]]):
        skipped, outcome = step(state, batches, 5e-3, 1)
        assert outcome.applied.item() is False
        assert not np.isfinite(outcome.gradient_norm.item())
        tiny.assert_identical(everything(skipped), before)
    after, outcome = step(skipped, [good[2]], 2e-3, 2)
    assert outcome.applied.item() is True
    clean, _ = step(state, [good[2]], 2e-3, 2)
    tiny.assert_identical(everything(after), everything(clean))
    assert all(np.isfinite(array).all() for array in everything(after).values())


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_base_that_is_not_finite_or_overflows_stops_the_update(value):
    model = adapted(tie_word_embeddings=False)
    model.lm_head.weight = mx.full((128, 64), value)
    step = step_of(model)
    before = step.initial_state()
    state, outcome = step(before, [batch_of(rows_of([20, 31]))], 1e-2, 0)
    assert outcome.applied.item() is False
    tiny.assert_identical(everything(state), everything(before))


@mx.custom_function
def with_spoilt_gradient(x: mx.array) -> mx.array:
    return x + 0


@with_spoilt_gradient.vjp
def _spoilt(_: mx.array, cotangent: mx.array, result: mx.array) -> mx.array:
    return cotangent * mx.array(float("inf"))


class SpoiltNorm(nn.RMSNorm):
    """Right forward, infinite backward."""

    def __call__(self, x: mx.array) -> mx.array:
        return with_spoilt_gradient(super().__call__(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_finite_loss_with_a_gradient_that_is_not_stops_the_update(compiled):
    model = adapted(b=0.05)
    batch = batch_of(rows_of([20, 31]))
    _, clean = step_of(model, compiled)(step_of(model).initial_state(), [batch], 1e-2, 0)
    model.model.norm.__class__ = SpoiltNorm
    step = step_of(model, compiled)
    before = step.initial_state()
    state, outcome = step(before, [batch], 1e-2, 0)
    assert outcome.loss.item() == pytest.approx(clean.loss.item(), rel=1e-6)
    assert outcome.applied.item() is False
    tiny.assert_identical(everything(state), everything(before))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_finite_with_gradients_that_are_stops_the_update(compiled, monkeypatch):
    model = adapted(b=0.05)
    whole = step_module.batch_loss
    monkeypatch.setattr(step_module, "batch_loss", lambda *arguments: whole(*arguments) + float("nan"))
    step = step_of(model, compiled)
    before = step.initial_state()
    state, outcome = step(before, [batch_of(rows_of([20, 31]))], 1e-2, 0)
    assert np.isfinite(outcome.gradient_norm.item())
    assert outcome.applied.item() is False
    tiny.assert_identical(everything(state), everything(before))


def assert_untouched(model: nn.Module, ids: mx.array, expected: mx.array, adapter: dict[str, np.ndarray]) -> None:
    tiny.assert_identical(tiny.copies(lora.parameters(model)), adapter)  # reading a tracer would raise
    assert mx.array_equal(model(ids), expected).item()
    assert np.isfinite(nn.value_and_grad(model, lambda ids: model(ids).square().mean())(ids)[0].item())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_step_leaves_the_model_as_it_was(compiled, checkpointed):
    model, ids = adapted(dropout=0.5), tiny.tokens()
    expected, adapter = model(ids), tiny.copies(lora.parameters(model))
    if checkpointed:
        checkpoint_blocks(model)
    state, _ = run(step_of(model, compiled), [[batch_of(rows_of([20, 31]))]] * 2)
    assert_untouched(model, ids, expected, adapter)
    lora.set_parameters(model, state.adapter)
    assert not mx.array_equal(model(ids), expected).item()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_step_leaves_the_model_as_it_was_after_an_exception(compiled, checkpointed):
    model, ids = adapted(dropout=0.5), tiny.tokens()
    expected, adapter = model(ids), tiny.copies(lora.parameters(model))
    if checkpointed:
        checkpoint_blocks(model)
    good = batch_of(rows_of([20, 31]))
    wrong = Batch(good.inputs, good.targets[:, :-1], good.mask, good.rows, good.tokens)
    step = step_of(model, compiled)
    state = step.initial_state()
    for batches in ([wrong], [good, wrong]):
        with pytest.raises(ValueError, match=r"shape|broadcast"):
            step(state, batches, 1e-2, 0)
        assert_untouched(model, ids, expected, adapter)
    after, outcome = step(state, [good], 1e-2, 0)
    assert outcome.applied.item()
    fresh, _ = run(step_of(adapted(dropout=0.5), compiled), [[good]])
    tiny.assert_identical(everything(after), everything(fresh))


def test_initial_state_is_not_changed_by_the_steps_that_start_from_it():
    step = step_of(adapted())
    state = step.initial_state()
    before = everything(state)
    first = everything(step(state, [batch_of(rows_of([20, 31]))], 1e-2, 0)[0])
    tiny.assert_identical(everything(state), before)
    again = everything(step(state, [batch_of(rows_of([20, 31]))], 1e-2, 0)[0])
    tiny.assert_identical(again, first)
    assert first["step"] == 1
    np.testing.assert_allclose(first["learning_rate"], 1e-2)
