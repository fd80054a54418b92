"""The attention of one layer over grids that are being drawn: what a position offers is computed once, and kept.

    start_row() -> for each column: add_to(column, features) -> set_codes(column, codes) -> start_row() ...

Legend: S samples, C channels, W columns of the grid, n heads, d width of a head, P positions so far, those of the
present row included, K codes.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import NUM_HEADS, CausalAttention


class IncrementalAttention:
    """Runs `CausalAttention` position by position.

    Args:
        layer: unchanged meanwhile.
        embeddings: [K,C] of the codes.
        num_samples: S.
        width: W.
    """

    def __init__(self, layer: CausalAttention, embeddings: Tensor, num_samples: int, width: int) -> None:
        self._layer, self._row, self._inner = layer, -1, NUM_HEADS * layer.head_width
        self._columns = torch.arange(width, device=embeddings.device)
        query, query_bias = _matrix(layer.query)
        by_head = "... (kv n d) -> ... (n kv d)"  # so that a head's part of an entry is one piece
        entry, entry_bias = (rearrange(x, by_head, kv=2, n=NUM_HEADS) for x in _matrix(layer.key_value))
        of_features, of_codes = entry.chunk(2)
        self._weight, self._bias = torch.cat([query, of_features], dim=1), torch.cat([query_bias, entry_bias])
        self._table = embeddings @ of_codes  # [K,(n kv d)], what a code adds to the entry of its position
        self._output, self._output_bias = _matrix(layer.output)
        no_position = rearrange(layer.no_position.detach(), "kv n d -> n 1 (kv d)")
        self._entries = repeat(no_position, "n 1 e -> s n 1 e", s=num_samples)  # [S,n,1+P,(kv d)], P so far

    def start_row(self) -> None:
        """Go to the first column of the next row."""
        self._row += 1
        num_samples, width = len(self._entries), len(self._columns)
        row = self._entries.new_zeros(num_samples, NUM_HEADS, width, self._entries.shape[3])
        self._first, self._entries = self._entries.shape[2], torch.cat([self._entries, row], dim=2)
        present = torch.tensor([self._row], device=row.device)
        self._scores = self._layer.bias(present, (self._row + 1, width))[None]  # [1,n,W,1+P]

    def add_to(self, column: int, features: Tensor) -> None:
        """Add what a position attends to, to its features [S,C], in place."""
        here = self._first + column
        found = torch.addmm(self._bias, features, self._weight)
        query, entry = found[:, None, : self._inner], found[:, self._inner :]
        self._entries[:, :, here] = rearrange(entry, "s (n e) -> s n e", n=NUM_HEADS)  # its code comes in `set_codes`
        key, value = self._entries[:, :, :here].chunk(2, dim=3)
        attended = F.scaled_dot_product_attention(
            rearrange(query, "s 1 (n d) -> s n 1 d", n=NUM_HEADS),
            key,
            value,
            attn_mask=self._scores[:, :, column : column + 1, :here],
        )
        features.addmm_(rearrange(attended, "s n 1 d -> s (n d)"), self._output).add_(self._output_bias)

    def set_codes(self, column: int, codes: Tensor) -> None:
        """Set the codes [S] of a column of the present row, once."""
        entry = rearrange(self._table.index_select(0, codes), "s (n e) -> s n e", n=NUM_HEADS)
        self._entries[:, :, self._first + column] += entry

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [S], indices of the present ones."""
        self._entries = self._entries[samples]


def _matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return a 1x1 convolution as a matrix [in,out] and a bias [out]."""
    assert convolution.bias is not None
    return convolution.weight[:, :, 0, 0].T, convolution.bias
