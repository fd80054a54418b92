"""Several processes of one command, on one machine or many, as `torchrun` starts them; without it there is one.

They talk through gloo, which every build of torch has, and only about what to do: results go through files.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # a process waits this long for the others: their shares of the work differ


@dataclass(frozen=True)
class ProcessGroup:
    """This process among `count`; the one of rank 0 is the main process."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action` in each process, each of which must call this. Return the own result, once all have one.

        Raises:
            InputError: it failed with an InputError somewhere; the first one, in the main process.
            OtherProcessError: in the other processes then, so that the line is printed once.
        """
        result: Any = None
        failure: dict[str, str] | None = None
        try:
            result = action()
        except InputError as error:
            failure = {"expected": error.expected, "got": error.got, "do": error.do}
        failures = [found for found in self.gather(failure) if found is not None]
        if failures and not self.is_main:
            raise OtherProcessError
        if failures:
            raise InputError(**failures[0])
        return result

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run `action` in the main process; return its result in each. Raises like `run_on_all`."""
        result: Any = self.gather(self.run_on_all(lambda: action() if self.is_main else None))[0]
        return result

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` in one process of each machine, then in its others, which find what the first left on disk."""
        first = self.run_on_all(lambda: action() if self.local_rank == 0 else None)
        others = self.run_on_all(lambda: None if self.local_rank == 0 else action())
        result: Any = first if self.local_rank == 0 else others
        return result

    def wait(self) -> None:
        """Return once every process is here."""
        self.gather(None)

    def share(self, items: list[T]) -> list[T]:
        """Return this process's share of `items`: each is in exactly one share, neighbours stay together."""
        first, last = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def device(self, name: str) -> str:
        """Return `name`, or, where it leaves open which GPU, the one of this process."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def gather(self, value: T) -> list[T]:
        """Return what each process gave, by rank. Raise InputError if one of them is lost."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(
                expected=f"all {self.count} processes to go on",
                got=f"one lost ({str(error).splitlines()[0]})",
                do="run the same command again: what is written is kept",
            ) from None
        return values


class OtherProcessError(SystemExit):
    """Another process says what went wrong; this one ends with status 1 and says nothing."""

    def __init__(self) -> None:
        super().__init__(1)


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that torchrun started together with this one, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield ProcessGroup()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
