"""Inference in blocks: the bytes of a plain loop over padded blocks, however divided; no setting is changed."""

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.inference import BLOCK, in_blocks, run_in_blocks

from ..support import torch_threads

SHAPE = (3, 6, 10)
COUNTS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 8]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 4, stride=2)).eval()


def items_of(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(count))


def position_in_block(block: Tensor) -> Tensor:
    """Return what no network should: a result that depends on the position in the block, and on its size."""
    return block.sum(dim=(1, 2, 3)) + torch.arange(len(block)) * 1000 + len(block)


def plain_loop(compute: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """The oracle: block after block, each padded with zeros, on one thread."""
    found = []
    with torch_threads(1), torch.no_grad():
        for start in range(0, len(items), BLOCK):
            subset = items[start : start + BLOCK]
            block = torch.zeros(BLOCK, *SHAPE)
            block[: len(subset)] = subset
            found.append(compute(block)[: len(subset)])
    return torch.cat(found)


@pytest.mark.parametrize("batch_size", [1, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize("count", COUNTS)
def test_the_bytes_are_those_of_a_plain_loop(count: int, batch_size: int, threads: int, model: nn.Module) -> None:
    items = items_of(count)
    for compute in (model, position_in_block):
        found = list(in_blocks(model, compute, lambda a, b: items[a:b], count, batch_size=batch_size))
        assert len(found) == -(-count // (-(-batch_size // BLOCK) * BLOCK))
        if count:
            assert torch.equal(torch.cat(found), plain_loop(compute, items))


def test_the_network_sees_complete_blocks_on_one_thread_without_gradients(threads: int, model: nn.Module) -> None:
    """One thread of OpenMP too, of which a new Python thread would use all."""
    omp = _openmp()
    model.train()
    seen: list[tuple[object, ...]] = []

    def compute(block: Tensor) -> Tensor:
        omp_threads = omp.omp_get_max_threads() if omp else 1  # before torch is asked, which would set it
        cudnn = torch.backends.cudnn
        exact = not cudnn.allow_tf32 and not cudnn.benchmark and torch.get_float32_matmul_precision() == "highest"
        seen.append((len(block), omp_threads, torch.is_grad_enabled(), model.training, exact, block.dtype))
        return model(block)

    list(in_blocks(model, compute, lambda a, b: items_of(b - a), 5 * BLOCK + 1, batch_size=1))
    assert seen == [(BLOCK, 1, False, False, True, torch.float32)] * 6


def _openmp() -> ctypes.CDLL | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = [line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "omp" in line]
    libraries = [
        ctypes.CDLL(path) for path in dict.fromkeys(loaded) if Path(path).name.startswith(("libgomp", "libomp"))
    ]
    return libraries[0] if len(libraries) == 1 else None


def test_the_order_is_kept_though_the_second_batch_is_finished_first(model: nn.Module) -> None:
    second_finished = threading.Event()

    def load(start: int, stop: int) -> Tensor:
        if start == 0:
            assert second_finished.wait(30)
        return torch.arange(start, stop)[:, None]

    def compute(block: Tensor) -> Tensor:
        if block[0] == BLOCK:
            second_finished.set()
        return block

    with torch_threads(2):
        found = torch.cat(list(in_blocks(model, compute, load, 5 * BLOCK - 3)))
    assert found[:, 0].tolist() == list(range(5 * BLOCK - 3))


def test_no_more_is_loaded_than_is_soon_needed(threads: int, model: nn.Module) -> None:
    """However long the caller works on the first batch."""
    most, loaded, too_many = 2 * threads + 1, [], threading.Event()

    def load(start: int, stop: int) -> Tensor:
        loaded.append(start)
        if len(loaded) > most:
            too_many.set()
        return torch.zeros(stop - start, 1)

    batches = in_blocks(model, torch.clone, load, 100 * BLOCK)
    assert loaded == []
    next(batches)
    assert not too_many.wait(0.2)
    batches.close()  # type: ignore[attr-defined]
    assert 1 <= len(loaded) <= most


def test_waiting_batches_are_not_started_once_the_caller_stops(model: nn.Module) -> None:
    """One thread, which is busy with the second batch; the third is waiting."""
    loaded, stopping = [], threading.Event()

    def load(start: int, stop: int) -> Tensor:
        loaded.append(start)
        if start:
            assert stopping.wait(30)
        return torch.zeros(stop - start, 1)

    with torch_threads(1):
        batches = in_blocks(model, torch.clone, load, 100 * BLOCK)
        next(batches)
        timer = threading.Timer(0.2, stopping.set)  # while `close` waits for the second batch
        timer.start()
        batches.close()  # type: ignore[attr-defined]
        timer.join()
    assert loaded in ([0], [0, BLOCK])


# The settings afterwards


def _state(model: nn.Module) -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    return torch.get_num_threads(), model.training, torch.is_grad_enabled(), flags, torch.get_float32_matmul_precision()


@pytest.fixture
def unusual() -> Iterator[None]:
    """Settings that `in_blocks` has to change."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("unusual")
@pytest.mark.parametrize("end", ["exhausted", "load fails", "compute fails", "abandoned", "the caller fails"])
@pytest.mark.parametrize("training", [True, False])
def test_every_setting_is_as_before(end: str, training: bool, threads: int, model: nn.Module) -> None:
    model.train(training)
    before = _state(model)
    calls = itertools.count()

    def fails(what: str) -> None:
        if end == f"{what} fails" and next(calls) == 2:
            raise ZeroDivisionError(what)

    def load(start: int, stop: int) -> Tensor:
        fails("load")
        return items_of(stop - start)

    def compute(block: Tensor) -> Tensor:
        fails("compute")
        return model(block)

    def use() -> None:
        batches = in_blocks(model, compute, load, 40 * BLOCK)
        for _ in batches:
            if end == "abandoned":
                return
            if end == "the caller fails":
                raise ZeroDivisionError("caller")

    if end.endswith("fails"):
        with pytest.raises(ZeroDivisionError, match=end.split()[-2]):
            use()
    else:
        use()
    assert _state(model) == before
    if end.endswith("fails") and not end.startswith("the"):
        assert next(calls) < 40  # the rest is not computed
    in_new_thread: list[int] = []
    thread = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert in_new_thread == [threads]


def test_two_at_a_time_restore_the_number_of_threads(threads: int, model: nn.Module) -> None:
    items = items_of(3 * BLOCK)
    several = (in_blocks(model, model, lambda a, b: items[a:b], len(items)) for _ in range(2))
    for one, other in zip(*several, strict=True):
        assert torch.equal(one, other)
    assert torch.get_num_threads() == threads


# Several tensors, and one accelerator


@pytest.mark.parametrize("count", COUNTS)
def test_several_tensors_of_a_block_belong_to_the_same_items(count: int, threads: int, model: nn.Module) -> None:
    items = items_of(count)
    found = list(
        run_in_blocks(
            model,
            lambda block: (block.sum(dim=(1, 2, 3)), model(block)),
            lambda a, b: items[a:b],
            count,
            batch_size=BLOCK + 1,
        )
    )
    sums, features = (torch.cat([batch[i] for batch in found]) if found else torch.empty(0) for i in (0, 1))
    assert len(sums) == len(features) == count
    if count:
        assert torch.equal(sums, items.sum(dim=(1, 2, 3)))
        assert torch.equal(features, plain_loop(model, items))


def test_an_accelerator_computes_one_block_at_a_time_while_others_are_loaded() -> None:
    """Only the activations of one block are in its memory. The device "meta", which has no data, replaces it here."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    inside, most, loading = [0], [0], threading.Barrier(4)

    def load(start: int, stop: int) -> Tensor:
        if start < 4 * BLOCK:
            loading.wait(30)  # breaks if the loads did not run side by side
        return torch.zeros(stop - start, 1)

    def compute(block: Tensor) -> Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        inside[0] -= 1
        return torch.full((len(block),), 7)

    try:
        found = list(in_blocks(nn.Linear(1, 1, device="meta"), compute, load, 12 * BLOCK))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(found), torch.full((12 * BLOCK,), 7))
    assert most == [1]
