"""Stage one as the training loop sees it: a model with codes, or a baseline without."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer import VQVAE, Baseline

from .codebook_picture import codebook_picture
from .evaluate import measure_reconstruction
from .images import to_uint8
from .pictures import above_and_below, save_grid, save_png
from .sources import ImageSplit
from .splits import held_out, split_rows

PICTURES = 16  # images in the picture of reconstructions
CHANGES_SEEN_IN = 256  # held-out images that tell how many codes changed


class BaselineStage:
    """An autoencoder without codes, and what it has in common with one that has them."""

    score = "nmse"
    remark = ""

    def __init__(self, model: VQVAE | Baseline, images: ImageSplit) -> None:
        self.model: VQVAE | Baseline = model
        self.images = images
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out(images.names))
        self.num_items = len(self.train_rows)

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        result = self.model(self.batch_of(indices))
        return {"loss": result.loss, "reconstruction": result.reconstruction_loss, "kl": result.kl}

    def batch_of(self, indices: np.ndarray) -> Tensor:
        """Training images [B,C,H',W'] on the model's device."""
        return self.images.batch(self.train_rows[indices]).to(self.device)

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> dict[str, float]:
        return asdict(measure_reconstruction(self.model, self.images, self.held_out_rows)[0])

    def draw(self, path: Path) -> None:
        images = self.images.batch(self.held_out_rows[:PICTURES]).to(self.device)
        again = self.model.decode(self.model.encode(images))
        columns = min(8, len(images))
        save_grid(above_and_below(to_uint8(images), to_uint8(again), columns), path, columns=columns)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class TokenizerStage(BaselineStage):
    """A VQ-VAE; with each evaluation goes a verdict on its codebook."""

    model: VQVAE

    def __init__(self, model: VQVAE, images: ImageSplit) -> None:
        super().__init__(model, images)
        self.recent = torch.zeros(model.config.num_codes, dtype=torch.int64, device=self.device)  # uses since `status`
        self.use = torch.zeros_like(self.recent)  # uses by all held-out images
        self.revived = torch.tensor(0)  # the quantizer's count at the last `status`
        self.codes: Tensor | None = None  # of some held-out images at the last evaluation

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        result = self.model(self.batch_of(indices))
        self.recent += torch.bincount(result.codes.flatten(), minlength=len(self.recent))
        return {
            "loss": result.loss,
            "reconstruction": result.reconstruction_loss,
            "commitment": result.commitment_loss,
        }

    def status(self) -> dict[str, float]:
        before, self.revived = self.revived, self.model.quantizer.revived.cpu().clone()
        used = int((self.recent > 0).sum())
        self.recent.zero_()
        return {"codes_in_use": used, "revived": int(self.revived - before)}

    def evaluate(self) -> dict[str, float]:
        return self.measure(self.images, self.held_out_rows) | {"codes_changed": self._share_of_changed_codes()}

    def measure(self, images: ImageSplit, rows: np.ndarray | None = None) -> dict[str, float]:
        """Numbers on images (those at `rows`), which the remark and the picture of the codebook then speak of."""
        numbers, health = measure_reconstruction(self.model, images, rows)
        assert health is not None
        self.use, self.remark = health.histogram, health.verdict
        return asdict(numbers) | {"codes_used": health.codes_used, "perplexity": health.perplexity}

    def draw(self, path: Path) -> None:
        super().draw(path)
        save_png(codebook_picture(self.model, self.use), path.with_stem(f"{path.stem}-codebook"))

    def _share_of_changed_codes(self) -> float:
        """The share of positions of some held-out images whose nearest code is another than at the last evaluation."""
        images = self.images.batch(self.held_out_rows[:CHANGES_SEEN_IN]).to(self.device)
        before, self.codes = self.codes, self.model.encode(images)
        return 1.0 if before is None else float((before != self.codes).float().mean())

    def state(self) -> dict[str, Tensor]:
        return {"revived": self.revived} | ({} if self.codes is None else {"codes": self.codes})

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.revived = state["revived"]
        self.codes = state["codes"].to(self.device) if "codes" in state else None


def stage_for(model: VQVAE | Baseline, images: ImageSplit) -> BaselineStage:
    """The stage that trains a model."""
    return TokenizerStage(model, images) if isinstance(model, VQVAE) else BaselineStage(model, images)
