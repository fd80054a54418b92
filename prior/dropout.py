"""Dropout whose choice for an item of a batch depends on a key of that item alone [1].

With torch's dropout, what is dropped of an item depends on its place in the batch and on the size of the batch. Here an
item has a key, a random number of its own: it loses the same activations wherever it is computed, alone or among
others, on a CPU or a GPU, by one process or by one of many that share a batch.

The random number of an activation is a hash [2] of the key, the layer, and the place of the activation in the item.

Legend: B batch, C channels, H W grid.

[1] Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting, JMLR 15
[2] Wellons 2018, github.com/skeeto/hash-prospector, lowbias32 (a 32-bit mixer of low bias)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GOLDEN = 0x9E3779B1 - 2**32  # odd, near 2^32 / the golden ratio, as an int32
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # multipliers of the mixer [2]


class ItemDropout(nn.Module):
    """Drops activations x [B,C,H,W] in training, and scales the others so that the mean stays.

    Args:
        share: of the activations that are dropped, in [0,1).
        layer: which of the layers this is: each drops others.
    """

    def __init__(self, share: float, layer: int) -> None:
        super().__init__()
        self.share, self.layer = share, layer

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return x with activations dropped by the keys [B] of its items; without keys, by torch's own generator."""
        if not self.training or self.share == 0:
            return x
        if keys is None:
            return F.dropout(x, self.share)
        return torch.where(kept(keys, self.layer, x.shape[1:], self.share), x * (1 / (1 - self.share)), 0)


def kept(keys: Tensor, layer: int, shape: torch.Size, share: float) -> Tensor:
    """Return which activations are kept, bool [B,*shape].

    Args:
        keys: int64 [B], random, in [0, 2^62).
        layer: 0 or more.
        shape: of the activations of an item.
        share: that is dropped, in [0,1).
    """
    place = torch.arange(shape.numel(), dtype=torch.int32, device=keys.device) + layer * shape.numel()
    mixed = mixed_bits(place * GOLDEN + (keys & 0x7FFFFFFF).to(torch.int32)[:, None])
    return ((mixed & 0x7FFFFFFF) >= int(share * 2**31)).reshape(len(keys), *shape)


def mixed_bits(x: Tensor) -> Tensor:
    """Return a permutation of all int32 numbers in which every bit of x changes about half of the bits [2]."""
    x = (x ^ _shifted(x, 16)) * FIRST
    x = (x ^ _shifted(x, 15)) * SECOND
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return int32 x shifted to the right with zeros from the left."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
