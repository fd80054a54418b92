"""The format of a checkpoint: a folder with `model.safetensors`, `config.json` and `training.safetensors`.

    model.safetensors     the weights to use
    config.json           format version, kind, config, step, class names, preprocessing, fingerprint, training
    training.safetensors  for resuming: the weights, optimizer and random states of the last step, and the step
    previous/             the same three files of the save before
    decoder/              of a tokenizer that has a sharp decoder: a checkpoint of its own (`decoders.py`)

The fingerprint is the SHA-256 of the file `model.safetensors`: `sha256sum` prints the same. `config.json` also holds
the SHA-256 of `training.safetensors` and of itself, so damage to any of the three is noticed by whoever reads it; then
the save before is used, with a warning. Nothing is a pickle. `restore.py` builds the networks from it.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from ..errors import InputError
from ..runtime.atomic_files import current, read_current, sha256, write_together
from ..runtime.schema import from_json, short
from ..runtime.sealed_json import check_seal, sealed
from ..runtime.untrusted_files import parse_json, read_regular, unreadable
from .tensor_file import Outline, parse_metadata, parse_tensors, read_tensor_file

FORMAT_VERSION = 2  # 2: Muon, the encoder without its 3x3 convolution
MODEL, CONFIG, TRAINING = "model.safetensors", "config.json", "training.safetensors"
PREVIOUS = "previous"  # subfolder of the save before the last
TRAIN_COMMAND = {
    "tokenizer": "train-tokenizer",
    "decoder": "train-decoder",
    "prior": "train-prior",
    "judge": "evaluate --samples",
}
LARGEST_CONFIG = 2**24  # bytes
ATTEMPTS = 5  # to read config and weights of one save, while a training run replaces both

T = TypeVar("T")
Check = Callable[["CheckpointInfo", Mapping[str, Outline]], None]  # raises ValueError unless weights fit the config

_log = logging.getLogger(__name__)


class DamagedError(InputError):
    """Says that a file of a checkpoint is not what was written; the save before may be intact."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The content of `config.json`."""

    kind: str  # "tokenizer", "decoder", "prior" or "judge"
    config: dict[str, Any]  # fields of TokenizerConfig (of a decoder, too) or PriorConfig
    step: int  # training steps behind these weights
    class_names: list[str]  # label i is class_names[i]; empty without labels
    preprocessing: dict[str, int]  # height, width, channels of the images
    training: dict[str, Any]  # the settings of the run: data, steps, batch size, seed, ...
    fingerprint: str = ""  # SHA-256 of model.safetensors
    training_sha256: str = ""  # SHA-256 of training.safetensors; "" if an older version wrote it, or none was written
    tokenizer_fingerprint: str = ""  # for a prior or a decoder: of the tokenizer whose codes it learned
    metrics: dict[str, float] = field(default_factory=dict)  # of the recorded evaluation; of a prior, its guidance
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
    weights: dict[str, Tensor]  # of model.safetensors: the weights to use, of the best evaluation where that is kept
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
        keep_previous: whether the files that this replaces, if they are intact, become those of `previous/`.

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
    keeps = keep_previous and is_intact(folder, info.kind)
    write_together(folder, files, keep=PREVIOUS if keeps else None)
    return info


def add_metrics(folder: Path, info: CheckpointInfo, metrics: Mapping[str, float]) -> CheckpointInfo:
    """Add numbers to `config.json` of the last save, whose info this is, and return the info with them.

    Raises:
        InputError: the file cannot be written; it is as it was.
    """
    info = replace(info, metrics={**info.metrics, **metrics})
    write_together(folder, {CONFIG: sealed(asdict(info))})
    return info


def copy_checkpoint(source: Path, target: Path, kind: str, fingerprint: str) -> None:
    """Make `target` a checkpoint with the weights of `source`, byte for byte, to use and not to resume.

    Nothing is written if it has them already.

    Raises:
        InputError: the source no longer has the weights with this fingerprint, or the files cannot be written.
    """
    if has_checkpoint(target) and read_info(target, kind).fingerprint == fingerprint:
        return
    info, weights = read_checkpoint(source, kind, _anything)
    if info.fingerprint != fingerprint:
        raise InputError(
            expected=f"the {kind} {short(fingerprint)} in {source}",
            got=f"another by now, {short(info.fingerprint)}",
            do="wait until its training has ended, and run the command again",
        )
    write_together(target, {MODEL: weights, CONFIG: sealed(asdict(replace(info, training_sha256="")))})


