"""The convolutions and the gate against loops over every position, channel and kernel entry."""

import math

import pytest
import torch
from torch import Tensor

from prior.layers import GatedLayer, HorizontalConv, VerticalConv, gate

from .oracles import generator

CASES = [(kernel, strict) for kernel in (1, 3, 5, 7) for strict in (False, True) if not (kernel == 1 and strict)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def convolve_slowly(x: Tensor, weight: Tensor, bias: Tensor, *, rows: range, columns: range) -> Tensor:
    """Sum over the offsets `rows` x `columns` from each position; what lies outside the grid counts as 0."""
    batch, _, height, width = x.shape
    result = bias[None, :, None, None].repeat(batch, 1, height, width)
    for i in range(height):
        for j in range(width):
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    if 0 <= i + row < height and 0 <= j + column < width:
                        result[:, :, i, j] += x[:, :, i + row, j + column] @ weight[:, :, a, b].T
    return result


def vertical_slowly(conv: VerticalConv, x: Tensor, kernel: int, strict: bool) -> Tensor:
    """Rows above (and, unless strict, the own row), to both sides."""
    radius = kernel // 2
    rows, columns = range(-radius, 0 if strict else 1), range(-radius, radius + 1)
    return convolve_slowly(x, conv.conv.weight, conv.conv.bias, rows=rows, columns=columns)


def horizontal_slowly(conv: HorizontalConv, x: Tensor, kernel: int, strict: bool) -> Tensor:
    """The own row, to the left (and, unless strict, the position itself)."""
    columns = range(-(kernel // 2), 0 if strict else 1)
    return convolve_slowly(x, conv.conv.weight, conv.conv.bias, rows=range(1), columns=columns)


@pytest.mark.parametrize("grid", [(4, 7), (7, 4), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(("kernel", "strict"), CASES)
@torch.no_grad()
def test_the_two_convolutions_are_sums_over_the_past(kernel: int, strict: bool, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = numbers(2, 2, *grid)
    vertical = VerticalConv(2, 3, kernel, strict=strict).double()
    horizontal = HorizontalConv(2, 3, kernel, strict=strict).double()
    torch.testing.assert_close(vertical(x), vertical_slowly(vertical, x, kernel, strict))
    torch.testing.assert_close(horizontal(x), horizontal_slowly(horizontal, x, kernel, strict))


def test_an_impulse_is_seen_below_and_to_the_right() -> None:
    """The pictures at the top of `layers.py`, read from the other end: who sees the one position that is not 0."""
    x = torch.zeros(1, 1, 4, 7)
    x[0, 0, 1, 3] = 1
    drawn = {
        (VerticalConv, True): ["0000000", "0000000", "0111110", "0111110"],
        (VerticalConv, False): ["0000000", "0111110", "0111110", "0111110"],
        (HorizontalConv, True): ["0000000", "0000110", "0000000", "0000000"],
        (HorizontalConv, False): ["0000000", "0001110", "0000000", "0000000"],
    }
    for (kind, strict), rows in drawn.items():
        conv = kind(1, 1, 5, strict=strict)
        torch.nn.init.ones_(conv.conv.weight)
        torch.nn.init.zeros_(conv.conv.bias)
        assert ["".join(str(int(value)) for value in row) for row in conv(x)[0, 0]] == rows


def test_gate() -> None:
    features, gates = [0.0, 1.0, -2.0], [3.0, 0.0, -1.0]
    expected = [math.tanh(f) / (1 + math.exp(-g)) for f, g in zip(features, gates, strict=True)]
    x = torch.tensor([features + gates], dtype=torch.float64)[:, :, None]
    torch.testing.assert_close(gate(x).flatten().tolist(), expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
@torch.no_grad()
def test_a_layer_is_figure_2_of_the_paper(first: bool, num_classes: int) -> None:
    torch.manual_seed(0)
    channels, kernel = 2, 5
    layer = GatedLayer(channels, kernel, label_rows=num_classes, index=0 if first else 2).double()
    vertical, horizontal = numbers(3, channels, 4, 7), numbers(3, channels, 4, 7, seed=1)
    labels = torch.tensor([2, 0, 2]) if num_classes else None

    above = vertical_slowly(layer.vertical, vertical, kernel, first)
    left = horizontal_slowly(layer.horizontal, horizontal, kernel, first)
    if layer.label_bias is not None:
        bias = layer.label_bias.weight[[2, 0, 2], :, None, None]
        above, left = above + bias[:, : 2 * channels], left + bias[:, 2 * channels :]
    link, output = layer.vertical_to_horizontal, layer.output
    both = left + convolve_slowly(above, link.weight, link.bias, rows=range(1), columns=range(1))
    gated = [torch.tanh(x[:, :channels]) * torch.sigmoid(x[:, channels:]) for x in (above, both)]
    update = convolve_slowly(gated[1], output.weight, output.bias, rows=range(1), columns=range(1))

    found_vertical, found_horizontal = layer(vertical, horizontal, vertical, labels)
    torch.testing.assert_close(found_vertical, gated[0])
    torch.testing.assert_close(found_horizontal, update if first else horizontal + update)


@torch.no_grad()
def test_dropout_acts_in_training_on_the_horizontal_update_alone() -> None:
    torch.manual_seed(0)
    layer = GatedLayer(4, 3, dropout=0.5).double()
    vertical, horizontal = numbers(2, 4, 5, 8), numbers(2, 4, 5, 8, seed=1)
    torch.nn.init.eye_(layer.output.weight[:, :, 0, 0])
    torch.nn.init.zeros_(layer.output.bias)
    trained_vertical, trained = layer.train()(vertical, horizontal, vertical, None)
    evaluated_vertical, evaluated = layer.eval()(vertical, horizontal, vertical, None)
    assert torch.equal(trained_vertical, evaluated_vertical)
    ratio = (trained - horizontal) / (evaluated - horizontal)  # 0 where dropped, 1 / (1 - 0.5) where kept
    dropped = ratio.abs() < 1e-9
    assert 100 < int(dropped.sum()) < 220  # of 320, half in the mean
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 2.0))
