"""What the training loop needs of a stage: a model, its losses, and how good it is on held-out items."""

import math
from collections.abc import Mapping
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


class Stage(Protocol):
    """A model in training, the items it is trained on, and others that are held out."""

    num_items: int  # training items; a batch is chosen from range(num_items)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""

    def weights_to_use(self) -> dict[str, Tensor]:
        """Return the weights of what `evaluate` measures, for model.safetensors."""

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the scalar losses of a batch of items [B]; "loss" is the one that is minimised."""

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
