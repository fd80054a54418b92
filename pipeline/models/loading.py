"""A trained model is one object: the network, what its checkpoint says about it, and the folder it came from.

Config and weights are read together, so that both come from the same save even while a training run replaces them.
Whether two models belong together is decided by the fingerprints of what was loaded; the folder is not read again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, Baseline, TokenizerConfig, build_model

from ..errors import InputError
from ..images.image_set import ImageSet, open_images
from ..runtime.device import choose_device
from .checkpoint import MODEL, TRAIN_COMMAND, CheckpointInfo, check_same_tokenizer, read_checkpoint

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
    own = data is None
    return open_images(
        info.training["data"] if data is None else data,
        image_size=(info.preprocessing["height"], info.preprocessing["width"]),
        channels=info.preprocessing["channels"],
        data_root=data_root or (info.training.get("data_root") if own else None),
    )


def _load(
    folder: Path, kind: str, config_type: type[Config], build: Callable[[Config], Model]
) -> tuple[Model, CheckpointInfo]:
    """Load a checkpoint of this kind: the model in `eval()` mode on the CPU, and its info."""
    info, data = read_checkpoint(folder, kind)
    try:
        model = build(config_type(**info.config))
        model.load_state_dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            expected=f"the weights of a {kind} in {folder / MODEL}",
            got=" ".join(str(error).split()),
            do=f"restore the folder from a copy, or run {TRAIN_COMMAND[kind]} again",
        ) from None
    return model.eval(), info
