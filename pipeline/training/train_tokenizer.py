"""Stage one: train a VQ-VAE on images."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer import TokenizerConfig, build_model

from ..errors import InputError
from ..images.image_set import ImageSet, ImageSplit, open_images
from ..images.preprocessing import to_uint8
from ..models.checkpoint import CheckpointInfo, SavedRun
from ..models.loading import config_of_run
from ..models.shares import check_same
from ..runtime.console import say
from ..runtime.device import manual_seed
from ..runtime.folder_lock import only_writer
from ..runtime.process_group import ProcessGroup, process_group
from .loop import run_training
from .loop_settings import LoopSettings
from .recipes import TokenizerSettings
from .run_folder import (
    RunFolder,
    check_decoder_folder,
    check_run_folder,
    of_this_attempt,
    prepare_run_folder,
    remove_decoder,
    saved_run,
)
from .settings import recorded, resolve
from .shared_steps import check_batch_size, images_digest, own_device
from .split_summary import RECORDED, measured_items, split_summary
from .tokenizer_stage import BaselineStage, TokenizerStage, stage_for
from .trial import with_fastest_way

OPTIONS_OF_ONE_BOTTLENECK = {
    "num_codes": "vq",
    "codebook_update": "vq",
    "commitment_weight": "vq",
    "sharp": "vq",
    "likelihood": "vae",
    "kl_weight": "vae",
}
OF_OLD_RUNS = {"likelihood": "gaussian"}  # what runs had that were started before there was a choice


def train_tokenizer(run: RunFolder, overrides: Mapping[str, Any]) -> CheckpointInfo:
    """Train a tokenizer into `run.out`.

    Args:
        run: where to write.
        overrides: fields of `TokenizerSettings`; None, or a field that is missing, takes the default.

    Raises:
        InputError: the images, a setting or the folder cannot be used, another run writes into it, or a loss is not
            finite.
        ValueError: a setting is out of its range.
    """
    with process_group() as group, group.entered_by_main(lambda: only_writer(run.out, "training run")):
        return _train(group.run_on_main(lambda: of_this_attempt(run)), overrides, group)


def _train(run: RunFolder, overrides: Mapping[str, Any], group: ProcessGroup) -> CheckpointInfo:
    """Train, while nobody else writes into the folder."""
    saved = group.run_on_main(lambda: saved_run(run, "tokenizer"))
    settings, device = group.run_on_all(lambda: _settings(run, overrides, saved, group))
    group.run_on_main(lambda: _check_folders(run, saved, settings))
    images = group.main_first(lambda: _open_images(settings))
    check_same(group, {"images": images_digest(images.train, group)})
    config = group.run_on_all(lambda: config_for(settings, images) if saved is None else _config_of(run, saved, images))
    manual_seed(settings.seed)
    model = build_model(config).to(device)
    before = saved.info.training if saved else None
    measured = group.run_on_all(lambda: measured_items(settings.steps, settings.batch_size, before))
    stage = stage_for(model, images.train, group, measured)
    group.run_on_main(lambda: _prepare_folder(run, saved))
    say(*explanation(stage, images, run.out))
    settings = with_fastest_way(stage, settings, group, is_new=saved is None)
    loop = LoopSettings.from_settings(settings, device)
    return run_training(stage, _info(settings, config, images, measured), loop, run.out, resume=saved, group=group)


def _settings(
    run: RunFolder, overrides: Mapping[str, Any], saved: SavedRun | None, group: ProcessGroup
) -> tuple[TokenizerSettings, torch.device]:
    """Return the settings of the run and the device of this process. Raises before images are prepared."""
    settings = resolve(TokenizerSettings, overrides, OF_OLD_RUNS | saved.info.training if saved else None)
    _refuse_idle_options(settings.bottleneck, overrides)
    _config(settings, in_channels=1, data_variance=1.0)  # refuses impossible settings
    check_batch_size(settings.batch_size, settings.accumulate, group)
    return settings, own_device(run.device, group)


def _check_folders(run: RunFolder, saved: SavedRun | None, settings: TokenizerSettings) -> None:
    """Raise InputError unless the run may write where it will."""
    check_run_folder(run, saved)
    if settings.sharp:
        check_decoder_folder(run)


def _prepare_folder(run: RunFolder, saved: SavedRun | None) -> None:
    """Make the folder, and remove what an older run logged there and what was trained for its codes."""
    prepare_run_folder(run, saved)
    if saved is None:
        remove_decoder(run.out)


def _refuse_idle_options(bottleneck: str, overrides: Mapping[str, Any]) -> None:
    """Raise InputError for an option that would do nothing with this bottleneck."""
    for name, user in OPTIONS_OF_ONE_BOTTLENECK.items():
        if overrides.get(name) is not None and user != bottleneck:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                expected=f"{option} with --bottleneck {user} only",
                got=f"--bottleneck {bottleneck}",
                do=f"omit {option}",
            )


def _open_images(settings: TokenizerSettings) -> ImageSet:
    """Return the images that the settings name, sized for the network."""
    return open_images(
        settings.data,
        image_size=(settings.image_size[0], settings.image_size[1]) if settings.image_size else None,
        channels=settings.channels,
        data_root=settings.data_root,
        multiple_of=settings.downsample,
    )


def _config_of(run: RunFolder, saved: SavedRun, images: ImageSet) -> TokenizerConfig:
    """Return the configuration of the model of the run to resume. Raise InputError if it takes other images."""
    config = config_of_run(saved, run.out, TokenizerConfig, build_model)
    before, now = (
        "{height}x{width}x{channels}".format(**form)
        for form in (saved.info.preprocessing, asdict(images.preprocessing))
    )
    if before != now:
        raise InputError(
            expected=f"images of {before} in {images.source}, as the run in {run.out} was started with",
            got=f"images of {now}",
            do="name the images it was started with, or train a new tokenizer with another --out",
        )
    return config


def _info(settings: TokenizerSettings, config: TokenizerConfig, images: ImageSet, measured: int) -> CheckpointInfo:
    """Return what `config.json` says before the first step."""
    return CheckpointInfo(
        kind="tokenizer",
        config=asdict(config),
        step=0,
        class_names=list(images.class_names),
        preprocessing=asdict(images.preprocessing),
        training={
            **recorded(settings),
            "data": images.source,
            "data_root": images.data_root,
            RECORDED: measured,
        },
    )


def explanation(stage: TokenizerStage | BaselineStage, images: ImageSet, out: Path) -> list[str]:
    """Return what the run is about to do, in lines of words."""
    size, config = images.preprocessing, stage.model.config
    height, width = stage.model.grid(size.height, size.width)
    source = "the built-in glyphs" if images.source == "glyphs" else images.source
    split = split_summary(
        "image",
        to_learn=len(stage.train_rows),
        held_out=len(images.train) - len(stage.train_rows),
        measured=len(stage.held_out_rows),
        test=len(images.test),
        broken=len(images.broken),
    )
    classes = f"; {len(images.class_names):,} classes" if images.class_names else ""
    latents = {
        "vq": f"codes, each one of {config.num_codes}",
        "vae": f"Gaussians of {config.code_dim} dimensions (a baseline: no codes, no prior)",
        "ae": f"vectors of {config.code_dim} dimensions (a baseline: no codes, no prior)",
    }[config.bottleneck]
    units = "reconstruction and kl are nats per image (the loss: a value); " if config.likelihood == "bernoulli" else ""
    return [
        f"stage one: a tokenizer for {source}, into {out}",
        f"{split}{classes}",
        f"each image of {size.height}x{size.width}x{size.channels} becomes {height}x{width} {latents}; "
        f"{units}nmse is the error of the way back (1 is a grey blur, 0 perfect)",
    ]


def config_for(settings: TokenizerSettings, images: ImageSet) -> TokenizerConfig:
    """Return the configuration of the model, from the settings and from what the training images are."""
    return _config(settings, in_channels=images.preprocessing.channels, data_variance=pixel_variance(images.train))


def _config(settings: TokenizerSettings, *, in_channels: int, data_variance: float) -> TokenizerConfig:
    """Return the configuration of the model. Raise ValueError if the settings are of no network."""
    return TokenizerConfig(
        in_channels=in_channels,
        hidden_channels=settings.hidden_channels,
        num_residual_layers=settings.num_residual_layers,
        residual_channels=settings.residual_channels,
        downsample=settings.downsample,
        num_codes=settings.num_codes,
        code_dim=settings.code_dim,
        codebook_update=settings.codebook_update,  # type: ignore[arg-type]
        commitment_weight=settings.commitment_weight,
        bottleneck=settings.bottleneck,  # type: ignore[arg-type]
        likelihood=settings.likelihood,  # type: ignore[arg-type]
        kl_weight=settings.kl_weight,
        data_variance=data_variance,
    )


def pixel_variance(images: ImageSplit, at_once: int = 1024) -> float:
    """Return the variance of all values of all images, on [0,1], from their exact histogram."""
    histogram = np.zeros(256, dtype=np.int64)
    for start in range(0, len(images), at_once):
        rows = np.arange(start, min(start + at_once, len(images)))
        histogram += np.bincount(to_uint8(images.batch(rows)).numpy().ravel(), minlength=256)
    values = np.arange(256) / 255
    shares = histogram / histogram.sum()
    mean = float(shares @ values)
    return max(float(shares @ (values - mean) ** 2), 1e-6)  # images of one colour have no variance
