"""The network of `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> set_codes(column, codes) -> start_row() ...

A column of few samples is little work, so what counts there is the number of operations. Convolutions are matrix
products, with positions before samples before channels, so that each tap of the horizontal kernel reads one contiguous
matrix and nothing is copied; what the horizontal stack sees of earlier columns is one product for all layers together.
The gate is folded into the weights around it (`folded_gate.py`). That leaves four operations a layer, into buffers that
are made once.

Legend: n samples, L layers, W columns of the grid, C channels, K codes, r = k // 2 columns that a kernel reaches left.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .folded_gate import FoldedGate, double_features, half_gated, output_matrix
from .layers import GatedLayer
from .model import GatedPixelCNN


class IncrementalPrior:
    """Runs `prior` over n grids that are being drawn: rows from the top, columns from the left.

    Args:
        prior: in `eval()` mode, and unchanged meanwhile.
        num_samples: n.
        width: W.
        labels: [n] on the prior's device, or None.

    Raises:
        TypeError: the prior has a layer that is not computed here.
    """

    def __init__(self, prior: GatedPixelCNN, num_samples: int, width: int, labels: Tensor | None) -> None:
        layers, like = gated_layers(prior), prior.embedding.weight
        biases = [None if layer.label_bias is None or labels is None else layer.label_bias(labels) for layer in layers]
        self._embeddings = like.detach()
        self._vertical = [_VerticalStack(layer, num_samples, width, b) for layer, b in zip(layers, biases, strict=True)]
        self._horizontal = _HorizontalStack(layers, like, num_samples, width)
        self._head = [(_taps(layer)[0], _bias(layer)) for layer in head_convolutions(prior)]
        self._output = like.new_zeros(width, num_samples, 2 * prior.config.channels)  # of each vertical layer in turn
        self._started = False

    def start_row(self) -> None:
        """Run the vertical stack for the next row, from the codes that were set in the rows above."""
        if self._started:
            self._vertical[0].push(self._horizontal.row)
        self._started = True
        for index, layer in enumerate(self._vertical):
            output = layer.run(self._output, self._horizontal.from_above[index])
            if index + 1 < len(self._vertical):
                self._vertical[index + 1].push(output)

    def features(self, column: int) -> Tensor:
        """Return the horizontal stack's output [n,C] at a column, from the codes that were set to its left."""
        return self._horizontal.run(column)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [n,K] of what `features` returned."""
        (widen, bias), (narrow, last_bias) = self._head
        return torch.addmm(last_bias, torch.addmm(bias, features.relu(), widen).relu_(), narrow)

    def set_codes(self, column: int, codes: Tensor) -> None:
        """Set the codes [n] of a column of the present row."""
        torch.index_select(self._embeddings, 0, codes, out=self._horizontal.columns[column].embedded)

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [n], indices of the present ones."""
        self._horizontal.row.copy_(self._horizontal.row[:, samples])
        for layer in self._vertical:
            layer.select(samples)


class _VerticalStack:
    """Holds the vertical stack of one layer: its weights as matrices, and the last rows of its input.

    The rows are stored as the patches that the kernel sees, so that one product is the whole convolution. They form a
    ring buffer: the newest row replaces the oldest, and for each place of the oldest there is a copy of the weights
    shifted by as many rows.
    """

    def __init__(self, layer: GatedLayer, num_samples: int, width: int, label_bias: Tensor | None) -> None:
        down, link = layer.vertical.conv, layer.vertical_to_horizontal
        channels, (num_rows, num_columns), reach = down.in_channels, down.kernel_size, layer.vertical.reach
        scale = 1 if layer.first else 2  # of the input, which is half the gated output of the layer before
        taps = double_features(rearrange(_taps(down) * scale, "(row col) c out -> row (col c) out", row=num_rows))
        self.shifted_weights = [taps.roll(shift, dims=0).flatten(0, 1) for shift in range(num_rows)]
        self.oldest = 0  # the place of the oldest row
        self.link = double_features(_taps(link)[0])
        self.link[:channels] /= 2  # which meet the doubled features
        bias, link_bias = (x.expand(num_samples, -1) for x in (_bias(down), _bias(layer.horizontal.conv) + _bias(link)))
        if label_bias is not None:
            above, left = label_bias.chunk(2, dim=1)
            bias, link_bias = bias + above, link_bias + left
        self.bias, self.link_bias = double_features(bias), double_features(link_bias)

        padded_row = down.weight.new_zeros(width + 2 * reach, num_samples, channels)
        self.row = padded_row[reach : reach + width]
        self.windows = padded_row.unfold(0, num_columns, 1).movedim(3, 2)  # [W,n,columns,C] of the row, overlapping
        self.patches = down.weight.new_zeros(width, num_samples, num_rows, num_columns, channels)
        self.rows, self.flat_patches = self.patches.unbind(2), self.patches.flatten(2).flatten(0, 1)

    def push(self, row: Tensor) -> None:
        """Take the next row [W,n,C] of the input in place of the oldest."""
        self.row.copy_(row)
        self.rows[self.oldest].copy_(self.windows)
        self.oldest = (self.oldest + 1) % len(self.rows)

    def select(self, samples: Tensor) -> None:
        """Continue with these samples [n], indices of the present ones."""
        self.patches.copy_(self.patches[:, samples])
        self.bias, self.link_bias = self.bias[samples], self.link_bias[samples]

    def run(self, output: Tensor, to_horizontal: Tensor) -> Tensor:
        """Run over the rows that are kept: fills `to_horizontal` [W,n,2C], overwrites `output` [W,n,2C].

        Returns half the gated output, [W,n,C].
        """
        output.copy_(self.bias)
        flat = output.flatten(0, 1)  # [(W n),2C]
        flat.addmm_(self.flat_patches, self.shifted_weights[self.oldest])
        torch.mm(flat, self.link, out=to_horizontal.flatten(0, 1))
        to_horizontal += self.link_bias
        return half_gated(output)


