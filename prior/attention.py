"""Causal attention of the horizontal stack: a position reads what it needs of all positions before it, near or far [1].

A convolution gives each position before it a fixed weight. Attention weighs them by what they hold, which a stack of
few convolutions cannot. Where it stands, the horizontal stack knows at position o only codes before o, so a position
may attend to itself and to all that come before it in raster order:

    a a a a a
    a a o . .      "a" and o itself are attended to
    . . . . .

How far up and how far to the side a position is adds a learned bias to its weight; distances beyond REACH count as
REACH, so that the parameters do not depend on the size of the grid.

Departures from [1]: added to the stack instead of beside it, every few layers; the bias in place of channels that hold
the coordinates [2].

Legend: B batch, C channels, H W grid, n heads, d width of a head, P = H W positions in raster order.

[1] Chen et al. 2018, PixelSNAIL: An Improved Autoregressive Generative Model, arXiv:1712.09763
[2] Shaw et al. 2018, Self-Attention with Relative Position Representations, arXiv:1803.02155
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

REACH = 31  # rows and columns; farther positions share the bias of this distance
NUM_HEADS = 4


class CausalAttention(nn.Module):
    """Maps [B,C,H,W] to [B,C,H,W]; position o sees o and the positions before it. A new one returns zeros.

    Args:
        channels: C; a head is C / 4 wide, rounded down, and at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_width = max(1, channels // NUM_HEADS)
        inner = NUM_HEADS * self.head_width
        self.to_qkv = nn.Conv2d(channels, 3 * inner, kernel_size=1)
        self.output = nn.Conv2d(inner, channels, kernel_size=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]  # which a convolution with a bias has
        self.row_bias = nn.Parameter(torch.zeros(NUM_HEADS, REACH + 1))  # by rows up
        self.column_bias = nn.Parameter(torch.zeros(NUM_HEADS, 2 * REACH + 1))  # by columns, from REACH to the right

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.to_qkv(x), "b (qkv n d) h w -> qkv b n (h w) d", qkv=3, n=NUM_HEADS)
        mask = self.bias(x.shape[2], x.shape[3]).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(rearrange(attended, "b n (h w) d -> b (n d) h w", h=x.shape[2]))

    def bias(self, height: int, width: int) -> Tensor:
        """Return what is added to the weight [n,P,P] that a position (first) gives another: -inf to those after it."""
        rows, columns = (torch.arange(size, device=self.row_bias.device) for size in (height, width))
        up = (rows[:, None] - rows).clamp(0, REACH)  # [H,H]; what is below is masked
        left = (columns[:, None] - columns).clamp(-REACH, REACH) + REACH  # [W,W]
        by_rows = rearrange(self.row_bias[:, up], "n i k -> n i 1 k 1")
        by_columns = rearrange(self.column_bias[:, left], "n j l -> n 1 j 1 l")
        positions = torch.arange(height * width, device=up.device)
        bias = rearrange(by_rows + by_columns, "n i j k l -> n (i j) (k l)")
        return bias.masked_fill(positions > positions[:, None], float("-inf"))
