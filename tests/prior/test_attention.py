"""Causal attention against a slow oracle: one position, one head, one sum at a time."""

import math

import pytest
import torch
from torch import Tensor

from prior import attention
from prior.attention import NUM_HEADS, REACH, CausalAttention

from .oracles import Grid

GRIDS = [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3)]


def random_attention(channels: int, *, seed: int = 0) -> CausalAttention:
    """An attention in float64 all of whose parameters matter: a new one returns zeros."""
    torch.manual_seed(seed)
    layer = CausalAttention(channels).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def attend_slowly(layer: CausalAttention, x: Tensor) -> Tensor:
    """The same, with loops over grids, heads and positions, and the distances clamped by hand."""
    _, channels, height, width = x.shape
    d = layer.head_width
    inner = NUM_HEADS * d
    weight, bias = layer.to_qkv.weight[:, :, 0, 0], layer.to_qkv.bias
    result = torch.zeros_like(x)
    for b, image in enumerate(x):
        for i in range(height):
            for j in range(width):
                past = [(r, c) for r in range(height) for c in range(width) if (r, c) <= (i, j)]
                attended = []
                for head in range(NUM_HEADS):
                    q, k, v = (slice(part * inner + head * d, part * inner + (head + 1) * d) for part in range(3))
                    query = weight[q] @ image[:, i, j] + bias[q]
                    scores = []
                    for r, c in past:
                        key = weight[k] @ image[:, r, c] + bias[k]
                        up, left = min(i - r, attention.REACH), max(-attention.REACH, min(j - c, attention.REACH))
                        extra = layer.row_bias[head, up] + layer.column_bias[head, left + attention.REACH]
                        scores.append(query @ key / math.sqrt(d) + extra)
                    shares = torch.stack(scores).softmax(dim=0)
                    attended.append(sum(s * (weight[v] @ image[:, r, c] + bias[v]) for s, (r, c) in zip(shares, past)))
                result[b, :, i, j] = layer.output.weight[:, :, 0, 0] @ torch.cat(attended) + layer.output.bias
    assert channels == result.shape[1]
    return result


@pytest.mark.parametrize("channels", [8, 6, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_is_the_sum_written_out(grid: Grid, channels: int) -> None:
    layer = random_attention(channels)
    x = torch.randn(2, channels, *grid, dtype=torch.float64)
    torch.testing.assert_close(layer(x), attend_slowly(layer, x))


def test_distances_beyond_the_reach_count_as_the_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REACH", 1)
    layer = random_attention(4)
    assert layer.row_bias.shape == (NUM_HEADS, 2)
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), attend_slowly(layer, x))


def test_a_grid_wider_than_the_reach_is_attended_to_as_a_whole() -> None:
    layer = random_attention(4)
    x = torch.randn(1, 4, 2, REACH + 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 1, 0].sum(), x)
    seen = gradient[0].abs().sum(dim=0) > 0
    assert bool(seen[0].all())
    assert bool(seen[1, 0])
    assert not bool(seen[1, 1:].any())


def test_a_new_layer_returns_zeros_and_learns() -> None:
    torch.manual_seed(0)
    layer = CausalAttention(8)
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(layer(x), torch.zeros_like(x))
    layer(x).square().add(layer(x)).sum().backward()
    assert layer.output.weight.grad is not None
    assert bool(layer.output.weight.grad.any())