class _Column(NamedTuple):
    """What the horizontal stack reads and writes at one column: views, made once."""

    from_above: Tensor  # [L,n,2C]
    past: list[Tensor]  # [L-1,n,C] for each column that the kernel reaches left
    first: list[Tensor]  # [n,C], the same of the first layer
    outputs: list[Tensor]  # [n,C] of each layer
    embedded: Tensor  # [n,C], the codes that are set here


class _HorizontalStack:
    """Holds the horizontal stacks of all layers, and what they compute over one row.

    The first layer sees the embedded codes left of a column, and not the column itself; every later one sees the
    outputs of the layer before, those of the same column included.
    """

    def __init__(self, layers: list[GatedLayer], like: Tensor, num_samples: int, width: int) -> None:
        channels, (first_layer, *later_layers) = layers[0].output.in_channels, layers
        first_reach, reach = first_layer.horizontal.reach, layers[-1].horizontal.reach
        taps = [double_features(_taps(layer.horizontal.conv)) for layer in later_layers]
        self.first_taps = list(double_features(_taps(first_layer.horizontal.conv)))
        self.past_taps = [torch.stack([each[tap] for each in taps]) for tap in range(reach) if taps]
        self.present_taps = [each[reach] for each in taps]
        self.output_matrices = [output_matrix(layer.output) for layer in layers]

        self.from_above = like.new_zeros(len(layers), width, num_samples, 2 * channels)  # with all biases of the gates
        embedded = like.new_zeros(first_reach + width, num_samples, channels)
        self.row = embedded[first_reach:]  # [W,n,C] embedded codes of the present row
        outputs = like.new_zeros(len(layers), reach + width, num_samples, channels)
        self.columns = [
            _Column(
                from_above=self.from_above[:, column],
                past=[outputs[:-1, column + tap] for tap in range(len(self.past_taps))],
                first=[embedded[column + tap] for tap in range(first_reach)],
                outputs=list(outputs[:, column + reach]),
                embedded=self.row[column],
            )
            for column in range(width)
        ]
        self.before = like.new_zeros(len(layers), num_samples, 2 * channels)  # what the gates take
        self.first_before, *self.later_before = self.before
        self.gate = FoldedGate(like, num_samples, channels)

    def run(self, column: int) -> Tensor:
        """Return the last layer's output [n,C] at a column."""
        here = self.columns[column]
        self.before.copy_(here.from_above)
        for past, weights in zip(here.past, self.past_taps, strict=True):
            self.before[1:].baddbmm_(past, weights)
        for embedded, weight in zip(here.first, self.first_taps, strict=True):
            self.first_before.addmm_(embedded, weight)
        present, *outputs = here.outputs
        torch.mm(self.gate(self.first_before), self.output_matrices[0], out=present)
        for before, weight, matrix, output in zip(
            self.later_before, self.present_taps, self.output_matrices[1:], outputs, strict=True
        ):
            gated = self.gate(before.addmm_(present, weight))
            present = torch.addmm(present, gated, matrix, out=output)
        return present


def gated_layers(prior: GatedPixelCNN) -> list[GatedLayer]:
    """Return the layers of the prior. Raise TypeError for one of a type that is not computed here."""
    for index, layer in enumerate(prior.layers):
        if type(layer) is not GatedLayer:
            raise TypeError(f"layer {index}: expected a GatedLayer, got a {type(layer).__name__}")
    return [layer for layer in prior.layers if isinstance(layer, GatedLayer)]


def head_convolutions(prior: GatedPixelCNN) -> list[nn.Conv2d]:
    """Return the two 1x1 convolutions that end in logits. Raise TypeError unless the head is ReLU, 1x1, ReLU, 1x1."""
    found = [type(layer) for layer in prior.to_logits]
    if found != [nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]:
        raise TypeError(f"to_logits: expected ReLU, Conv2d, ReLU, Conv2d, got {[kind.__name__ for kind in found]}")
    return [layer for layer in prior.to_logits if isinstance(layer, nn.Conv2d)]


def _taps(convolution: nn.Conv2d) -> Tensor:
    """Return the weight [out,in,rows,columns] as a matrix [in,out] for each of its taps, row by row."""
    return rearrange(convolution.weight, "out c row col -> (row col) c out").contiguous()


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias
