"""Running a model over many images or code grids, so that the result does not depend on how the work is divided.

A convolution may round differently for another batch size or another number of threads, and an encoder output halfway
between two code vectors, or a pixel halfway between two values, may then round the other way. So the network only ever
sees BLOCK items at once (the last block is padded), each block on one thread, in float32. Blocks run in parallel, one
on each thread, which is also faster than all threads on one block. On a GPU they run one after the other, and the
threads only load.

`export-codes`, `evaluate` and `measure-rate` encode with these functions, so they see the same codes. Processes of a
group share the blocks (`blocks_of_all`), and get what one process gets.

Legend: n items, C channels, H' W' image, H W grid of codes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from prior.sampling import evaluating
from tokenizer import VQVAE, Baseline

from ..errors import InputError
from ..images.preprocessing import to_float, to_uint8
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import with_progress
from .shares import of_process

IN_MEMORY = "memory"  # where a model comes from that was not loaded from a folder
BLOCK = 64  # items; on two cores 64 gave 4,400 images of 32x32 a second, 32 gave 4,080 and 256 gave 4,030

Found = TypeVar("Found")
Load = Callable[[int, int], Tensor]  # (start, stop) -> items [stop - start,...]; called from several threads


def encode_images(tokenizer: VQVAE, images: Load, count: int, *, batch_size: int = BLOCK) -> Iterator[Tensor]:
    """Yield the codes of images 0 .. count - 1, int64 [n,H,W] on the CPU, batch by batch in order.

    Args:
        tokenizer: put into `eval()` mode for the duration.
        images: (start, stop) -> images [stop - start,C,H',W'] in [0,1]; called from several threads.
        count: of images.
        batch_size: images loaded at a time, rounded up to complete blocks; it changes nothing in the result.
    """
    return in_blocks(tokenizer, tokenizer.encode, images, count, batch_size=batch_size)


def decode_codes(tokenizer: VQVAE, codes: Load, count: int, *, folder: Path | str = IN_MEMORY) -> Iterator[Tensor]:
    """Yield the images of code grids 0 .. count - 1, uint8 [n,C,H',W'] on the CPU, batch by batch in order.

    They are bit for bit what `reconstruct_images` returns for the images that the codes came from.

    Args:
        tokenizer: put into `eval()` mode for the duration.
        codes: (start, stop) -> codes int64 [stop - start,H,W]; called from several threads.
        count: of grids.
        folder: where the decoder comes from, for the message.

    Raises:
        InputError: the decoder gives NaN or infinity.
    """
    return in_blocks(tokenizer, lambda block: _finite_uint8(tokenizer.decode(block), folder), codes, count)


def reconstruct_images(
    model: VQVAE | Baseline,
    images: Tensor,
    *,
    folder: Path | str = IN_MEMORY,
    progress: bool = False,
    group: ProcessGroup = ALONE,
) -> Tensor:
    """Return the reconstructions, uint8 [n,C,H',W'] on the CPU, of as many images [n,C,H',W'], uint8 or float in [0,1].

    The reconstruction of an image is the same to the bit, alone or among others.

    Args:
        model: put into `eval()` mode for the duration.
        images: on any device.
        folder: where the decoder comes from, for the message.
        progress: whether to show it.
        group: processes that share the work; each must call this, and gets all reconstructions.

    Raises:
        InputError: the decoder gives NaN or infinity.
    """

    def load(start: int, stop: int) -> Tensor:
        block = images[start:stop]  # of which floats take four times the memory
        return to_float(block) if block.dtype == torch.uint8 else block

    def decode(block: Tensor) -> tuple[Tensor, ...]:
        return (_finite_uint8(model.decode(model.encode(block)), folder),)

    found = run_in_blocks_of_all(model, decode, load, len(images), group, "reconstructing" if progress else None)
    reconstructed = [batch for (batch,) in found]
    return torch.cat([images.new_empty(0, *images.shape[1:], dtype=torch.uint8).cpu(), *reconstructed])


def in_blocks(
    model: nn.Module, compute: Callable[[Tensor], Tensor], load: Load, count: int, *, batch_size: int = BLOCK
) -> Iterator[Tensor]:
    """Yield what `compute` returns for items 0 .. count - 1, as `run_in_blocks` does, but for a single tensor."""
    for (result,) in run_in_blocks(model, lambda block: (compute(block),), load, count, batch_size=batch_size):
        yield result


def run_in_blocks(
    model: nn.Module,
    compute: Callable[[Tensor], tuple[Tensor, ...]],
    load: Load,
    count: int,
    *,
    batch_size: int = BLOCK,
    first: int = 0,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what `compute` returns for `count` items: its tensors for each batch, on the CPU, in order.

    Args:
        model: put into `eval()` mode for the duration.
        compute: [BLOCK,...] on the model's device -> tensors [BLOCK,...], each item independent of the others.
        load: (start, stop) -> items [stop - start,...]; called from several threads.
        count: of items.
        batch_size: items loaded at a time, rounded up to complete blocks; it changes nothing in the result.
        first: the number of the first item.
    """
    device, threads = next(model.parameters()).device, torch.get_num_threads()
    batch = -(-batch_size // BLOCK) * BLOCK
    one_at_a_time: AbstractContextManager[object] = nullcontext() if device.type == "cpu" else Lock()

    def run(start: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            items = load(start, min(start + batch, first + count)).to(device)
            with one_at_a_time:  # on a GPU, where the activations of a block for each thread would be too much memory
                results = [[tensor[: len(block)] for tensor in compute(_padded(block))] for block in items.split(BLOCK)]
            return tuple(torch.cat(tensors).cpu() for tensors in zip(*results, strict=True))

    waiting: deque[Future[tuple[Tensor, ...]]] = deque()
    # OpenMP's number of threads is a setting of each thread, and a new thread does not inherit it from its creator.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with evaluating(model), _exact():
        try:
            for start in range(first, first + count, batch):
                waiting.append(pool.submit(run, start))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # for threads that start from now on


def run_in_blocks_of_all(
    model: nn.Module,
    compute: Callable[[Tensor], tuple[Tensor, ...]],
    load: Load,
    count: int,
    group: ProcessGroup,
    description: str | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what `compute` returns for items 0 .. count - 1, as `run_in_blocks` does, in every process of the group.

    Each process computes a share of the blocks, and must call this; `description` is for the line of progress, if any.
    """

    def share(start: int, stop: int) -> Iterator[tuple[Tensor, ...]]:
        batches = run_in_blocks(model, compute, load, stop - start, first=start, batch_size=BLOCK)
        words = of_process(description or "", group)
        return with_progress(
            batches, stop - start, words, size=lambda batch: len(batch[0]), shown=description is not None
        )

    return blocks_of_all(share, count, group)


def blocks_of_all(share: Callable[[int, int], Iterable[Found]], count: int, group: ProcessGroup) -> Iterator[Found]:
    """Yield what `share(start, stop)` yields about items start .. stop - 1, for all `count` items and in order.

    Each process of the group must call this, and gets what all found. Its own share is some neighbouring blocks, or
    nothing, if there are fewer blocks than processes. One process alone gets what it finds at once.

    Raises:
        InputError: as `ProcessGroup.run_on_all` does, if `share` raises one.
    """
    if group.count == 1:
        yield from share(0, count)
        return
    starts = group.share(list(range(0, count, BLOCK)))
    own = range(starts[0], min(starts[-1] + BLOCK, count)) if starts else range(0)
    for found in group.gather(group.run_on_all(lambda: list(share(own.start, own.stop)))):
        yield from found


def _finite_uint8(decoded: Tensor, folder: Path | str) -> Tensor:
    """Return decoded images [n,C,H',W'] as uint8. Raise InputError for values that are no numbers."""
    if not bool(decoded.isfinite().all()):
        raise InputError(
            expected=f"finite pixels from the decoder in {folder}",
            got="NaN or infinity",
            do="restore the folder from a copy, or train it again",
        )
    return to_uint8(decoded)


def _padded(items: Tensor) -> Tensor:
    """Return items [n,...] as a complete block [BLOCK,...], padded with zeros."""
    missing = BLOCK - len(items)
    return items if missing == 0 else torch.cat([items, items.new_zeros(missing, *items.shape[1:])])


@contextmanager
def _exact() -> Iterator[None]:
    """Forbid TensorFloat-32 on a GPU, and choosing an algorithm by timing it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
