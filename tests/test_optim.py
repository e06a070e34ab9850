"""Optimizers and schedules, against float64: formulas written out in numpy, and torch's own."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_lora.config import SGD, Adafactor, Adam, AdamW, Lion, Schedule, Train
from mlx_lora.optim import flatten_state, initial_state, learning_rate, make_optimizer, restore_state, warmup_steps

SHAPES = {"block.q_proj.lora_a": (9, 4), "block.q_proj.lora_b": (4, 7), "experts.lora_a": (3, 4, 5)}
STEPS = 50


def train(optimizer: dict, rate: float = 1e-2) -> Train:
    return Train(optimizer=optimizer, learning_rate=rate)


def start() -> dict[str, np.ndarray]:
    """Random arrays; lora_b is zero, as it starts."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays["block.q_proj.lora_b"][:] = 0
    return arrays


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of changing sign and size; lora_a's first is zero, as it is while lora_b is."""
    random = np.random.default_rng([1, step])
    size = 10.0 ** random.uniform(-3, 1)
    arrays = {name: (size * random.normal(0.2, 1, shape)).astype(np.float32) for name, shape in SHAPES.items()}
    if step == 0:
        arrays["block.q_proj.lora_a"][:] = 0
    return arrays


def rate_of(step: int) -> float:
    return 1e-2 * (1 + math.cos(step / 15)) / 2 + 1e-3


def run(options: dict, steps: int = STEPS, rate: float | None = None) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(train(options))
    parameters = {name: mx.array(array) for name, array in start().items()}
    initial_state(optimizer, parameters)
    for step in range(steps):
        optimizer.learning_rate = mx.array(rate_of(step) if rate is None else rate)
        slopes = {name: mx.array(array) for name, array in gradients(step).items()}
        parameters = optimizer.apply_gradients(slopes, parameters)
        mx.eval(parameters, optimizer.state)
    return {name: np.array(array) for name, array in parameters.items()}


def root_mean_square(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))


# Each formula takes (parameter, gradient, slots, step from 1, rate, options), all float64, and returns the parameter.


def adam(w, g, slots, t, rate, o):
    b1, b2 = o.betas
    slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * g
    slots["v"] = b2 * slots.get("v", 0) + (1 - b2) * g**2
    return w - rate * (slots["m"] / (1 - b1**t)) / (np.sqrt(slots["v"] / (1 - b2**t)) + o.eps)


def adamw(w, g, slots, t, rate, o):
    return adam(w, g, slots, t, rate, o) - rate * o.weight_decay * w


def sgd(w, g, slots, t, rate, o):
    slots["v"] = o.momentum * slots.get("v", 0) + g + o.weight_decay * w
    return w - rate * slots["v"]


def lion(w, g, slots, t, rate, o):
    b1, b2 = o.betas
    m = slots.get("m", 0)
    slots["m"] = b2 * m + (1 - b2) * g
    return w - rate * (np.sign(b1 * m + (1 - b1) * g) + o.weight_decay * w)


def adafactor(w, g, slots, t, rate, o):
    """Shazeer and Stern, 2018, arXiv:1804.04235, algorithm 4, without the relative step."""
    if o.scale_parameter:
        rate = rate * max(1e-3, root_mean_square(w))
    b2 = 1 - t**-0.8
    square = g**2 + 1e-30
    slots["row"] = b2 * slots.get("row", 0) + (1 - b2) * square.mean(-1)
    slots["column"] = b2 * slots.get("column", 0) + (1 - b2) * square.mean(-2)
    row, column = slots["row"], slots["column"]
    v = row[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]
    u = g / np.sqrt(v)
    u = u / max(1.0, root_mean_square(u) / 1.0)
    return w - rate * o.weight_decay * w - rate * u


CASES = [
    (AdamW(), adamw),
    (AdamW(weight_decay=0.3, betas=[0.7, 0.95], eps=1e-3), adamw),
    (Adam(), adam),
    (Adam(betas=[0.5, 0.9], eps=1e-2), adam),
    (SGD(), sgd),
    (SGD(momentum=0.9), sgd),
    (SGD(momentum=0.6, weight_decay=0.2), sgd),
    (Lion(), lion),
    (Lion(weight_decay=0.4, betas=[0.8, 0.95]), lion),
    (Adafactor(), adafactor),
    (Adafactor(weight_decay=0.4), adafactor),
    (Adafactor(scale_parameter=True), adafactor),
    (Adafactor(scale_parameter=True, weight_decay=0.4), adafactor),
]


