"""Stage two: train a gated PixelCNN on code grids."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from prior import GatedPixelCNN, PriorConfig

from ..codes.dataset import CodeDataset
from ..codes.export import export_codes
from ..codes.made_by import check_made_by
from ..codes.manifest import MANIFEST, CodeManifest, read_manifest
from ..errors import InputError
from ..evaluation.simple_predictors import in_words
from ..generation.chosen_guidance import choose_guidance
from ..generation.guidance import MEASURED
from ..images.holdout import held_out
from ..models.checkpoint import CONFIG, CheckpointInfo, SavedRun, add_metrics, check_same_tokenizer
from ..models.labels import all_labelled
from ..models.loading import TrainedTokenizer, config_of_run, load_prior, load_trained_tokenizer
from ..models.shares import check_same
from ..runtime.atomic_files import sha256
from ..runtime.console import say
from ..runtime.device import manual_seed
from ..runtime.folder_lock import only_writer
from ..runtime.process_group import ProcessGroup, process_group
from ..runtime.schema import short
from .loop import run_training
from .loop_settings import LoopSettings
from .prior_stage import PriorStage, sample_preview
from .recipes import ATTENTION_EVERY, FIRST_KERNEL, LABEL_DROPOUT, MOST_ATTENDED, MOST_CODES, PriorSettings
from .run_folder import CODES, RunFolder, check_run_folder, of_this_attempt, prepare_run_folder, saved_run
from .settings import recorded, resolve
from .shared_steps import check_batch_size, own_device
from .split_summary import RECORDED, measured_items, split_summary
from .trial import with_fastest_way


def train_prior(run: RunFolder, overrides: Mapping[str, Any], default_tokenizer: Path) -> CheckpointInfo:
    """Train a prior into `run.out`.

    Args:
        run: where to write.
        overrides: fields of `PriorSettings`; None, or a field that is missing, takes the default.
        default_tokenizer: the tokenizer if none is named and one is needed. If none is needed, it decodes the preview
            pictures, provided that it made the codes.

    Raises:
        InputError: the codes, the tokenizer, a setting or the folder cannot be used, another run writes into it, or a
            loss is not finite.
        ValueError: a setting is out of its range.
    """
    with process_group() as group, group.entered_by_main(lambda: only_writer(run.out, "training run")):
        return _train(group.run_on_main(lambda: of_this_attempt(run)), overrides, default_tokenizer, group)


def _train(
    run: RunFolder, overrides: Mapping[str, Any], default_tokenizer: Path, group: ProcessGroup
) -> CheckpointInfo:
    """Train, while nobody else writes into the folder."""
    saved = group.run_on_main(lambda: saved_run(run, "prior"))
    settings, device = group.run_on_all(lambda: _settings(run, overrides, saved, group))
    group.run_on_main(lambda: check_run_folder(run, saved))
    tokenizer_folder = Path(settings.tokenizer) if settings.tokenizer is not None else default_tokenizer
    required = settings.tokenizer is not None or settings.codes is None
    # A tokenizer without codes is refused before anything is written.
    tokenizer = group.run_on_all(lambda: _required_tokenizer(tokenizer_folder, device, settings)) if required else None
    codes = _open_codes(run, saved, settings, tokenizer, group)
    tokenizer = group.run_on_all(lambda: _fitting_tokenizer(tokenizer, tokenizer_folder, codes, device))

    manual_seed(settings.seed)
    config = group.run_on_all(lambda: config_for(settings, codes) if saved is None else _config_of(run, saved, codes))
    model = GatedPixelCNN(config).to(device)
    preview = None
    if tokenizer is not None:
        preview = sample_preview(model, tokenizer.model, codes.manifest.grid, settings.seed)
    before = saved.info.training if saved else None
    measured = group.run_on_all(lambda: measured_items(settings.steps, settings.batch_size, before))
    stage = PriorStage(model, codes, held_out(codes.names()), preview, group, measured)
    group.run_on_main(lambda: prepare_run_folder(run, saved))
    say(*explanation(stage, codes, run.out))
    settings = with_fastest_way(stage, settings, group, is_new=saved is None)
    info = _info(settings, config, codes, tokenizer_folder if required else None, measured)
    loop = LoopSettings.from_settings(settings, device, keep_best=True)
    info = run_training(stage, info, loop, run.out, resume=saved, group=group)
    if config.label_dropout == 0 or MEASURED in info.metrics:
        return info
    return group.run_on_main(lambda: _with_guidance(info, run.out, codes.manifest.grid, device))


def _settings(
    run: RunFolder, overrides: Mapping[str, Any], saved: SavedRun | None, group: ProcessGroup
) -> tuple[PriorSettings, torch.device]:
    """Return the settings of the run and the device of this process. Raises before codes are exported."""
    settings = resolve(PriorSettings, overrides, _started_with(saved))
    network_config(settings, num_codes=2, num_classes=1, grid=(1, 1))  # refuses impossible settings
    check_batch_size(settings.batch_size, settings.accumulate, group)
    return settings, own_device(run.device, group)


def _required_tokenizer(folder: Path, device: torch.device, settings: PriorSettings) -> TrainedTokenizer:
    """Return the tokenizer. Raise InputError if there is none, or labels that its images lack are to be dropped."""
    tokenizer = _tokenizer_for_pictures(folder, device)
    if settings.codes is None and not tokenizer.info.class_names:
        _check_label_dropout(settings, f"images of the tokenizer in {tokenizer.folder}")
    return tokenizer


def _fitting_tokenizer(
    tokenizer: TrainedTokenizer | None, folder: Path, codes: CodeDataset, device: torch.device
) -> TrainedTokenizer | None:
    """Return the tokenizer that made the codes, if there is one. Raise InputError if the one that is required did not.

    Args:
        tokenizer: the one that is required; None if none is.
        folder: where there may be one in that case.
        codes: to learn.
        device: where to compute.
    """
    if tokenizer is None:
        return _optional_tokenizer(folder, codes, device)
    remedy = f"export them again with export-codes --tokenizer {tokenizer.folder}"
    check_made_by(codes, tokenizer, f"{remedy}, or name the tokenizer that made them")
    return tokenizer


def config_for(settings: PriorSettings, codes: CodeDataset) -> PriorConfig:
    """Return the configuration of the model, from the settings and from what the codes are.

    The model is conditioned on labels if every grid has one.

    Raises:
        InputError: labels are to be dropped, and not every grid has one.
    """
    manifest = codes.manifest
    labelled = all_labelled(manifest.class_names, (shard.labels for shard in codes.shards()))
    if not labelled:
        _check_label_dropout(settings, f"codes in {codes.location}")
    num_classes = len(manifest.class_names) if labelled else 0
    return network_config(settings, num_codes=manifest.num_codes, num_classes=num_classes, grid=manifest.grid)


def _config_of(run: RunFolder, saved: SavedRun, codes: CodeDataset) -> PriorConfig:
    """Return the configuration of the model of the run to resume. Raise InputError if it is over other codes."""
    config, num_codes = config_of_run(saved, run.out, PriorConfig, GatedPixelCNN), codes.manifest.num_codes
    before, now = saved.info.class_names, list(codes.manifest.class_names)
    remedy = "name the codes it was started with, or train a new prior with another --out"
    if config.num_codes != num_codes or config.num_classes not in (0, len(now)):
        raise InputError(
            expected=f"{config.num_codes} codes and {config.num_classes} classes, as the run in {run.out} learns",
            got=f"{num_codes} and {len(now)} in {codes.location}",
            do=remedy,
        )
    if config.num_classes and before != now:  # as many, but a label means another class
        raise InputError(
            expected=f"the classes {short(', '.join(before))}, as the run in {run.out} learns",
            got=f"{short(', '.join(now))} in {codes.location}",
            do=remedy,
        )
    return config


def network_config(settings: PriorSettings, *, num_codes: int, num_classes: int, grid: tuple[int, int]) -> PriorConfig:
    """Return the configuration of the model. Raise ValueError if the settings are of no network."""
    attention_every = _attention_every(settings, grid)
    return PriorConfig(
        num_codes=num_codes,
        num_classes=num_classes,
        channels=settings.channels,
        num_layers=settings.num_layers,
        kernel_size=settings.kernel_size,
        attention_every=attention_every,
        first_kernel_size=FIRST_KERNEL if attention_every else PriorConfig.first_kernel_size,
        dropout=settings.dropout,
        label_dropout=_label_dropout(settings, num_classes),
    )


def _attention_every(settings: PriorSettings, grid: tuple[int, int]) -> int:
    """Return after every how many layers the network attends; 0 for never. Raise ValueError if it has too few layers.

    The first layer never attends, so a network that does has more layers than this.
    """
    every, most = settings.attention_every, settings.num_layers - 1
    if every is None:
        return ATTENTION_EVERY if most >= ATTENTION_EVERY and math.prod(grid) <= MOST_ATTENDED else 0
    if every > max(0, most):
        raise ValueError(f"attention_every: expected less than num_layers, which is {most + 1}, or 0, got {every}")
    return every


def _label_dropout(settings: PriorSettings, num_classes: int) -> float:
    """Return the share of the labels that are hidden in training."""
    if settings.label_dropout is not None:
        return settings.label_dropout
    return LABEL_DROPOUT if num_classes else 0.0


def _check_label_dropout(settings: PriorSettings, what: str) -> None:
    """Raise InputError if labels of `what`, which has none, are to be dropped."""
    if settings.label_dropout:
        raise InputError(
            expected=f"{what} with a label for each, so that --label-dropout {settings.label_dropout:g} can act",
            got="some or all without",
            do="omit the option, or train on a folder with one subfolder a class",
        )


def _started_with(saved: SavedRun | None) -> dict[str, Any] | None:
    """Return the settings that the run to resume was started with; one from before some of them did without."""
    return None if saved is None else {"label_dropout": 0.0, "attention_every": 0, **saved.info.training}


def _info(
    settings: PriorSettings, config: PriorConfig, codes: CodeDataset, tokenizer: Path | None, measured: int
) -> CheckpointInfo:
    """Return what `config.json` says before the first step; `tokenizer` is the folder that a resumed run needs."""
    # the numbers themselves, which a resumed run keeps
    settings = replace(settings, label_dropout=config.label_dropout, attention_every=config.attention_every)
    return CheckpointInfo(
        kind="prior",
        config=asdict(config),
        step=0,
        class_names=list(codes.manifest.class_names) if config.num_classes else [],
        preprocessing=codes.manifest.image,
        training={
            **recorded(settings),
            "tokenizer": None if tokenizer is None else str(tokenizer),
            RECORDED: measured,
        },
        tokenizer_fingerprint=codes.manifest.tokenizer_fingerprint,
    )


def explanation(stage: PriorStage, codes: CodeDataset, out: Path) -> list[str]:
    """Return what the run is about to do, in lines of words."""
    config, (height, width) = stage.model.config, codes.manifest.grid
    split = split_summary(
        "grid",
        to_learn=len(stage.train_rows),
        held_out=len(codes) - len(stage.train_rows),
        measured=len(stage.held_out_rows),
    )
    measured = "held-out" if len(stage.train_rows) < len(codes) else "training"
    return [
        f"stage two: a prior over the codes in {codes.location}, into {out}",
        f"{split}; {height}x{width} codes each, {config.num_classes or 'no'} classes",
        "bits_per_code is what a code costs given those before it",
        f"simple predictors on the {measured} codes: {in_words(stage.simple_bits)}",
    ]


def _with_guidance(info: CheckpointInfo, folder: Path, grid: tuple[int, int], device: torch.device) -> CheckpointInfo:
    """Choose the guidance that suits the prior just saved in `folder`, and return its info with it."""
    chosen = choose_guidance(load_prior(folder, device=device), grid)
    say(chosen.in_words)
    return add_metrics(folder, info, {MEASURED: chosen.guidance})


def _open_codes(
    run: RunFolder,
    saved: SavedRun | None,
    settings: PriorSettings,
    tokenizer: TrainedTokenizer | None,
    group: ProcessGroup,
) -> CodeDataset:
    """Return the codes to learn, exported into the run first if none were named, which takes the tokenizer."""
    if settings.codes is not None:
        folders: str | Path | Sequence[str] = settings.codes
    else:
        assert tokenizer is not None
        folders = _exported_codes(tokenizer, run, saved, group)
    codes = group.run_on_all(lambda: _checked_codes(folders, saved))
    check_same(group, {"codes": sha256(repr(codes.manifest.shards).encode())})
    return codes


def _checked_codes(folders: str | Path | Sequence[str], saved: SavedRun | None) -> CodeDataset:
    """Return the codes in folders. Raise InputError if they are damaged, or not those that a resumed run learns."""
    codes = CodeDataset(folders)
    codes.check_files()
    _check_learnable(codes)
    if saved is not None:
        _check_resumable(saved.info, codes.manifest.tokenizer_fingerprint, f"codes in {codes.location}")
    return codes


def _check_learnable(codes: CodeDataset) -> None:
    """Raise InputError if there are no codes, some are missing, or a label is of no class."""
    manifest = codes.manifest
    if not manifest.complete:
        raise InputError(
            expected=f"all {manifest.total:,} grids in {codes.location}",
            got=f"{manifest.count:,}",
            do="run the export-codes that was interrupted once more: it continues",
        )
    if manifest.num_codes > MOST_CODES:
        raise InputError(
            expected=f"at most {MOST_CODES:,} different codes in {codes.location}",
            got=f"{manifest.num_codes:,}",
            do="use a tokenizer with fewer",
        )
    if not len(codes):
        raise InputError(expected=f"at least one grid in {codes.location}", got="none", do="export the codes of images")
    highest = max(int(shard.labels.max()) for shard in codes.shards())
    if manifest.class_names and highest >= len(manifest.class_names):
        raise InputError(
            expected=f"labels below {len(manifest.class_names)}, the number of class names in {codes.location}",
            got=str(highest),
            do="find the damaged shard with verify-codes",
        )


def _exported_codes(tokenizer: TrainedTokenizer, run: RunFolder, saved: SavedRun | None, group: ProcessGroup) -> Path:
    """Return the folder of the codes of the tokenizer's own images, exported into the run unless they exist.

    An interrupted export continues, or with --force starts anew.
    """
    out, fingerprint = run.out / CODES, tokenizer.info.fingerprint
    if saved is not None:
        info, what = saved.info, f"a tokenizer in {tokenizer.folder}"
        group.run_on_all(lambda: _check_resumable(info, fingerprint, what))
    existing = group.run_on_main(lambda: _existing_export(out, run))
    is_other = existing is not None and existing.tokenizer_fingerprint != fingerprint
    if existing is None or is_other or not existing.complete:
        export_codes(tokenizer.folder, out, device=run.device, force=run.force or is_other)
    return out


def _existing_export(out: Path, run: RunFolder) -> CodeManifest | None:
    """Return the manifest of the codes that are in the run already, None without any; with --force, if it is intact."""
    if not (out / MANIFEST).exists():
        return None
    try:
        return read_manifest(out)
    except InputError:
        if run.force:
            return None
        raise


def _check_resumable(saved: CheckpointInfo, fingerprint: str, what: str) -> None:
    """Raise InputError unless `what`, with this fingerprint, belongs to the tokenizer whose codes the run learns."""
    check_same_tokenizer(saved.tokenizer_fingerprint, fingerprint, what, "train a new prior with another --out")


def _optional_tokenizer(folder: Path, codes: CodeDataset, device: torch.device) -> TrainedTokenizer | None:
    """Return the tokenizer for the preview pictures, or None if it does not exist or fit the codes or cannot be used.

    Only pictures depend on it, so whatever is wrong with it is printed as a note and is no error.
    """
    if not os.path.exists(folder / CONFIG):
        return None
    try:
        tokenizer = _tokenizer_for_pictures(folder, device)
        if tokenizer.info.fingerprint == codes.manifest.tokenizer_fingerprint:
            return tokenizer
        reason = f"the tokenizer in {folder} did not make these codes"
    except (InputError, OSError) as error:
        reason = f"the tokenizer in {folder} cannot be used ({error})"
    say(f"note: {reason}; training continues without pictures")
    return None


def _tokenizer_for_pictures(folder: Path, device: torch.device) -> TrainedTokenizer:
    """Return a tokenizer with its sharp decoder, or if there is none that can be used with the plain one.

    Raises:
        InputError: there is no tokenizer.
    """
    try:
        return load_trained_tokenizer(folder, device)
    except InputError as error:
        plain = load_trained_tokenizer(folder, device, decoder="plain")
        say(f"note: the pictures are those of the plain decoder, as the sharp one cannot be used ({error})")
        return plain
