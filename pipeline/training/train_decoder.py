"""A sharp decoder for the codes of a tokenizer, trained after it into the folder `decoder` inside the tokenizer's.

Encoder and codebook do not change, so code data sets and priors stay valid, and the plain decoder stays where it is.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..images.image_set import ImageSet
from ..models.checkpoint import (
    CheckpointInfo,
    DamagedError,
    SavedRun,
    check_same_tokenizer,
    copy_checkpoint,
    has_checkpoint,
    read_info,
)
from ..models.decoders import decoder_folder
from ..models.loading import TrainedTokenizer, images_of, load_trained_tokenizer
from ..models.shares import check_same
from ..runtime.console import say
from ..runtime.device import manual_seed
from ..runtime.folder_lock import only_writer
from ..runtime.output_paths import check_output_folder
from ..runtime.process_group import ProcessGroup, process_group
from .decoder_stage import DecoderStage
from .loop import run_training
from .loop_settings import LoopSettings
from .recipes import SHARPENING_SHARE, DecoderSettings
from .run_folder import RunFolder, check_run_folder, of_this_attempt, prepare_run_folder, saved_run
from .settings import recorded, resolve
from .shared_steps import check_batch_size, images_digest, own_device
from .split_summary import RECORDED, measured_items, split_summary
from .trial import with_fastest_way


def train_decoder(run: RunFolder, overrides: Mapping[str, Any], tokenizer_folder: Path) -> CheckpointInfo:
    """Train a sharp decoder for the tokenizer in `tokenizer_folder`.

    Args:
        run: where to write: the tokenizer's own folder, or another, which becomes a copy of the tokenizer first.
        overrides: fields of `DecoderSettings`; None, or a field that is missing, takes the default.
        tokenizer_folder: what train-tokenizer wrote; if it is `run.out`, nothing but its folder `decoder` changes.

    Returns:
        The info of the decoder's checkpoint; its step is 0, and its weights are those of the plain decoder, if no
        evaluation was better than that.

    Raises:
        InputError: the tokenizer, the images, a setting or the folder cannot be used, another run writes into it, or a
            loss is not finite for the second time, which leaves the best decoder so far.
        ValueError: a setting is out of its range.
    """
    with process_group() as group, group.entered_by_main(lambda: only_writer(run.out, "training run")):
        return _train(run, overrides, tokenizer_folder, group)


def sharpen(run: RunFolder, tokenizer: CheckpointInfo, overrides: Mapping[str, Any]) -> CheckpointInfo:
    """Train a sharp decoder for the tokenizer that was trained into `run.out` with `sharp`: its last phase.

    A decoder that was begun for these weights is resumed; one for earlier weights is replaced.

    Args:
        run: the folder of the tokenizer.
        tokenizer: its info, with the settings that hold for the decoder, too.
        overrides: those of these settings that the user chose now: a run that was done before did not record them.

    Raises:
        InputError, ValueError: as `train_decoder`.
    """
    with process_group() as group:
        fingerprint = group.run_on_main(lambda: _begun_for(decoder_folder(run.out)))
    changeable, fixed = ("data_root", "precision"), ("batch_size", "seed", "optimizer")
    chosen = changeable if fingerprint == tokenizer.fingerprint else (*changeable, *fixed)
    settings = tokenizer.training | {name: value for name, value in overrides.items() if value is not None}
    shared = {name: settings.get(name) for name in chosen} | {"steps": default_steps(tokenizer)}
    resumes = fingerprint in (None, tokenizer.fingerprint)
    return train_decoder(replace(run, resume=resumes, force=not resumes), shared, run.out)


def default_steps(tokenizer: CheckpointInfo) -> int:
    """Return the steps of a decoder's training: a share of those behind the tokenizer."""
    return max(1, round(SHARPENING_SHARE * tokenizer.step))


def _train(run: RunFolder, overrides: Mapping[str, Any], tokenizer_folder: Path, group: ProcessGroup) -> CheckpointInfo:
    """Train, while nobody else writes into the folder."""
    decoder_run = replace(run, out=decoder_folder(run.out))
    decoder_run = group.run_on_main(lambda: of_this_attempt(decoder_run))
    saved = group.run_on_main(lambda: saved_run(decoder_run, "decoder"))
    settings, device = group.run_on_all(lambda: _settings(run, overrides, saved, group))
    tokenizer = group.run_on_all(lambda: load_trained_tokenizer(tokenizer_folder, device, decoder="plain"))
    group.run_on_main(lambda: _check_folders(run, decoder_run, saved, tokenizer))
    images = group.main_first(lambda: images_of(tokenizer.info, data=settings.data, data_root=settings.data_root))
    check_same(group, {"images": images_digest(images.train, group)})
    manual_seed(settings.seed)
    steps = settings.steps or default_steps(tokenizer.info)
    settings = replace(settings, steps=steps, data=images.source)
    before = saved.info.training if saved else None
    measured = group.run_on_all(lambda: measured_items(steps, settings.batch_size, before))
    stage = DecoderStage(tokenizer.model, images.train, group, measured)
    group.run_on_main(lambda: _prepare_folders(run, decoder_run, saved, tokenizer))
    say(*_explanation(stage, images, tokenizer_folder, decoder_run.out))
    settings = with_fastest_way(stage, settings, group, is_new=saved is None)
    loop = LoopSettings.from_settings(settings, device, decays=False, keep_best=True, evaluate_first=True)
    return run_training(
        stage, _info(settings, tokenizer, images, measured), loop, decoder_run.out, resume=saved, group=group
    )


