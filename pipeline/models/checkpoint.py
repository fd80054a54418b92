"""The format of a checkpoint: a folder with `model.safetensors`, `config.json` and `training.safetensors`.

    model.safetensors     the weights to use
    config.json           format version, kind, config, step, class names, preprocessing, fingerprint, training
    training.safetensors  for resuming: the weights, optimizer and random states of the last step, and the step
    previous/             the same three files of the save before

The fingerprint is the SHA-256 of the file `model.safetensors`: `sha256sum` prints the same. `config.json` also holds
the SHA-256 of `training.safetensors` and of itself, so damage to any of the three is noticed by whoever reads it; then
the save before is used, with a warning. Nothing is a pickle. `loading.py` builds the models from it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError
from ..runtime.atomic_files import current, sha256, write_together
from ..runtime.json_files import check_seal, parse_json, read_current, sealed
from ..runtime.schema import from_json, short

FORMAT_VERSION = 2  # 2: Muon, the encoder without its 3x3 convolution
MODEL, CONFIG, TRAINING = "model.safetensors", "config.json", "training.safetensors"
PREVIOUS = "previous"  # subfolder of the save before the last
TRAIN_COMMAND = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
LARGEST_CONFIG = 2**24  # bytes
ATTEMPTS = 5  # to read config and weights of one save, while a training run replaces both

T = TypeVar("T")

_log = logging.getLogger(__name__)


class DamagedError(InputError):
    """Says that a file of a checkpoint is not what was written; the save before may be intact."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The content of `config.json`."""

    kind: str  # "tokenizer" or "prior"
    config: dict[str, Any]  # fields of TokenizerConfig or PriorConfig
    step: int  # training steps behind these weights
    class_names: list[str]  # label i is class_names[i]; empty without labels
    preprocessing: dict[str, int]  # height, width, channels of the images
    training: dict[str, Any]  # the settings of the run: data, steps, batch size, seed, ...
    fingerprint: str = ""  # SHA-256 of model.safetensors
    training_sha256: str = ""  # SHA-256 of training.safetensors; "" if an older version wrote it, or none was written
    tokenizer_fingerprint: str = ""  # for a prior: of the tokenizer whose codes it learned
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, on held-out images
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote the checkpoint
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The state that a resumed run continues from, so that it computes what an uninterrupted one does."""

    tensors: dict[str, Tensor]  # weights, optimizer and random states, by name
    values: dict[str, Any]  # step, best score, ...: anything JSON holds


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """All that a run needs to resume; every file has the hash that was written."""

    info: CheckpointInfo
    weights: dict[str, Tensor]  # of model.safetensors: the weights to use, for a prior those of the best evaluation
    training: TrainingState
    is_previous: bool = False  # whether this is the save before the last, because the last is damaged


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    weights: Mapping[str, Tensor],
    training: TrainingState | None = None,
    *,
    keep_previous: bool = False,
) -> CheckpointInfo:
    """Write or replace all files of the checkpoint together.

    Args:
        folder: of the checkpoint.
        info: without fingerprint, hash and versions.
        weights: to use.
        training: the state to resume from; None if nobody will.
        keep_previous: whether the files that this replaces become those of `previous/`.

    Returns:
        `info` with the fingerprint, the hash and the versions that were written.

    Raises:
        InputError: the files cannot be written; those of the last save are unchanged.
    """
    files = {MODEL: safetensors.torch.save({name: _plain(tensor) for name, tensor in weights.items()})}
    written = {"fingerprint": sha256(files[MODEL]), "training_sha256": "", "versions": library_versions()}
    if training is not None:
        tensors = {name: _plain(tensor) for name, tensor in training.tensors.items()}
        files[TRAINING] = safetensors.torch.save(tensors, metadata={"values": json.dumps(training.values)})
        written["training_sha256"] = sha256(files[TRAINING])
    info = CheckpointInfo(**{**asdict(info), **written})
    files[CONFIG] = sealed(asdict(info))
    write_together(folder, files, keep=PREVIOUS if keep_previous else None)
    return info


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint was saved in `folder`, intact or not. Raise InputError for a foreign commit."""
    return current(folder, CONFIG).exists() or (folder / PREVIOUS / CONFIG).exists()


