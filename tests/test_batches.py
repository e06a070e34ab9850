"""Batches: every row once an epoch, by length, in an order that only data, seed and epoch decide."""

import itertools

import numpy as np
import pytest

from mlx_lora.batches import BLOCK, MAX_SHAPES, WINDOW, Batch, Batches, _levels
from mlx_lora.data import Example


def examples(lengths) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(
            random.integers(1, 1000, length).astype(np.int32),
            np.concatenate([[False], random.random(length - 2) < 0.5, [True]])
            if length > 2
            else np.array([False, True]),
            f"rows.jsonl:{number}",
        )
        for number, length in enumerate(lengths, 1)
    ]


LENGTHS = np.random.default_rng(1).integers(2, 400, 1003)


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches(examples(LENGTHS), batch_size=4, seed=7)


LAYOUTS = [
    {"batch_size": 4},
    {"batch_size": 4, "accumulate": 3},
    {"batch_size": 8, "accumulate": 2, "batch_tokens": 600},
    {"batch_size": 8, "batch_tokens": 100},
    {"batch_size": 6, "packing": True},
    {"batch_size": 16, "batch_tokens": 1024, "packing": True},
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def laid_out(request) -> Batches:
    return Batches(examples(LENGTHS), seed=7, **request.param)


def epoch_of(batches: Batches, number: int) -> list[list[Batch]]:
    size = batches.steps_per_epoch
    return list(batches.steps(number * size, (number + 1) * size))


def test_every_row_once_an_epoch_whatever_the_layout(laid_out):
    for number in (0, 3):
        steps = epoch_of(laid_out, number)
        rows = [row for step in steps for batch in step for row in batch.rows]
        assert sorted(rows) == list(range(1003))
        size, counts = (
            laid_out.batch_size * laid_out.accumulate,
            [sum(len(batch.rows) for batch in step) for step in steps],
        )
        assert sum(count != size for count in counts) <= 2
        assert max(counts) == size


def test_an_update_holds_the_same_rows_in_every_layout():
    """Layout is a matter of time and memory only."""
    plain = Batches(examples(LENGTHS), 8, 7, accumulate=2)
    for more in ({"batch_tokens": 300}, {"batch_tokens": 5000}, {"packing": True}):
        other = Batches(plain.examples, 8, 7, accumulate=2, **more)
        for one, two in zip(epoch_of(plain, 1), epoch_of(other, 1), strict=True):
            assert {row for batch in one for row in batch.rows} == {row for batch in two for row in batch.rows}


def test_order_is_a_function_of_seed_and_epoch(batches):
    def order(seed, epoch):
        return content(Batches(batches.examples, 4, seed).epoch(epoch))

    def content(updates):
        return [[group.tolist() for group in groups] for groups in updates]

    assert order(7, 3) == content(batches.epoch(3))
    assert order(7, 3) != order(8, 3)
    assert order(7, 3) != order(7, 4)


def test_composition_of_batches_changes_every_epoch(batches):
    few = Batches(examples(np.arange(100, 300)), 4, 0)  # sorted all together, they would be the same ones each time
    for of_some, most in ((batches, 5), (few, 25)):
        first, second = ({frozenset(rows.tolist()) for [rows] in of_some.epoch(epoch)} for epoch in (0, 1))
        assert len(first & second) < most


def test_rows_of_a_batch_are_neighbours_in_length(batches):
    def padding(order):
        widths = [max(LENGTHS[rows]) * len(rows) for rows in order]
        return 1 - LENGTHS.sum() / sum(widths)

    assert WINDOW * 4 < 1003
    shuffled = np.random.default_rng(0).permutation(1003)
    assert padding(np.array_split(shuffled, 251)) > 0.3
    assert padding([rows for [rows] in batches.epoch(0)]) < 0.05


def test_few_rows_are_not_sorted_all_together():
    """Eight batches: neighbours of two, so that no update has the shortest rows alone, and the next one the longest."""
    lengths = np.arange(100, 164)
    batches = Batches(examples(lengths), 8, 0)
    spread = [lengths[rows].max() - lengths[rows].min() for number in range(5) for [rows] in batches.epoch(number)]
    assert np.mean(spread) > 20  # 7 if they were
    random = np.random.default_rng(0).permuted(np.tile(lengths, (50, 1)), axis=1).reshape(-1, 8)
    assert np.mean(spread) < 0.8 * np.ptp(random, axis=1).mean()


def test_batches_hold_the_rows_where_they_say(laid_out):
    """Every row's inputs, targets and mask at its place; nothing supervised anywhere else."""
    for batch in (batch for step in epoch_of(laid_out, 2) for batch in step):
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
        assert batch.tokens == LENGTHS[list(batch.rows)].sum()
        supervised = 0
        for number, (row, (line, start)) in enumerate(zip(batch.rows, batch.places, strict=True)):
            example, end = laid_out.examples[row], start + LENGTHS[row] - 1
            np.testing.assert_array_equal(batch.inputs[line, start:end], example.tokens[:-1])
            np.testing.assert_array_equal(batch.targets[line, start:end], example.tokens[1:])
            np.testing.assert_array_equal(batch.mask[line, start:end], example.supervised[1:])
            supervised += example.supervised[1:].sum()
            if laid_out.packing:
                assert set(batch.segments[line, start:end]) == {number + 1}
                assert end - start <= batch.window
                assert batch.window % BLOCK == 0
        assert batch.supervised == supervised
        if laid_out.packing:
            ends = [start + LENGTHS[row] - 1 for row, (_, start) in zip(batch.rows, batch.places, strict=True)]
            assert [start for _, start in batch.places] == [0, *ends[:-1]]
            assert not batch.segments[0, ends[-1] :].any()
        else:
            assert (batch.segments, batch.window) == (None, None)


def test_batch_tokens_bounds_every_batch_of_more_than_one_row():
    for more in ({}, {"packing": True}):
        batches = Batches(examples(LENGTHS), 16, 7, accumulate=2, batch_tokens=700, **more)
        sizes = [batch.mask.size for step in epoch_of(batches, 0) for batch in step if len(batch.rows) > 1]
        assert 600 < max(sizes) <= 700
        assert len(sizes) < 1003 / 2


def shape(batch: Batch) -> tuple:
    return batch.mask.shape, None if batch.positions is None else batch.positions.size, batch.window


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("longest", [2, 9, 100, 129, 5000])
def test_a_run_has_at_most_sixteen_shapes_and_none_larger_than_the_largest(longest, layout):
    lengths = np.random.default_rng(0).integers(2, longest + 1, 500)
    batches = Batches(examples(lengths), seed=0, **layout)
    shapes = {shape(batch) for number in range(3) for step in epoch_of(batches, number) for batch in step}
    assert len(shapes) <= MAX_SHAPES
    assert max(lines * width for (lines, width), _, _ in shapes) <= batches.largest().mask.size


@pytest.mark.parametrize(("name", "least"), [("chat", 0.90), ("alpaca", 0.80)])
def test_padding_efficiency(name, least):
    """Lengths as of chats (a lognormal with a long tail) and of short instructions; what is said is what is so."""
    middle, spread, longest = {"chat": (5.8, 0.6, 2048), "alpaca": (4.3, 0.6, 1024)}[name]
    lengths = np.clip(np.random.default_rng(0).lognormal(middle, spread, 3000), 8, longest).astype(int)
    for size in (4, 8):
        batches = Batches(examples(lengths), size, 0)
        laid_out = [batch for step in epoch_of(batches, 1) for batch in step]
        real = sum(batch.tokens - len(batch.rows) for batch in laid_out)
        efficiency = real / sum(batch.mask.size for batch in laid_out)
        assert efficiency >= least
        assert batches.padding_efficiency == pytest.approx(efficiency, abs=0.02)


def test_steps_are_the_epochs_one_after_the_other(batches):
    assert batches.steps_per_epoch == 251
    rows = [[row for batch in step for row in batch.rows] for step in batches.steps(0, 300)]
    assert rows == [list(rows) for number in (0, 1) for [rows] in batches.epoch(number)][:300]


def test_steps_from_the_middle_are_those_of_the_whole_run(laid_out):
    last = 2 * laid_out.steps_per_epoch
    whole = [[batch.rows for batch in step] for step in laid_out.steps(0, last)]
    assert [[batch.rows for batch in step] for step in laid_out.steps(last - 30, last)] == whole[-30:]
    assert list(laid_out.steps(last, last)) == []


def test_steps_carry_what_is_kept_for_them(batches):
    [step] = batches.steps(3, 4, lambda batch: batch.inputs * 2)
    for batch in step:
        np.testing.assert_array_equal(batch.kept, 2 * batch.inputs)


def test_evaluation_sees_every_row_once_in_one_order(laid_out):
    orders = [[batch.rows for batch in laid_out.in_order()] for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(row for rows in orders[0] for row in rows) == list(range(1003))


def test_fewer_rows_than_a_batch_are_one_batch():
    [[batch]] = Batches(examples([5, 9]), 8, 0).steps(0, 1)
    assert batch.inputs.shape[0] == 2


def test_positions_hold_every_supervised_target(laid_out):
    for batch in (batch for step in epoch_of(laid_out, 0) for batch in step):
        if batch.positions is not None:
            assert len(set(batch.positions.tolist())) == batch.positions.size < batch.mask.size
            assert batch.mask.reshape(-1)[batch.positions].sum() == batch.mask.sum()


def test_a_batch_without_room_for_its_targets_becomes_two():
    """One row in a hundred is supervised whole, the others hardly: rooms are made for the others."""
    rows = [
        Example(np.arange(1, 65, dtype=np.int32), np.arange(64) >= (1 if number % 100 == 0 else 60), "rows")
        for number in range(1000)
    ]
    batches = Batches(rows, 8, 0)
    steps = epoch_of(batches, 0) + epoch_of(batches, 1)
    assert {len(step) for step in steps} > {1}
    assert {shape(batch)[1] for step in steps for batch in step} == {batches.largest().positions.size}
    assert batches.largest().positions.size < 8 * 63 / 3


def padded(widths, lengths):
    return widths[np.searchsorted(widths, lengths)].sum()


def test_widths_pad_as_little_as_any_sixteen_can():
    """Compared with every choice of three widths, and for one long row among short ones."""
    lengths = np.random.default_rng(0).choice([3, 9, 17, 30, 41, 60, 90], 200)
    possible = np.unique(-(-lengths // 8) * 8)
    found = _levels(lengths, 3, unit=8)
    assert len(found) == 3
    best = min(
        padded(np.array([*two, possible[-1]]), lengths) for two in itertools.combinations(possible[:-1].tolist(), 2)
    )
    assert padded(found, lengths) == best
    one_long = np.array([2048] + [20, 30, 45, 60] * 250)
    assert padded(_levels(one_long, MAX_SHAPES, unit=8), one_long) < 1.2 * one_long.sum()
