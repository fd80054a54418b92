"""Bottlenecks without codes: none at all (a plain autoencoder) or a Gaussian (a VAE [1]).

Baselines for the quantizer, with the same encoder and decoder. Neither has codes.

Legend: B batch, D latent channels, H W grid.

[1] Kingma and Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114, section 2.4 and appendix B
"""

import torch
from torch import Tensor, nn

from .objective import at_least_float32


class NoBottleneck(nn.Module):
    """Leaves the vectors z [B,D,H,W] as they are: a plain autoencoder, from whose latents nobody can sample."""

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latents [B,D,H,W], and a penalty of 0."""
        return z, z.new_zeros(())

    def mode(self, z: Tensor) -> Tensor:
        """Return the latents [B,D,H,W]."""
        return z


class GaussianBottleneck(nn.Module):
    """Takes z [B,2D,H,W] as mean and log-variance of a Gaussian at each position, and samples the latent from it."""

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean + deviation * N(0,1) [B,D,H,W], and KL(N(mean, deviation^2) || N(0,1)) in nats per image.

        Args:
            z: [B,2D,H,W].
            noise: [B,D,H,W], the samples of N(0,1); by default of torch's own generator.
        """
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = at_least_float32(z).chunk(2, dim=1)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
            noise = torch.randn_like(mean) if noise is None else noise.to(mean.dtype)
            latents = mean + (0.5 * log_variance).exp() * noise
            return latents, kl.sum(dim=(1, 2, 3)).mean()

    def mode(self, z: Tensor) -> Tensor:
        """Return the most likely latents [B,D,H,W], the means."""
        return z.chunk(2, dim=1)[0]
