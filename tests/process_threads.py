"""Threads in place of processes: they communicate as the processes of a group do, quickly and within one test.

What they exchange is pickled, as it is between processes.
"""

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup

T = TypeVar("T")


class Meeting:
    """Exchanges what the threads of a process group gather, also if one is lost right after; none waits for it then."""

    def __init__(self, count: int) -> None:
        self.count, self.lost = count, False
        self.rounds: list[dict[int, bytes]] = []
        self.condition = threading.Condition()

    def exchange(self, rank: int, number: int, value: Any) -> list[Any]:
        """Return what each thread exchanges in the round of this number."""
        data = pickle.dumps(value)
        with self.condition:
            self.rounds += [{} for _ in range(number + 1 - len(self.rounds))]
            values = self.rounds[number]
            values[rank] = data
            self.condition.notify_all()
            self.condition.wait_for(lambda: len(values) == self.count or self.lost, timeout=30)
        if len(values) < self.count:
            raise InputError(expected="all to go on", got="one lost", do="run the same command again")
        return [pickle.loads(values[other]) for other in range(self.count)]

    def lose(self) -> None:
        """Let nobody wait any more."""
        with self.condition:
            self.lost = True
            self.condition.notify_all()


@dataclass(frozen=True)
class ThreadAsProcess(ProcessGroup):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of the rounds

    def gather(self, value: T) -> list[T]:
        return self.meeting.exchange(self.rank, next(self.numbers), value)

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
                meeting.lose()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
