"""The discriminator of a sharp decoder: one logit for each code, of whether its part of the picture is a real one.

    images -> [4x4 stride-2 conv, LeakyReLU] x log2(downsample) -> 3x3 conv, LeakyReLU -> h [B,F,H,W] -> 3x3 conv -> l
    vectors of the codes -> 3x3 conv -> e [B,F,H,W]                                          logits [B,H,W] = l + h . e

It is a patch discriminator [1] whose patches are the cells of the grid (they overlap), conditioned on the codes by
projection [2]: what it learns is whether the picture is a likely one *of these codes*, so the decoder gains nothing by
drawing a likely picture of others. Every weight is divided by its spectral norm [3]. It has no normalisation over the
batch, so a picture is judged alone as among others.

Legend: B batch, C image channels, H' W' image, H W grid of codes (H = H' / downsample), D code dimension, F features.

[1] Isola et al. 2017, Image-to-image translation with conditional adversarial networks, arXiv:1611.07004, section 3.2.2
[2] Miyato, Koyama 2018, cGANs with projection discriminator, arXiv:1802.05637, eq. 4
[3] Miyato et al. 2018, Spectral normalization for generative adversarial networks, arXiv:1802.05957, section 2
"""

import itertools

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .config import TokenizerConfig

WIDTH = 48  # channels of the first layer; all others have twice as many
SLOPE = 0.2  # of the LeakyReLU below 0


class Discriminator(nn.Module):
    """Judges images [B,C,H',W'] beside the vectors [B,D,H,W] of their codes: logits [B,H,W], higher for real ones.

    Args:
        config: of the tokenizer whose decoder is trained; its channels, `code_dim` and `downsample` are used.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        features = 2 * WIDTH
        widths = [config.in_channels, WIDTH, *[features] * (config.num_downsampling_layers - 1)]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(width_in, width_out, 4, stride=2, padding=1)), nn.LeakyReLU(SLOPE)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], features, 3, padding=1)), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers)
        self.unconditional = spectral_norm(nn.Conv2d(features, 1, 3, padding=1))
        self.embedding = spectral_norm(nn.Conv2d(config.code_dim, features, 3, padding=1))

    def forward(self, images: Tensor, vectors: Tensor) -> Tensor:
        """Return the logits [B,H,W] of images [B,C,H',W'], about [0,1], of codes with these vectors [B,D,H,W]."""
        features = self.features(2 * images - 1)
        logits: Tensor = self.unconditional(features).squeeze(1) + (features * self.embedding(vectors)).sum(dim=1)
        return logits