@pytest.mark.parametrize(("options", "formula"), CASES, ids=lambda case: str(getattr(case, "__name__", case)))
def test_optimizer_follows_its_formula_in_float64(options, formula):
    expected = {name: array.astype(np.float64) for name, array in start().items()}
    slots: dict[str, dict] = {name: {} for name in expected}
    for step in range(STEPS):
        for name, slope in gradients(step).items():
            rate = rate_of(step)
            expected[name] = formula(expected[name], slope.astype(np.float64), slots[name], step + 1, rate, options)
    actual, before = run(options.model_dump()), start()
    for name, array in expected.items():
        moved = np.abs(array - before[name]).max()
        assert moved > 1e-4
        np.testing.assert_allclose(actual[name], array, rtol=1e-6, atol=1e-5 * moved)


@pytest.mark.parametrize(
    ("options", "theirs", "arguments"),
    [
        (
            {"name": "adamw", "weight_decay": 0.3, "betas": [0.7, 0.95], "eps": 1e-3},
            torch.optim.AdamW,
            {"weight_decay": 0.3, "betas": (0.7, 0.95), "eps": 1e-3},
        ),
        ({"name": "adam"}, torch.optim.Adam, {}),
        (
            {"name": "sgd", "momentum": 0.6, "weight_decay": 0.2},
            torch.optim.SGD,
            {"momentum": 0.6, "weight_decay": 0.2},
        ),
    ],
)
def test_optimizer_does_what_torchs_does_in_float64(options, theirs, arguments):
    arrays = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in start().items()}
    optimizer = theirs(arrays.values(), lr=1.0, **arguments)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_of(step)
        for name, slope in gradients(step).items():
            arrays[name].grad = torch.tensor(slope, dtype=torch.float64)
        optimizer.step()
    for name, array in run(options).items():
        np.testing.assert_allclose(array, arrays[name].detach().numpy(), rtol=1e-6, atol=1e-5)


OTHERS = {
    AdamW: {"weight_decay": 0.5, "betas": [0.9, 0.9], "eps": 0.1},
    Adam: {"betas": [0.5, 0.999], "eps": 0.1},
    SGD: {"momentum": 0.5, "weight_decay": 0.5},
    Adafactor: {"weight_decay": 0.5, "scale_parameter": True},
    Lion: {"weight_decay": 0.5, "betas": [0.9, 0.5]},
}


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_option_changes_the_result(kind):
    assert set(kind.model_fields) - {"name"} == set(OTHERS[kind])
    default = run(kind().model_dump())
    for option, value in OTHERS[kind].items():
        changed = run(kind(**{option: value}).model_dump())
        assert any(np.abs(changed[name] - default[name]).max() > 1e-4 for name in default), option


def test_both_betas_change_the_result():
    for kind in (AdamW, Adam, Lion):
        first, second = kind().betas
        results = [run(kind(betas=betas).model_dump()) for betas in ([first, second], [0.3, second], [first, 0.3])]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(results[one]["experts.lora_a"] - results[other]["experts.lora_a"]).max() > 1e-4


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "lion"])
def test_learning_rate_scales_the_first_update(name):
    before, small, large = start(), *(run({"name": name}, 1, rate) for rate in (1e-3, 1e-2))
    for key in ("experts.lora_a", "block.q_proj.lora_b"):
        moves = [array[key].astype(np.float64) - before[key] for array in (small, large)]
        assert np.abs(moves[0]).max() > 1e-5
        np.testing.assert_allclose(moves[1], 10 * moves[0], rtol=1e-2, atol=2e-6)


# ---- the state -------------------------------------------------------------------------------------------------------

STATEFUL = [case[0].model_dump() for case in CASES]


@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_flattened_state_goes_through_a_file_and_restores_the_run_exactly(options, tmp_path):
    def proceed(optimizer, parameters, steps):
        for step in steps:
            optimizer.learning_rate = mx.array(rate_of(step))
            slopes = {name: mx.array(array) for name, array in gradients(step).items()}
            parameters = optimizer.apply_gradients(slopes, parameters)
        return parameters

    optimizer = make_optimizer(train(options))
    parameters = {name: mx.array(array) for name, array in start().items()}
    initial_state(optimizer, parameters)
    halfway = proceed(optimizer, parameters, range(4))
    flat = flatten_state(optimizer.state)
    assert all(isinstance(array, mx.array) for array in flat.values())
    assert flat["step"].item() == 4
    assert {name.split("/")[0] for name in flat} == {"step", "learning_rate", *SHAPES}
    mx.save_safetensors(str(tmp_path / "state.safetensors"), flat)
    mx.save_safetensors(str(tmp_path / "parameters.safetensors"), halfway)
    whole = proceed(optimizer, halfway, range(4, 8))

    other = make_optimizer(train(options))
    state = initial_state(other, {name: mx.array(array) for name, array in start().items()})
    loaded = mx.load(str(tmp_path / "state.safetensors"))
    other.state = restore_state(state, loaded)
    again = flatten_state(other.state)
    assert again.keys() == flat.keys()
    assert all(again[name].dtype == flat[name].dtype and mx.array_equal(again[name], flat[name]) for name in flat)
    resumed = proceed(other, mx.load(str(tmp_path / "parameters.safetensors")), range(4, 8))
    for name in SHAPES:
        assert mx.array_equal(resumed[name], whole[name]).item()
        assert not mx.array_equal(resumed[name], halfway[name]).item()


