"""The gated layer of the PixelCNN: two stacks of convolutions that see the past of a position and nothing else [1].

The vertical stack reads the rows above; the horizontal stack reads what is left of the position in its own row, and
what the vertical stack found. For the position o, with a kernel of 3 after a first of 5 ("v" vertical, "h" horizontal):

    first layer (type A)        every later layer
    v v v v v                   . . . . .
    v v v v v                   . v v v .       at row i the vertical stack knows rows < i already,
    h h o . .                   . v v v .       so it may look at its own row: this is what closes
                                . h o . .       the blind spot (shifting in every layer reopens it)

Causality is a matter of shape: kernels reach up and left only, the input is padded there, and the result cropped; no
weight is masked, so nothing (optimizer, averaging, compilation) can open the future.

Departures from the paper: none in the gate, the stacks or where they meet; the first layer is the only shifted one, and
a layer may end in causal attention over the horizontal stack (`attention.py`).

Legend: B batch, C channels of a stack, H W grid.

[1] van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328, figure 2 and eq. 4
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CausalAttention
from .dropout import ItemDropout


class VerticalConv(nn.Module):
    """Maps [B,C_in,H,W] to [B,C_out,H,W]; row i sees rows i-k//2 .. i, with `strict` only to i-1, and k columns."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, strict: bool = False) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        rows = self.reach if strict else self.reach + 1
        self.conv = nn.Conv2d(channels_in, channels_out, (rows, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.reach, self.reach, self.reach, 0))  # left, right, top, bottom
        return self.conv(padded)[:, :, : x.shape[2]]  # a strict kernel leaves one row more: it belongs to row H


class HorizontalConv(nn.Module):
    """Maps [B,C_in,H,W] to [B,C_out,H,W]; column j sees columns j-k//2 .. j of its row, with `strict` only to j-1."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, *, strict: bool = False) -> None:
        super().__init__()
        self.reach = kernel_size // 2
        columns = self.reach if strict else self.reach + 1
        self.conv = nn.Conv2d(channels_in, channels_out, (1, columns))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.reach, 0, 0, 0))
        return self.conv(padded)[:, :, :, : x.shape[3]]


def gate(x: Tensor) -> Tensor:
    """Return tanh(first half) * sigmoid(second half) [B,C,...] of x [B,2C,...] [1, eq. 2]."""
    features, gates = x.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gates)


class LabelTable(nn.Embedding):
    """Maps labels [B] to rows [B,D]; -1, which is no label, to the last one."""

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels.remainder(self.num_embeddings))


class GatedLayer(nn.Module):
    """One layer of both stacks: (vertical, horizontal) [B,C,H,W] each, with the embedded codes [B,C,H,W] -> the same.

    Args:
        channels: C.
        kernel_size: odd.
        label_rows: labels that bias both stacks here; 0 for none.
        hides_labels: the last of these rows is for "no label", -1.
        index: of the layer. The first, 0, is of type A: the position itself is hidden from both stacks, and there is no
            residual to leak it.
        attention: the horizontal stack attends to all positions before, after the gate.
        dropout: share of the gated horizontal activations dropped in training.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        label_rows: int = 0,
        hides_labels: bool = False,
        index: int = 1,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = index == 0
        self.vertical = VerticalConv(channels, 2 * channels, kernel_size, strict=self.first)
        self.horizontal = HorizontalConv(channels, 2 * channels, kernel_size, strict=self.first)
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, kernel_size=1)
        self.dropout = ItemDropout(dropout, index)
        self.output = nn.Conv2d(channels, channels, kernel_size=1)
        self.attention = CausalAttention(channels) if attention else None
        table = LabelTable if hides_labels else nn.Embedding  # which refuses -1
        self.label_bias = table(label_rows, 4 * channels) if label_rows else None

    def forward(
        self,
        vertical: Tensor,
        horizontal: Tensor,
        embedded: Tensor,
        labels: Tensor | None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the stacks know after this layer; `keys` [B] are for `ItemDropout`."""
        from_above, from_left = self.vertical(vertical), self.horizontal(horizontal)
        if self.label_bias is not None and labels is not None:
            bias = rearrange(self.label_bias(labels), "b (stack c) -> stack b c 1 1", stack=2)
            from_above, from_left = from_above + bias[0], from_left + bias[1]
        from_left = from_left + self.vertical_to_horizontal(from_above)
        update = self.output(self.dropout(gate(from_left), keys))
        horizontal = update if self.first else horizontal + update
        if self.attention is not None:
            horizontal = horizontal + self.attention(horizontal, embedded)
        return gate(from_above), horizontal
