"""Stage two as the training loop sees it: a prior over code grids.

Legend: N grids in all, n in a batch, H W positions in a grid.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prior import GatedPixelCNN, sample_codes
from prior.objective import cross_entropy, drop_labels
from prior.uniforms import draw_uniforms, seeded_generator
from tokenizer import VQVAE

from ..evaluation.likelihood import measure_prior
from ..evaluation.simple_predictors import (
    SimpleBits,
    SimplePredictors,
    share_explained,
    share_in_words,
    training_rows,
)
from ..generation.guidance import default_guidance
from ..images.holdout import MOST_HELD_OUT, split_rows
from ..images.png import save_grid
from ..images.preprocessing import to_uint8
from ..runtime.process_group import ALONE, ProcessGroup
from .stage import Batch, Evaluation

PREVIEW_SAMPLES = 32  # in the picture of each evaluation
EVALUATION_BATCH = 256  # grids

Preview = Callable[[Path], None]  # writes a picture of samples to this PNG


class Grids(Protocol):
    """Code grids with labels: a `CodeDataset`, or arrays with the same method."""

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the codes [n,H,W] and labels [n], both int64, of the rows `indices` [n]."""

    def names(self) -> Iterable[str]:
        """Return the names of the images, in the order of the rows."""


class PriorStage:
    """A prior in training, on grids of which some are held out.

    Args:
        model: on the device to train on.
        grids: codes, and labels where the model is conditioned on them.
        held_out_mask: bool [N], the grids that the prior is evaluated on.
        preview: writes samples; None where there is no tokenizer to decode them.
        group: the processes that share the training.
        measured: held-out items to evaluate on, at most.
    """

    def __init__(
        self,
        model: GatedPixelCNN,
        grids: Grids,
        held_out_mask: np.ndarray,
        preview: Preview | None = None,
        group: ProcessGroup = ALONE,
        measured: int = MOST_HELD_OUT,
    ) -> None:
        self.model, self.grids, self._preview, self.group = model, grids, preview, group
        self.network: nn.Module = model
        self.compilable: tuple[nn.Module, ...] = (model,)
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out_mask, measured)
        self.num_items = len(self.train_rows)

    def weights_to_use(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        return self.grids.batch(self.train_rows[indices])

    def begin_step(self, batches: Sequence[Batch]) -> None:
        pass

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        config, (codes, labels) = self.model.config, batch.data
        if config.label_dropout:
            uniforms = draw_uniforms(batch.keys.tolist(), 1)[:, 0]
            labels = drop_labels(labels, config.label_dropout, uniforms)
        logits = self.network(codes, labels if config.num_classes else None, batch.keys.to(self.device))
        loss = cross_entropy(logits, codes)
        return {"loss": loss, "bits_per_code": loss.detach() / math.log(2)}

    def finish_step(self) -> None:
        pass

    def discard_step(self) -> None:
        pass

    def names(self, indices: np.ndarray) -> list[str]:
        names = list(self.grids.names())
        return [names[row] for row in self.train_rows[indices]]

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> Evaluation:
        bits, simple = measure_prior(self.model, self._held_out_batches(), group=self.group), self.simple_bits
        numbers = {"bits_per_code": bits, "bits_share_explained": share_explained(bits, simple.histogram)}
        return Evaluation(numbers=numbers, score_name="bits_per_code", summary=share_in_words(bits, simple))

    @cached_property
    def simple_bits(self) -> SimpleBits:
        """What simple predictors, counted on training grids, reach on the held-out ones; a few seconds, once.

        The main process counts, for all, which ask for it at the same time.
        """
        return self.group.run_on_main(self._count_simple_bits)

    def _count_simple_bits(self) -> SimpleBits:
        """Fit simple predictors and measure them."""
        rows = self.train_rows[training_rows(self.num_items, self._codes_in_grid())]
        codes, labels = (tensor.numpy() for tensor in self.grids.batch(rows))
        config = self.model.config
        predictors = SimplePredictors.fit(codes, labels, config.num_codes, config.num_classes)
        return predictors.bits_of_batches((codes.numpy(), labels.numpy()) for codes, labels in self._held_out_batches())

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        if self._preview is not None:
            self._preview(path)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    def _codes_in_grid(self) -> int:
        """Return H W."""
        return self.grids.batch(self.train_rows[:1])[0].numel()

    def _held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the codes [n,H,W] and labels [n] of the held-out grids, EVALUATION_BATCH at a time."""
        for start in range(0, len(self.held_out_rows), EVALUATION_BATCH):
            yield self.grids.batch(self.held_out_rows[start : start + EVALUATION_BATCH])


def sample_preview(model: GatedPixelCNN, tokenizer: VQVAE, grid: tuple[int, int], seed: int) -> Preview:
    """Return a function that writes PREVIEW_SAMPLES decoded samples, of each class in turn, as one picture.

    They are drawn with the guidance of the command `sample` for a prior in training: what suits it is measured at the
    end. They start from the same random numbers each time, so that two pictures differ by the model alone.
    """

    def preview(path: Path) -> None:
        device = next(model.parameters()).device
        num_classes = model.config.num_classes
        labels = torch.arange(PREVIEW_SAMPLES, device=device) % num_classes if num_classes else None
        guidance = default_guidance(model.config)
        codes = sample_codes(
            model, PREVIEW_SAMPLES, grid, labels=labels, guidance=guidance, generator=seeded_generator(seed)
        )
        save_grid(to_uint8(tokenizer.decode(codes)), path, columns=8)

    return preview
