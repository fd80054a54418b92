"""The losses that sharpen a decoder: squared error, and what a discriminator says, in balance [1].

    decoder        squared error / data variance - w * mean of the logits of its pictures
    discriminator  mean of max(0, 1 - logit) of real ones + mean of max(0, 1 + logit) of the decoder's (hinge [2])

w makes the two terms pull the decoder's last layer with comparable force: BALANCE times the ratio of the norms of their
gradients there, the ratio at most LARGEST_RATIO (`balance_weight`). Without the bound, a discriminator that is fooled,
and whose gradient vanishes, would be given any weight, and its noise would wreck the decoder; with one of 1 the error
of simple pictures still rose by a quarter.

Departure from [1]: no perceptual loss, so no foreign weights; the discriminator sees real and drawn pictures with the
same flips and shifts (`Augmentation`).

Legend: B batch, C image channels, H' W' image, H W grid of codes.

[1] Esser et al. 2021, Taming transformers for high-resolution image synthesis, arXiv:2012.09841, eq. 5 to 7
[2] Lim, Ye 2017, Geometric GAN, arXiv:1705.02894, section 3
[3] Zhao et al. 2020, Differentiable augmentation for data-efficient GAN training, arXiv:2006.10738, section 3.2
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .discriminator import Discriminator
from .networks import Decoder
from .objective import at_least_float32, reconstruction_loss

BALANCE = 0.8  # the norm of the gradient of the discriminator's term, in units of that of the squared error
LARGEST_RATIO = 0.1  # of the two norms, by which the term is multiplied
LARGEST_SHIFT = 1 / 8  # of a side of the grid

MeanOfAll = Callable[[Tensor], Tensor]


def hinge_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Return the loss of a discriminator [2], a scalar in float32; 2 if it cannot tell, 0 if it is sure of all.

    Args:
        real: logits [B,H,W] of real images.
        drawn: logits [B,H,W] of what the decoder drew.
    """
    return F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(drawn)).mean()


def balance_weight(
    decoded: Tensor, of_error: Tensor, of_logits: Tensor, last_layer: Tensor, mean_of_all: MeanOfAll | None = None
) -> Tensor:
    """Return w, a scalar: BALANCE * min(LARGEST_RATIO, |gradient of the error| / |gradient of the logits|) [1, eq. 7].

    The gradients are those of the decoder's last layer. Costs two backward passes through that layer alone.

    Args:
        decoded: [B,C,H',W'], a function of `last_layer` among others; its graph is kept.
        of_error: [B,C,H',W'], the gradient of the first term with respect to `decoded`.
        of_logits: [B,C,H',W'], that of the second term.
        last_layer: the weight of the layer that `decoded` comes from.
        mean_of_all: where processes share the batch, returns the mean of a tensor over their images.
    """
    gradients = torch.stack(
        [torch.autograd.grad(decoded, last_layer, of, retain_graph=True)[0] for of in (of_error, of_logits)]
    )
    error, logits = (each.norm() for each in (gradients if mean_of_all is None else mean_of_all(gradients)))
    return BALANCE * (error / logits.clamp_min(torch.finfo(logits.dtype).tiny)).clamp_max(LARGEST_RATIO)


@dataclass(frozen=True)
class SharpeningLosses:
    loss: Tensor  # scalar to minimise; its gradient for each network is that of the network's own loss
    error: Tensor  # scalar, squared error / data variance
    discriminator: Tensor  # scalar, the hinge loss: 2 if the discriminator cannot tell, 0 if it is sure of all
    weight: Tensor  # scalar w