def test_state_without_one_of_its_arrays_is_an_error():
    optimizer = make_optimizer(train({"name": "adamw"}))
    state = initial_state(optimizer, {name: mx.array(array) for name, array in start().items()})
    flat = flatten_state(state)
    assert len(flat) == 2 + 2 * len(SHAPES)
    for name in flat:
        with pytest.raises(KeyError):
            restore_state(state, {other: array for other, array in flat.items() if other != name})


# ---- schedules -------------------------------------------------------------------------------------------------------


def rates(name: str, warmup: float, steps: int, low: float = 1e-5, high: float = 1e-3) -> list[float]:
    config = Train(learning_rate=high, schedule=Schedule(name=name, warmup=warmup, min_lr=low))
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.1, 10])
def test_warmup_rises_evenly_from_min_lr_to_the_full_rate(name, warmup):
    values = rates(name, warmup, 100)
    low, high = 1e-5, 1e-3
    np.testing.assert_allclose(values[:11], np.linspace(low, high, 12)[1:], rtol=1e-12)
    assert low < values[0] < values[9] < values[10] == high == max(values)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1e-3, 1e-3, 1e-3, 1e-3]),
        ("linear", [1e-3, 1e-3 - 9.9e-4 / 90, 5.05e-4, 1e-5 + 9.9e-4 / 90]),
        (
            "cosine",
            [1e-3, *(1e-5 + 9.9e-4 * math.cos(math.pi * share / 2) ** 2 for share in (1 / 90, 1 / 2, 89 / 90))],
        ),
    ],
)
def test_rate_after_warmup(name, expected):
    values = rates(name, 10, 100)
    np.testing.assert_allclose([values[step] for step in (10, 11, 55, 99)], expected, rtol=1e-9)
    if name != "constant":
        assert np.all(np.diff(values[10:]) < 0)
        assert values[-1] > 1e-5


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_would_end_at_min_lr(name):
    config = Train(learning_rate=1e-3, schedule=Schedule(name=name, warmup=0, min_lr=2e-4))
    assert learning_rate(config, 0, 40) == 1e-3
    np.testing.assert_allclose(learning_rate(config, 20, 40), 6e-4, rtol=1e-12)
    np.testing.assert_allclose(learning_rate(config, 40, 40), 2e-4, rtol=1e-12)


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0.0, 100, 0),
        (0.03, 100, 3),
        (0.03, 1000, 30),
        (0.03, 10, 1),  # a share rounds up
        (0.5, 7, 4),
        (1, 100, 1),  # from 1 on it is a number of steps
        (7, 100, 7),
        (100, 100, 100),
        (500, 100, 100),
        (0.999, 1, 1),
    ],
)
def test_steps_of_the_warmup(warmup, steps, expected):
    assert warmup_steps(Schedule(warmup=warmup), steps) == expected


def test_share_of_the_warmup_is_exact_where_it_is_whole():
    wrong = [
        (percent, steps, found)
        for percent in range(100)
        for steps in (50, 100, 200, 1000, 5000)
        if percent * steps % 100 == 0
        and (found := warmup_steps(Schedule(warmup=percent / 100), steps)) != percent * steps // 100
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_run_of_one_step(name):
    assert rates(name, 0, 1) == [1e-3]
    np.testing.assert_allclose(rates(name, 1, 1), [(1e-5 + 1e-3) / 2], rtol=1e-12)
    np.testing.assert_allclose(rates(name, 0.03, 1), [(1e-5 + 1e-3) / 2], rtol=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [8, 9, 1000])
def test_warmup_as_long_as_the_run_or_longer_rises_to_the_end(name, warmup):
    np.testing.assert_allclose(rates(name, warmup, 8), np.linspace(1e-5, 1e-3, 10)[1:-1], rtol=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rate_stays_between_min_lr_and_the_full_rate(name):
    for warmup in (0, 0.03, 0.5, 1, 40, 90):
        for steps in (1, 2, 3, 50):
            values = rates(name, warmup, steps)
            assert all(1e-5 < value <= 1e-3 for value in values)


def test_equal_bounds_make_every_schedule_constant():
    for name in ("constant", "linear", "cosine"):
        np.testing.assert_allclose(rates(name, 5, 20, low=1e-3, high=1e-3), 1e-3, rtol=1e-12)
