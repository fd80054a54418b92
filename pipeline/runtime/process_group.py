"""Several processes of one command, on one machine or many, as `torchrun` starts them; without it there is one.

They exchange messages through gloo, which every build of torch has, about what to do; tensors on GPUs go through NCCL,
and results through files. A process that is lost ends all: `heartbeat.py`.

N numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .meeting import read_launch
from .membership import Membership, OtherProcessError, is_loss, membership

__all__ = ["OtherProcessError", "ProcessGroup", "process_group"]

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the `count` of the group; the one of rank 0 is the main process."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    _member: Membership | None = field(default=None, kw_only=True, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run `action` in every process, each of which must call this. Return its own result, once all have one.

        Raises:
            InputError, ValueError: in the main process, if `action` raised one in any process: the first, by rank.
            FloatingPointError: in every process, if `action` raised one in any, and no InputError.
            OtherProcessError: in the other processes in the first case, so that the line is printed once.
        """
        result: Any = None
        own: Exception | None = None
        try:
            result = action()
        except (InputError, FloatingPointError, ValueError) as error:
            if self.count == 1:
                raise
            own = _as_sent(error)
        errors = [error for error in self.gather(own) if error is not None]
        for kind in (InputError, FloatingPointError, ValueError):  # the most telling first
            first = next((error for error in errors if isinstance(error, kind)), None)
            if first is not None:
                raise first if self.is_main or kind is FloatingPointError else OtherProcessError
        return result

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run `action` in the main process; return its result in every process. Raises as `run_on_all` does."""
        result: Any = self.run_on_all(lambda: action() if self.is_main else None)
        return self.of_main(result)

    @contextmanager
    def entered_by_main(self, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Let the main process enter a context, such as a lock, for all processes. Raises as `run_on_all` does."""
        with ExitStack() as stack:
            self.run_on_main(lambda: bool(stack.enter_context(context())))
            yield

    def main_first(self, action: Callable[[], T]) -> T:
        """Run `action` in one process of each machine, then in its others, which find on disk what the first wrote."""
        first = self.run_on_all(lambda: action() if self.local_rank == 0 else None)
        others = self.run_on_all(lambda: None if self.local_rank == 0 else action())
        result: Any = first if self.local_rank == 0 else others
        return result

    def wait(self) -> None:
        """Return once every process has called this."""
        self.gather(None)

    def share(self, items: list[T]) -> list[T]:
        """Return this process's share of `items`: each item is in exactly one share, and a share is contiguous."""
        return items[slice(*self.bounds(len(items)))]

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the first of `count` items that is in this process's share, and the first after it."""
        first, last = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return first, last

    def device(self, name: str) -> str:
        """Return `name`, or the GPU of this process if `name` does not say which of several.

        That GPU is also what "cuda" means from then on, as NCCL needs it.
        """
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{self.local_rank % torch.cuda.device_count()}"
            torch.cuda.set_device(name)
        return name

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Raise as `explaining_loss` does."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self.explaining_loss():
            dist.all_gather_object(values, value)
        return values

    def of_main(self, value: T) -> T:
        """Return the value of the main process. Raise as `explaining_loss` does."""
        if self.count == 1:
            return value
        values = [value]
        with self.explaining_loss():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Return the greatest value over all processes of each of N numbers, exactly; NaN if one is NaN.

        It takes one reduction on the CPU: 0.4 ms for two processes of one machine. Raises as
        `explaining_loss` does.
        """
        if self.count == 1:
            return list(values)
        numbers = [(-math.inf, 1.0) if math.isnan(value) else (value, 0.0) for value in values]
        reduced = torch.tensor(numbers, dtype=torch.float64)  # (N, 2): gloo's maximum may lose a NaN, so beside it
        with self.explaining_loss():
            dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return [math.nan if is_nan else number for number, is_nan in reduced.tolist()]

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of each element of `tensor`, a new float64 tensor on its device.

        All processes get the same bits. One process alone returns `tensor` as it is. Raises as `explaining_loss` does.
        """
        if self.count == 1:
            return tensor
        total = tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        with self.explaining_loss():
            dist.all_reduce(total)
        return total

    @contextmanager
    def explaining_loss(self) -> Iterator[None]:
        """Turn what gloo and NCCL raise within `with` when another process is gone into an error that says so.

        Raises:
            InputError: a process is lost, and this is the first to notice it.
            OtherProcessError: another process says what went wrong.
        """
        try:
            yield
        except RuntimeError as error:
            if self._member is None or not is_loss(error):
                raise
            raise self._member.loss(error) from None


def _as_sent(error: Exception) -> Exception:
    """Return an error that says the same and can be sent to other processes, as an error of a library may not be."""
    if isinstance(error, InputError):
        return error
    return (FloatingPointError if isinstance(error, FloatingPointError) else ValueError)(str(error))


ALONE = ProcessGroup()
_open: ProcessGroup | None = None  # the group, while a `with` of `process_group` is entered


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that a launcher started together with this one, or this one alone.

    Within `with`, a further `with process_group()` yields the same group, and only the outermost ends it. Every process
    must call this equally often.

    Raises:
        InputError: the environment says too little about the others, or they are not there within half an hour.
    """
    global _open
    launch = read_launch() if _open is None else None
    if launch is None:
        yield _open or ALONE
        return
    with membership(launch) as member:
        _open = ProcessGroup(launch.rank, launch.count, launch.local_rank, _member=member)
        try:
            yield _open
        finally:
            _open = None
