"""Running a network over many items so that what comes out does not depend on how the work is cut.

A convolution may round otherwise for another size of batch or another number of threads, and a code that lies between
two vectors, or a pixel between two values, may then fall to the other side. So the network only ever sees BLOCK items
at once (the last block is filled up), each block on one thread, in float32. Blocks run side by side, one a thread,
which is also faster than all threads on one block.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prior.sampling import evaluating

BLOCK = 64  # items; on two cores 64 gave 4,400 images of 32x32 a second, 32 gave 4,080 and 256 gave 4,030


def in_blocks(
    model: nn.Module,
    compute: Callable[[Tensor], Tensor],
    load: Callable[[int, int], Tensor],
    count: int,
    *,
    batch_size: int = BLOCK,
) -> Iterator[Tensor]:
    """What `compute` of `model` gives for items 0 .. count - 1: one tensor for each batch, on the CPU, in order.

    Args:
        model: put into `eval()` mode for the duration.
        compute: [BLOCK,...] on the model's device -> [BLOCK,...], each item by itself.
        load: (start, stop) -> items [stop - start,...]; called from several threads.
        count: of items.
        batch_size: items loaded at a time, in whole blocks; it changes nothing in the result.
    """
    device, threads = next(model.parameters()).device, torch.get_num_threads()
    batch = -(-batch_size // BLOCK) * BLOCK

    def run(start: int) -> Tensor:
        with torch.no_grad():
            items = load(start, min(start + batch, count)).to(device)
            parts = [compute(_filled(part))[: len(part)] for part in items.split(BLOCK)]
            return torch.cat(parts).cpu()

    waiting: deque[Future[Tensor]] = deque()
    # OpenMP counts threads for each of ours, and a new one begins with all: what the caller's has set is not passed on.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with evaluating(model), _exact():
        try:
            for start in range(0, count, batch):
                waiting.append(pool.submit(run, start))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # of threads that begin from now on


def _filled(items: Tensor) -> Tensor:
    """Items [n,...] as a whole block [BLOCK,...], with zeros after them."""
    missing = BLOCK - len(items)
    return items if missing == 0 else torch.cat([items, items.new_zeros(missing, *items.shape[1:])])


@contextmanager
def _exact() -> Iterator[None]:
    """No TensorFloat-32 on a GPU, and no choice of algorithm by the clock."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