def _settings(
    run: RunFolder, overrides: Mapping[str, Any], saved: SavedRun | None, group: ProcessGroup
) -> tuple[DecoderSettings, torch.device]:
    """Return the settings of the run and the device of this process."""
    settings = resolve(DecoderSettings, overrides, None if saved is None else saved.info.training)
    check_batch_size(settings.batch_size, settings.accumulate, group)
    return settings, own_device(run.device, group)


def _check_folders(run: RunFolder, decoder_run: RunFolder, saved: SavedRun | None, tokenizer: TrainedTokenizer) -> None:
    """Raise InputError unless the run may write where it will."""
    _check_place(run, tokenizer)
    if saved is not None:
        _check_resumable(saved, tokenizer, decoder_run.out)
    check_run_folder(decoder_run, saved)


def _prepare_folders(
    run: RunFolder, decoder_run: RunFolder, saved: SavedRun | None, tokenizer: TrainedTokenizer
) -> None:
    """Make the folders of the run; a folder other than the tokenizer's becomes a copy of it."""
    if not _is_same_folder(run.out, tokenizer.folder):
        copy_checkpoint(tokenizer.folder, run.out, "tokenizer", tokenizer.info.fingerprint)
    prepare_run_folder(decoder_run, saved)


def _check_place(run: RunFolder, tokenizer: TrainedTokenizer) -> None:
    """Raise InputError unless `run.out` is the tokenizer's folder, holds a copy of it, or may become one."""
    if _is_same_folder(run.out, tokenizer.folder):
        return
    if not has_checkpoint(run.out):
        check_output_folder(run.out, force=run.force)
        return
    found = read_info(run.out, "tokenizer").fingerprint
    check_same_tokenizer(tokenizer.info.fingerprint, found, f"a copy of it in --out {run.out}", "name another --out")


def _check_resumable(saved: SavedRun, tokenizer: TrainedTokenizer, folder: Path) -> None:
    """Raise InputError unless the decoder in `folder` was trained for the tokenizer's codes."""
    expected, found = tokenizer.info.fingerprint, saved.info.tokenizer_fingerprint
    check_same_tokenizer(expected, found, f"a decoder in {folder}", "train another with --force")


def _is_same_folder(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _begun_for(folder: Path) -> str | None:
    """Return the fingerprint of the tokenizer whose sharp decoder was begun in `folder`; None if none was saved there.

    Of one that is damaged it is "", that of no tokenizer.
    """
    try:
        saved = saved_run(RunFolder(out=folder, resume=True), "decoder")
    except DamagedError:
        return ""
    return None if saved is None else saved.info.tokenizer_fingerprint


def _info(settings: DecoderSettings, tokenizer: TrainedTokenizer, images: ImageSet, measured: int) -> CheckpointInfo:
    """Return what `config.json` says before the first step."""
    return CheckpointInfo(
        kind="decoder",
        config=asdict(tokenizer.model.config),
        step=0,
        class_names=tokenizer.info.class_names,
        preprocessing=tokenizer.info.preprocessing,
        training={**recorded(settings), "data_root": images.data_root, RECORDED: measured},
        tokenizer_fingerprint=tokenizer.info.fingerprint,
    )


def _explanation(stage: DecoderStage, images: ImageSet, tokenizer_folder: Path, out: Path) -> list[str]:
    """Return what the run is about to do, in lines of words."""
    split = split_summary(
        "image",
        to_learn=len(stage.train_rows),
        held_out=len(images.train) - len(stage.train_rows),
        measured=len(stage.distance.rows),
    )
    return [
        f"a sharper decoder for the codes of the tokenizer in {tokenizer_folder}, into {out}",
        f"{split}; the codes do not change, so priors and exported codes stay valid",
        "distance is how far decoded images are from real ones in the encoder's features; what a decoder adds to come "
        "near them it invents, so nmse rises a little",
    ]
