"""The same network as `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> put(column, codes) -> start_row() ...

Convolutions are matrix products here: with positions before samples before channels, the input of a kernel's offset is
one contiguous matrix, so that nothing is copied.

Legend: n samples, W columns of the grid, C channels, K codes, R rows and k columns of a kernel, r = k // 2.
"""

import torch
from einops import rearrange
from torch import Tensor

from .layers import GatedLayer
from .model import GatedPixelCNN


class _LayerCache:
    """The weights of one layer as matrices, and what is kept of its inputs."""

    def __init__(self, layer: GatedLayer, num_samples: int, width: int, labels: Tensor | None) -> None:
        down, across = layer.vertical.conv, layer.horizontal.conv
        channels = down.in_channels
        self.first, self.width, self.reach = layer.first, width, layer.vertical.reach
        self.down_weights = rearrange(down.weight, "out c row col -> row col c out").contiguous()
        self.across_weight = rearrange(across.weight, "out c 1 col -> (col c) out").contiguous()
        self.link_weight = rearrange(layer.vertical_to_horizontal.weight, "out c 1 1 -> c out").contiguous()
        self.output_weight = rearrange(layer.output.weight, "out c 1 1 -> c out").contiguous()
        assert down.bias is not None
        assert across.bias is not None
        assert layer.vertical_to_horizontal.bias is not None
        assert layer.output.bias is not None
        self.output_bias = layer.output.bias
        self.down_bias = down.bias.expand(num_samples, -1)
        self.across_bias = (across.bias + layer.vertical_to_horizontal.bias).expand(num_samples, -1)
        if layer.label_bias is not None and labels is not None:
            above, left = layer.label_bias(labels).chunk(2, dim=1)
            self.down_bias, self.across_bias = self.down_bias + above, self.across_bias + left
        rows = self.down_weights.shape[0]
        empty = down.weight.new_zeros
        self.above = [empty(width + 2 * self.reach, num_samples, channels) for _ in range(rows)]  # oldest first
        self.left = empty(num_samples, width + self.reach, channels)  # the present row, after r columns of padding
        self.from_above = empty(width, num_samples, 2 * channels)  # what the vertical stack gives to each column

    def push_row(self, row: Tensor) -> None:
        """Take the next row [W,n,C] of the vertical stack's input; the oldest is forgotten."""
        self.above.append(self.above.pop(0))
        self.above[-1][self.reach : self.reach + self.width] = row

    def run_row(self) -> Tensor:
        """The vertical stack over the rows in `above`: returns its gated output [W,n,C], keeps what goes across."""
        summed = self.down_bias.repeat(self.width, 1)  # [(W n),2C]
        for row, weights in zip(self.above, self.down_weights, strict=True):
            for offset, weight in enumerate(weights):
                summed.addmm_(row[offset : offset + self.width].flatten(0, 1), weight)
        across = torch.mm(summed, self.link_weight, out=self.from_above.flatten(0, 1))
        across.view_as(self.from_above).add_(self.across_bias)
        return _gate(summed).view(self.width, -1, summed.shape[1] // 2)

    def run_column(self, column: int, present: Tensor) -> Tensor:
        """The horizontal stack at a column, whose input is `present` [n,C]: its output [n,C]."""
        self.left[:, column + self.reach] = present  # of a first layer not seen, and replaced by `put`
        reached = self.across_weight.shape[0] // present.shape[1]
        seen = self.left[:, column : column + reached].flatten(1)  # a view: the columns of a sample lie side by side
        update = _gate(torch.addmm(self.from_above[column], seen, self.across_weight))
        residual = self.output_bias if self.first else present + self.output_bias
        return torch.addmm(residual, update, self.output_weight)


class IncrementalPrior:
    """`prior` over n grids that are being drawn: rows from the top, columns from the left.

    Args:
        prior: in `eval()` mode, and left alone meanwhile.
        num_samples: n.
        width: W.
        labels: [n] on the prior's device, or None.
    """

    def __init__(self, prior: GatedPixelCNN, num_samples: int, width: int, labels: Tensor | None) -> None:
        self.embedding, self.to_logits = prior.embedding, prior.to_logits
        self.layers = [_LayerCache(layer, num_samples, width, labels) for layer in _layers(prior)]
        self.row = prior.embedding.weight.new_zeros(width, num_samples, prior.config.channels)
        self.started = False

    def start_row(self) -> None:
        """Run the vertical stack for the next row, from the codes that were put into the rows above."""
        if self.started:
            self.layers[0].push_row(self.row)
        self.started = True
        for index, layer in enumerate(self.layers):
            output = layer.run_row()
            if index + 1 < len(self.layers):
                self.layers[index + 1].push_row(output)

    def features(self, column: int) -> Tensor:
        """The horizontal stack's output [n,C] at a column, from the codes that were put to its left."""
        present = self.row[column]
        for layer in self.layers:
            present = layer.run_column(column, present)
        return present

    def logits(self, features: Tensor) -> Tensor:
        """The logits [n,K] of what `features` gave."""
        return self.to_logits(features[:, :, None, None])[:, :, 0, 0]

    def put(self, column: int, codes: Tensor) -> None:
        """Set the codes [n] of a column of the present row."""
        self.row[column] = self.embedding(codes)
        first = self.layers[0]
        first.left[:, column + first.reach] = self.row[column]


def _layers(prior: GatedPixelCNN) -> list[GatedLayer]:
    return [layer for layer in prior.layers if isinstance(layer, GatedLayer)]


def _gate(x: Tensor) -> Tensor:
    features, gates = x.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gates)
