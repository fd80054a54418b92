"""Several processes of one command, on one machine or many, as `torchrun` starts them; without it there is one.

They exchange messages through gloo, which every build of torch has, about what to do; results go through files.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # how long a process waits for the others, whose shares of the work take different times


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the `count` of the group; the one of rank 0 is the main process."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action` in every process, each of which must call this. Return its own result, once all have one.

        Raises:
            InputError: in the main process, if `action` raised one in any process: the first, by rank.
            OtherProcessError: in the other processes in that case, so that the line is printed once.
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
        """Run `action` in the main process; return its result in every process. Raises as `run_on_all` does."""
        result: Any = self.gather(self.run_on_all(lambda: action() if self.is_main else None))[0]
        return result

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` in one process of each machine, then in its others, which find on disk what the first wrote."""
        first = self.run_on_all(lambda: action() if self.local_rank == 0 else None)
        others = self.run_on_all(lambda: None if self.local_rank == 0 else action())
        result: Any = first if self.local_rank == 0 else others
        return result

    @contextmanager
    def entered_by_main(self, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Let the main process enter a context, such as a lock, for all processes. Raises as `run_on_all` does."""
        with ExitStack() as stack:
            self.run_on_main(lambda: bool(stack.enter_context(context())))
            yield

    def wait(self) -> None:
        """Return once every process has called this."""
        self.gather(None)

    def share(self, items: list[T]) -> list[T]:
        """Return this process's share of `items`: each item is in exactly one share, and a share is contiguous."""
        first, last = self.bounds(len(items))
        return items[first:last]

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the first of `count` items that is in this process's share, and the first after it."""
        first, last = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return first, last

    def maxima(self, values):
        if self.count == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t.tolist()

    def sums(self, tensor):
        if self.count == 1:
            return tensor
        t = tensor.double()
        dist.all_reduce(t)
        return t

    def device(self, name: str) -> str:
        """Return `name`, or the GPU of this process if `name` does not say which of several."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Raise InputError if one of them is lost."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(
                expected=f"all {self.count} processes to continue",
                got=f"one lost ({str(error).splitlines()[0]})",
                do="run the same command again: what is written is kept",
            ) from None
        return values


class OtherProcessError(SystemExit):
    """Ends this process with status 1 and no message, because another one says what went wrong."""

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