def read_info(folder: str | Path, kind: str) -> CheckpointInfo:
    """Read `config.json` of a checkpoint of this `kind`; the weights are not looked at.

    Raises:
        DamagedError: its content is not what was written.
        InputError: there is no checkpoint, or it has another kind or format version.
    """
    folder = Path(folder)
    path = folder / CONFIG
    try:
        content = parse_json(read_current(folder, CONFIG, LARGEST_CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        raise _no_config(folder, kind) from None
    except (OSError, ValueError) as error:
        raise _damaged(f"JSON in {path}", short(error), kind) from None
    return _parse_info(content, kind, path)


def read_checkpoint(folder: Path, kind: str) -> tuple[CheckpointInfo, bytes]:
    """Read config and weights from the same save, also while a training run replaces both.

    If the last save is damaged, the one before it is read, with a warning.

    Args:
        folder: of the checkpoint.
        kind: "tokenizer" or "prior".

    Returns:
        The config, and the bytes of `model.safetensors`; their SHA-256 is the fingerprint in the config.

    Raises:
        InputError: there is no intact checkpoint of this kind and format version.
    """
    return _or_previous(folder, lambda place: _read_save(place, kind))


def read_run(folder: Path, kind: str) -> SavedRun:
    """Read all of a checkpoint to resume from: of the last save, or if that is damaged of the one before it.

    Only the writer of the folder calls this: nothing may replace the files meanwhile.

    Raises:
        InputError: there is no intact checkpoint of this kind and format version with a state to resume from.
    """
    return _or_previous(folder, lambda place: _read_run(place, kind, is_previous=place != folder))


def load_training(folder: Path, kind: str = "", written: str = "") -> TrainingState:
    """Return the state to resume from.

    Args:
        folder: of the checkpoint.
        kind: "tokenizer" or "prior", for the message.
        written: the SHA-256 that the file should have; "" to compare nothing.

    Raises:
        DamagedError: the file is missing or is not what was written.
    """
    try:
        data = read_current(folder, TRAINING, largest_file())
        if written and sha256(data) != written:
            raise ValueError(f"{len(data):,} bytes with the SHA-256 {sha256(data)} in place of {written}")
        return TrainingState(tensors=parse_tensors(data), values=_values_of(data))
    except (OSError, ValueError) as error:
        got = f"a file that cannot be read ({short(error)})"
        raise _damaged(f"the training state {folder / TRAINING}", got, kind) from None


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, on the CPU. Raise ValueError if it is none."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"no safetensors file ({' '.join(str(error).split())})") from None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return in words which of the tensors holds NaN or infinity, None if none does; a CPU-GPU sync for each.

    A scalar may be infinite: so the quantizer marks the count of updates of a codebook that was set by hand.
    """
    for name, tensor in tensors.items():
        wrong = tensor.isnan() if tensor.dim() == 0 else ~tensor.isfinite()
        if bool(wrong.any()):
            return f"{name} with {int(wrong.sum()):,} values that are not"
    return None


def largest_file() -> int:
    """Return the bytes of the memory of this machine, which no file that is read at once may exceed."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such number on this system
        return 2**40


def check_same_tokenizer(expected: str, got: str, what: str, do: str) -> None:
    """Raise InputError, with both fingerprints, unless `what` was made by the tokenizer in use."""
    if expected != got:
        raise InputError(
            expected=f"{what} made with this tokenizer (fingerprint {expected})", got=f"fingerprint {got}", do=do
        )


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a run computes."""
    names = ("codegrid", "torch", "torchvision", "numpy", "pillow", "safetensors")
    return {name: found for name in names if (found := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _or_previous(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what `read` returns for `folder`, or if that is damaged for the save before, with a warning."""
    try:
        return read(folder)
    except DamagedError as error:
        try:
            found = read(folder / PREVIOUS)
        except InputError:
            raise error from None
        _log.warning(
            "Warning: the last save is damaged (expected %s, got %s); using the one before it, %s",
            error.expected,
            error.got,
            folder / PREVIOUS,
        )
        return found


def _read_save(folder: Path, kind: str) -> tuple[CheckpointInfo, bytes]:
    """Return config and weights of one save. Raise DamagedError if they do not fit together in any of the ATTEMPTS."""
    for attempt in range(ATTEMPTS):
        info = read_info(folder, kind)
        try:
            data, found = read_current(folder, MODEL, largest_file()), ""
        except FileNotFoundError:
            data, found = b"", "no such file"
        except (OSError, ValueError) as error:
            raise _damaged(f"weights in {folder / MODEL}", short(error), kind) from None
        if sha256(data) == info.fingerprint:
            return info, data
        if attempt < ATTEMPTS - 1:
            time.sleep(0.1)
    expected = f"{folder / MODEL} with the fingerprint {short(info.fingerprint)} that {CONFIG} names"
    raise _damaged(expected, found or f"{len(data):,} bytes with {sha256(data)}", kind)


def _read_run(folder: Path, kind: str, *, is_previous: bool) -> SavedRun:
    """Return all of one save. Raise DamagedError if a file of it is damaged."""
    info, data = _read_save(folder, kind)
    training = load_training(folder, kind, info.training_sha256)
    try:
        weights = parse_tensors(data)
    except ValueError as error:
        raise _damaged(f"weights in {folder / MODEL}", short(error), kind) from None
    return SavedRun(info=info, weights=weights, training=training, is_previous=is_previous)


def _values_of(data: bytes) -> dict[str, Any]:
    """Return the values of a training state from the bytes of its file. Raise ValueError if there are none."""
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        values = parse_json(header["__metadata__"]["values"])
    except (KeyError, TypeError):
        raise ValueError("a file without the values of a training state") from None
    if not isinstance(values, dict):
        raise ValueError(f"{short(values)} as the values of a training state")
    return values


def _parse_info(content: Any, kind: str, path: Path) -> CheckpointInfo:
    """Return what `config.json` holds. Raise InputError, or DamagedError if it is not what was written."""
    found = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=short(found),
            do="use the version of codegrid that wrote it",
        )
    try:
        info = from_json(CheckpointInfo, content)
        check_seal(content)
        if info.step < 0:
            raise ValueError(f"{info.step} as step")
    except ValueError as error:
        raise _damaged(f"a checkpoint's config in {path}", str(error), kind) from None
    if info.kind != kind:
        raise InputError(
            expected=f"a {kind} checkpoint in {path.parent}",
            got=f"a {short(info.kind)} checkpoint",
            do=f"name the folder that {TRAIN_COMMAND[kind]} wrote",
        )
    return info


def _no_config(folder: Path, kind: str) -> InputError:
    """Return the error for a folder without a config: damaged if there are other files of a checkpoint."""
    if any((folder / name).exists() for name in (MODEL, PREVIOUS)):
        return _damaged(f"a checkpoint's config in {folder / CONFIG}", "no such file", kind)
    found = "a folder without config.json" if folder.is_dir() else "no such folder"
    return InputError(
        expected=f"a {kind} checkpoint in {folder}", got=found, do=f"run {TRAIN_COMMAND[kind]} or name another"
    )


def _damaged(expected: str, got: str, kind: str) -> DamagedError:
    command = TRAIN_COMMAND.get(kind, "train")
    return DamagedError(
        expected=expected, got=got, do=f"restore the folder from a copy, or {command} with --force to start anew"
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
