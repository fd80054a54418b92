"""Sharp decoders that a reader checks by eye, for the tests of what uses them.

The plain decoder of a "brightness" tokenizer (support.py) shows code k as a cell of the brightness of level k. The one
here is `LIFT` grey values brighter everywhere: it has the shape of another decoder, and is of other widths if wanted.
"""

import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from pipeline.models.checkpoint import CheckpointInfo, TrainingState, read_info, save_checkpoint
from tokenizer import TokenizerConfig
from tokenizer.networks import Decoder

from .support import LOUD, brightness_tokenizer

LIFT = 2 * 17  # grey values: two levels


def lifted_decoder(lift: int = LIFT, *, num_codes: int = 16) -> Decoder:
    """Return the decoder of `brightness_tokenizer`, brighter by `lift` grey values."""
    decoder = deepcopy(brightness_tokenizer(num_codes).decoder)
    last = decoder.layers[-1]
    assert isinstance(last, nn.ConvTranspose2d)
    assert last.bias is not None
    with torch.no_grad():
        last.bias += lift / 255
    return decoder.eval()


def wide_config(channels: int = 4) -> TokenizerConfig:
    """Return the configuration of a decoder for `brightness_tokenizer` that is larger than its own."""
    return replace(brightness_tokenizer().config, hidden_channels=channels, num_residual_layers=2, residual_channels=3)


def wide_decoder(lift: int = LIFT) -> Decoder:
    """Return a larger decoder that draws what `lifted_decoder` draws; its residual blocks add nothing."""
    decoder = Decoder(wide_config()).eval()
    mix, up = decoder.layers[0], decoder.layers[-1]
    assert isinstance(mix, nn.Conv2d)
    assert isinstance(up, nn.ConvTranspose2d)
    assert up.bias is not None
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        mix.weight[0, 0, 1, 1] = LOUD
        up.weight[0, 0, 1:3, 1:3] = 1 / LOUD
        up.bias += lift / 255 - 0.5
    return decoder


def save_decoder(
    folder: Path,
    decoder: Decoder,
    tokenizer: CheckpointInfo,
    config: TokenizerConfig | None = None,
    state: TrainingState | None = None,
    *,
    keep_previous: bool = False,
    tokenizer_fingerprint: str | None = None,
) -> CheckpointInfo:
    """Save a decoder of this `config` (by default that of `wide_decoder`) into `folder` as one of this tokenizer."""
    info = CheckpointInfo(
        kind="decoder",
        config=asdict(wide_config() if config is None else config),
        step=3,
        class_names=tokenizer.class_names,
        preprocessing=tokenizer.preprocessing,
        training={"tokenizer": "tokenizer"},
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer_fingerprint is None else tokenizer_fingerprint,
    )
    return save_checkpoint(folder, info, decoder.state_dict(), state, keep_previous=keep_previous)


def add_sharp_decoder(tokenizer_folder: Path, lift: int = LIFT) -> CheckpointInfo:
    """Add a decoder that lifts the brightness to the folder of a `brightness_tokenizer`."""
    info = read_info(tokenizer_folder, "tokenizer")
    return save_decoder(tokenizer_folder / "decoder", wide_decoder(lift), info)


def with_random_decoder(tokenizer_folder: Path, out: Path, seed: int = 0) -> CheckpointInfo:
    """Copy any tokenizer to `out`, and add a decoder of its own shape with random weights."""
    shutil.copytree(tokenizer_folder, out)
    info = read_info(out, "tokenizer")
    config = TokenizerConfig(**info.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(config)
    return save_decoder(out / "decoder", decoder, info, config)
