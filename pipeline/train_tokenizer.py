"""Stage one: train a VQ-VAE on images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tokenizer import TokenizerConfig, build_model

from .checkpoint import CheckpointInfo
from .device import choose_device, compile_networks
from .errors import InputError
from .images import to_uint8
from .loop import LoopSettings, run_training
from .settings import RunFolder, claim_run, clear_run, recorded, saved_run, settle
from .sources import ImageSet, ImageSplit, open_images
from .tokenizer_stage import BaselineStage, stage_for

OPTIONS_OF_ONE_BOTTLENECK = {"num_codes": "vq", "codebook_update": "vq", "commitment_weight": "vq", "kl_weight": "vae"}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a user can choose about stage one; the rest of `TokenizerConfig` follows from the images."""

    data: str = "glyphs"
    data_root: str | None = None
    image_size: tuple[int, int] | None = None  # height, width; None takes the source's own
    channels: int | None = None  # 1 or 3; None takes the source's own
    steps: int = 1500
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0
    precision: str = "auto"
    optimizer: str = "muon"
    compile: bool = False
    num_codes: int = 512
    code_dim: int = 8
    downsample: int = 4
    hidden_channels: int = 128
    num_residual_layers: int = 4
    residual_channels: int = 32
    codebook_update: str = "ema"
    commitment_weight: float = 1.0  # above the paper's 0.25: the lower error and the higher perplexity
    bottleneck: str = "vq"
    kl_weight: float = 0.1


def train_tokenizer(run: RunFolder, given: Mapping[str, Any]) -> CheckpointInfo:
    """Train a tokenizer into `run.out`; `given` are fields of `TokenizerSettings`, None for the default.

    Raises:
        InputError: the images, a setting or the folder cannot be used, or a loss is not finite.
    """
    saved = saved_run(run, "tokenizer")
    settings = settle(TokenizerSettings, given, saved)
    _refuse_idle_options(settings.bottleneck, given)
    device = choose_device(run.device)
    images = open_images(
        settings.data,
        image_size=(settings.image_size[0], settings.image_size[1]) if settings.image_size else None,
        channels=settings.channels,
        data_root=settings.data_root,
        multiple_of=settings.downsample,
    )
    config = config_for(settings, images) if saved is None else TokenizerConfig(**saved.config)
    claim_run(run, saved)
    torch.manual_seed(settings.seed)
    model = build_model(config).to(device)
    if settings.compile:
        compile_networks(model.encoder, model.decoder)
    stage = stage_for(model, images.train)
    print(explanation(stage, images, config))
    info = CheckpointInfo(
        kind="tokenizer",
        config=asdict(config),
        step=0,
        class_names=list(images.class_names),
        preprocessing=asdict(images.preprocessing),
        training={**recorded(settings), "data": images.source, "data_root": images.data_root},
    )
    loop = LoopSettings.chosen(settings, device)
    clear_run(run, saved)
    return run_training(stage, info, loop, run.out, resume=saved is not None)


def _refuse_idle_options(bottleneck: str, given: Mapping[str, Any]) -> None:
    """Raise InputError for an option that this bottleneck has no use for."""
    idle = [
        name for name, user in OPTIONS_OF_ONE_BOTTLENECK.items() if given.get(name) is not None and user != bottleneck
    ]
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        raise InputError(
            expected=f"{option} with --bottleneck {OPTIONS_OF_ONE_BOTTLENECK[idle[0]]} only",
            got=f"--bottleneck {bottleneck}",
            do=f"leave {option} away",
        )


def explanation(stage: BaselineStage, images: ImageSet, config: TokenizerConfig) -> str:
    """What is about to happen, in words."""
    size = images.preprocessing
    height, width = stage.model.grid(size.height, size.width)
    labels = f", {len(images.class_names)} classes" if images.class_names else ""
    aside = f"{len(stage.held_out_rows):,} of them held out to check on"
    each = {
        "vq": f"codes, each one of {config.num_codes}",
        "vae": f"Gaussians of {config.code_dim} dimensions (a baseline: no codes, no prior)",
        "ae": f"vectors of {config.code_dim} dimensions (a baseline: no codes, no prior)",
    }[config.bottleneck]
    return (
        f"{len(images.train):,} images to learn from, {aside}{labels}\n"
        f"each image of {size.height}x{size.width}x{size.channels} becomes {height}x{width} {each}; "
        "nmse is the error of the way back (1 is a grey blur, 0 perfect)"
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
        commitment_weight=settings.commitment_weight,
        bottleneck=settings.bottleneck,  # type: ignore[arg-type]
        kl_weight=settings.kl_weight,
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
