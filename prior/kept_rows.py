"""The last rows of a layer's input, and the vertical convolution over them.

The rows form a ring buffer: the newest replaces the oldest, and for each place of the oldest there is a copy of the
weights (or of where they are in a table) shifted by as many rows.

Legend: n samples, W columns of the grid, R rows and S columns of the kernel, C channels, K codes.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


class KeptRows:
    """Keeps rows of vectors, with positions before samples before (rows, channels).

    So what a column of the kernel sees of all positions is one contiguous matrix, the next column's is shifted by one,
    and no patch is copied.

    Args:
        taps: [R,S,C,C_out].
        num_samples: n.
        width: W.
    """

    def __init__(self, taps: Tensor, num_samples: int, width: int) -> None:
        num_rows, num_columns, channels, _ = taps.shape
        reach, taps = num_columns // 2, taps.transpose(0, 1)  # [S,R,C,C_out]
        self._shifted_weights = [list(taps.roll(shift, dims=1).flatten(1, 2)) for shift in range(num_rows)]
        self._oldest = 0
        self._padded = taps.new_zeros(width + 2 * reach, num_samples, num_rows, channels)
        self._rows = self._padded[reach : reach + width].unbind(2)
        self._seen = [self._padded[tap : tap + width].flatten(2).flatten(0, 1) for tap in range(num_columns)]

    def next_row(self) -> Tensor:
        """Return where the next row [W,n,C] is to be written, in place of the oldest."""
        row = self._rows[self._oldest]
        self._oldest = (self._oldest + 1) % len(self._rows)
        return row

    def add_to(self, outputs: Tensor) -> None:
        """Add the convolution of the rows to `outputs` [(W n),C_out]."""
        for seen, weights in zip(self._seen, self._shifted_weights[self._oldest], strict=True):
            outputs.addmm_(seen, weights)

    def select(self, samples: Tensor) -> None:
        """Continue with these samples [n], indices of the present ones."""
        self._padded.copy_(self._padded[:, samples])


class KeptCodes:
    """Keeps rows of codes, which is what the first layer sees.

    What a code adds to an output at a tap of the kernel is one of K vectors. They are computed once, and the
    convolution is a sum of R S rows of a table; the table costs what K positions cost as products.

    Args:
        embeddings: [K,C].
        taps: [R,S,C,C_out].
        num_samples: n.
        width: W.
    """

    def __init__(self, embeddings: Tensor, taps: Tensor, num_samples: int, width: int) -> None:
        num_rows, num_columns, _, _ = taps.shape
        num_codes, reach = len(embeddings), num_columns // 2
        self._table = F.pad(embeddings @ taps, (0, 0, 0, 1)).flatten(0, 2)  # [(R S K+1),C_out]; the last for no code
        starts = torch.arange(0, len(self._table), num_codes + 1, device=taps.device).view(num_rows, num_columns)
        self._shifted_starts = [starts.roll(shift, dims=0) for shift in range(num_rows)]
        self._oldest = 0
        self._padded = torch.full((width + 2 * reach, num_samples, num_rows), num_codes, device=taps.device)
        self._rows = self._padded[reach : reach + width].unbind(2)
        self._seen = self._padded.unfold(0, num_columns, 1)  # [W,n,R,S], overlapping

    def next_row(self) -> Tensor:
        """Return where the next row [W,n] is to be written, in place of the oldest."""
        row = self._rows[self._oldest]
        self._oldest = (self._oldest + 1) % len(self._rows)
        return row

    def add_to(self, outputs: Tensor) -> None:
        """Add the convolution of the rows to `outputs` [(W n),C_out]."""
        entries = rearrange(self._seen + self._shifted_starts[self._oldest], "w n row col -> (w n) (row col)")
        outputs += F.embedding_bag(entries, self._table, mode="sum")

    def select(self, samples: Tensor) -> None:
        """Continue with these samples [n], indices of the present ones."""
        self._padded.copy_(self._padded[:, samples])
