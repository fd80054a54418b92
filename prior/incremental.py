"""The network of `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> set_codes(column, codes) -> start_row() ...

A column of few samples is little work, so what counts there is the number of operations. Convolutions are matrix
products that read and write where the values stay, and nothing is copied:

    vertical      rows are stored with positions before samples before (rows of the kernel, channels): what a column of
                  the kernel sees of all positions is one contiguous matrix, and the next column's is shifted by one.
    horizontal    rows are stored with samples before positions: what an output adds to its own position and to those
                  right of it is one product, added in place to what these positions are to be.

The gate is folded into the weights around it (`folded_gate.py`). That leaves four operations for a layer and a column,
into buffers that are made once.

Legend: n samples, L layers, W columns of the grid, C channels, K codes, r = k // 2 columns that a kernel reaches left.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from .folded_gate import FoldedGate, double_features, negated_gate, output_matrix
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
        self._embedded = like.new_zeros(width, num_samples, prior.config.channels)  # codes of the present row
        self._columns = self._embedded.unbind()
        self._vertical = [_VerticalStack(layer, num_samples, width, b) for layer, b in zip(layers, biases, strict=True)]
        self._horizontal = _HorizontalStack(layers, like, num_samples, width)
        self._head = [(_taps(layer)[0], _bias(layer)) for layer in head_convolutions(prior)]
        self._buffers = like.new_zeros(2, width, num_samples, 2 * prior.config.channels)  # of each vertical layer
        self._started = False

    def start_row(self) -> None:
        """Run the vertical stack for the next row, from the codes that were set in the rows above."""
        if self._started:
            self._vertical[0].next_row().copy_(self._embedded)
        self._started = True
        output, linked = self._buffers
        for layer, following, from_above in zip(
            self._vertical, [*self._vertical[1:], None], self._horizontal.from_above, strict=True
        ):
            layer.run(output, linked, from_above)
            if following is not None:
                negated_gate(output, out=following.next_row())

    def features(self, column: int) -> Tensor:
        """Return the horizontal stack's output [n,C] at a column, from the codes that were set to its left.

        Columns are asked for in order, once each; the next call overwrites what this one returned.
        """
        return self._horizontal.run(column)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [n,K] of what `features` returned."""
        (widen, bias), (narrow, last_bias) = self._head
        return torch.addmm(last_bias, torch.addmm(bias, features.relu(), widen).relu_(), narrow)

    def set_codes(self, column: int, codes: Tensor) -> None:
        """Set the codes [n] of a column of the present row, once."""
        embedded = torch.index_select(self._embeddings, 0, codes, out=self._columns[column])
        self._horizontal.look_back(column, embedded)

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [n], indices of the present ones."""
        self._embedded.copy_(self._embedded[:, samples])
        for layer in self._vertical:
            layer.select(samples)


class _VerticalStack:
    """Holds the vertical stack of one layer: its weights as matrices, and the last rows of its input.

    The rows form a ring buffer: the newest row replaces the oldest, and for each place of the oldest there is a copy of
    the weights shifted by as many rows.
    """

    def __init__(self, layer: GatedLayer, num_samples: int, width: int, label_bias: Tensor | None) -> None:
        down, link = layer.vertical.conv, layer.vertical_to_horizontal
        channels, (num_rows, num_columns), reach = down.in_channels, down.kernel_size, layer.vertical.reach
        sign = 1 if layer.first else -1  # of the input, which is the negated output of the gate before
        taps = double_features(rearrange(_taps(down) * sign, "(row col) c out -> col row c out", row=num_rows))
        self.shifted_weights = [list(taps.roll(shift, dims=1).flatten(1, 2)) for shift in range(num_rows)]
        self.oldest = 0  # the place of the oldest row
        self.link = double_features(_taps(link)[0])
        self.link[:channels] /= 2  # which meet the doubled features
        bias, link_bias = (x.expand(num_samples, -1) for x in (_bias(down), _bias(layer.horizontal.conv) + _bias(link)))
        if label_bias is not None:
            above, left = label_bias.chunk(2, dim=1)
            bias, link_bias = bias + above, link_bias + left
        self.bias, self.link_bias = double_features(bias), double_features(link_bias)

        self.padded = down.weight.new_zeros(width + 2 * reach, num_samples, num_rows, channels)
        self.rows = self.padded[reach : reach + width].unbind(2)
        self.seen = [self.padded[tap : tap + width].flatten(2).flatten(0, 1) for tap in range(num_columns)]

    def next_row(self) -> Tensor:
        """Return where the next row [W,n,C] of the input is to be written, in place of the oldest."""
        row = self.rows[self.oldest]
        self.oldest = (self.oldest + 1) % len(self.rows)
        return row

    def select(self, samples: Tensor) -> None:
        """Continue with these samples [n], indices of the present ones."""
        self.padded.copy_(self.padded[:, samples])
        self.bias, self.link_bias = self.bias[samples], self.link_bias[samples]

    def run(self, output: Tensor, linked: Tensor, from_above: Tensor) -> None:
        """Run over the rows that are kept.

        Args:
            output: [W,n,2C], is overwritten with what the gate of this stack takes.
            linked: [W,n,2C], is overwritten.
            from_above: [n,W,2C], is overwritten with what the horizontal stack gets, all biases included.
        """
        output.copy_(self.bias)
        flat = output.flatten(0, 1)  # [(W n),2C]
        for seen, weights in zip(self.seen, self.shifted_weights[self.oldest], strict=True):
            flat.addmm_(seen, weights)
        torch.mm(flat, self.link, out=linked.flatten(0, 1))
        torch.add(linked.transpose(0, 1), self.link_bias[:, None], out=from_above)


class _HorizontalStack:
    """Holds the horizontal stacks of all layers, and what their gates take over one row.

    The first layer sees the embedded codes left of a column, and not the column itself; every later one sees the
    outputs of the layer before, those of the same column included.
    """

    def __init__(self, layers: list[GatedLayer], like: Tensor, num_samples: int, width: int) -> None:
        self.weights = [_rightward(layer.horizontal.conv) for layer in layers]  # [C,(columns 2C)]
        self.output_matrices = [output_matrix(layer.output) for layer in layers]
        channels, reach = layers[0].output.in_channels, max(layer.horizontal.reach for layer in layers)
        before = like.new_zeros(len(layers), num_samples, width + reach, 2 * channels)  # the gate; past W never read
        self.from_above = before[:, :, :width].unbind()  # where they begin, with all biases of the gates
        flat = before.flatten(2)  # [L,n,(columns 2C)]
        self.before = [list(flat[:, :, 2 * channels * column :][..., : 2 * channels]) for column in range(width)]
        self.reached = [
            [
                each[:, 2 * channels * (column + layer.first) :][:, : weights.shape[1]]
                for each, layer, weights in zip(flat, layers, self.weights, strict=True)
            ]
            for column in range(width)
        ]
        self.gate = FoldedGate(like, num_samples, channels)
        self.present = like.new_zeros(num_samples, channels)

    def look_back(self, column: int, embedded: Tensor) -> None:
        """Let the first layer see the embedded codes [n,C] of a column."""
        self.reached[column][0].addmm_(embedded, self.weights[0])

    def run(self, column: int) -> Tensor:
        """Return the last layer's output [n,C] at a column."""
        first, *later = self.before[column]
        torch.mm(self.gate(first), self.output_matrices[0], out=self.present)
        for before, reached, weights, matrix in zip(
            later, self.reached[column][1:], self.weights[1:], self.output_matrices[1:], strict=True
        ):
            reached.addmm_(self.present, weights)
            self.present.addmm_(self.gate(before), matrix)
        return self.present


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


def _rightward(convolution: nn.Conv2d) -> Tensor:
    """Return [in,(columns out)]: what a column gives to the nearest column that sees it, to the next one right of that,
    and so on; what gets it are the outputs before a gate."""
    taps = double_features(_taps(convolution)).flip(0)  # the last tap is the nearest column
    return rearrange(taps, "col c out -> c (col out)").contiguous()
