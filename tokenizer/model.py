"""The VQ-VAE: encoder, quantizer, decoder. Two verbs: `encode(images) -> codes` and `decode(codes) -> images`.

Legend: B batch, C image channels, H' W' image, H W grid of codes, K codes, D code dimension.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bottleneck import GaussianBottleneck, NoBottleneck
from .config import TokenizerConfig
from .networks import Decoder, Encoder
from .objective import bernoulli_loss, reconstruction_loss
from .quantizer import VectorQuantizer


@dataclass(frozen=True)
class VQVAEOutput:
    reconstruction: Tensor  # [B,C,H',W'] in [0,1]
    codes: Tensor  # [B,H,W] int64 in [0,K)
    loss: Tensor  # scalar, what training minimises: reconstruction_loss + the quantizer's loss
    reconstruction_loss: Tensor  # scalar, squared error / data variance
    commitment_loss: Tensor  # scalar, unweighted
    codebook_loss: Tensor  # scalar, unweighted; minimised only by the gradient codebook


@dataclass(frozen=True)
class BaselineOutput:
    reconstruction: Tensor  # [B,C,H',W'] in [0,1]
    loss: Tensor  # scalar, what training minimises; per value of an image, see `Baseline`
    reconstruction_loss: Tensor  # scalar, squared error / data variance; of a Bernoulli -log p, nats per image
    kl: Tensor  # scalar, nats per image; 0 for a plain autoencoder


class Autoencoder(nn.Module):
    """Holds an encoder and a decoder; `VQVAE` and `Baseline` add what is between them."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid (H, W) of codes of an image of `height` x `width` pixels."""
        return height // self.config.downsample, width // self.config.downsample

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError for a wrong number of channels, or a side that is no multiple of `downsample`."""
        channels, multiple = self.config.in_channels, self.config.downsample
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"expected images [B,{channels},H,W], got the shape {list(images.shape)}")
        if images.shape[2] % multiple or images.shape[3] % multiple:
            size = f"{images.shape[2]}x{images.shape[3]}"
            raise ValueError(f"expected image sides that are multiples of {multiple}, got {size}; resize or crop")


class VQVAE(Autoencoder):
    """Images [B,C,H',W'] in [0,1] <-> codes [B,H,W] in [0,K), with H' and W' multiples of `config.downsample`.

    Raises:
        ValueError: the config asks for another bottleneck than "vq".
    """

    def __init__(self, config: TokenizerConfig) -> None:
        if config.bottleneck != "vq":
            raise ValueError(f"VQVAE: expected the bottleneck 'vq', got {config.bottleneck!r}; that is a Baseline")
        super().__init__(config)
        self.quantizer = VectorQuantizer(
            config.num_codes,
            config.code_dim,
            codebook_update=config.codebook_update,
            commitment_weight=config.commitment_weight,
            ema_decay=config.ema_decay,
            revival_threshold=config.revival_threshold,
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Reconstruct a batch, with the losses. In training mode this also moves the codebook.

        Args:
            images: [B,C,H',W'] in [0,1].

        Raises:
            ValueError: wrong number of channels, or a side that is no multiple of `downsample`.
        """
        self.check_images(images)
        quantized = self.quantizer(self.encoder(images))
        decoded = self.decoder(quantized.vectors)
        reconstruction = reconstruction_loss(decoded, images, self.config.data_variance)
        return VQVAEOutput(
            reconstruction=decoded.clamp(0, 1),
            codes=quantized.codes,
            loss=reconstruction + quantized.loss,
            reconstruction_loss=reconstruction,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B,C,H',W'] in [0,1] to codes [B,H,W] int64 in [0,K). Never changes the codebook.

        Raises:
            ValueError: wrong number of channels, or a side that is no multiple of `downsample`.
        """
        self.check_images(images)
        return self.quantizer.nearest(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B,H,W] int64 in [0,K) to images [B,C,H*downsample,W*downsample] in [0,1].

        Raises:
            ValueError: codes of another shape, or out of range.
        """
        if codes.ndim != 3:
            raise ValueError(f"decode: expected codes [B,H,W], got the shape {list(codes.shape)}")
        return self.decoder(self.quantizer.lookup(codes)).clamp(0, 1)

    def with_decoder(self, decoder: nn.Module) -> "VQVAE":
        """Return a tokenizer with the same encoder and codebook, not copies of them, and another decoder.

        Args:
            decoder: vectors [B,D,H,W] -> images [B,C,H*downsample,W*downsample], about [0,1]; on the same device.
        """
        other = copy(self)
        other._modules = {**self._modules, "decoder": decoder.train(self.training)}
        return other


class Baseline(Autoencoder):
    """A model to compare a VQ-VAE with: the same encoder and decoder around a Gaussian ("vae") or nothing ("ae").

    The loss of the VAE is, but for a constant factor, the negative evidence lower bound:

        gaussian   reconstruction_loss + kl_weight * kl / (C H' W')    decoder of variance data_variance * kl_weight / 2
        bernoulli  (reconstruction_loss + kl_weight * kl) / (C H' W')  where kl_weight is 1; the decoder gives logits

    A Bernoulli's bound is of images binarised at random, see `bernoulli_loss`. Division by the values of an image
    changes no ratio of the terms: the learning rate suits images of any size.

    Raises:
        ValueError: the config asks for the bottleneck "vq".
    """

    def __init__(self, config: TokenizerConfig) -> None:
        if config.bottleneck == "vq":
            raise ValueError("Baseline: expected the bottleneck 'vae' or 'ae', got 'vq'; that is a VQVAE")
        super().__init__(config)
        self.bottleneck = GaussianBottleneck() if config.bottleneck == "vae" else NoBottleneck()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> BaselineOutput:
        """Reconstruct a batch, with the losses.

        Args:
            images: [B,C,H',W'] in [0,1].
            noise: [B,D,H,W] of N(0,1), for a VAE; by default of torch's own generator.

        Raises:
            ValueError: as `VQVAE`.
        """
        self.check_images(images)
        latents, kl = self.bottleneck(self.encoder(images), noise)
        decoded, penalty, values = self.decoder(latents), self.config.kl_weight * kl, images[0].numel()
        if self.config.likelihood == "bernoulli":
            reconstruction = bernoulli_loss(decoded, images)
            loss = (reconstruction + penalty) / values
        else:
            reconstruction = reconstruction_loss(decoded, images, self.config.data_variance)
            loss = reconstruction + penalty / values
        return BaselineOutput(
            reconstruction=self._pixels(decoded), loss=loss, reconstruction_loss=reconstruction, kl=kl
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B,C,H',W'] in [0,1] to their most likely latents [B,D,H,W]. Raises as `VQVAE` does."""
        self.check_images(images)
        return self.bottleneck.mode(self.encoder(images))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B,D,H,W] to images [B,C,H*downsample,W*downsample] in [0,1]; a VAE's of N(0,1) are new.

        The images are means, without the noise of a Gaussian or the coin of a Bernoulli.
        """
        return self._pixels(self.decoder(latents))

    def _pixels(self, decoded: Tensor) -> Tensor:
        """Return what the decoder gives, [B,C,H',W'], as images in [0,1]."""
        return decoded.sigmoid() if self.config.likelihood == "bernoulli" else decoded.clamp(0, 1)


def build_model(config: TokenizerConfig) -> VQVAE | Baseline:
    """Build the model with the bottleneck that the config asks for."""
    return VQVAE(config) if config.bottleneck == "vq" else Baseline(config)
