"""Threads in place of processes: they communicate as the processes of a group do, quickly and within one test.

What they exchange is pickled, as it is between processes.
"""

import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup

T = TypeVar("T")


class Meeting:
    """Exchanges what the threads of a process group gather; a thread that is lost breaks it."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=30)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        try:
            self.values[rank] = pickle.dumps(value)
            self.barrier.wait()
            values = [pickle.loads(data) for data in self.values]
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise InputError(expected="all to go on", got="one lost", do="run the same command again") from None
        return values


@dataclass(frozen=True)
class ThreadAsProcess(ProcessGroup):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: T) -> list[T]:
        return self.meeting.exchange(self.rank, value)

    def of_main(self, value: T) -> T:
        return self.gather(value)[0]

    def maxima(self, values: Sequence[float]) -> list[float]:
        return [max(column) for column in zip(*self.gather(list(values)), strict=True)]

    def sums(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor.double())).sum(dim=0)


def run_in_threads(count: int, work: Callable[[ProcessGroup], Any], machines: int = 1) -> list[Any]:
    """Return what `work` returned or raised in each of `count` processes, by rank."""
    meeting, outcomes = Meeting(count), [None] * count
    per_machine = count // machines

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadAsProcess(rank, count, rank % per_machine, meeting))
        except BaseException as error:  # a kill too
            outcomes[rank] = error  # type: ignore[call-overload]
            if not isinstance(error, (InputError, OtherProcessError)):
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
