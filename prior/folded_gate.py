"""The gate and the 1x1 convolution after it as one sigmoid, one fused product and one matrix product.

With s the sigmoid, a and b the two halves that come before the gate, W and c the weight and bias of the convolution:

    gate(a, b)          = tanh(a) s(b)                          [1, eq. 2]
    tanh(a)             = 2 s(2a) - 1
    -gate(a, b)         = s(b) - 2 s(2a) s(b)
    W gate(a, b) + c    = [-W, c] [-gate(a, b); 1]

So whatever computes a and b gives 2a and b, for which the first half of its outputs is doubled (`double_features`);
the weights that meet the gated values are negated; and the convolution becomes one matrix (`output_matrix`) that meets
what `FoldedGate` holds. A tanh of its own would take longer than the matrix product.

Legend: n samples, C channels.

[1] van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328
"""

import torch
from torch import Tensor, nn


class FoldedGate:
    """Computes [-gate(a, b); 1] of n samples, into a buffer that is made once.

    Args:
        like: a tensor of the type and on the device to compute in.
        num_samples: n.
        channels: C.
    """

    def __init__(self, like: Tensor, num_samples: int, channels: int) -> None:
        self._sigmoids = like.new_empty(num_samples, 2 * channels)
        self._features, self._gates = self._sigmoids.chunk(2, dim=1)
        self._buffer = like.new_ones(num_samples, channels + 1)
        self._negated = self._buffer[:, :-1]

    def __call__(self, before: Tensor) -> Tensor:
        """Return [n,C+1] of `before` [n,2C], which holds 2a and b; the next call overwrites it."""
        torch.sigmoid(before, out=self._sigmoids)
        torch.addcmul(self._gates, self._features, self._gates, value=-2, out=self._negated)
        return self._buffer


def negated_gate(before: Tensor, out: Tensor) -> None:
    """Write -gate(a, b) to `out` [...,C], from `before` [...,2C], which holds 2a and b and is overwritten."""
    features, gates = before.sigmoid_().chunk(2, dim=-1)
    torch.addcmul(gates, features, gates, value=-2, out=out)


def double_features(outputs: Tensor) -> Tensor:
    """Return [...,2C] with its first half doubled: outputs, weights or biases that give a, b now give 2a, b."""
    features, gates = outputs.chunk(2, dim=-1)
    return torch.cat([2 * features, gates], dim=-1)


def output_matrix(convolution: nn.Conv2d) -> Tensor:
    """Return the 1x1 convolution after a gate as the matrix [C+1,C_out] that meets what `FoldedGate` returns."""
    assert convolution.bias is not None
    return torch.cat([-convolution.weight[:, :, 0, 0].T, convolution.bias[None]])
