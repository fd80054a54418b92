"""Stage one as the training loop sees it: a model with codes, or a baseline without.

Legend: n images, B of them in a batch, C channels, H' W' image, H W grid of codes, D code dimension, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prior.uniforms import draw_uniforms
from tokenizer import VQVAE, Baseline

from ..evaluation.codebook_picture import codebook_picture
from ..evaluation.reconstruction import measure_reconstruction
from ..images.holdout import MOST_HELD_OUT, held_out, split_rows
from ..images.image_set import ImageSplit
from ..images.png import above_and_below, save_grid, save_png
from ..images.preprocessing import to_float, to_uint8
from ..images.rows import evenly_spaced
from ..models.tensor_file import check_outlines, outlines_of
from ..runtime.process_group import ALONE, ProcessGroup
from .stage import Batch, Evaluation

PREVIEW_IMAGES = 16  # in the picture of each evaluation
CHANGES_SEEN_IN = 256  # held-out images that tell how many codes changed


class BaselineStage:
    """An autoencoder without codes in training.

    It logs `loss`, what is minimised, per value of an image; `reconstruction`, squared error / data variance or, of a
    Bernoulli, nats per image; and `kl`, nats per image.

    Args:
        model: on the device to train on.
        images: the training split of an image set, of which some are held out.
        group: the processes that share the training.
        measured: held-out items to evaluate on, at most.
    """

    def __init__(
        self, model: Baseline, images: ImageSplit, group: ProcessGroup = ALONE, measured: int = MOST_HELD_OUT
    ) -> None:
        self.model, self.images, self.group = model, images, group
        self.network: nn.Module = model
        self.compilable: tuple[nn.Module, ...] = (model.encoder, model.decoder)
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out(images.names), measured)
        self.num_items = len(self.train_rows)

    def weights_to_use(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        return (self.images.batch_uint8(self.train_rows[indices]),)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        pass

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        images = to_float(batch.data[0])
        result = self.network(images, self._noise(batch.keys, images))
        return {"loss": result.loss, "reconstruction": result.reconstruction_loss, "kl": result.kl}

    def finish_step(self) -> None:
        pass

    def discard_step(self) -> None:
        pass

    def names(self, indices: np.ndarray) -> list[str]:
        return [self.images.names[row] for row in self.train_rows[indices]]

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> Evaluation:
        return evaluate_autoencoder(self.model, self.images, self.held_out_rows, self.group)

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        preview_reconstructions(self.model, self.images, self.held_out_rows, path)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    def _noise(self, keys: Tensor, images: Tensor) -> Tensor | None:
        """Return the samples of N(0,1) for images [B,C,H',W'] with keys [B], [B,D,H,W]; None if there are none."""
        config = self.model.config
        if config.bottleneck != "vae":
            return None
        shape = (config.code_dim, *self.model.grid(images.shape[2], images.shape[3]))
        uniforms = draw_uniforms(keys.tolist(), math.prod(shape))
        return standard_normal(uniforms).reshape(len(images), *shape).to(self.device, torch.float32)


class TokenizerStage:
    """A VQ-VAE in training; each evaluation says in words how its codebook is used.

    Args:
        model: on the device to train on.
        images: the training split of an image set, of which some are held out.
        group: the processes that share the training.
        measured: held-out items to evaluate on, at most.
    """

    def __init__(
        self, model: VQVAE, images: ImageSplit, group: ProcessGroup = ALONE, measured: int = MOST_HELD_OUT
    ) -> None:
        self.model, self.images, self.group = model, images, group
        self.network: nn.Module = model
        self.compilable: tuple[nn.Module, ...] = (model.encoder, model.decoder)
        model.quantizer.deferred = True  # until every loss of a step has been computed
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out(images.names), measured)
        self.num_items = len(self.train_rows)
        self.recent = torch.zeros(model.config.num_codes, dtype=torch.int64, device=self.device)  # [K] since `status`
        self.revived = torch.tensor(0)  # the quantizer's count at the last `status`
        self.codes: Tensor | None = None  # [n,H,W] of the first held-out images at the last evaluation

    def weights_to_use(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        return (self.images.batch_uint8(self.train_rows[indices]),)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Start the codebook on the images of the first step."""
        if not self.model.quantizer.started:
            with torch.no_grad():
                vectors = [self.model.encoder(to_float(batch.data[0])) for batch in batches]
            self.model.quantizer.start(torch.cat(vectors))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        result = self.network(to_float(batch.data[0]))
        self.recent += torch.bincount(result.codes.flatten(), minlength=len(self.recent))
        return {
            "loss": result.loss,
            "reconstruction": result.reconstruction_loss,
            "commitment": result.commitment_loss,
        }

    def finish_step(self) -> None:
        self.model.quantizer.update()

    def discard_step(self) -> None:
        self.model.quantizer.discard()

    def names(self, indices: np.ndarray) -> list[str]:
        return [self.images.names[row] for row in self.train_rows[indices]]

    def status(self) -> dict[str, float]:
        before, self.revived = self.revived, self.model.quantizer.revived.cpu().clone()
        used = int((self._recent_of_all() > 0).sum())
        self.recent.zero_()
        return {"codes_in_use": used, "revived": int(self.revived - before)}

    def evaluate(self) -> Evaluation:
        evaluation = evaluate_autoencoder(self.model, self.images, self.held_out_rows, self.group)
        return replace(evaluation, numbers=evaluation.numbers | {"codes_changed": self._share_of_changed_codes()})

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        preview_reconstructions(self.model, self.images, self.held_out_rows, path)
        assert evaluation.code_histogram is not None
        save_png(codebook_picture(self.model, evaluation.code_histogram), path.with_stem(f"{path.stem}-codebook"))

    def state(self) -> dict[str, Tensor]:
        codes = {} if self.codes is None else {"codes": self.codes}
        return {"recent": self._recent_of_all(), "revived": self.revived, **codes}

    def load_state(self, state: dict[str, Tensor]) -> None:
        counts = {"recent": state.get("recent", torch.zeros_like(self.recent)), "revived": state["revived"]}
        check_outlines(outlines_of({"recent": self.recent, "revived": self.revived}), outlines_of(counts))
        self.recent, self.revived = counts["recent"].to(self.device), counts["revived"]
        if not self.group.is_main:
            self.recent = torch.zeros_like(self.recent)  # they are counted once
        self.model.quantizer.discard()
        self.codes = state["codes"].to(self.device) if "codes" in state else None

    def _recent_of_all(self) -> Tensor:
        """Return how often each code was used since the last `status`, by all processes: int64 [K]."""
        return self.group.sums(self.recent).long()

    def _share_of_changed_codes(self) -> float:
        """Return the share of positions in some held-out images whose code has changed since the last evaluation."""
        images = self.images.batch(self.held_out_rows[:CHANGES_SEEN_IN]).to(self.device)
        before, self.codes = self.codes, self.model.encode(images)
        if before is None or before.shape != self.codes.shape:  # the first evaluation, or that of other images
            return 1.0
        return float((before != self.codes).float().mean())


