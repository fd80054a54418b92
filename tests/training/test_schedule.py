"""What of a run is a function of step, seed and position: random numbers, keys, parts of batches, held-out items."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.images.holdout import MOST_HELD_OUT
from pipeline.runtime.process_group import ProcessGroup
from pipeline.training.schedule import StepRandomness
from pipeline.training.shared_steps import check_batch_size
from pipeline.training.split_summary import FEWEST, RECORDED, measured_items
from pipeline.training.stage import Batch

SEEDS = [0, 1, 11, 2**32 + 1, 2**70]

# Random numbers


def drawn(seed: int, step: int) -> bytes:
    StepRandomness(seed, 4).begin(step)
    return torch.rand(8).numpy().tobytes()


def test_the_generators_of_a_step_depend_on_seed_and_step_alone() -> None:
    """Whatever was drawn before, and in whichever order the steps come: nothing of it has to be saved."""
    steps = [0, 1, 11, 111, 10_000_000]
    forwards = {(seed, step): drawn(seed, step) for seed in SEEDS for step in steps}
    for (seed, step), expected in reversed(forwards.items()):
        torch.rand(step % 7)
        assert drawn(seed, step) == expected
    assert len(set(forwards.values())) == len(forwards)


def test_begin_leaves_the_generator_of_a_step_as_a_seed_does() -> None:
    """The batch size, that of all processes, is none of its business; nor is the state of a generator passed in."""
    other = torch.Generator().manual_seed(5)
    before = other.get_state()
    StepRandomness(3, 2).begin(7)
    state = torch.get_rng_state()
    assert state.equal(torch.Generator().manual_seed(torch.initial_seed()).get_state())
    StepRandomness(3, 500).begin(7)
    assert state.equal(torch.get_rng_state())
    assert before.equal(other.get_state())


def test_keys_depend_on_seed_step_and_position_alone() -> None:
    """A run with another batch size gives its first items the same keys; those of no two items are the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for seed in SEEDS:
        for step in (0, 1, 2, 999):
            keys = StepRandomness(seed, 50).keys(step)
            assert (keys.dtype, keys.shape) == (torch.int64, (50,))
            torch.rand(3)
            np.random.default_rng(0).random()
            assert keys.equal(StepRandomness(seed, 50).keys(step))
            assert keys[:7].equal(StepRandomness(seed, 7).keys(step))
            found[seed, step] = keys.tolist()
    every = [key for keys in found.values() for key in keys]
    assert len(set(every)) == len(every)
    assert 0 <= min(every) < 2**56
    assert 2**62 - 2**56 < max(every) < 2**62


def test_every_bit_of_the_keys_is_random() -> None:
    """Dropout takes the lowest 31, the streams of torch the lowest 32: 5 standard deviations are 0.04."""
    keys = StepRandomness(0, 4000).keys(3)
    shares = torch.stack([(keys >> bit & 1).double().mean() for bit in range(62)])
    assert (shares - 0.5).abs().max() < 0.04


def test_keys_and_the_order_of_the_items_are_other_streams() -> None:
    """Or an item's noise would be a function of its place in the epoch."""
    key = StepRandomness(0, 1).keys(5).item()
    assert key not in np.random.default_rng([0, 5]).integers(2**62, size=10)


# Parts of batches


def batch_of_size(count: int) -> Batch:
    indices = np.arange(count) * 7
    return Batch(indices, torch.arange(count) + 100, (torch.arange(2 * count).reshape(count, 2), torch.arange(count)))


@pytest.mark.parametrize(("count", "parts"), [(7, 3), (8, 2), (5, 5), (6, 1), (1, 1), (100, 7)])
def test_the_parts_of_a_batch_are_all_of_it_in_order(count: int, parts: int) -> None:
    batch = batch_of_size(count)
    found = batch.split(parts)
    sizes = [len(part) for part in found]
    assert (len(found), sum(sizes)) == (parts, count)
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    assert np.concatenate([part.indices for part in found]).tolist() == batch.indices.tolist()
    assert torch.cat([part.keys for part in found]).equal(batch.keys)
    for column in range(2):
        assert torch.cat([part.data[column] for part in found]).equal(batch.data[column])
    for part in found:
        assert len(part.keys) == len(part.data[0]) == len(part.data[1]) == len(part)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 12, 13])
def test_the_shares_of_processes_are_all_items_in_the_order_of_ranks(processes: int, count: int) -> None:
    groups = [ProcessGroup(rank, processes) for rank in range(processes)]
    items = list(range(count))
    assert [item for group in groups for item in group.share(items)] == items
    bounds = [group.bounds(count) for group in groups]
    assert [items[slice(*each)] for each in bounds] == [group.share(items) for group in groups]
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("processes", "accumulate", "least"), [(1, 1, 1), (4, 1, 4), (1, 3, 3), (2, 3, 6), (3, 2, 6)])
def test_every_process_has_an_item_of_every_part(processes: int, accumulate: int, least: int) -> None:
    """Exactly where the check says so: with one item less, a process would have none of some part."""

    def smallest_part(batch_size: int) -> int:
        shares = [
            last - first for first, last in (ProcessGroup(r, processes).bounds(batch_size) for r in range(processes))
        ]
        return min(len(part) for share in shares for part in batch_of_size(share).split(accumulate))

    group = ProcessGroup(processes - 1, processes)
    for batch_size in range(least, least + 9):
        check_batch_size(batch_size, accumulate, group)
        assert smallest_part(batch_size) >= 1
    assert smallest_part(least - 1) == 0
    with pytest.raises(InputError, match=f"--batch-size of {least} or more") as error:
        check_batch_size(least - 1, accumulate, group)
    words = f"{processes} processes" if accumulate == 1 else f"{processes} x {accumulate} parts"
    assert error.value.expected == f"--batch-size of {least} or more, the items of all processes, for {words}"
    assert error.value.got == str(least - 1)


# How many items are measured


@pytest.mark.parametrize(
    ("steps", "batch_size", "expected"),
    [(1, 1, 128), (512, 32, 128), (1500, 32, 375), (1504, 32, 376), (16_384, 32, 4096), (10**7, 512, 4096)],
)
def test_a_new_run_is_evaluated_on_a_share_of_what_it_trains_on(steps: int, batch_size: int, expected: int) -> None:
    assert (FEWEST, MOST_HELD_OUT) == (128, 4096)
    assert measured_items(steps, batch_size, None) == expected


@pytest.mark.parametrize("number", [1, 375, MOST_HELD_OUT])
def test_a_resumed_run_keeps_its_number_whatever_its_length_is_now(number: int) -> None:
    for steps in (1, 10**7):
        assert measured_items(steps, 32, {RECORDED: number, "steps": 5}) == number
    assert measured_items(1, 1, {"steps": 5}) == MOST_HELD_OUT  # of a run from before there was a number


@pytest.mark.parametrize("number", [0, -3, MOST_HELD_OUT + 1, 2**80, True, 12.0, "12", None, [12], "x" * 10_000])
def test_a_number_of_a_strangers_file_is_refused(number: Any) -> None:
    with pytest.raises(InputError) as error:
        measured_items(100, 32, {RECORDED: number})
    assert re.search(r"training\.measured", str(error.value))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_batches_hold_what_they_were_given() -> None:
    batch = batch_of_size(3)
    data: tuple[Tensor, ...] = batch.split(1)[0].data
    assert len(batch) == 3
    assert all(one.equal(other) for one, other in zip(data, batch.data, strict=True))
