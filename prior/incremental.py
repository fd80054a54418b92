"""The same network as `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> put(column, codes) -> start_row() ...

A column of few samples is little work, so what counts there is the number of operations. Convolutions are matrix
products, with positions before samples before channels, so that each tap of the horizontal kernel reads one contiguous
matrix and nothing is copied; what the horizontal stack sees of earlier columns is one product for all layers together.
The gate is one sigmoid, by tanh(a) sigmoid(b) = (2 sigmoid(2 a) - 1) sigmoid(b): the 2s and the -1 go into the weights
before and after. That leaves four operations a layer, into buffers that are made once.

Legend: n samples, L layers, W columns of the grid, C channels, K codes, r = k // 2 columns that a kernel reaches left.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import GatedLayer
from .model import GatedPixelCNN


class _Column(NamedTuple):
    """What the horizontal stack reads and writes at one column: views, made once."""

    from_above: Tensor  # [L,n,2C]
    past: list[Tensor]  # [L-1,n,C] for each column that the kernel reaches left
    first: list[Tensor]  # [n,C], the same of the first layer
    outputs: list[Tensor]  # [n,C] of each layer
    embedded: Tensor  # [n,C], the codes that are put here


class _VerticalStack:
    """The vertical stack of one layer: its weights as matrices, and the last rows of its input.

    The rows lie as the patches that the kernel sees, each row in a slot of its own, so that one product is the whole
    convolution; the newest row takes the slot of the oldest, and the weights come in the order of the slots.
    """

    def __init__(self, layer: GatedLayer, num_samples: int, width: int, label_bias: Tensor | None) -> None:
        down, link = layer.vertical.conv, layer.vertical_to_horizontal
        channels, (num_rows, num_columns), reach = down.in_channels, down.kernel_size, layer.vertical.reach
        scale = 1 if layer.first else 2  # of the input, which is half the gated output of the layer before
        taps = _features_doubled(rearrange(_matrices(down) * scale, "(row col) c out -> row (col c) out", row=num_rows))
        self.weights = [taps.roll(turn, dims=0).flatten(0, 1) for turn in range(num_rows)]
        self.turn = 0  # the slot of the oldest row
        self.link = _features_doubled(_matrices(link)[0])
        self.link[:channels] /= 2  # which meet the doubled features
        bias, link_bias = (x.expand(num_samples, -1) for x in (_bias(down), _bias(layer.horizontal.conv) + _bias(link)))
        if label_bias is not None:
            above, left = label_bias.chunk(2, dim=1)
            bias, link_bias = bias + above, link_bias + left
        self.bias, self.link_bias = _features_doubled(bias), _features_doubled(link_bias)

        row_of_zeros = down.weight.new_zeros(width + 2 * reach, num_samples, channels)
        self.row = row_of_zeros[reach : reach + width]
        self.windows = row_of_zeros.unfold(0, num_columns, 1).movedim(3, 2)  # [W,n,columns,C] of the row, overlapping
        self.patches = down.weight.new_zeros(width, num_samples, num_rows, num_columns, channels)
        self.slots, self.flat_patches = self.patches.unbind(2), self.patches.flatten(2).flatten(0, 1)

    def push(self, row: Tensor) -> None:
        """Take the next row [W,n,C] of the input; the oldest is forgotten."""
        self.row.copy_(row)
        self.slots[self.turn].copy_(self.windows)
        self.turn = (self.turn + 1) % len(self.slots)

    def select(self, samples: Tensor) -> None:
        """Go on with these samples [n], indices of the present ones."""
        self.patches.copy_(self.patches[:, samples])
        self.bias, self.link_bias = self.bias[samples], self.link_bias[samples]

    def run(self, summed: Tensor, to_horizontal: Tensor) -> Tensor:
        """Over the rows that are kept: writes `to_horizontal` [W,n,2C], spends `summed` [W,n,2C].

        Returns half the gated output, [W,n,C].
        """
        summed.copy_(self.bias)
        flat = summed.flatten(0, 1)  # [(W n),2C]
        flat.addmm_(self.flat_patches, self.weights[self.turn])
        torch.mm(flat, self.link, out=to_horizontal.flatten(0, 1))
        to_horizontal += self.link_bias
        features, gates = summed.sigmoid_().chunk(2, dim=2)
        return features.mul_(gates).sub_(gates, alpha=0.5)


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
        self.summed = like.new_zeros(width, num_samples, 2 * channels)  # for each layer of the vertical stack in turn
        self.from_above = like.new_zeros(len(layers), width, num_samples, 2 * channels)  # with all biases of the gates
        embedded = like.new_zeros(first_reach + width, num_samples, channels)
        self.row = embedded[first_reach:]  # [W,n,C] embedded codes of the present row
        inputs = like.new_zeros(len(layers), reach + width, num_samples, channels)  # of the next layer; the output
        self.columns = [
            _Column(
                from_above=self.from_above[:, column],
                past=[inputs[:-1, column + tap] for tap in range(len(self.past_taps))],
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
            output = stack.run(self.summed, self.from_above[index])
            if index + 1 < len(self.vertical):
                self.vertical[index + 1].push(output)

    def features(self, column: int) -> Tensor:
        """The horizontal stack's output [n,C] at a column, from the codes that were put to its left."""
        here = self.columns[column]
        self.before.copy_(here.from_above)
        for past, weights in zip(here.past, self.past_taps, strict=True):
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
