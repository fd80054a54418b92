"""The network whose features tell sets of images apart: a small classifier, or without labels an autoencoder.

    images [B,C,H,W] --stem--> at most about 24 a side --residual blocks, max pooling twice--> mean --> features [B,64]
    features [B,64] --> logits [B,K]            with K classes
    features [B,64] --> small images [B,C,h,w]  without: h, w at most 32

The stem's stride grows with the image, so that the cost of an image hardly depends on its size, and fine detail still
reaches the network: nothing is scaled down before it.

Each feature has mean 0 and variance 1 over the training images (a batch norm without parameters), so distances have
the same scale on every set of images.

Legend: B batch, C image channels, H W pixels, K classes.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 64  # dimensions
WIDTHS = (48, 96, 192)  # channels of the three levels
LARGEST_STEM = 24  # positions along a side behind the stem, about
SMALL_SIDE = 32  # pixels of the longer side of what the autoencoder reconstructs, at most


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The configuration of a `Judge`.

    Raises:
        ValueError: a field is out of its range.
    """

    channels: int  # of the images
    height: int  # pixels
    width: int  # pixels
    num_classes: int  # 2 or more for a classifier, 0 for an autoencoder

    def __post_init__(self) -> None:
        if self.channels < 1 or min(self.height, self.width) < 2:
            size = f"{self.height}x{self.width}x{self.channels}"
            raise ValueError(f"JudgeConfig: expected images of at least 2x2x1, got {size}")
        if self.num_classes < 0 or self.num_classes == 1:
            raise ValueError(f"JudgeConfig.num_classes: expected 0, or 2 or more, got {self.num_classes}")

    @property
    def strides(self) -> tuple[int, int]:
        """The strides (vertical, horizontal) of the stem: 2, and more along a side above 48 pixels."""
        vertical, horizontal = (max(2, -(-side // LARGEST_STEM)) for side in (self.height, self.width))
        return vertical, horizontal

    @property
    def small_size(self) -> tuple[int, int]:
        """The height and width of what the autoencoder reconstructs."""
        scale = max(1.0, max(self.height, self.width) / SMALL_SIDE)
        return max(1, round(self.height / scale)), max(1, round(self.width / scale))


class Judge(nn.Module):
    """Turns images [B,C,H,W] in [0,1] into features [B,64]; in training mode B is at least 2."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = WIDTHS
        strides = config.strides
        kernel = (2 * strides[0], 2 * strides[1])
        padding = (-(-strides[0] // 2), -(-strides[1] // 2))
        self.trunk = nn.Sequential(
            nn.Conv2d(config.channels, first, kernel, strides, padding, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            ResidualBlock(first),
            *(convolution(first, second), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), ResidualBlock(second)),
            *(convolution(second, third), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), ResidualBlock(third)),
        )
        self.to_features = nn.Sequential(nn.Linear(third, FEATURES), nn.BatchNorm1d(FEATURES, affine=False))
        self.head: nn.Module = nn.Linear(FEATURES, config.num_classes) if config.num_classes else SmallDecoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [B,64] of images [B,C,H,W] in [0,1]. Raises ValueError for images of another size."""
        expected = (self.config.channels, self.config.height, self.config.width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images [B,{','.join(map(str, expected))}], got {list(images.shape)}")
        features: Tensor = self.to_features(self.pooled(images))
        return features

    def pooled(self, images: Tensor) -> Tensor:
        """Return what the features [B,64] are a linear function of: the trunk's mean over positions."""
        mean: Tensor = self.trunk((images - 0.5) / 0.25).mean(dim=(2, 3))
        return mean

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return what training minimises, a scalar in float32.

        Args:
            images: [B,C,H,W] in [0,1].
            labels: [B] int64; of no use to an autoencoder.
        """
        predicted = self.head(self(images)).float()
        if self.config.num_classes:
            return F.cross_entropy(predicted, labels)
        return F.mse_loss(predicted, F.adaptive_avg_pool2d(images, self.config.small_size))


class ResidualBlock(nn.Module):
    """Adds two convolutions to x [B,C,H,W], and takes what is positive."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(convolution(channels, channels), nn.ReLU(), convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inside(x))


class SmallDecoder(nn.Module):
    """Turns features [B,64] into small images [B,C,h,w]."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.size = config.small_size
        self.height, self.width = (-(-side // 4) for side in self.size)
        self.first = nn.Linear(FEATURES, WIDTHS[1] * self.height * self.width)
        self.rest = nn.Sequential(
            nn.ReLU(),
            *(nn.ConvTranspose2d(WIDTHS[1], WIDTHS[0], 4, 2, padding=1), nn.ReLU()),
            nn.ConvTranspose2d(WIDTHS[0], config.channels, 4, 2, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        x = self.first(features).unflatten(1, (WIDTHS[1], self.height, self.width))
        images: Tensor = self.rest(x)
        return images[:, :, : self.size[0], : self.size[1]]


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3x3 convolution and its batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
