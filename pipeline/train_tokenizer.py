"""Stage one: train a VQ-VAE on images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer import VQVAE, TokenizerConfig

from .checkpoint import CheckpointInfo
from .codebook_picture import codebook_picture
from .device import choose_device
from .evaluate import measure_with_histogram
from .health import codebook_health
from .images import to_uint8
from .loop import LoopSettings, run_training, split_rows
from .pictures import above_and_below, save_grid, save_png
from .settings import RunFolder, claim_run, clear_run, recorded, saved_run, settle
from .sources import ImageSet, ImageSplit, open_images
from .splits import held_out

PICTURES = 16  # images in the picture of reconstructions
CHANGES_SEEN_IN = 256  # held-out images that tell how many codes changed


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a user can choose about stage one; the rest of `TokenizerConfig` follows from the images."""

    data: str = "glyphs"
    data_root: str | None = None
    image_size: tuple[int, int] | None = None  # height, width; None takes the source's own
    channels: int | None = None  # 1 or 3; None takes the source's own
    steps: int = 1500
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    precision: str = "auto"
    num_codes: int = 512
    code_dim: int = 16
    downsample: int = 4
    hidden_channels: int = 128
    num_residual_layers: int = 2
    residual_channels: int = 32
    codebook_update: str = "ema"


class TokenizerStage:
    """The tokenizer, as the training loop sees it."""

    score = "nmse"

    def __init__(self, model: VQVAE, images: ImageSplit) -> None:
        self.model, self.images = model, images
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(held_out(images.names))
        self.num_items = len(self.train_rows)
        self.recent = torch.zeros(model.config.num_codes, dtype=torch.int64, device=self.device)  # uses since `status`
        self.use = torch.zeros_like(self.recent)  # uses by all held-out images
        self.revived = torch.tensor(0)  # the quantizer's count at the last `status`
        self.codes: Tensor | None = None  # of some held-out images at the last evaluation
        self.remark = ""

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        result = self.model(self.images.batch(self.train_rows[indices]).to(self.device))
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
        numbers, self.use = measure_with_histogram(self.model, self.images, self.held_out_rows)
        self.remark = codebook_health(self.use).verdict
        return asdict(numbers) | {"codes_changed": self._share_of_changed_codes()}

    def draw(self, path: Path) -> None:
        save_png(codebook_picture(self.model, self.use), path.with_stem(f"{path.stem}-codebook"))
        images = self.images.batch(self.held_out_rows[:PICTURES]).to(self.device)
        again = self.model.decode(self.model.encode(images))
        columns = min(8, len(images))
        save_grid(above_and_below(to_uint8(images), to_uint8(again), columns), path, columns=columns)

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


def train_tokenizer(run: RunFolder, given: Mapping[str, Any]) -> CheckpointInfo:
    """Train a tokenizer into `run.out`; `given` are fields of `TokenizerSettings`, None for the default.

    Raises:
        InputError: the images, a setting or the folder cannot be used, or a loss is not finite.
    """
    saved = saved_run(run, "tokenizer")
    settings = settle(TokenizerSettings, given, saved)
    device = choose_device(run.device)
    images = open_images(
        settings.data,
        image_size=(settings.image_size[0], settings.image_size[1]) if settings.image_size else None,
        channels=settings.channels,
        data_root=settings.data_root,
        multiple_of=settings.downsample,
    )
    claim_run(run, saved)
    torch.manual_seed(settings.seed)
    config = config_for(settings, images) if saved is None else TokenizerConfig(**saved.config)
    stage = TokenizerStage(VQVAE(config).to(device), images.train)
    print(explanation(stage, images, config))
    info = CheckpointInfo(
        kind="tokenizer",
        config=asdict(config),
        step=0,
        class_names=list(images.class_names),
        preprocessing=asdict(images.preprocessing),
        training={**recorded(settings), "data": images.source, "data_root": images.data_root},
    )
    loop = LoopSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.lr,
        seed=settings.seed,
        device=device,
        precision=settings.precision,
    )
    clear_run(run, saved)
    return run_training(stage, info, loop, run.out, resume=saved is not None)


def explanation(stage: TokenizerStage, images: ImageSet, config: TokenizerConfig) -> str:
    """What is about to happen, in words."""
    size = images.preprocessing
    height, width = stage.model.grid(size.height, size.width)
    labels = f", {len(images.class_names)} classes" if images.class_names else ""
    aside = f"{len(stage.held_out_rows):,} of them held out to check on"
    return (
        f"{len(images.train):,} images to learn from, {aside}{labels}\n"
        f"each image of {size.height}x{size.width}x{size.channels} becomes {height}x{width} codes, "
        f"each one of {config.num_codes}; nmse is the error of the way back (1 is a grey blur, 0 perfect)"
    )


def config_for(settings: TokenizerSettings, images: ImageSet) -> TokenizerConfig:
    """The configuration of the model: what was chosen, and what the training images say."""
    return TokenizerConfig(
        in_channels=images.preprocessing.channels,
        hidden_channels=settings.hidden_channels,
        num_residual_layers=settings.num_residual_layers,
        residual_channels=settings.residual_channels,
        downsample=settings.downsample,
        num_codes=settings.num_codes,
        code_dim=settings.code_dim,
        codebook_update=settings.codebook_update,  # type: ignore[arg-type]
        data_variance=pixel_variance(images.train),
    )


def pixel_variance(images: ImageSplit, at_once: int = 1024) -> float:
    """Variance of all values of all images, on [0,1], from their exact histogram."""
    histogram = np.zeros(256, dtype=np.int64)
    for start in range(0, len(images), at_once):
        rows = np.arange(start, min(start + at_once, len(images)))
        histogram += np.bincount(to_uint8(images.batch(rows)).numpy().ravel(), minlength=256)
    values = np.arange(256) / 255
    shares = histogram / histogram.sum()
    mean = float(shares @ values)
    return max(float(shares @ (values - mean) ** 2), 1e-6)  # images of one colour have no variance
