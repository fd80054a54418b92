"""What the processes that share a training do together in each step; one process alone does nothing of it.

Each takes a contiguous part of the batch of a step (`ProcessGroup.share`), and torch's DistributedDataParallel adds up
their gradients while they are computed. What one of them finds out (a loss that is not finite, a signal, that it is
time to save) holds for all from the same step on.
"""

import gc
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..codes.encoded_images import rows_sha256
from ..errors import InputError
from ..images.image_set import ImageSplit
from ..models.shares import check_same
from ..runtime.device import choose_device
from ..runtime.process_group import ProcessGroup
from .divergence import DivergedError
from .stage import Stage

# The quantizer keeps its buffers equal itself. The older of the two names is deprecated in torch 2.14.
PARAMETERS = signature(DistributedDataParallel.__init__).parameters
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers": False
}


@dataclass(frozen=True)
class Wishes:
    """What is wanted of a run after the step in progress."""

    signal: int = 0  # the number of the signal that asks to stop; 0 for none
    output_closed: bool = False  # nobody reads standard output any more
    save: bool = False  # it is time to save


class SharedSteps:
    """The processes of a training, as its loop sees them.

    Args:
        group: the processes.
        wishes: returns what is wanted in this process.
    """

    def __init__(self, group: ProcessGroup, wishes: Callable[[], Wishes]) -> None:
        self.group, self._wishes = group, wishes
        self._agreed = Wishes()

    @contextmanager
    def gradients_of(self, stage: Stage) -> Iterator[None]:
        """Let the gradients of the stage's network be added up over all processes, within `with`.

        Its weights and buffers become those of the main process.
        """
        network = stage.network
        if self.group.count > 1:
            device = next(network.parameters()).device
            devices = [device] if device.type == "cuda" else None
            stage.network = DistributedDataParallel(network, device_ids=devices, **OWN_BUFFERS)
        try:
            with warnings.catch_warnings():  # of a transposed convolution, whose gradient is laid out in another way
                warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
                yield
        finally:
            stage.network = network
            if self.group.count > 1:
                gc.collect()  # what was wrapped holds on to the process group, which ends before the program

    def backward(self, network: nn.Module, loss: Tensor, share: float, *, is_last: bool) -> None:
        """Add the gradients of part of a batch.

        Args:
            network: what the loss was computed with.
            loss: the mean over the items of the part.
            share: of the whole batch that the part is.
            is_last: whether it is the last part of this process, after which gradients are added up over all.
        """
        waits: AbstractContextManager[object] = nullcontext()
        if isinstance(network, DistributedDataParallel) and not is_last:
            waits = network.no_sync()
        with waits:
            (loss * (share * self.group.count)).backward()  # of which DistributedDataParallel takes the mean

    def agree(self, error: DivergedError | None) -> None:
        """Agree with the other processes on what is wanted.

        Raises:
            DivergedError: in every process, if one has an error; it is that of the first that has one.
        """
        if self.group.count > 1:
            wishes = self._wishes()
            flags = [float(error is not None), float(wishes.signal), float(wishes.output_closed), float(wishes.save)]
            failed, signal, closed, save = self.group.maxima(flags)
            self._agreed = Wishes(signal=int(signal), output_closed=bool(closed), save=bool(save))
            if failed:
                self._raise_first(error)
        elif error is not None:
            raise error

    def check(self, check: Callable[[], None]) -> None:
        """Call `check` in every process. Raise DivergedError in each, if it raises one in any."""
        found: DivergedError | None = None
        try:
            check()
        except DivergedError as error:
            found = error
        if self.group.maxima([float(found is not None)])[0]:
            self._raise_first(found)

    def wishes(self) -> Wishes:
        """Return what is wanted, the same in every process after the same step."""
        return self._wishes() if self.group.count == 1 else self._agreed

    def check_equal(self, stage: Stage, step: int) -> None:
        """Check that the weights and the codebook are the same in every process; costs their hash.

        Raises:
            InputError: in the main process, if they are not; in the others, OtherProcessError.
        """
        if self.group.count > 1:
            found = {f"weights and codebook after {step:,} steps": digest(stage.model)}
            check_same(self.group, found, "use the same devices and versions everywhere, and continue with --resume")

    def _raise_first(self, error: DivergedError | None) -> None:
        """Raise the error of the first process that has one."""
        raise next(each for each in self.group.gather(error) if each is not None)


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_batch_size(batch_size: int, accumulate: int, group: ProcessGroup) -> None:
    """Raise InputError unless every process has an item of every part of a batch."""
    least = group.count * accumulate
    if batch_size < least:
        parts = f"{group.count} processes" if accumulate == 1 else f"{group.count} x {accumulate} parts"
        raise InputError(
            expected=f"--batch-size of {least} or more, the items of all processes, for {parts}",
            got=f"{batch_size}",
            do="raise --batch-size, lower --accumulate, or start fewer processes",
        )


def images_digest(images: ImageSplit, group: ProcessGroup) -> str:
    """Return the SHA-256 of images, to compare; one process alone has nothing to compare, and gets ""."""
    return rows_sha256(images) if group.count > 1 else ""


def own_device(name: str, group: ProcessGroup) -> torch.device:
    """Return the device of this process. Raise InputError if there is none, or several processes would share a GPU."""
    device = choose_device(group.device(name))
    if device.type == "cuda" and group.local_rank >= torch.cuda.device_count():
        raise InputError(
            expected=f"at most {torch.cuda.device_count()} processes on this machine, one for each GPU",
            got=f"{group.local_rank + 1} or more",
            do="start fewer, or train on --device cpu",
        )
    return device
