"""Loading ahead: the tensors of `load`, whatever is loaded when; errors, rollbacks and an end that nothing holds up."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.training import prefetch
from pipeline.training.prefetch import Prefetcher

CPU = torch.device("cpu")
LAST = 7  # steps of the runs here


class Source:
    """Loads two tensors of each step, and records which steps it was asked for, and by which thread."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.torch_threads: set[int] = set()
        self.failing: dict[int, BaseException] = {}

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        self.asked.append(step)
        self.threads.add(threading.get_ident())
        self.torch_threads.add(torch.get_num_threads())
        if step in self.failing:
            raise self.failing.pop(step)
        generator = torch.Generator().manual_seed(step)
        return torch.randn(2, 3, 5, generator=generator), torch.randint(9, (2,), generator=generator)


def is_step(tensors: tuple[Tensor, ...], step: int) -> bool:
    return all(torch.equal(one, other) for one, other in zip(tensors, Source()(step), strict=True))


def until(holds: object) -> None:
    """Wait until `holds()`, at most five seconds."""
    assert callable(holds)
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def free() -> Iterator[threading.Event]:
    """An event that a `load` may wait for, set at the end of the test so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("ahead", [None, 0, 1, 2, 20])
def test_every_step_is_what_load_returns(ahead: int | None) -> None:
    with Prefetcher(Source(), CPU, first=2, last=LAST, ahead=ahead) as prefetcher:
        assert all(is_step(prefetcher.get(step), step) for step in range(2, LAST))


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("announced", [False, True])
def test_after_a_rollback_the_earlier_steps_come_again(ahead: int, announced: bool) -> None:
    with Prefetcher(Source(), CPU, first=0, last=LAST, ahead=ahead) as prefetcher:
        for step in (0, 1, 2, 3):
            prefetcher.get(step)
        if announced:
            prefetcher.seek(1)
        assert all(is_step(prefetcher.get(step), step) for step in range(1, LAST))
        assert is_step(prefetcher.get(5), 5)


def test_it_loads_ahead_this_many_steps_and_none_beyond_the_last() -> None:
    source = Source()
    with Prefetcher(source, CPU, first=0, last=LAST, ahead=2) as prefetcher:
        until(lambda: source.asked == [0, 1])
        time.sleep(0.02)
        assert source.asked == [0, 1]
        for step in range(LAST):
            prefetcher.get(step)
            until(lambda step=step: source.asked == list(range(min(LAST, step + 3))))
        time.sleep(0.02)
    assert source.asked == list(range(LAST))


def test_a_thread_of_its_own_loads_with_one_thread_of_torch_and_leaves_those_of_others() -> None:
    source, found = Source(), []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Prefetcher(source, CPU, first=0, last=LAST, ahead=2) as prefetcher:
            prefetcher.get(0)
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            later.start()
            later.join()
        assert source.threads.isdisjoint({threading.get_ident()})
        assert source.torch_threads == {1}
        assert [torch.get_num_threads(), *found] == [2, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ahead", [None, 0])
def test_on_the_cpu_there_is_no_thread_and_nothing_is_loaded_before_it_is_asked_for(ahead: int | None) -> None:
    source = Source()
    with Prefetcher(source, CPU, first=0, last=LAST, ahead=ahead) as prefetcher:
        time.sleep(0.01)
        assert source.asked == []
        prefetcher.get(0)
    assert source.threads == {threading.get_ident()}


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_is_raised_for_its_step_and_the_step_can_be_had_again(ahead: int) -> None:
    source = Source()
    source.failing = {1: KeyError("of the thread")}
    with Prefetcher(source, CPU, first=0, last=LAST, ahead=ahead) as prefetcher:
        assert is_step(prefetcher.get(0), 0)
        with pytest.raises(KeyError, match="of the thread"):
            prefetcher.get(1)
        assert all(is_step(prefetcher.get(step), step) for step in range(1, LAST))


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_seconds_waited(ahead: int) -> None:
    """Ahead of time, a slow step is waited for only as far as it is not done."""
    loaded = threading.Event()

    def load(step: int) -> tuple[Tensor, ...]:
        time.sleep(0.2)
        if step == 1:
            loaded.set()
        return ()

    with Prefetcher(load, CPU, first=0, last=2, ahead=ahead) as prefetcher:
        prefetcher.get(0)
        first = prefetcher.waited
        if ahead:
            assert loaded.wait(5)
            time.sleep(0.02)
        prefetcher.get(1)
        second = prefetcher.waited - first
        assert first > 0.1
        assert second < 0.1 if ahead else second > 0.19


def test_closing_waits_for_no_load_that_blocks(free: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "PATIENCE", 0.05)
    started = threading.Event()

    def load(step: int) -> tuple[Tensor, ...]:
        started.set()
        free.wait()
        return ()

    start = time.monotonic()
    with Prefetcher(load, CPU, first=0, last=LAST, ahead=2) as prefetcher:
        started.wait()
    assert time.monotonic() - start < 2
    thread = prefetcher._thread
    assert thread is not None
    assert thread.is_alive()
    assert thread.daemon  # or the program could not end
    free.set()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_ends_the_thread_drops_what_is_not_begun_and_can_be_done_twice(free: threading.Event) -> None:
    source, started = Source(), threading.Event()

    def load(step: int) -> tuple[Tensor, ...]:
        started.set()
        free.wait()
        return source(step)

    prefetcher = Prefetcher(load, CPU, first=0, last=LAST, ahead=3)
    started.wait()
    threading.Timer(0.05, free.set).start()
    prefetcher.close()
    prefetcher.close()
    assert prefetcher._thread is not None
    assert not prefetcher._thread.is_alive()
    assert source.asked == [0]


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_it_does_not_have(ahead: int) -> None:
    prefetcher = Prefetcher(Source(), CPU, first=0, last=LAST, ahead=ahead)
    with pytest.raises(ValueError, match="expected one below 7"):
        prefetcher.get(LAST)
    prefetcher.close()
    with pytest.raises(ValueError, match="before `close`, got 0"):
        prefetcher.get(0)


def test_a_negative_number_of_steps_ahead() -> None:
    with pytest.raises(ValueError, match="ahead: expected 0 or more steps, got -1"):
        Prefetcher(Source(), CPU, first=0, last=1, ahead=-1)


def test_tensors_arrive_on_the_device() -> None:
    with Prefetcher(Source(), torch.device("meta"), first=0, last=LAST) as prefetcher:
        assert {tensor.device.type for tensor in prefetcher.get(0)} == {"meta"}