def is_intact(folder: Path, kind: str) -> bool:
    """Return whether every file of the last save is there and is what was written."""
    try:
        _read_run(folder, kind, is_previous=False)
    except InputError:
        return False
    return True


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint was saved in `folder`, intact or not. Raise InputError for a foreign commit."""
    return current(folder, CONFIG).exists() or (folder / PREVIOUS / CONFIG).exists()


def read_info(folder: str | Path, kind: str) -> CheckpointInfo:
    """Read `config.json` of a checkpoint of this `kind`; the weights are not looked at.

    Raises:
        DamagedError: its content is not what was written.
        InputError: there is no checkpoint, it may not be read, or it has another kind or format version.
    """
    folder = Path(folder)
    path = folder / CONFIG
    try:
        content = parse_json(read_current(folder, CONFIG, lambda place: read_regular(place, LARGEST_CONFIG)))
    except (FileNotFoundError, NotADirectoryError):
        raise _no_config(folder, kind) from None
    except (OSError, ValueError) as error:
        raise _unusable(path, f"JSON in {path}", error, kind) from None
    return _parse_info(content, kind, path)


def read_checkpoint(folder: Path, kind: str, check: Check) -> tuple[CheckpointInfo, bytes]:
    """Read config and weights from the same save, also while a training run replaces both.

    If the last save is damaged, the one before it is read, with a warning.

    Args:
        folder: of the checkpoint.
        kind: "tokenizer", "decoder" or "prior".
        check: compares the shapes and types of the weights with the config, before the weights are read.

    Returns:
        The config, and the bytes of `model.safetensors`; their SHA-256 is the fingerprint in the config.

    Raises:
        InputError: there is no intact checkpoint of this kind and format version.
    """
    return _or_previous(folder, lambda place: _read_save(place, kind, check))


def read_run(folder: Path, kind: str) -> SavedRun:
    """Read all of a checkpoint to resume from: of the last save, or if that is damaged of the one before it.

    Only the writer of the folder calls this: nothing may replace the files meanwhile.

    Raises:
        InputError: there is no intact checkpoint of this kind and format version with a state to resume from.
    """
    return _or_previous(folder, lambda place: _read_run(place, kind, is_previous=place != folder))


def load_training(folder: Path) -> TrainingState:
    """Return the state to resume from, whatever save it is of.

    Raises:
        DamagedError: the file is missing or is no training state.
        InputError: it may not be read.
    """
    try:
        return _parse_training(read_current(folder, TRAINING, read_tensor_file))
    except (OSError, ValueError, MemoryError) as error:
        raise _unusable_training(folder, error, "") from None


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


def _read_save(folder: Path, kind: str, check: Check) -> tuple[CheckpointInfo, bytes]:
    """Return config and weights of one save. Raise DamagedError if they do not fit together in any of the ATTEMPTS."""
    info: CheckpointInfo | None = None
    problem: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt > 0:
            time.sleep(0.1)
        before, info = info, read_info(folder, kind)
        if info == before and isinstance(problem, ValueError):
            break  # nobody replaces the files meanwhile: they are damaged
        try:
            data = read_current(folder, MODEL, partial(read_tensor_file, check=partial(check, info)))
            digest = sha256(data)
            if digest == info.fingerprint:
                return info, data
            problem = ValueError(f"{len(data):,} bytes with {digest}")
        except FileNotFoundError:
            problem = FileNotFoundError("no such file")
        except (OSError, ValueError, MemoryError) as error:
            problem = error
    assert info is not None
    assert problem is not None
    named = f"with the fingerprint {short(info.fingerprint)} that {CONFIG} names"
    raise _unusable(folder / MODEL, f"the weights of a {kind} in {folder / MODEL}, {named}", problem, kind)


def _read_run(folder: Path, kind: str, *, is_previous: bool) -> SavedRun:
    """Return all of one save. Raise DamagedError if a file of it is damaged."""
    info, data = _read_save(folder, kind, _anything)
    try:
        training = _parse_training(_read_training(folder, info))
    except (OSError, ValueError, MemoryError) as error:
        raise _unusable_training(folder, error, kind) from None
    try:
        weights = parse_tensors(data)
    except ValueError as error:
        raise _damaged(f"weights in {folder / MODEL}", _reason(error), kind) from None
    return SavedRun(info=info, weights=weights, training=training, is_previous=is_previous)


def _anything(info: CheckpointInfo, outlines: Mapping[str, Outline]) -> None:
    """Accept the weights."""


def _read_training(folder: Path, info: CheckpointInfo) -> bytes:
    """Return the content of the training state. Raise OSError, ValueError or MemoryError unless it is what `info` says.

    Older versions wrote no hash; then nothing is compared.
    """
    data = read_current(folder, TRAINING, read_tensor_file)
    if info.training_sha256 and sha256(data) != info.training_sha256:
        raise ValueError(f"{len(data):,} bytes with the SHA-256 {sha256(data)} in place of {info.training_sha256}")
    return data


def _parse_training(data: bytes) -> TrainingState:
    """Return the training state in the bytes of its file. Raise ValueError if it is none."""
    metadata = parse_metadata(data)
    values = metadata.get("values") if isinstance(metadata, dict) else None
    parsed = parse_json(values.encode()) if isinstance(values, str) else None
    if not isinstance(parsed, dict):
        raise ValueError("a file without the values of a training state")
    return TrainingState(tensors=parse_tensors(data), values=parsed)


def _parse_info(content: Any, kind: str, path: Path) -> CheckpointInfo:
    """Return what `config.json` holds. Raise InputError, or DamagedError if it is not what was written."""
    found = content.get("format_version") if isinstance(content, dict) else None
    try:
        check_seal(content)
    except ValueError as error:
        got = str(error) if found == FORMAT_VERSION else f"format version {short(found)}, and {error}"
        raise _damaged(f"a checkpoint's config of format version {FORMAT_VERSION} in {path}", got, kind) from None
    if isinstance(found, int) and found != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=short(found),
            do="use the version of codegrid that wrote it",
        )
    try:
        info = from_json(CheckpointInfo, content)
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


def _unusable(path: Path, expected: str, error: Exception, kind: str) -> InputError:
    """Return the error for a file that could not be used: a DamagedError, unless it may not be read at all."""
    if isinstance(error, PermissionError):
        return unreadable(path, error)
    return _damaged(expected, _reason(error), kind)


def _unusable_training(folder: Path, error: Exception, kind: str) -> InputError:
    """Return the error for the file of the training state, as `_unusable` does."""
    path = folder / TRAINING
    if isinstance(error, PermissionError):
        return unreadable(path, error)
    return _damaged(f"the training state {path}", f"a file that cannot be read ({_reason(error)})", kind)


def _reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    return short(" ".join(str(error).split())) or type(error).__name__


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
