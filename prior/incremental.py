"""The network of `GatedPixelCNN.forward`, one row and one column at a time, each activation computed once.

Drawing needs the logits of a position only when all codes before it are there. So the vertical stack, which sees the
rows above, runs once a row, for all columns together; the horizontal stack runs once a column. What a later position
needs is kept: of the vertical stack the last rows of each layer's input, of the horizontal stack the present row.
Over a grid this is the arithmetic of one forward pass.

    start_row() -> for each column: features(column) -> logits -> choose -> set_codes(column, codes) -> start_row() ...

A column of few samples is little work, so what counts there is the number of operations. Convolutions are matrix
products that read and write where the values stay (`kept_rows.py` for the vertical stack); what an output of the
horizontal stack adds to its own position and to those right of it is one product. The first layer sees codes, so its
convolutions look up in tables. The gate is folded into the weights around it (`folded_gate.py`). That leaves four
operations for a layer and a column, into buffers that are made once.

Legend: n samples, L layers, W columns of the grid, C channels, K codes.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from .folded_gate import FoldedGate, double_features, negated_gate, output_matrix
from .incremental_attention import IncrementalAttention
from .kept_rows import KeptCodes, KeptRows
from .layers import GatedLayer
from .model import GatedPixelCNN


class IncrementalPrior:
    """Runs `prior` over n grids that are being drawn: rows from the top, columns from the left.

    Args:
        prior: in `eval()` mode, and unchanged meanwhile.
        num_samples: n.
        width: W.
        labels: [n] on the prior's device, or None.
        vertical_dtype: in which the vertical stack is computed; None for that of the prior. What it gives the
            horizontal stack, the residual stream and the logits stay in that of the prior. bfloat16 is faster for many
            grids, on processors that multiply in it, and slower for one (benchmarks/README.md).

    Raises:
        TypeError: the prior has a layer that is not computed here.
    """

    def __init__(
        self,
        prior: GatedPixelCNN,
        num_samples: int,
        width: int,
        labels: Tensor | None,
        *,
        vertical_dtype: torch.dtype | None = None,
    ) -> None:
        layers, embeddings = gated_layers(prior), prior.embedding.weight.detach()
        dtype = vertical_dtype or embeddings.dtype
        biases = [None if layer.label_bias is None or labels is None else layer.label_bias(labels) for layer in layers]
        self._embeddings = embeddings
        self._codes = torch.zeros(width, num_samples, dtype=torch.int64, device=embeddings.device)  # of the present row
        self._columns = self._codes.unbind()
        self._rows = [_kept_rows(layer, embeddings, num_samples, width, dtype) for layer in layers]
        self._vertical = [_VerticalStack(layer, num_samples, b, dtype) for layer, b in zip(layers, biases, strict=True)]
        attention = [
            None if layer.attention is None else IncrementalAttention(layer.attention, embeddings, num_samples, width)
            for layer in layers
        ]
        self._attending = [each for each in attention if each is not None]
        self._horizontal = _HorizontalStack(layers, attention, embeddings, num_samples, width)
        self._head = [(_taps(layer)[0], _bias(layer)) for layer in head_convolutions(prior)]
        size = (width, num_samples, 2 * prior.config.channels)
        self._buffers = embeddings.new_zeros(2, *size, dtype=dtype)  # of each layer's vertical stack in turn
        self._started = False

    def start_row(self) -> None:
        """Run the vertical stack for the next row, from the codes that were set in the rows above."""
        first, *others = self._rows
        if self._started:
            first.next_row().copy_(self._codes if isinstance(first, KeptCodes) else self._embeddings[self._codes])
        self._started = True
        output, linked = self._buffers
        for index, layer in enumerate(self._vertical):
            layer.run(self._rows[index], output, linked, self._horizontal.from_above[index])
            if index < len(others):
                negated_gate(output, out=others[index].next_row())
        for attention in self._attending:
            attention.start_row()

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
        self._columns[column].copy_(codes)
        self._horizontal.look_back(column, codes)
        for attention in self._attending:
            attention.set_codes(column, codes)

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [n], indices of the present ones."""
        self._codes.copy_(self._codes[:, samples])
        for rows, layer in zip(self._rows, self._vertical, strict=True):
            rows.select(samples)
            layer.select(samples)
        for attention in self._attending:
            attention.select(samples)


