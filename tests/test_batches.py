"""Batches: every row once an epoch, by length, in an order that only data, seed and epoch decide."""

import itertools

import numpy as np
import pytest

from mlx_lora.batches import MAX_SHAPES, WINDOW, Batches, _widths
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


def test_every_row_once_an_epoch_and_only_one_batch_is_partial(batches):
    for epoch in (0, 1, 5):
        order = batches.epoch(epoch)
        assert sorted(np.concatenate(order)) == list(range(1003))
        assert sorted(map(len, order)) == [3] + [4] * 250
        assert len(order) == len(batches)


def test_order_is_a_function_of_seed_and_epoch(batches):
    def order(seed, epoch):
        return [rows.tolist() for rows in Batches(batches.examples, 4, seed).epoch(epoch)]

    assert order(7, 3) == [rows.tolist() for rows in batches.epoch(3)]
    assert order(7, 3) != order(8, 3)
    assert order(7, 3) != order(7, 4)


def test_composition_of_batches_changes_every_epoch(batches):
    first, second = ({frozenset(rows.tolist()) for rows in batches.epoch(epoch)} for epoch in (0, 1))
    assert len(first & second) < 5


def test_rows_of_a_batch_are_neighbours_in_length(batches):
    def padding(order):
        widths = [max(LENGTHS[rows]) * len(rows) for rows in order]
        return 1 - LENGTHS.sum() / sum(widths)

    assert WINDOW * 4 < 1003
    shuffled = np.random.default_rng(0).permutation(1003)
    assert padding(np.array_split(shuffled, 251)) > 0.3
    assert padding(batches.epoch(0)) < 0.05


def test_collated_batch_holds_the_rows_padded_on_the_right(batches):
    rows = np.array([5, 17, 900])
    batch = batches.collate(rows)
    longest = max(LENGTHS[rows]) - 1
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
    assert batch.inputs.shape[0] == 4
    assert longest <= batch.inputs.shape[1] < longest + 64
    for place, row in enumerate(rows):
        example, length = batches.examples[row], LENGTHS[row] - 1
        np.testing.assert_array_equal(batch.inputs[place, :length], example.tokens[:-1])
        np.testing.assert_array_equal(batch.targets[place, :length], example.tokens[1:])
        np.testing.assert_array_equal(batch.mask[place, :length], example.supervised[1:])
        assert not batch.mask[place, length:].any()
    assert not batch.mask[3].any()
    assert batch.supervised == sum(batches.examples[row].supervised[1:].sum() for row in rows)
    assert batch.tokens == LENGTHS[rows].sum()
    assert batch.rows == (5, 17, 900)


@pytest.mark.parametrize("longest", [2, 9, 100, 129, 2048, 5000])
def test_a_run_has_at_most_sixteen_shapes(longest):
    lengths = np.random.default_rng(0).integers(2, longest + 1, 500)
    all_batches = Batches(examples(lengths), 3, 0)
    shapes = {batch.inputs.shape for epoch in range(3) for batch in map(all_batches.collate, all_batches.epoch(epoch))}
    assert len(shapes) <= MAX_SHAPES


def test_steps_are_the_epochs_cut_into_updates(batches):
    assert batches.steps_per_epoch(4) == 63
    steps = list(batches.steps(4, 0, 70))
    assert [len(micro) for micro in steps] == [4] * 62 + [3] + [4] * 7
    for epoch, part in enumerate((steps[:63], steps[63:])):
        rows = [batch.rows for micro in part for batch in micro]
        assert rows == [tuple(rows.tolist()) for rows in batches.epoch(epoch)[: len(rows)]]


def test_steps_from_the_middle_are_those_of_the_whole_run(batches):
    whole = [[batch.rows for batch in micro] for micro in batches.steps(2, 0, 200)]
    assert [[batch.rows for batch in micro] for micro in batches.steps(2, 130, 200)] == whole[130:]
    assert list(batches.steps(2, 200, 200)) == []


def test_evaluation_sees_every_row_once_in_one_order(batches):
    orders = [[batch.rows for batch in batches.in_order()] for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(row for rows in orders[0] for row in rows) == list(range(1003))


def test_fewer_rows_than_a_batch_are_one_batch():
    few = Batches(examples([5, 9]), 8, 0)
    assert (len(few), few.collate(few.epoch(0)[0]).inputs.shape[0]) == (1, 2)


def test_positions_hold_every_supervised_target_and_one_number_per_shape(batches):
    sizes = {}
    for batch in map(batches.collate, batches.epoch(0)):
        flat = batch.mask.reshape(-1)
        assert len(set(batch.positions.tolist())) == batch.positions.size <= flat.size
        assert flat[batch.positions].sum() == flat.sum()
        sizes.setdefault(batch.inputs.shape, set()).add(batch.positions.size)
    assert all(len(numbers) == 1 for numbers in sizes.values())


def padded(widths, lengths):
    return widths[np.searchsorted(widths, lengths)].sum()


def test_widths_pad_as_little_as_any_sixteen_can():
    """Compared with every choice of three widths, and for one long row among short ones."""
    lengths = np.random.default_rng(0).choice([3, 9, 17, 30, 41, 60, 90], 200)
    possible = np.unique(-(-lengths // 8) * 8)
    found = _widths(lengths, 3)
    assert len(found) == 3
    best = min(
        padded(np.array([*two, possible[-1]]), lengths) for two in itertools.combinations(possible[:-1].tolist(), 2)
    )
    assert padded(found, lengths) == best
    one_long = np.array([2048] + [20, 30, 45, 60] * 250)
    assert padded(_widths(one_long, MAX_SHAPES), one_long) < 1.2 * one_long.sum()
