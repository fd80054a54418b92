"""Checkpoints: a folder with `model.safetensors`, `config.json` and, for resuming, `training.safetensors`.

    model.safetensors     the weights to use
    config.json           format version, kind, config, step, class names, preprocessing, fingerprint, training
    training.safetensors  the weights, optimizer and random states to go on from, and the step, at the same moment

The fingerprint is the SHA-256 of the file `model.safetensors`: `sha256sum` gives it without us. Nothing is a pickle.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, Baseline, TokenizerConfig, build_model

from .errors import InputError
from .files import current, read_current, sha256, to_json, write_together

FORMAT_VERSION = 2  # 2: Muon, the encoder without its 3x3 convolution
MODEL, CONFIG, TRAINING = "model.safetensors", "config.json", "training.safetensors"
TRAIN_COMMAND = {"tokenizer": "train-tokenizer", "prior": "train-prior"}

Config = TypeVar("Config", TokenizerConfig, PriorConfig)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What `config.json` says beside the weights."""

    kind: str  # "tokenizer" or "prior"
    config: dict[str, Any]  # fields of TokenizerConfig or PriorConfig
    step: int  # training steps behind these weights
    class_names: list[str]  # label i is class_names[i]; empty without labels
    preprocessing: dict[str, int]  # height, width, channels of the images
    training: dict[str, Any]  # the settings of the run: data, steps, batch size, seed, ...
    fingerprint: str = ""  # SHA-256 of model.safetensors
    tokenizer_fingerprint: str = ""  # a prior's: of the tokenizer whose codes it learned
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, on held-out images
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that wrote it
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to go on as if it had never stopped."""

    tensors: dict[str, Tensor]  # weights, optimizer and random states, by name
    values: dict[str, Any]  # step, best score, ...: anything JSON holds


def save_checkpoint(
    folder: Path, info: CheckpointInfo, weights: Mapping[str, Tensor], training: TrainingState | None = None
) -> CheckpointInfo:
    """Write or replace the checkpoint as one; returns `info` with the fingerprint and versions that were written."""
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
        InputError: no checkpoint there, another kind or format version, or a file that is not what it should be.
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


def load_tokenizer(folder: str | Path, *, device: str = "cpu") -> VQVAE:
    """The tokenizer of a checkpoint folder, in `eval()` mode.

    Raises:
        InputError: there is none that is whole, or it is a baseline without codes.
    """
    return with_codes(load_autoencoder(folder, device=device), folder)


def with_codes(model: VQVAE | Baseline, folder: str | Path) -> VQVAE:
    """`model`, which came from `folder`, if it has codes. Raises InputError for a baseline."""
    if not isinstance(model, VQVAE):
        raise InputError(
            expected=f"a tokenizer with codes in {folder}",
            got=f"one with --bottleneck {model.config.bottleneck}, which has none",
            do="name one that was trained with --bottleneck vq",
        )
    return model


def load_autoencoder(folder: str | Path, *, device: str = "cpu") -> VQVAE | Baseline:
    """What train-tokenizer wrote, with codes or without, in `eval()` mode. Raises InputError if none is whole."""
    model: VQVAE | Baseline = _load(Path(folder), "tokenizer", TokenizerConfig, build_model)
    return model.to(device)


def load_prior(folder: str | Path, *, device: str = "cpu") -> GatedPixelCNN:
    """The prior of a checkpoint folder, in `eval()` mode. Raises InputError if there is none that is whole."""
    return _load(Path(folder), "prior", PriorConfig, GatedPixelCNN).to(device)


def load_training(folder: Path) -> TrainingState:
    """The state to resume from. Raises InputError if the checkpoint has none, or a broken one."""
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
    """The tensors of `model.safetensors`, on the CPU."""
    return safetensors.torch.load(current(folder, MODEL).read_bytes())


def check_same_tokenizer(expected: str, got: str, what: str, do: str) -> None:
    """Raise InputError, with both fingerprints, unless `what` was made by the tokenizer in use."""
    if expected != got:
        raise InputError(
            expected=f"{what} made with this tokenizer (fingerprint {expected})", got=f"fingerprint {got}", do=do
        )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes."""
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


def _load(folder: Path, kind: str, config_type: type[Config], build: Callable[[Config], nn.Module]) -> Any:
    info, data = _read_whole(folder, kind)
    try:
        model = build(config_type(**info.config))
        model.load_state_dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            expected=f"the weights of a {kind} in {folder / MODEL}",
            got=" ".join(str(error).split()),
            do=f"restore the folder from a copy, or run {TRAIN_COMMAND[kind]} again",
        ) from None
    return model.eval()


def _read_whole(folder: Path, kind: str, attempts: int = 5) -> tuple[CheckpointInfo, bytes]:
    """Config and weights of one moment, also while a training run is replacing both."""
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


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
