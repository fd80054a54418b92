"""Causal attention of the horizontal stack: a position reads what it needs of all positions before it, near or far [1].

A convolution gives each position before it a fixed weight. Attention weighs them by what they hold: the code there, and
what the horizontal stack knew when that code was still to come. A position attends to all that come before it in raster
order, not to itself, whose code is not known, and to a learned entry that is no position, so that the first has one:

    a a a a a
    a a o . .      "a" is attended to from o
    . . . . .

How far up and how far to the side a position is adds a learned bias to its weight [2]; distances beyond REACH count as
REACH, so that the parameters do not depend on the size of the grid.

Departures from [1]: added to the stack instead of beside it, every few layers; the bias in place of channels that hold
the coordinates.

Legend: B batch, C channels, H W grid, n heads, d width of a head, P = H W positions in raster order.

[1] Chen et al. 2018, PixelSNAIL: An Improved Autoregressive Generative Model, arXiv:1712.09763
[2] Raffel et al. 2020, Exploring the Limits of Transfer Learning, arXiv:1910.10683, section 2.1 (a bias by distance)
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

REACH = 31  # rows and columns; farther positions share the bias of this distance
NUM_HEADS = 4


class CausalAttention(nn.Module):
    """Maps features and embedded codes [B,C,H,W] each to an update [B,C,H,W]; that at o sees the codes before o alone.

    A new one returns zeros.

    Args:
        channels: C; a head is C / 4 wide, rounded down, and at least 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_width = max(1, channels // NUM_HEADS)
        inner = NUM_HEADS * self.head_width
        self.query = nn.Conv2d(channels, inner, kernel_size=1)
        self.key_value = nn.Conv2d(2 * channels, 2 * inner, kernel_size=1)
        self.output = nn.Conv2d(inner, channels, kernel_size=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]  # which a convolution with a bias has
        self.no_position = nn.Parameter(torch.empty(2, NUM_HEADS, self.head_width))  # its key and its value
        nn.init.normal_(self.no_position, std=0.1)
        self.row_bias = nn.Parameter(torch.zeros(NUM_HEADS, REACH + 1))  # by rows up
        self.column_bias = nn.Parameter(torch.zeros(NUM_HEADS, 2 * REACH + 1))  # by columns, from REACH to the right

    def forward(self, features: Tensor, embedded: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        query = rearrange(self.query(features), "b (n d) h w -> b n (h w) d", n=NUM_HEADS)
        key_value = self.key_value(torch.cat([features, embedded], dim=1))
        at_positions = rearrange(key_value, "b (kv n d) h w -> kv b n (h w) d", kv=2, n=NUM_HEADS)
        no_position = repeat(self.no_position, "kv n d -> kv b n 1 d", b=batch)
        key, value = torch.cat([no_position.to(at_positions.dtype), at_positions], dim=3)
        mask = self.bias(torch.arange(height, device=features.device), (height, width)).to(query.dtype)
        # torch holds all scores [B,n,P,1+P] if heads are strided, or the mask has no batch dimension or has a gradient
        attended = F.scaled_dot_product_attention(query.contiguous(), key, value, attn_mask=mask[None])
        return self.output(rearrange(attended, "b n (h w) d -> b (n d) h w", h=height))

    def bias(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what is added to the scores of the positions in `rows` [R], of a grid (H, W): [n,(R W),1+P].

        Entry 0 is no position, and its bias 0; a position and those after it get -inf.
        """
        height, width = grid
        every_row, columns = (torch.arange(size, device=rows.device) for size in grid)
        up = (rows[:, None] - every_row).clamp(0, REACH)  # [R,H]; what is below is masked
        left = (columns[:, None] - columns).clamp(-REACH, REACH) + REACH  # [W,W]
        by_rows = rearrange(self.row_bias[:, up], "n i k -> n i 1 k 1")
        by_columns = rearrange(self.column_bias[:, left], "n j l -> n 1 j 1 l")
        bias = rearrange(by_rows + by_columns, "n i j k l -> n (i j) (k l)")
        here, there = (rows[:, None] * width + columns).flatten(), torch.arange(height * width, device=rows.device)
        return F.pad(bias.masked_fill(there >= here[:, None], float("-inf")), (1, 0))
