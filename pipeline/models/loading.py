"""A trained model is one object: the network, what its checkpoint says about it, and the folder it came from.

Config and weights are read together, so that both come from the same save even while a training run replaces them.
Whether two models belong together is decided by the fingerprints of what was loaded; the folder is not read again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, Baseline, TokenizerConfig, build_model

from ..errors import InputError
from ..images.image_set import ImageSet, open_images
from ..images.preprocessing import Preprocessing
from ..runtime.device import choose_device
from ..runtime.schema import from_json, short
from .checkpoint import (
    MODEL,
    TRAIN_COMMAND,
    CheckpointInfo,
    SavedRun,
    check_same_tokenizer,
    read_checkpoint,
)
from .tensor_file import Outline, check_finite, check_outlines, outlines_of, parse_tensors

LARGEST_SIDE = 2**14  # pixels of an image that a tokenizer takes
UNUSED_SIZE = 2**16  # that a config may name beyond its weights: a model without codes has a number of codes

Config = TypeVar("Config", TokenizerConfig, PriorConfig)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainedAutoencoder:
    """What train-tokenizer wrote: a tokenizer, or a baseline without codes."""

    model: VQVAE | Baseline  # in `eval()` mode, on the requested device
    info: CheckpointInfo  # from the same save as the weights
    folder: Path  # of the checkpoint, for messages

    def with_codes(self) -> "TrainedTokenizer":
        """Return it as a tokenizer. Raise InputError for a baseline."""
        if not isinstance(self.model, VQVAE):
            raise InputError(
                expected=f"a tokenizer with codes in {self.folder}",
                got=f"one with --bottleneck {self.model.config.bottleneck}, which has none",
                do="name one that was trained with --bottleneck vq",
            )
        return TrainedTokenizer(model=self.model, info=self.info, folder=self.folder)


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer with codes."""

    model: VQVAE  # in `eval()` mode, on the requested device
    info: CheckpointInfo  # from the same save as the weights
    folder: Path  # of the checkpoint, for messages

    @property
    def grid(self) -> tuple[int, int]:
        """The grid (H, W) of codes of one of its images."""
        return self.model.grid(self.info.preprocessing["height"], self.info.preprocessing["width"])


@dataclass(frozen=True, kw_only=True)
class TrainedPrior:
    """A prior over the codes of one tokenizer."""

    model: GatedPixelCNN  # in `eval()` mode, on the requested device
    info: CheckpointInfo  # from the same save as the weights
    folder: Path  # of the checkpoint, for messages


def load_trained_autoencoder(folder: str | Path, device: str | torch.device) -> TrainedAutoencoder:
    """Load what train-tokenizer wrote, with codes or without.

    Args:
        folder: of the checkpoint.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.

    Raises:
        InputError: there is no complete checkpoint of a tokenizer, or no such device.
    """
    folder, chosen = Path(folder), choose_device(str(device))
    model, info = _load(folder, "tokenizer", TokenizerConfig, build_model)
    return TrainedAutoencoder(model=model.to(chosen), info=info, folder=folder)


def load_trained_tokenizer(folder: str | Path, device: str | torch.device) -> TrainedTokenizer:
    """Load a tokenizer; the same as `load_trained_autoencoder`, but raise InputError for a baseline without codes."""
    return load_trained_autoencoder(folder, device).with_codes()


def load_trained_prior(folder: str | Path, device: str | torch.device) -> TrainedPrior:
    """Load a prior.

    Args:
        folder: of the checkpoint.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.

    Raises:
        InputError: there is no complete checkpoint of a prior, or no such device.
    """
    folder, chosen = Path(folder), choose_device(str(device))
    model, info = _load(folder, "prior", PriorConfig, GatedPixelCNN)
    return TrainedPrior(model=model.to(chosen), info=info, folder=folder)


def load_pair(
    tokenizer_folder: str | Path, prior_folder: str | Path, device: str | torch.device
) -> tuple[TrainedTokenizer, TrainedPrior]:
    """Load a tokenizer and the prior over its codes.

    Raises:
        InputError: a checkpoint cannot be used, the tokenizer has no codes, or the loaded prior was trained on the
            codes of another tokenizer than the loaded one.
    """
    tokenizer = load_trained_tokenizer(tokenizer_folder, device)
    prior = load_trained_prior(prior_folder, device)
    check_same_tokenizer(
        tokenizer.info.fingerprint,
        prior.info.tokenizer_fingerprint,
        f"a prior in {prior_folder}",
        "name the tokenizer it was trained with, or train the prior again with train-prior",
    )
    if prior.model.config.num_codes != tokenizer.model.config.num_codes:
        raise InputError(
            expected=f"a prior over {tokenizer.model.config.num_codes} codes in {prior_folder}, as the tokenizer has",
            got=f"one over {prior.model.config.num_codes}",
            do="train the prior again with train-prior",
        )
    return tokenizer, prior


def load_tokenizer(folder: str | Path, *, device: str | torch.device = "cpu") -> VQVAE:
    """Return the tokenizer of a checkpoint folder as a module in `eval()` mode.

    Args:
        folder: what train-tokenizer wrote.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.

    Raises:
        InputError: there is no complete checkpoint, it is a baseline without codes, or there is no such device.
    """
    return load_trained_tokenizer(folder, device).model


def load_prior(folder: str | Path, *, device: str | torch.device = "cpu") -> GatedPixelCNN:
    """Return the prior of a checkpoint folder as a module in `eval()` mode.

    Args:
        folder: what train-prior wrote.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.

    Raises:
        InputError: there is no complete checkpoint, or there is no such device.
    """
    return load_trained_prior(folder, device).model