def sharpening_losses(
    decoder: Decoder,
    discriminator: Discriminator,
    vectors: Tensor,
    images: Tensor,
    data_variance: float,
    *,
    augment: "Augmentation | None" = None,
    mean_of_all: MeanOfAll | None = None,
) -> SharpeningLosses:
    """Return the losses of both networks on a batch, for one backward pass and one step of both.

    The discriminator's term enters the loss as its linearisation at the decoded images: the same gradient for the
    decoder, none for the discriminator, which is traversed once.

    Args:
        decoder: to be sharpened.
        discriminator: its opponent.
        vectors: [B,D,H,W], of the codes of the images; constant.
        images: [B,C,H',W'] in [0,1].
        data_variance: above 0, of the training pixels.
        augment: for these images; by default one drawn by torch's own generator.
        mean_of_all: where processes share the batch, returns the mean of a tensor over their images.
    """
    decoded = at_least_float32(decoder(vectors))
    error = reconstruction_loss(decoded, images, data_variance)
    if augment is None:
        augment = Augmentation.draw(torch.rand(len(images), 3), (vectors.shape[2], vectors.shape[3]), images.device)
    codes = augment(vectors)
    constant = decoded.detach().requires_grad_()
    drawn, real = discriminator(augment(constant), codes), discriminator(augment(images), codes)
    (of_logits,) = torch.autograd.grad(-at_least_float32(drawn).mean(), constant, retain_graph=True)
    (of_error,) = torch.autograd.grad(error, decoded, retain_graph=True)
    weight = balance_weight(decoded, of_error, of_logits, decoder.last_layer, mean_of_all)
    hinge = hinge_loss(real, drawn)
    loss = error + weight * (decoded * of_logits).sum() + hinge
    return SharpeningLosses(loss=loss, error=error.detach(), discriminator=hinge.detach(), weight=weight)


@dataclass(frozen=True)
class Augmentation:
    """Flips and shifts of B images, drawn once and applied alike to real images, to decoded ones, and to the codes.

    So the discriminator learns nothing about the edges or the side that a picture shows, and has more images to learn
    from [3]. Shifts are by whole cells of the grid: every cell keeps its code, and a pattern with the period of the
    codes, which a decoder draws easily and no real image has, stays where the discriminator sees it. (With shifts by
    any number of pixels it did not, and a fine grid was over flat areas.) It is differentiable: pixels are only moved,
    those beyond an edge are mirrored.
    """

    grid: tuple[int, int]  # H, W
    flips: Tensor  # bool [B], mirrored left to right
    down: Tensor  # int64 [B], cells
    right: Tensor  # int64 [B], cells

    @classmethod
    def draw(cls, uniforms: Tensor, grid: tuple[int, int], device: torch.device) -> "Augmentation":
        """Draw it for B images of this grid of codes.

        Args:
            uniforms: [B,3] in [0,1), the random numbers of each image.
            grid: H, W.
            device: of the images.
        """
        flips, *places = uniforms.to(device).unbind(dim=1)
        limits = [int(side * LARGEST_SHIFT) for side in grid]
        down, right = ((place * (2 * limit + 1)).long() - limit for place, limit in zip(places, limits, strict=True))
        return cls(grid=grid, flips=flips < 0.5, down=down, right=right)

    def __call__(self, x: Tensor) -> Tensor:
        """Return images [B,C,H',W'], or the vectors of their codes [B,D,H,W], flipped and shifted."""
        count, _, height, width = x.shape
        rows = _mirrored(self.down * (height // self.grid[0]), height)
        columns = _mirrored(self.right * (width // self.grid[1]), width)
        columns = torch.where(self.flips[:, None], columns.flip(1), columns)
        item = torch.arange(count, device=x.device)[:, None, None]
        moved = rearrange(x, "b c h w -> b h w c")[item, rows[:, :, None], columns[:, None, :]]
        return rearrange(moved, "b h w c -> b c h w")


def _mirrored(shifts: Tensor, side: int) -> Tensor:
    """Return which of `side` rows come where after shifts [B]: [B,side]; beyond an edge they are mirrored.

    The row at the edge is there twice, 1 0 | 0 1 2, so that what is mirrored is whole cells.
    """
    positions = torch.arange(side, device=shifts.device) - shifts[:, None]
    positions = torch.where(positions < 0, -1 - positions, positions)
    return torch.where(positions < side, positions, 2 * side - 1 - positions)