class _VerticalStack:
    """Holds the biases of one layer's vertical stack, and its link to the horizontal stack as a matrix."""

    def __init__(self, layer: GatedLayer, num_samples: int, label_bias: Tensor | None, dtype: torch.dtype) -> None:
        down, link = layer.vertical.conv, layer.vertical_to_horizontal
        matrix = double_features(_taps(link)[0])
        matrix[: down.in_channels] /= 2  # which meet the doubled features
        self.link = matrix.to(dtype)
        bias, link_bias = (x.expand(num_samples, -1) for x in (_bias(down), _bias(layer.horizontal.conv) + _bias(link)))
        if label_bias is not None:
            above, left = label_bias.chunk(2, dim=1)
            bias, link_bias = bias + above, link_bias + left
        self.bias, self.link_bias = double_features(bias), double_features(link_bias)

    def select(self, samples: Tensor) -> None:
        """Continue with these samples [n], indices of the present ones."""
        self.bias, self.link_bias = self.bias[samples], self.link_bias[samples]

    def run(self, rows: KeptRows | KeptCodes, output: Tensor, linked: Tensor, from_above: Tensor) -> None:
        """Run over the rows that are kept.

        Args:
            rows: the input.
            output: [W,n,2C], is overwritten with what the gate of this stack takes.
            linked: [W,n,2C], is overwritten.
            from_above: [n,W,2C], is overwritten with what the horizontal stack gets, all biases included.
        """
        output.copy_(self.bias)
        flat = output.flatten(0, 1)  # [(W n),2C]
        rows.add_to(flat)
        torch.mm(flat, self.link, out=linked.flatten(0, 1))
        torch.add(linked.transpose(0, 1), self.link_bias[:, None], out=from_above)


class _HorizontalStack:
    """Holds the horizontal stacks of all layers, and what their gates take over one row.

    The first layer sees the embedded codes left of a column, and not the column itself; every later one sees the
    outputs of the layer before, those of the same column included.
    """

    def __init__(
        self,
        layers: list[GatedLayer],
        attention: list[IncrementalAttention | None],
        embeddings: Tensor,
        num_samples: int,
        width: int,
    ) -> None:
        first_weights, *weights = [_rightward(layer.horizontal.conv) for layer in layers]
        self.table = embeddings @ first_weights  # [K,(columns 2C)], what each code gives to the columns right of it
        self.first_matrix, *matrices = [output_matrix(layer.output) for layer in layers]
        channels, reach = layers[0].output.in_channels, max(layer.horizontal.reach for layer in layers)
        # what the gates take, with samples before positions: what a column gives is one matrix; past W nothing is read
        before = embeddings.new_zeros(len(layers), num_samples, width + reach, 2 * channels)
        self.from_above = before[:, :, :width].unbind()  # where it begins, with all biases
        self.first_before, *later_before = [list(each.unbind(1)) for each in before]
        first_flat, *flat = before.flatten(2)  # [n,(columns 2C)]
        size = 2 * channels
        self.first_reached = first_flat[:, size:].unfold(1, self.table.shape[1], size).unbind(1)
        reached = [x.unfold(1, w.shape[1], size).unbind(1) for x, w in zip(flat, weights, strict=True)]
        layered = list(zip(later_before, reached, weights, matrices, attention[1:], strict=True))
        self.later = [[(b[column], r[column], w, m, a) for b, r, w, m, a in layered] for column in range(width)]
        self.gate = FoldedGate(embeddings, num_samples, channels)
        self.present = embeddings.new_zeros(num_samples, channels)

    def look_back(self, column: int, codes: Tensor) -> None:
        """Let the first layer see the codes [n] of a column, from the columns right of it."""
        self.first_reached[column].add_(self.table.index_select(0, codes))

    def run(self, column: int) -> Tensor:
        """Return the last layer's output [n,C] at a column."""
        present = torch.mm(self.gate(self.first_before[column]), self.first_matrix, out=self.present)
        for before, reached, weights, matrix, attention in self.later[column]:
            reached.addmm_(present, weights)
            present.addmm_(self.gate(before), matrix)
            if attention is not None:
                attention.add_to(column, present)
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


def _kept_rows(
    layer: GatedLayer, embeddings: Tensor, num_samples: int, width: int, dtype: torch.dtype
) -> KeptRows | KeptCodes:
    """Return the input of a layer's vertical stack, no row there yet."""
    convolution = layer.vertical.conv
    taps = double_features(rearrange(convolution.weight, "out c row col -> row col c out"))
    if not layer.first:
        return KeptRows(-taps.to(dtype), num_samples, width)  # which meet the negated output of the gate before
    if embeddings.device.type == "cpu" and len(embeddings) <= num_samples * width:  # the table costs as much as one row
        return KeptCodes(embeddings, taps, num_samples, width)
    return KeptRows(taps.to(dtype), num_samples, width)


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