def images_of(info: CheckpointInfo, *, data: str | None = None, data_root: str | None = None) -> ImageSet:
    """Open `data` (by default what the tokenizer was trained on) in the size and channels that the tokenizer takes.

    Raises:
        InputError: the images cannot be opened.
    """
    if data is None:
        data, own_root = own_images(info)
        data_root = data_root or own_root
    return open_images(
        data,
        image_size=(info.preprocessing["height"], info.preprocessing["width"]),
        channels=info.preprocessing["channels"],
        data_root=data_root,
    )


def own_images(info: CheckpointInfo) -> tuple[str, str | None]:
    """Return the source and the data root that the tokenizer was trained on. Raise InputError if it names none."""
    data, data_root = info.training.get("data"), info.training.get("data_root")
    if not isinstance(data, str) or not isinstance(data_root, (str, type(None))):
        raise InputError(
            expected="a checkpoint that names the images it was trained on", got=short(data), do="name them with --data"
        )
    return data, data_root


def config_of_run(
    saved: SavedRun, folder: Path, config_type: type[Config], build: Callable[[Config], nn.Module]
) -> Config:
    """Return the configuration of the model of a run to resume.

    Args:
        saved: the run.
        folder: it was read from, for the message.
        config_type: `TokenizerConfig` or `PriorConfig`.
        build: makes the model.

    Raises:
        InputError: it is no configuration of such a model, or the weights are not of its shapes.
    """
    try:
        _check_network(config_type, build, saved.info, outlines_of(saved.weights))
        return _parse_config(config_type, saved.info)
    except ValueError as error:
        raise _no_network(folder, saved.info.kind, error) from None


def _load(
    folder: Path, kind: str, config_type: type[Config], build: Callable[[Config], Model]
) -> tuple[Model, CheckpointInfo]:
    """Load a checkpoint of this kind: the model in `eval()` mode on the CPU, and its info.

    Nothing is allocated by what the config says before the file of the weights is known to be of that size.
    """
    info, data = read_checkpoint(folder, kind, partial(_check_network, config_type, build))
    try:
        weights = parse_tensors(data)
        check_finite(weights)
        model = build(_parse_config(config_type, info))
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _no_network(folder, kind, error) from None
    return model.eval(), info


def _no_network(folder: Path, kind: str, error: Exception) -> InputError:
    """Return the error for a checkpoint whose files are intact, and which is no model."""
    return InputError(
        expected=f"the weights of a {kind} in {folder / MODEL}",
        got=" ".join(str(error).split()) or type(error).__name__,
        do=f"restore the folder from a copy, or run {TRAIN_COMMAND[kind]} again",
    )


def _check_network(
    config_type: type[Config],
    build: Callable[[Config], nn.Module],
    info: CheckpointInfo,
    found: Mapping[str, Outline],
) -> None:
    """Raise ValueError unless the config is of a model whose weights have these shapes and types.

    The model that they are compared with has no memory.
    """
    config = _parse_config(config_type, info)
    _check_sizes(config, found)
    try:
        with torch.device("meta"), _WithoutNumbers():
            expected = build(config).state_dict()
    except RuntimeError as error:  # a size beyond all numbers
        raise ValueError(f"a config of no network ({error})") from None
    check_outlines(outlines_of(expected), found)


class _WithoutNumbers(TorchFunctionMode):
    """Draws no numbers for the parameters of a model: on the meta device there are none.

    There, to draw some would import torch's compiler, which takes a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _parse_config(config_type: type[Config], info: CheckpointInfo) -> Config:
    """Return the configuration of the model. Raise ValueError if it is none, or does not fit the rest of the info."""
    unknown = sorted(info.config.keys() - {item.name for item in fields(config_type)})
    if unknown:
        raise ValueError(f"the unknown field {short(unknown[0])} in its config")
    config, size = from_json(config_type, info.config, "config"), _parse_size(info.preprocessing)
    if isinstance(config, TokenizerConfig):
        if config.in_channels != size.channels or size.height % config.downsample or size.width % config.downsample:
            raise ValueError(f"a network that does not take images of {size.height}x{size.width}x{size.channels}")
    elif config.num_classes != len(info.class_names):
        raise ValueError(f"{short(config.num_classes)} classes with {len(info.class_names)} names")
    return config


def _parse_size(preprocessing: Mapping[str, int]) -> Preprocessing:
    """Return the form of the images. Raise ValueError if there is no such form."""
    try:
        size = from_json(Preprocessing, preprocessing, "preprocessing")
    except InputError as error:
        raise ValueError(f"{short(error.got)} in place of {error.expected}") from None
    if max(size.height, size.width) > LARGEST_SIDE:
        raise ValueError(f"images of {short(size.height)}x{short(size.width)} pixels, more than {LARGEST_SIDE} a side")
    return size


def _check_sizes(config: TokenizerConfig | PriorConfig, found: Mapping[str, Outline]) -> None:
    """Raise ValueError if the config has a size that exceeds all that the file holds."""
    tensors, numbers = len(found), sum(outline.count for outline in found.values())
    for name, value in vars(config).items():
        most = tensors if name.endswith("_layers") else max(numbers, UNUSED_SIZE)
        if type(value) is int and value > most:
            raise ValueError(
                f"a config of {short(value)} {name}, and weights of {tensors} tensors, {short(numbers)} numbers"
            )
