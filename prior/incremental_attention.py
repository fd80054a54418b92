"""The attention of one layer over grids that are being drawn: what a position offers is computed once, and kept.

    start_row(row) -> for each column: add_to(column, features) -> ... -> set_codes(column, codes) -> start_row(row + 1)

Legend: S samples, C channels, H W grid, n heads, d width of a head, P = H W positions in raster order, K codes.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import NUM_HEADS, CausalAttention


class IncrementalAttention:
    """Runs `CausalAttention` position by position.

    Args:
        layer: unchanged meanwhile.
        embeddings: [K,C] of the codes.
        num_samples: S.
        grid: (H, W).
    """

    def __init__(self, layer: CausalAttention, embeddings: Tensor, num_samples: int, grid: tuple[int, int]) -> None:
        self._layer, self._grid, self._width = layer, grid, layer.head_width
        query, query_bias = _matrix(layer.query)
        entry, entry_bias = _matrix(layer.key_value)
        entry, entry_bias = (
            rearrange(x, "... (kv n d) -> ... (n kv d)", kv=2, n=NUM_HEADS) for x in (entry, entry_bias)
        )
        of_features, of_codes = entry.chunk(2)
        self._weight, self._bias = torch.cat([query, of_features], dim=1), torch.cat([query_bias, entry_bias])
        self._table = embeddings @ of_codes  # [K,(n kv d)], what each code adds to the entry of its position
        self._output, self._output_bias = _matrix(layer.output)
        positions = grid[0] * grid[1]
        self._entries = embeddings.new_empty(num_samples, NUM_HEADS, 1 + positions, 2 * layer.head_width)
        self._entries[:, :, 0] = rearrange(layer.no_position.detach(), "kv n d -> n (kv d)")

    def start_row(self, row: int) -> None:
        """Go to the first column of a row."""
        self._first = row * self._grid[1]
        rows = torch.tensor([row], device=self._entries.device)
        self._scores = self._layer.bias(rows, self._grid)  # [n,W,1+P]

    def add_to(self, column: int, features: Tensor) -> None:
        """Add what a position attends to, to its features [S,C], in place."""
        count, past = len(features), 1 + self._first + column
        query, entry = torch.addmm(self._bias, features, self._weight).split([self._inner, 2 * self._inner], dim=1)
        self._entries[:, :, past] = entry.view(count, NUM_HEADS, -1)  # to which its code is added when it is known
        key, value = self._entries[:, :, :past].chunk(2, dim=3)
        mask = self._scores[:, column, None, :past]
        attended = F.scaled_dot_product_attention(query.view(count, NUM_HEADS, 1, -1), key, value, attn_mask=mask)
        features.addmm_(attended.view(count, self._inner), self._output).add_(self._output_bias)

    def set_codes(self, column: int, codes: Tensor) -> None:
        """Set the codes [S] of a column of the present row, once."""
        entry = self._table.index_select(0, codes).view(len(codes), NUM_HEADS, -1)
        self._entries[:, :, 1 + self._first + column] += entry

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [S], indices of the present ones."""
        self._entries = self._entries[samples]

    @property
    def _inner(self) -> int:
        return NUM_HEADS * self._width


def _matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return a 1x1 convolution as a matrix [in,out] and a bias [out]."""
    assert convolution.bias is not None
    return convolution.weight[:, :, 0, 0].T, convolution.bias
