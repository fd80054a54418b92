"""Noticing losses, scores and states that are not finite, and saying in which step and which batch it began."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..models.tensor_file import not_finite
from .schedule import DataOrder
from .stage import Stage

NAMED = 5  # images of a batch that a message names


class DivergedError(InputError):
    """Says that a loss, a score or the state to save is not finite."""


class Divergence:
    """Watches the numbers of a run.

    Args:
        stage: knows the names of the images.
        order: knows the batch of a step.
        learning_rate: for the message.
        device: of the losses.
    """

    def __init__(self, stage: Stage, order: DataOrder, learning_rate: float, device: torch.device) -> None:
        self.stage, self.order, self.learning_rate = stage, order, learning_rate
        self.kept = "nothing was saved yet"  # what is left of the run, for the message
        self._first_bad = torch.tensor(-1, device=device)  # the first step, from 0, whose losses were not finite

    def note(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Note the step, counted from 0, if its losses are the first that are not finite; no CPU-GPU sync."""
        total = torch.stack([loss.detach().float() for loss in losses.values()]).sum()
        self._first_bad = torch.where((self._first_bad < 0) & ~total.isfinite(), step, self._first_bad)

    def check(self, numbers: Mapping[str, Tensor | float], step: int) -> None:
        """Raise DivergedError if a number is NaN or infinite after `step` steps; a CPU-GPU sync for each."""
        for name, number in numbers.items():
            value = torch.as_tensor(number)
            if not bool(value.isfinite()):
                raise self._error("finite losses", f"{name} = {value.item()}", step)

    def check_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Raise DivergedError if a tensor holds NaN or infinity after `step` steps; a CPU-GPU sync for each."""
        wrong = not_finite(tensors)
        if wrong is not None:
            raise self._error("a finite state to save", wrong, step)

    def caught(self, error: FloatingPointError, step: int) -> DivergedError:
        """Return the error for one that the model raised in the batch of a step, counted from 0."""
        self._first_bad.fill_(step)
        return self._error("finite losses", str(error).partition("; ")[0], step)

    def forget(self) -> None:
        """Begin anew, after a return to a good state."""
        self._first_bad.fill_(-1)

    def _error(self, expected: str, got: str, step: int) -> DivergedError:
        """Return the error; it says where it began and which state is kept."""
        bad = int(self._first_bad)
        place = f"step {step:,}" if bad < 0 else f"step {bad + 1:,}, in the batch of {self._names_of(bad)}"
        return DivergedError(
            expected=expected, got=f"{got} at {place}", do=f"lower --lr (now {self.learning_rate:g}); {self.kept}"
        )

    def _names_of(self, step: int) -> str:
        """Return the names of the first images in the batch of a step, counted from 0, and how many more there are."""
        names = self.stage.names(self.order.batch(step))
        others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + others
