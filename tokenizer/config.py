"""What defines a tokenizer: the shape of its network and how its codebook learns."""

import math
from dataclasses import dataclass
from typing import Literal

CodebookUpdate = Literal["ema", "gradient"]
Bottleneck = Literal["vq", "vae", "ae"]
Likelihood = Literal["gaussian", "bernoulli"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The configuration of a `VQVAE`, or of one of the baselines without codes (`Baseline`).

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    in_channels: int = 3  # C of the images: 1 grey, 3 colour
    hidden_channels: int = 128  # channels of the residual stacks
    num_residual_layers: int = 4  # 3x3 -> 1x1 blocks in the encoder, and as many in the decoder
    residual_channels: int = 32  # channels inside a residual block
    downsample: int = 4  # pixels that a code covers along each side: 2, 4, 8 or 16
    num_codes: int = 512  # K, vectors in the codebook
    code_dim: int = 8  # D, their dimension; few dimensions keep all codes in use
    codebook_update: CodebookUpdate = "ema"  # moving averages [1, appendix A.1] or gradient [1, eq. 3]
    commitment_weight: float = 0.25  # beta of [1, eq. 3]
    ema_decay: float = 0.99  # gamma of [1, appendix A.1]
    revival_threshold: float = 0.02  # a code used less than this share of the mean use is dead; 0 keeps the dead
    data_variance: float = 1.0  # variance of all pixels of the training images; divides the squared error
    bottleneck: Bottleneck = "vq"  # codes; or, to compare with: "vae" a Gaussian, "ae" nothing
    likelihood: Likelihood = "gaussian"  # of a pixel given the latents of the "vae"; see objective.py
    # Of the "vae"; by default (None, which becomes the number) 0.1 if gaussian, whose decoder then has a variance of
    # kl_weight / 2 of the data's, and 1 if bernoulli, which makes the loss the negative evidence lower bound.
    kl_weight: float = None  # type: ignore[assignment]  # a float to all who read it, and no null in a config.json

    def __post_init__(self) -> None:
        if self.kl_weight is None:
            object.__setattr__(self, "kl_weight", 1.0 if self.likelihood == "bernoulli" else 0.1)
        for name in ("in_channels", "hidden_channels", "residual_channels", "code_dim"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.hidden_channels % 2 == 0, self, "hidden_channels", "an even number")
        _require(self.num_residual_layers >= 0, self, "num_residual_layers", "0 or more")
        _require(self.downsample in (2, 4, 8, 16), self, "downsample", "2, 4, 8 or 16")
        _require(self.num_codes >= 2, self, "num_codes", "at least 2")
        _require(self.codebook_update in ("ema", "gradient"), self, "codebook_update", "'ema' or 'gradient'")
        _require(self.commitment_weight >= 0, self, "commitment_weight", "0 or more")
        _require(0 < self.ema_decay < 1, self, "ema_decay", "between 0 and 1, exclusive")
        _require(0 <= self.revival_threshold < 1, self, "revival_threshold", "from 0 to below 1")
        _require(self.data_variance > 0, self, "data_variance", "above 0")
        _require(self.bottleneck in ("vq", "vae", "ae"), self, "bottleneck", "'vq', 'vae' or 'ae'")
        _require(self.likelihood in ("gaussian", "bernoulli"), self, "likelihood", "'gaussian' or 'bernoulli'")
        bernoulli_of_vae = self.likelihood == "gaussian" or self.bottleneck == "vae"
        _require(bernoulli_of_vae, self, "likelihood", f"'gaussian' with the bottleneck {self.bottleneck!r}")
        _require(0 <= self.kl_weight < math.inf, self, "kl_weight", "0 or more, and finite")

    @property
    def encoder_channels(self) -> int:
        """Return the channels between encoder and bottleneck: `code_dim`, or as many means and log-variances."""
        return 2 * self.code_dim if self.bottleneck == "vae" else self.code_dim

    @property
    def num_downsampling_layers(self) -> int:
        """Return the number of stride-2 convolutions in the encoder: log2 of `downsample`."""
        return self.downsample.bit_length() - 1


def _require(holds: bool, config: TokenizerConfig, field: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"TokenizerConfig.{field}: expected {allowed}, got {getattr(config, field)!r}")
