"""The loss of the tokenizer: squared error in units of the data's variance, plus the quantizer's own terms.

[1] van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937, eq. 3
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
    precision = torch.promote_types(decoded.dtype, torch.float32)
    return F.mse_loss(decoded.to(precision), images.to(precision)) / data_variance
