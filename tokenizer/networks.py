"""Encoder and decoder of the VQ-VAE: the convolutional network of sonnet's example [2] for the paper's section 4.1 [1].

    images -> [4x4 stride-2 conv, SiLU] x log2(downsample) -> residual stack -> 1x1 conv -> vectors
    vectors -> 3x3 conv -> residual stack -> [4x4 stride-2 transposed conv] x log2(downsample) -> images

Departures: SiLU in place of ReLU; the weights of sonnet's 3x3 convolution before the encoder's residual stack are spent
on more residual blocks on both sides, which reconstructs better (benchmarks/README.md); any power of two from 2 to 16
as `downsample` (the sources have 4); the images enter and leave in [0, 1] and are centred on 0 inside.

Legend: B batch, C image channels, H' W' image, H W grid of codes (H = H' / downsample), D code dimension.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937
[2] github.com/google-deepmind/sonnet, examples/vqvae_example.ipynb
"""

import itertools

from torch import Tensor, nn

from .config import TokenizerConfig


class ResidualBlock(nn.Module):
    """Computes x + conv1x1(silu(conv3x3(silu(x))))."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, residual_channels, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(residual_channels, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residual_stack(config: TokenizerConfig) -> list[nn.Module]:
    """Return the residual blocks and the SiLU after them."""
    blocks = [
        ResidualBlock(config.hidden_channels, config.residual_channels) for _ in range(config.num_residual_layers)
    ]
    return [*blocks, nn.SiLU()]


class Encoder(nn.Module):
    """Maps images [B,C,H',W'] in [0,1] to vectors [B,D,H,W] (2D channels for a Gaussian bottleneck)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = _pyramid(config)
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        hidden = config.hidden_channels
        layers += [*residual_stack(config), nn.Conv2d(hidden, config.encoder_channels, kernel_size=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images - 0.5)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees, [B,hidden_channels,H,W], of images [B,C,H',W'] in [0,1]."""
        return self.layers[:-1](images - 0.5)


class Decoder(nn.Module):
    """Maps vectors [B,D,H,W] to images [B,C,H',W'], about [0,1] but not clamped to it."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, hidden, kernel_size=3, padding=1)]
        layers += residual_stack(config)
        widths = _pyramid(config)[::-1]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1])  # no SiLU on the pixels

    @property
    def last_layer(self) -> Tensor:
        """The weight of the layer that the pixels come from."""
        return self.layers[-1].get_parameter("weight")

    def forward(self, vectors: Tensor) -> Tensor:
        return self.layers(vectors) + 0.5


def _pyramid(config: TokenizerConfig) -> list[int]:
    """Return the channels at each resolution, from pixels to grid; the first stride-2 layer has half the hidden ones.

    downsample 2: C, hidden;  4: C, hidden/2, hidden;  8: C, hidden/2, hidden, hidden
    """
    hidden, layers = config.hidden_channels, config.num_downsampling_layers
    first = [hidden // 2] if layers > 1 else []
    return [config.in_channels, *first, *[hidden] * (layers - len(first))]
