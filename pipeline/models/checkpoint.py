"""The format of a checkpoint: a folder with `model.safetensors`, `config.json` and `training.safetensors`.

    model.safetensors     the weights to use
    config.json           format version, kind, config, step, class names, preprocessing, fingerprint, training
    training.safetensors  for resuming: the weights, optimizer and random states of the last step, and the step

The fingerprint is the SHA-256 of the file `model.safetensors`: `sha256sum` prints the same. Nothing is a pickle.
`loading.py` builds the models from it.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError
from ..runtime.atomic_files import current, read_current, sha256, to_json, write_together

FORMAT_VERSION = 2  # 2: Muon, the encoder without its 3x3 convolution
MODEL, CONFIG, TRAINING = "model.safetensors", "config.json", "training.safetensors"
TRAIN_COMMAND = {"tokenizer": "train-tokenizer", "prior": "train-prior"}


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
    tokenizer_fingerprint: str = ""  # for a prior: of the tokenizer whose codes it learned
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, on held-out images
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote the checkpoint
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The state that a resumed run continues from, so that it computes what an uninterrupted one does."""

    tensors: dict[str, Tensor]  # weights, optimizer and random states, by name
    values: dict[str, Any]  # step, best score, ...: anything JSON holds


def save_checkpoint(
    folder: Path, info: CheckpointInfo, weights: Mapping[str, Tensor], training: TrainingState | None = None
) -> CheckpointInfo:
    """Write or replace all files of the checkpoint together.

    Returns:
        `info` with the fingerprint and the versions that were written.
    """
    model = safetensors.torch.save({name: _plain(tensor) for name, tensor in weights.items()})
    info = CheckpointInfo(**{**asdict(info), "fingerprint": sha256(model), "versions": library_versions()})
    files = {MODEL: model, CONFIG: to_json(asdict(info))}
    if training is not None:
        tensors = {name: _plain(tensor) for name, tensor in training.tensors.items()}
        files[TRAINING] = safetensors.torch.save(tensors, metadata={"values": json.dumps(training.values)})
    write_together(folder, files)
    return info


def read_info(folder: str | Path, kind: str) -> CheckpointInfo:
    """Read `config.json` of a checkpoint of this `kind`.

    Raises:
        InputError: there is no checkpoint, it has another kind or format version, or its config is damaged.
    """
    folder = Path(folder)
    path = folder / CONFIG
    try:
        content = json.loads(read_current(folder, CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise InputError(
            expected=f"a {kind} checkpoint in {folder}", got=found, do=f"run {TRAIN_COMMAND[kind]} or name another"
        ) from None
    except ValueError:
        raise InputError(
            expected=f"JSON in {path}", got="something else", do=f"train the {kind} again or restore it"
        ) from None
    return _parse_info(content, kind, path)


def read_checkpoint(folder: Path, kind: str, attempts: int = 5) -> tuple[CheckpointInfo, bytes]:
    """Read config and weights from the same save, also while a training run replaces both.

    Args:
        folder: of the checkpoint.
        kind: "tokenizer" or "prior".
        attempts: how often to read before config and weights that do not fit together count as damaged.

    Returns:
        The config, and the bytes of `model.safetensors`; their SHA-256 is the fingerprint in the config.

    Raises:
        InputError: there is no complete checkpoint of this kind and format version.
    """
    for _ in range(attempts):
        info = read_info(folder, kind)
        try:
            data = read_current(folder, MODEL)
        except FileNotFoundError:
            data = b""
        if sha256(data) == info.fingerprint:
            return info, data
        time.sleep(0.1)
    raise InputError(
        expected=f"{folder / MODEL} with the fingerprint {info.fingerprint} that {CONFIG} names",
        got=f"{len(data):,} bytes with {sha256(data)}" if data else "no such file",
        do=f"restore the folder from a copy, or run {TRAIN_COMMAND[kind]} again",
    )


def load_training(folder: Path) -> TrainingState:
    """Return the state to resume from. Raise InputError if the checkpoint has none, or a broken one."""
    path = current(folder, TRAINING)
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return TrainingState(tensors=tensors, values=json.loads(file.metadata()["values"]))
    except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            expected=f"the training state {path}",
            got=f"a file that cannot be read ({error})",
            do="train with --force to start anew, or restore the file",
        ) from None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of `model.safetensors`, on the CPU."""
    return safetensors.torch.load(current(folder, MODEL).read_bytes())


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


def _parse_info(content: Any, kind: str, path: Path) -> CheckpointInfo:
    known = {f.name for f in fields(CheckpointInfo)}
    try:
        info = CheckpointInfo(**{name: value for name, value in content.items() if name in known})
    except (AttributeError, TypeError) as error:
        raise InputError(
            expected=f"a checkpoint's config in {path}", got=str(error), do="name another folder or train anew"
        ) from None
    if info.format_version != FORMAT_VERSION:
        raise InputError(
            expected=f"format version {FORMAT_VERSION} in {path}",
            got=f"{info.format_version}",
            do="use the version of codegrid that wrote it",
        )
    if info.kind != kind:
        raise InputError(
            expected=f"a {kind} checkpoint in {path.parent}",
            got=f"a {info.kind} checkpoint",
            do=f"name the folder that {TRAIN_COMMAND[kind]} wrote",
        )
    return info


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
