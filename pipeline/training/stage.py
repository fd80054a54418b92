"""What the training loop needs of a stage: a model, its losses, and how good it is on held-out items."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Holds how good a model is on held-out items."""

    numbers: dict[str, float]  # by name, as they are logged
    score_name: str  # the one of `numbers` that is best when lowest
    summary: str = ""  # what the numbers mean, in words; empty for nothing
    code_histogram: Tensor | None = None  # [K] int64, uses of each code by the held-out items; None without codes

    def is_better_than(self, best: Mapping[str, float]) -> bool:
        """Return whether the score is lower than that of `best`, which holds the numbers of another evaluation.

        One without this score, as another version may have recorded, is worse than any.
        """
        return self.numbers[self.score_name] < best.get(self.score_name, math.inf)


@dataclass(frozen=True)
class Batch:
    """Holds the items of a step that one process computes at once: all, or its part, or a part of that."""

    indices: np.ndarray  # [B] int64 in [0,num_items)
    keys: Tensor  # [B] int64 on the CPU, what the random numbers of each item come from (`StepRandomness`)
    data: tuple[Tensor, ...]  # [B,...] each, what `Stage.load` returned, on the device

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, parts: int) -> list["Batch"]:
        """Return the batch in this many parts, of sizes that differ by one at most, in order."""
        bounds = [len(self) * part // parts for part in range(parts + 1)]
        slices = [slice(first, last) for first, last in itertools.pairwise(bounds)]
        return [
            Batch(self.indices[part], self.keys[part], tuple(tensor[part] for tensor in self.data)) for part in slices
        ]


class Stage(Protocol):
    """A model in training, the items it is trained on, and others that are held out.

    Where processes share a training, each has a stage, and all call these functions at the same time.
    """

    num_items: int  # training items; a batch is chosen from range(num_items)
    network: nn.Module  # what `losses` calls: the model or a part of it, which the loop may wrap
    compilable: tuple[nn.Module, ...]  # networks that torch may compile, in place

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""

    def weights_to_use(self) -> dict[str, Tensor]:
        """Return the weights of what `evaluate` measures, for model.safetensors."""

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Return what `losses` needs of items [B], on the CPU; a function of the indices, called from any thread."""

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Prepare a step of the optimizer over these batches, each of which is then given to `losses`."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalar losses, means over the items; "loss" is the one that is minimised."""

    def finish_step(self) -> None:
        """Learn what is not learned by gradients, once every loss of the step has been computed."""

    def discard_step(self) -> None:
        """Forget the losses since `begin_step`: the step is not taken."""

    def names(self, indices: np.ndarray) -> list[str]:
        """Return the names of the images behind items [B], for messages."""

    def status(self) -> dict[str, float]:
        """Return numbers about the steps since the last call, for the log and the progress bar."""

    def evaluate(self) -> Evaluation:
        """Measure the model on the held-out items."""

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        """Write a picture of what the model can do to the PNG `path`; `evaluation` is the one just made."""

    def state(self) -> dict[str, Tensor]:
        """Return what the numbers of the stage depend on besides the model, to be saved for a resume."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; entries that an older version did not save are missing.

        Raises:
            KeyError, ValueError: an entry is missing that every version saved, or is not one of this model.
        """
