"""The VQ-VAE: encoder, quantizer, decoder. Two verbs: `encode(images) -> codes` and `decode(codes) -> images`.

Legend: B batch, C image channels, H' W' image, H W grid of codes, K codes, D code dimension.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import TokenizerConfig
from .networks import Decoder, Encoder
from .objective import reconstruction_loss
from .quantizer import VectorQuantizer


@dataclass(frozen=True)
class VQVAEOutput:
    reconstruction: Tensor  # [B,C,H',W'] in [0,1]
    codes: Tensor  # [B,H,W] int64 in [0,K)
    loss: Tensor  # scalar, what training minimises: reconstruction_loss + the quantizer's loss
    reconstruction_loss: Tensor  # scalar, squared error / data variance
    commitment_loss: Tensor  # scalar, unweighted
    codebook_loss: Tensor  # scalar, unweighted; minimised only by the gradient codebook


class VQVAE(nn.Module):
    """Images [B,C,H',W'] in [0,1] <-> codes [B,H,W] in [0,K), with H' and W' multiples of `config.downsample`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(
            config.num_codes,
            config.code_dim,
            codebook_update=config.codebook_update,
            commitment_weight=config.commitment_weight,
            ema_decay=config.ema_decay,
            revival_threshold=config.revival_threshold,
        )
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Reconstruct a batch, with the losses. In training mode this also moves the codebook.

        Args:
            images: [B,C,H',W'] in [0,1].

        Raises:
            ValueError: wrong number of channels, or a side that is no multiple of `downsample`.
        """
        self._check_images(images)
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
        """Images [B,C,H',W'] in [0,1] -> codes [B,H,W] int64 in [0,K). Never changes the codebook.

        Raises:
            ValueError: wrong number of channels, or a side that is no multiple of `downsample`.
        """
        self._check_images(images)
        return self.quantizer.nearest(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B,H,W] int64 in [0,K) -> images [B,C,H*downsample,W*downsample] in [0,1].

        Raises:
            ValueError: codes of another shape, or out of range.
        """
        if codes.ndim != 3:
            raise ValueError(f"decode: expected codes [B,H,W], got the shape {list(codes.shape)}")
        return self.decoder(self.quantizer.lookup(codes)).clamp(0, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (H, W) of codes of an image of `height` x `width` pixels."""
        return height // self.config.downsample, width // self.config.downsample

    def _check_images(self, images: Tensor) -> None:
        channels, multiple = self.config.in_channels, self.config.downsample
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"expected images [B,{channels},H,W], got the shape {list(images.shape)}")
        if images.shape[2] % multiple or images.shape[3] % multiple:
            size = f"{images.shape[2]}x{images.shape[3]}"
            raise ValueError(f"expected image sides that are multiples of {multiple}, got {size}; resize or crop")
