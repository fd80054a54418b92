"""The losses and gradients of a step, over the parts of its batch, in this process and in those that share the run.

Legend: B items in a batch of all processes, n in the part of this process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from ..runtime.device import autocast
from .divergence import DivergedError, Divergence
from .loop_settings import LoopSettings
from .prefetch import Prefetcher
from .schedule import DataOrder, StepRandomness
from .shared_steps import SharedSteps
from .stage import Batch, Stage
from .trial import without_a_trace


class StepGradients:
    """Computes the gradients of one step after the other.

    Args:
        stage: the model and its items.
        settings: of the run.
        shared: the processes that share it.
    """

    def __init__(self, stage: Stage, settings: LoopSettings, shared: SharedSteps) -> None:
        self.stage, self.settings, self.shared = stage, settings, shared
        self.own = slice(*shared.group.bounds(settings.batch_size))  # the part of this process
        self.order = self._new_order()
        self.randomness = StepRandomness(settings.seed, settings.batch_size)
        self.divergence = Divergence(stage, self.order, settings.learning_rate, settings.device)
        self._batches: Prefetcher | None = None

    @contextmanager
    def loading_from(self, step: int) -> Iterator[None]:
        """Load the batches of the coming steps, from this one on, before they are asked for, within `with`."""
        order = self._new_order()  # of another thread

        def load(step: int) -> tuple[Tensor, ...]:
            return self.stage.load(order.batch(step)[self.own])

        with Prefetcher(load, self.settings.device, first=step, last=self.settings.steps) as self._batches:
            self._rehearse(step)
            yield

    def seek(self, step: int) -> None:
        """Continue with this step."""
        if self._batches is not None:
            self._batches.seek(step)

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for their batches."""
        return 0.0 if self._batches is None else self._batches.waited

    def compute(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a step; return the losses of this process, each weighted by its share of the batch.

        Raises:
            DivergedError: a loss is not finite in some process, and the device is one where it costs nothing to know,
                or the model says so itself.
        """
        self.stage.model.train()
        self.randomness.begin(step)
        parts = self._batch(step).split(self.settings.accumulate)
        try:
            with self.shared.group.explaining_loss():
                self._begin_step(parts, step)
                found = [self._losses_of(part, step, is_last=part is parts[-1]) for part in parts]
        except DivergedError:
            self.stage.discard_step()
            raise
        return {name: torch.stack([losses[name] for losses in found]).sum() for name in found[0]}

    def _batch(self, step: int) -> Batch:
        """Return the part of this process of the batch of a step."""
        assert self._batches is not None
        indices = self.order.batch(step)[self.own]
        return Batch(indices, self.randomness.keys(step)[self.own], self._batches.get(step))

    def _begin_step(self, parts: list[Batch], step: int) -> None:
        """Let the stage prepare the step. Raise DivergedError if it finds what is not finite, in every process."""
        try:
            with autocast(self.settings.device, self.settings.precision):
                self.stage.begin_step(parts)
        except FloatingPointError as error:
            raise self.divergence.caught(error, step) from error

    def _losses_of(self, part: Batch, step: int, *, is_last: bool) -> dict[str, Tensor]:
        """Add the gradients of part of a batch; return its losses, weighted by its share of the batch."""
        share = len(part) / self.settings.batch_size
        error: DivergedError | None = None
        losses: dict[str, Tensor] = {}
        try:
            with autocast(self.settings.device, self.settings.precision):
                losses = self.stage.losses(part)
            self.divergence.note(losses, step)
            if self.settings.device.type == "cpu":  # elsewhere it would cost a sync in each step
                self.divergence.check(losses, step + 1)
        except DivergedError as found:
            error = found
        except FloatingPointError as found:  # of the model itself, such as the quantizer, before there is a loss
            error = self.divergence.caught(found, step)
        self.shared.agree(error)
        self.shared.backward(self.stage.network, losses["loss"], share, is_last=is_last)
        return {name: loss.detach() * share for name, loss in losses.items()}

    def _rehearse(self, step: int) -> None:
        """Where processes share the run, compute the gradients of the first step once in vain.

        After its first backward pass, DistributedDataParallel puts the gradients in the order in which they came, and
        sums are rounded by their place in it: without this, a resumed run would differ from one that never stopped.
        """
        if self.shared.group.count == 1 or step >= self.settings.steps:
            return
        with without_a_trace(self.stage), suppress(DivergedError):  # which the step itself will raise again
            self.compute(step)
        self.divergence.forget()
        self.seek(step)

    def _new_order(self) -> DataOrder:
        return DataOrder(self.stage.num_items, self.settings.batch_size, self.settings.seed)
