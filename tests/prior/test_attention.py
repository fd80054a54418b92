"""Causal attention against a slow oracle: one position, one head, one sum at a time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def attend_slowly(layer: CausalAttention, features: Tensor, embedded: Tensor) -> Tensor:
    """The same, with loops over grids, positions and heads, and the distances clamped by hand."""
    batch, _, height, width = features.shape
    order = [(i, j) for i in range(height) for j in range(width)]
    result = torch.zeros_like(features)
    for b in range(batch):
        for number, (i, j) in enumerate(order):
            heads = [
                attend_in_one_head(layer, head, features[b], embedded[b], (i, j), order[:number])
                for head in range(NUM_HEADS)
            ]
            result[b, :, i, j] = layer.output.weight[:, :, 0, 0] @ torch.cat(heads) + layer.output.bias
    return result


def attend_in_one_head(
    layer: CausalAttention, head: int, features: Tensor, embedded: Tensor, here: Grid, before: list[Grid]
) -> Tensor:
    """What one head [d] finds at the position `here`, of one grid [C,H,W]."""
    d = layer.head_width
    q, k, v = (slice(start, start + d) for start in (head * d, head * d, (NUM_HEADS + head) * d))
    query = layer.query.weight[q, :, 0, 0] @ features[:, here[0], here[1]] + layer.query.bias[q]
    no_key, no_value = layer.no_position[:, head]
    scores, values = [query @ no_key / math.sqrt(d)], [no_value]
    for i, j in before:
        source = torch.cat([features[:, i, j], embedded[:, i, j]])
        key, value = (layer.key_value.weight[part, :, 0, 0] @ source + layer.key_value.bias[part] for part in (k, v))
        up, left = min(here[0] - i, attention.REACH), max(-attention.REACH, min(here[1] - j, attention.REACH))
        bias = layer.row_bias[head, up] + layer.column_bias[head, left + attention.REACH]
        scores.append(query @ key / math.sqrt(d) + bias)
        values.append(value)
    return torch.stack(scores).softmax(dim=0) @ torch.stack(values)


def inputs(channels: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Features and embedded codes of two grids."""
    features, embedded = torch.randn(2, 2, channels, *grid, dtype=torch.float64)
    return features, embedded


@pytest.mark.parametrize("channels", [8, 6, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_is_the_sum_written_out(grid: Grid, channels: int) -> None:
    layer = random_attention(channels)
    x = inputs(channels, grid)
    torch.testing.assert_close(layer(*x), attend_slowly(layer, *x))


def test_distances_beyond_the_reach_count_as_the_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REACH", 1)
    layer = random_attention(4)
    assert layer.row_bias.shape == (NUM_HEADS, 2)
    x = inputs(4, (4, 3))
    torch.testing.assert_close(layer(*x), attend_slowly(layer, *x))


def test_a_grid_wider_than_the_reach_is_attended_to_as_a_whole() -> None:
    """From row 1, column 1 to all of row 0 and to column 0: the features and codes there; its own features."""
    layer = random_attention(4)
    x = [tensor[:1].requires_grad_() for tensor in inputs(4, (2, REACH + 3))]
    gradients = torch.autograd.grad(layer(*x)[0, :, 1, 1].sum(), x)
    of_features, of_codes = (gradient[0].abs().sum(dim=0) > 0 for gradient in gradients)
    before = torch.zeros(2, REACH + 3, dtype=torch.bool)
    before[0], before[1, 0] = True, True
    assert torch.equal(of_codes, before)
    before[1, 1] = True
    assert torch.equal(of_features, before)


def test_a_new_layer_returns_zeros_and_learns() -> None:
    torch.manual_seed(0)
    layer = CausalAttention(8)
    features, embedded = torch.randn(2, 2, 8, 3, 4)
    update = layer(features, embedded)
    assert torch.equal(update, torch.zeros_like(update))
    update.sum().backward()
    assert layer.output.weight.grad is not None
    assert bool(layer.output.weight.grad.any())


class LargestResult(TorchDispatchMode):
    """Records the most numbers that one operation returns in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.numbers = max(self.numbers, *(each.numel() for each in returned if isinstance(each, Tensor)), 0)
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_gradients_the_scores_of_all_positions_are_never_held_together(layout: torch.memory_format) -> None:
    """The most that is held is the mask, once for all grids."""
    torch.manual_seed(0)
    layer, x = CausalAttention(8), [tensor.to(memory_format=layout) for tensor in torch.randn(2, 16, 8, 12, 9)]
    with torch.no_grad(), LargestResult() as largest:
        layer(*x)
    mask, scores = (batch * NUM_HEADS * 108 * 109 for batch in (1, 16))
    assert mask <= largest.numbers < scores / 4
