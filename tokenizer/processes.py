"""What the processes of a distributed training have to agree on about a codebook; one process alone agrees with itself.

Every process holds the whole codebook and a part of each batch. Here the parts are taken together: by sums in float64,
and by vectors that are chosen as if one process had held the whole batch, in the order of the ranks.

Legend: n vectors of this process, N of all processes, D code dimension.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

WIDEST = {"mps": torch.float32}  # the type of sums where a device has no float64


def count_of_processes() -> int:
    """Return how many processes train together, those of torch's default process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the type of sums: float64, where the device has it."""
    return tensor.to(WIDEST.get(tensor.device.type, torch.float64))


def sum_of_all(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, by elements, in the type of the tensor."""
    if count_of_processes() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def of_first_process(tensor: Tensor) -> Tensor:
    """Return the tensor of the first process, in place of that of this one; it is changed in place."""
    if count_of_processes() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


@dataclass(frozen=True)
class Spread:
    """How all vectors of a batch, of all processes, are spread."""

    count: int  # N
    deviation: float  # of all their values
    largest: float  # absolute value

    @classmethod
    def of(cls, vectors: Tensor) -> "Spread":
        """Measure vectors [n,D]; NaN or infinity in any process is so in the result of each."""
        values = widened(vectors)
        largest = values.abs().amax() if len(values) else values.new_zeros(())
        moments = [values.new_tensor(values.numel()), values.sum(), values.square().sum()]
        number, total, squares = sum_of_all(torch.stack(moments)).tolist()
        highest = float(torch.cat(_gathered(largest[None])).amax())
        variance = squares / number - (total / number) ** 2
        return cls(count=int(number) // vectors.shape[1], deviation=max(variance, 0.0) ** 0.5, largest=highest)


def draw_distinct(vectors: Tensor, count: int, eligible: Tensor | None = None) -> Tensor:
    """Return up to `count` different vectors [m,D] of all processes at random, the same in each.

    Rows are drawn one after the other, and one whose vector is there already is left out: a picture's background gives
    the same vector many times over.
    The choice depends on the vectors and on torch's generator of the first process, not on how they are divided.

    Args:
        vectors: [n,D] of this process.
        count: how many to draw.
        eligible: bool [n], those that may be drawn; by default all.
    """
    start, total = _place_among_all(len(vectors), vectors.device)
    order = of_first_process(torch.randperm(total, device=vectors.device))[start : start + len(vectors)]
    candidate = order < max(16 * count, 4096)  # of a large batch, a part that is easily sorted
    if eligible is not None:
        candidate &= eligible
    vectors, order = _first_distinct(vectors[candidate], order[candidate], count)
    return _first_distinct(torch.cat(_gathered(vectors)), torch.cat(_gathered(order)), count)[0]


def _first_distinct(vectors: Tensor, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` different ones of vectors [m,D] by their numbers in `order` [m], with the numbers."""
    if len(vectors) == 0:
        return vectors, order
    distinct, inverse = torch.unique(vectors, dim=0, return_inverse=True)
    first = order.new_full((len(distinct),), torch.iinfo(order.dtype).max)
    numbers, places = first.scatter_reduce(0, inverse, order, "amin").sort()
    return distinct[places[:count]], numbers[:count]


def _gathered(tensor: Tensor) -> list[Tensor]:
    """Return the tensors [m,...] of all processes, by rank; each may have another m."""
    count = count_of_processes()
    if count == 1:
        return [tensor]
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(count)]
    dist.all_gather(sizes, size)
    longest = int(torch.cat(sizes).max())
    padded = F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, longest - len(tensor)]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return [part[: int(length)] for part, length in zip(parts, sizes, strict=True)]


def _place_among_all(count: int, device: torch.device) -> tuple[int, int]:
    """Return how many items come before the `count` of this process, in the order of the ranks, and how many there are.

    Args:
        count: items of this process.
        device: of the tensors that the processes exchange.
    """
    if count_of_processes() == 1:
        return 0, count
    sizes = torch.cat(_gathered(torch.tensor([count], device=device))).tolist()
    return sum(sizes[: dist.get_rank()]), sum(sizes)
