"""A trained model is one object: the network, what its checkpoint says about it, and the folder it came from.

Config and weights are read together, so that both come from the same save even while a training run replaces them.
Whether two models belong together is decided by the fingerprints of what was loaded; the folder is not read again.

A tokenizer holds one of two decoders for the same codes (`decoders.py`): the plain one, which was trained with its
encoder, or the sharp one that train-decoder added. Encoder, codebook and codes are the same with both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, Baseline, TokenizerConfig, build_model

from ..errors import InputError
from ..images.image_set import ImageSet, open_images
from ..runtime.device import choose_device
from ..runtime.schema import short
from .checkpoint import CheckpointInfo, SavedRun, check_same_tokenizer
from .decoders import DecoderChoice, DecoderName, check_choice, decoder_folder, find_sharp_decoder, load_sharp_decoder
from .restore import Config, check_network, no_network, parse_config, restore
from .tensor_file import outlines_of

Trained = TypeVar("Trained", bound="TrainedAutoencoder")


@dataclass(frozen=True, kw_only=True)
class TrainedAutoencoder:
    """What train-tokenizer wrote: a tokenizer, or a baseline without codes."""

    model: VQVAE | Baseline  # in `eval()` mode, on the requested device; its `decode` is the chosen decoder
    info: CheckpointInfo  # from the same save as the weights of encoder, codebook and plain decoder
    folder: Path  # of the checkpoint, for messages
    decoder_info: CheckpointInfo | None = None  # of the sharp decoder that `model` holds; None: it holds the plain one
    plain_model: VQVAE | None = None  # beside a sharp decoder: the same encoder and codebook with the plain one

    @property
    def decoder(self) -> DecoderName:
        """The decoder that the model holds: "plain" or "sharp"."""
        return "plain" if self.decoder_info is None else "sharp"

    @property
    def decoder_folder(self) -> Path:
        """The folder of the checkpoint of that decoder, for messages."""
        return self.folder if self.decoder_info is None else decoder_folder(self.folder)

    def with_plain_decoder(self: Trained) -> Trained:
        """Return the same encoder and codebook, not copies, with the plain decoder."""
        plain = self.model if self.plain_model is None else self.plain_model
        return replace(self, model=plain, decoder_info=None, plain_model=None)

    def with_codes(self) -> "TrainedTokenizer":
        """Return it as a tokenizer. Raise InputError for a baseline."""
        if not isinstance(self.model, VQVAE):
            raise _without_codes(self.folder, self.model.config)
        return TrainedTokenizer(
            model=self.model,
            info=self.info,
            folder=self.folder,
            decoder_info=self.decoder_info,
            plain_model=self.plain_model,
        )


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer(TrainedAutoencoder):
    """A tokenizer with codes."""

    model: VQVAE  # in `eval()` mode, on the requested device; its `decode` is the chosen decoder

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


def load_trained_autoencoder(
    folder: str | Path, device: str | torch.device, *, decoder: DecoderChoice = "auto"
) -> TrainedAutoencoder:
    """Load what train-tokenizer wrote, with codes or without.

    Args:
        folder: of the checkpoint.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.
        decoder: "plain", the one that was trained with the encoder, and then no other is looked for; "sharp", the one
            that train-decoder wrote; "auto", that one if there is one. A model without codes has a plain one alone.

    Raises:
        InputError: there is no complete checkpoint of a tokenizer, no such device, or no such decoder of these codes.
        ValueError: another `decoder`.
    """
    check_choice(decoder)
    folder, chosen = Path(folder), choose_device(str(device))
    model, info = restore(folder, "tokenizer", TokenizerConfig, build_model)
    trained = TrainedAutoencoder(model=model.to(chosen), info=info, folder=folder)
    return trained if decoder == "plain" else _with_sharp_decoder(trained, chosen, required=decoder == "sharp")


def load_trained_tokenizer(
    folder: str | Path, device: str | torch.device, *, decoder: DecoderChoice = "auto"
) -> TrainedTokenizer:
    """Load a tokenizer; the same as `load_trained_autoencoder`, but raise InputError for a baseline without codes."""
    return load_trained_autoencoder(folder, device, decoder=decoder).with_codes()


def load_trained_prior(folder: str | Path, device: str | torch.device) -> TrainedPrior:
    """Load a prior.

    Args:
        folder: of the checkpoint.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.

    Raises:
        InputError: there is no complete checkpoint of a prior, or no such device.
    """
    folder, chosen = Path(folder), choose_device(str(device))
    model, info = restore(folder, "prior", PriorConfig, GatedPixelCNN)
    return TrainedPrior(model=model.to(chosen), info=info, folder=folder)


def load_pair(
    tokenizer_folder: str | Path,
    prior_folder: str | Path,
    device: str | torch.device,
    *,
    decoder: DecoderChoice = "auto",
) -> tuple[TrainedTokenizer, TrainedPrior]:
    """Load a tokenizer and the prior over its codes; the prior is the same with any `decoder`.

    Raises:
        InputError: a checkpoint cannot be used, the tokenizer has no codes or no such decoder, or the loaded prior was
            trained on the codes of another tokenizer than the loaded one.
        ValueError: another `decoder` than "auto", "plain" or "sharp".
    """
    tokenizer = load_trained_tokenizer(tokenizer_folder, device, decoder=decoder)
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


def load_tokenizer(folder: str | Path, *, device: str | torch.device = "cpu", decoder: DecoderChoice = "auto") -> VQVAE:
    """Return the tokenizer of a checkpoint folder as a module in `eval()` mode.

    Args:
        folder: what train-tokenizer wrote.
        device: auto, cpu, cuda, cuda:1 or mps, or a device of torch.
        decoder: whose pictures `decode` returns: "plain", trained with the encoder on squared error; "sharp", what
            train-decoder wrote, which draws likely detail; "auto", the sharp one if there is one. `encode` is the same.

    Raises:
        InputError: there is no complete checkpoint, it is a baseline without codes, there is no such device, or no such
            decoder.
        ValueError: another `decoder`.
    """
    return load_trained_tokenizer(folder, device, decoder=decoder).model


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
        check_network(config_type, build, saved.info, outlines_of(saved.weights))
        return parse_config(config_type, saved.info)
    except ValueError as error:
        raise no_network(folder, saved.info.kind, error) from None


def _with_sharp_decoder(plain: TrainedAutoencoder, device: torch.device, *, required: bool) -> TrainedAutoencoder:
    """Return the model with its sharp decoder; or as it is, if there is none, or none yet that is better (step 0).

    Raises:
        InputError: there is none though it is `required`, or it cannot be used.
    """
    if not isinstance(plain.model, VQVAE):
        if required:
            raise _without_codes(plain.folder, plain.model.config)
        return plain
    if find_sharp_decoder(plain.folder, required=required) is None:
        return plain
    network, info = load_sharp_decoder(plain.folder, plain.model.config, plain.info)
    if info.step == 0 and required:
        raise InputError(
            expected=f"a sharp decoder in {decoder_folder(plain.folder)}",
            got="the plain one, for none that was trained is nearer to real images",
            do="train it with more --steps, or omit --decoder sharp",
        )
    if info.step == 0:
        return plain
    sharp = plain.model.with_decoder(network.to(device))
    return replace(plain, model=sharp, decoder_info=info, plain_model=plain.model)


def _without_codes(folder: Path, config: TokenizerConfig) -> InputError:
    """Return the error for a baseline where codes are needed."""
    return InputError(
        expected=f"a tokenizer with codes in {folder}",
        got=f"one with --bottleneck {config.bottleneck}, which has none",
        do="name one that was trained with --bottleneck vq",
    )
