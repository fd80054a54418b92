"""The same network as `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> put(column, codes) -> start_row() ...

A column of few samples is little work, so what counts there is the number of operations. Convolutions are matrix
products, with positions before samples before channels, so that each tap of a kernel reads one contiguous matrix and
nothing is copied; what the horizontal stack sees of earlier columns is one product for all layers together. The gate
is one sigmoid, by tanh(a) sigmoid(b) = (2 sigmoid(2 a) - 1) sigmoid(b): the 2s and the -1 go into the weights before
and after. That leaves four operations a layer, into buffers that are made once.

Legend: n samples, L layers, W columns of the grid, C channels, K codes, r = k // 2 columns that a kernel reaches left.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import GatedLayer
from .model import GatedPixelCNN


class _Row(NamedTuple):
    """A row that the vertical stack keeps, and views of it."""

    whole: Tensor  # [W+2r,n,C], padded with zeros
    inside: Tensor  # [W,n,C]
    taps: list[Tensor]  # [(W n),C] for each column of the kernel


class _Column(NamedTuple):
    """What the horizontal stack reads and writes at one column: views, made once."""

    from_above: Tensor  # [L,n,2C]
    past: list[Tensor]  # [L-1,n,C] for each column that the kernel reaches left
    first: list[Tensor]  # [n,C], the same of the first layer
    outputs: list[Tensor]  # [n,C] of each layer
    embedded: Tensor  # [n,C], the codes that are put here


class _VerticalStack:
    """The vertical stack of one layer: its weights as matrices, and the last rows of its input."""

    def __init__(self, layer: GatedLayer, num_samples: int, width: int, label_bias: Tensor | None) -> None:
        down, link = layer.vertical.conv, layer.vertical_to_horizontal
        self.width, self.reach, channels = width, layer.vertical.reach, down.in_channels
        scale = 1 if layer.first else 2  # of the input, which is half the gated output of the layer before
        taps = _matrices(down) * scale
        self.weights = rearrange(taps, "(row col) c out -> row col c out", col=down.kernel_size[1])
        self.link = _features_doubled(_matrices(link)[0])
        self.bias = _bias(down).expand(num_samples, -1)
        link_bias = (_bias(layer.horizontal.conv) + _bias(link)).expand(num_samples, -1)
        if label_bias is not None:
            above, left = label_bias.chunk(2, dim=1)
            self.bias, link_bias = self.bias + above, link_bias + left
        self.link_bias = _features_doubled(link_bias)
        empty = down.weight.new_zeros
        kept = [empty(width + 2 * self.reach, num_samples, channels) for _ in self.weights]
        self.rows = [self._views(row) for row in kept]  # oldest first
        self.summed = empty(width, num_samples, 2 * channels)

    def push(self, row: Tensor) -> None:
        """Take the next row [W,n,C] of the input; the oldest is forgotten."""
        self.rows.append(self.rows.pop(0))
        self.rows[-1].inside.copy_(row)

    def select(self, samples: Tensor) -> None:
        """Go on with these samples [n], indices of the present ones."""
        self.rows = [self._views(row.whole[:, samples]) for row in self.rows]
        self.bias, self.link_bias = self.bias[samples], self.link_bias[samples]

    def run(self, to_horizontal: Tensor) -> Tensor:
        """Over the rows that are kept: returns half the gated output [W,n,C]; writes `to_horizontal` [W,n,2C]."""
        self.summed.copy_(self.bias)
        summed = self.summed.flatten(0, 1)  # [(W n),2C]
        for row, weights in zip(self.rows, self.weights, strict=True):
            for tap, weight in zip(row.taps, weights, strict=True):
                summed.addmm_(tap, weight)
        torch.mm(summed, self.link, out=to_horizontal.flatten(0, 1))
        to_horizontal += self.link_bias
        features, gates = self.summed.chunk(2, dim=2)
        features.mul_(2)
        self.summed.sigmoid_()
        return features.mul_(gates).sub_(gates, alpha=0.5)

    def _views(self, row: Tensor) -> "_Row":
        """Of a row [W+2r,n,C]: each tap of the kernel reads W positions, as one matrix [(W n),C]."""
        taps = [row[offset : offset + self.width].flatten(0, 1) for offset in range(2 * self.reach + 1)]
        return _Row(whole=row, inside=row[self.reach : self.reach + self.width], taps=taps)


class IncrementalPrior:
    """`prior` over n grids that are being drawn: rows from the top, columns from the left.

    Args:
        prior: in `eval()` mode, and left alone meanwhile.
        num_samples: n.
        width: W.
        labels: [n] on the prior's device, or None.
    """

    def __init__(self, prior: GatedPixelCNN, num_samples: int, width: int, labels: Tensor | None) -> None:
        layers = [layer for layer in prior.layers if isinstance(layer, GatedLayer)]
        channels, like = prior.config.channels, prior.embedding.weight
        self.embeddings = like.detach()
        biases = [None if layer.label_bias is None or labels is None else layer.label_bias(labels) for layer in layers]
        self.vertical = [_VerticalStack(layer, num_samples, width, b) for layer, b in zip(layers, biases, strict=True)]
        self.started = False

        # The horizontal stack. The first layer sees the embeddings left of the present column and not itself.
        taps = [_matrices(layer.horizontal.conv) for layer in layers]
        taps = [_features_doubled(each) for each in taps]
        first_reach, reach = layers[0].horizontal.reach, prior.config.kernel_size // 2
        self.first_taps = list(taps[0])
        self.past_taps = [torch.stack([each[tap] for each in taps[1:]]) for tap in range(reach) if taps[1:]]
        self.present_taps = [each[reach] for each in taps[1:]]
        self.outputs = [_output_matrix(layer.output) for layer in layers]
        self.from_above = like.new_zeros(len(layers), width, num_samples, 2 * channels)  # with all biases of the gates
        embedded = like.new_zeros(first_reach + width, num_samples, channels)
        self.row = embedded[first_reach:]  # [W,n,C] embedded codes of the present row
        inputs = like.new_zeros(len(layers), reach + width, num_samples, channels)  # of the next layer; the output
        self.columns = [
            _Column(
                from_above=self.from_above[:, column],
                past=[inputs[:-1, column + tap] for tap in range(reach)],
                first=[embedded[column + tap] for tap in range(first_reach)],
                outputs=list(inputs[:, column + reach]),
                embedded=self.row[column],
            )
            for column in range(width)
        ]
        self.before = like.new_zeros(len(layers), num_samples, 2 * channels)  # the gates
        self.first_before, *self.later_before = self.before
        self.gated = like.new_ones(num_samples, 2 * channels + 1)  # see `_output_matrix`
        self.sigmoids, self.product = self.gated[:, :-1], self.gated[:, :channels]
        self.gates = self.gated[:, channels:-1]

        widen, narrow = (layer for layer in prior.to_logits if isinstance(layer, nn.Conv2d))
        self.head = [(_matrices(layer)[0], _bias(layer)) for layer in (widen, narrow)]

    def start_row(self) -> None:
        """Run the vertical stack for the next row, from the codes that were put into the rows above."""
        if self.started:
            self.vertical[0].push(self.row)
        self.started = True
        for index, stack in enumerate(self.vertical):
            output = stack.run(self.from_above[index])
            if index + 1 < len(self.vertical):
                self.vertical[index + 1].push(output)

    def features(self, column: int) -> Tensor:
        """The horizontal stack's output [n,C] at a column, from the codes that were put to its left."""
        here = self.columns[column]
        self.before.copy_(here.from_above)
        for past, weights in zip(here.past, self.past_taps, strict=False):  # one layer has none
            self.before[1:].baddbmm_(past, weights)
        for embedded, weight in zip(here.first, self.first_taps, strict=True):
            self.first_before.addmm_(embedded, weight)
        self._gate(self.first_before)
        present, *outputs = here.outputs
        torch.mm(self.gated, self.outputs[0], out=present)
        for before, weight, output_weight, output in zip(
            self.later_before, self.present_taps, self.outputs[1:], outputs, strict=True
        ):
            self._gate(before.addmm_(present, weight))
            present = torch.addmm(present, self.gated, output_weight, out=output)
        return present

    def logits(self, features: Tensor) -> Tensor:
        """The logits [n,K] of what `features` gave."""
        (widen, bias), (narrow, last_bias) = self.head
        return torch.addmm(last_bias, torch.addmm(bias, features.relu(), widen).relu_(), narrow)

    def put(self, column: int, codes: Tensor) -> None:
        """Set the codes [n] of a column of the present row."""
        torch.index_select(self.embeddings, 0, codes, out=self.columns[column].embedded)

    def select(self, samples: Tensor) -> None:
        """Go on with these samples [n], indices of the present ones; between rows."""
        self.row.copy_(self.row[:, samples])
        for stack in self.vertical:
            stack.select(samples)

    def _gate(self, before: Tensor) -> None:
        """[n,2C] into `gated`: the product of the two sigmoids, the second, and 1."""
        torch.sigmoid(before, out=self.sigmoids)
        self.product.mul_(self.gates)


def _features_doubled(x: Tensor) -> Tensor:
    """[...,2C] with its first half, that tanh is taken of, doubled."""
    features, gates = x.chunk(2, dim=-1)
    return torch.cat([2 * features, gates], dim=-1)


def _output_matrix(output: nn.Conv2d) -> Tensor:
    """[2C+1,C]: a 1x1 convolution of tanh(a) g as a matrix that meets sigmoid(2a) g, g and 1; its bias is last."""
    weight = _matrices(output)[0]
    return torch.cat([2 * weight, -weight, _bias(output)[None]])


def _matrices(convolution: nn.Conv2d) -> Tensor:
    """The weight [out,in,rows,columns] as a matrix [in,out] for each of its taps, row by row."""
    return rearrange(convolution.weight, "out c row col -> (row col) c out").contiguous()


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias
