"""Work that processes share: every item once, all results in order everywhere, one line for an error in any of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.images.preprocessing import to_uint8
from pipeline.models import inference
from pipeline.models.inference import blocks_of_all, reconstruct_images, run_in_blocks, run_in_blocks_of_all
from pipeline.models.shares import check_same, map_on_all, of_process
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup

from ..process_threads import run_in_threads
from ..support import HEIGHT, WIDTH, brightness_tokenizer

BLOCK = 4  # items


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "BLOCK", BLOCK)


def refuse(item: int) -> int:
    if item == 3:
        raise InputError(expected="no 3", got="one", do="omit it")
    return item


def only_main_says(outcomes: list[Any], line: str) -> None:
    assert str(outcomes[0]) == line
    assert isinstance(outcomes[0], InputError)
    assert all(isinstance(outcome, OtherProcessError) for outcome in outcomes[1:])


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("n", range(7))
def test_each_item_is_given_to_one_process_and_all_get_all_results_in_order(count: int, n: int) -> None:
    given: list[tuple[int, int]] = []

    def work(group: ProcessGroup) -> list[int]:
        def action(item: int) -> int:
            given.append((item, group.rank))
            return item * item

        return map_on_all(action, (item for item in range(n)), group)

    assert run_in_threads(count, work) == [[item * item for item in range(n)]] * count
    assert sorted(given) == [(item, item % count) for item in range(n)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_item_that_is_refused_ends_all_with_one_line(count: int) -> None:
    outcomes = run_in_threads(count, lambda group: map_on_all(refuse, range(5), group))
    only_main_says(outcomes, "expected no 3, got one; omit it")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, BLOCK, 2 * BLOCK + 1, 4 * BLOCK])
def test_a_share_is_neighbouring_blocks_and_all_get_what_all_found(count: int, n: int) -> None:
    """Also where there are fewer blocks than processes."""
    given: list[range] = []

    def work(group: ProcessGroup) -> list[int]:
        def share(start: int, stop: int) -> Iterator[int]:
            given.append(range(start, stop))
            yield from range(start, stop)

        return list(blocks_of_all(share, n, group))

    assert run_in_threads(count, work) == [list(range(n))] * count
    assert len(given) == count
    assert sorted(item for part in given for item in part) == list(range(n))
    assert all(part.start % BLOCK == 0 for part in given)
    sizes = [-(-len(part) // BLOCK) for part in given]
    assert max(sizes) - min(sizes) <= 1


def test_a_block_that_is_refused_ends_all_with_one_line() -> None:
    def work(group: ProcessGroup) -> list[int]:
        return list(blocks_of_all(lambda start, stop: map(refuse, range(start, stop)), 9, group))

    only_main_says(run_in_threads(3, work), "expected no 3, got one; omit it")


def position_in_block(block: Tensor) -> tuple[Tensor, ...]:
    """What no network should: a result that depends on the position in the block, and on what else is in it."""
    return (block.sum(dim=1) + torch.arange(len(block)) * 1000, block + block.sum())


@pytest.mark.parametrize("n", [1, 11])
def test_the_blocks_are_those_of_one_process(n: int) -> None:
    items, model = torch.rand(n, 3, generator=torch.Generator().manual_seed(0)), nn.Linear(1, 1)
    alone = list(run_in_blocks(model, position_in_block, lambda a, b: items[a:b], n, batch_size=BLOCK))
    for count in (1, 2, 3):
        outcomes = run_in_threads(
            count,
            lambda group: list(run_in_blocks_of_all(model, position_in_block, lambda a, b: items[a:b], n, group)),
        )
        for found in outcomes:
            assert len(found) == len(alone)
            for batches in zip(found, alone, strict=True):
                assert all(map(torch.equal, *batches))


def test_items_are_numbered_from_the_first_on() -> None:
    seen: list[tuple[int, int]] = []

    def load(start: int, stop: int) -> Tensor:
        seen.append((start, stop))
        return torch.zeros(stop - start, 1)

    list(run_in_blocks(nn.Linear(1, 1), lambda block: (block,), load, 6, first=8, batch_size=BLOCK))
    assert sorted(seen) == [(8, 12), (12, 14)]


def test_each_process_gets_all_reconstructions() -> None:
    images = torch.rand(11, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    alone = reconstruct_images(brightness_tokenizer(), images)
    assert (alone != to_uint8(images)).any()
    for found in run_in_threads(3, lambda group: reconstruct_images(brightness_tokenizer(), images, group=group)):
        assert torch.equal(found, alone)


def test_what_differs_between_processes_is_named_once() -> None:
    def work(group: ProcessGroup, different: int) -> None:
        check_same(group, {"tokenizer": "abc", "num_images": 7 if group.rank == different else 5})

    assert run_in_threads(3, lambda group: work(group, 4)) == [None] * 3
    for rank in (1, 2):
        only_main_says(
            run_in_threads(3, lambda group, rank=rank: work(group, rank)),  # type: ignore[misc]
            f"expected the same num images in every process, got 7 in process {rank}, 5 in process 0; "
            "give all machines the same models and images",
        )


def test_the_line_of_progress_says_whose_share_it_counts() -> None:
    assert of_process("judging", ProcessGroup()) == "judging"
    assert of_process("judging", ProcessGroup(1, 3)) == "judging (process 2 of 3)"