def stage_for(
    model: VQVAE | Baseline, images: ImageSplit, group: ProcessGroup = ALONE, measured: int = MOST_HELD_OUT
) -> TokenizerStage | BaselineStage:
    """Return the stage that trains `model`."""
    if isinstance(model, VQVAE):
        return TokenizerStage(model, images, group, measured)
    return BaselineStage(model, images, group, measured)


def standard_normal(uniforms: Tensor) -> Tensor:
    """Return numbers distributed as N(0,1), of as many that are uniform on [0,1), in float64."""
    return torch.special.ndtri(uniforms.clamp_min(2.0**-54))


def evaluate_autoencoder(
    model: VQVAE | Baseline, images: ImageSplit, rows: np.ndarray | None = None, group: ProcessGroup = ALONE
) -> Evaluation:
    """Measure reconstruction, and the use of the codes if there are any, on the images at `rows`, by default all.

    The processes of the group share the work; each gets the same.
    """
    numbers, health = measure_reconstruction(model, images, rows, group=group)
    if health is None:
        return Evaluation(numbers=asdict(numbers), score_name="nmse")
    return Evaluation(
        numbers=asdict(numbers) | {"codes_used": health.codes_used, "perplexity": health.perplexity},
        score_name="nmse",
        summary=health.verdict,
        code_histogram=health.histogram,
    )


def preview_reconstructions(model: VQVAE | Baseline, split: ImageSplit, rows: np.ndarray, path: Path) -> None:
    """Write PREVIEW_IMAGES of the images at `rows`, evenly spaced, above their reconstructions."""
    shown = rows[evenly_spaced(len(rows), PREVIEW_IMAGES)]
    images = split.batch(shown).to(next(model.parameters()).device)
    reconstructed = model.decode(model.encode(images))
    columns = min(8, len(images))
    save_grid(above_and_below(to_uint8(images), to_uint8(reconstructed), columns=columns), path, columns=columns)
