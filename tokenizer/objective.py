"""The loss of the reconstruction: squared error in units of the data's variance, or cross-entropy for a Bernoulli VAE.

The quantizer, or the Gaussian of a VAE, adds its own terms.

Legend: B batch, C channels, H' W' image.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937, eq. 3
[2] Kingma and Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114, eq. 3 and appendix C.1
[3] Loaiza-Ganem and Cunningham 2019, The continuous Bernoulli, arXiv:1907.06845
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def reconstruction_loss(decoded: Tensor, images: Tensor, data_variance: float) -> Tensor:
    """Return the mean squared error over every element, divided by the variance of the training pixels.

    Always predicting the mean of the data scores 1. A mean, not a sum, so that neither the batch size nor the size of
    the image changes its weight against the quantizer's loss.

    Args:
        decoded: [B,C,H',W'], not clamped, so that a pixel out of range still has a gradient.
        images: [B,C,H',W'] in [0,1].
        data_variance: above 0.
    """
    decoded = at_least_float32(decoded)
    return F.mse_loss(decoded, images.to(decoded.dtype)) / data_variance


def bernoulli_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Return -log p(image) in nats per image, of pixels that are 1 with the probability sigmoid(logit) [2, C.1].

    The mean over the batch of the sum over all values of an image of  - x log p - (1 - x) log(1 - p).

    Images that are not binary are taken as they are. This is then the mean over all ways to binarise them at random,
    each value being the probability of a 1: the likelihood of such binary images, not a density of grey values, which
    would need a normaliser that depends on p [3]. It is lowest at p = x, where it is the entropy of x, not 0. So it can
    be compared with other numbers of the same images only, and never with bits per dimension.

    Args:
        logits: [B,C,H',W'], any finite number.
        images: [B,C,H',W'] in [0,1].
    """
    logits = at_least_float32(logits)
    nats = F.binary_cross_entropy_with_logits(logits, images.to(logits.dtype), reduction="sum")
    return nats / len(images)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
