"""The loss and the bits, against loops in plain Python and numbers known in closed form."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from prior.objective import bits_per_dim, cross_entropy, grid_bits

from .oracles import Grid, generator, tiny_prior


def nats_slowly(logits: Tensor, codes: Tensor) -> list[float]:
    """-ln p of each position, one after the other."""
    batch, _, height, width = logits.shape
    return [
        math.log(sum(math.exp(x) for x in logits[b, :, i, j].tolist())) - float(logits[b, codes[b, i, j], i, j])
        for b in range(batch)
        for i in range(height)
        for j in range(width)
    ]


def some(batch: int, num_codes: int, grid: Grid) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(batch, num_codes, *grid, dtype=torch.float64, generator=generator())
    return logits, torch.randint(num_codes, (batch, *grid), generator=generator(1))


def test_cross_entropy_is_the_mean_over_every_position() -> None:
    logits, codes = some(3, 5, (2, 4))
    assert cross_entropy(logits, codes).item() == pytest.approx(sum(nats_slowly(logits, codes)) / 24, rel=1e-12)


def test_bits_are_summed_over_each_grid() -> None:
    logits, codes = some(3, 5, (2, 4))
    nats = nats_slowly(logits, codes)
    expected = [sum(nats[8 * b : 8 * b + 8]) / math.log(2) for b in range(3)]
    bits = grid_bits(logits, codes)
    assert bits.dtype == torch.float64
    assert bits.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_codes", [2, 3, 5, 64, 512])
def test_a_uniform_prior_costs_log2_k_bits_for_each_code(num_codes: int) -> None:
    prior = tiny_prior(num_codes=num_codes, num_layers=1)
    torch.nn.init.zeros_(prior.to_logits[-1].weight)
    torch.nn.init.constant_(prior.to_logits[-1].bias, 0.25)
    codes = torch.randint(num_codes, (3, 2, 4), generator=generator())
    with torch.no_grad():
        logits = prior(codes)
    for precision, error in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        bits = grid_bits(logits.to(precision), codes).sum().item() / codes.numel()
        assert bits == pytest.approx(math.log2(num_codes), rel=error)


def test_bits_of_a_data_set_do_not_depend_on_its_batches() -> None:
    """11 grids in batches of 4, 4 and 3; the mean of the batches' means is another number."""
    logits, codes = some(11, 5, (2, 4))
    logits[8:] *= 3
    expected = sum(nats_slowly(logits, codes)) / math.log(2) / codes.numel()
    batches = [grid_bits(x, y) for x, y in zip(logits.split(4), codes.split(4), strict=True)]
    assert sum(bits.sum().item() for bits in batches) / codes.numel() == pytest.approx(expected, rel=1e-12)
    assert sum(bits.mean().item() / 8 for bits in batches) / 3 != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("num_codes", "grid"), [(3, (1, 3)), (3, (3, 1)), (2, (2, 3)), (2, (3, 2))])
def test_the_probabilities_of_all_grids_sum_to_one(num_codes: int, grid: Grid) -> None:
    """Only of a prior that sees no future is the product over the positions a distribution."""
    everything = torch.tensor(list(product(range(num_codes), repeat=math.prod(grid)))).view(-1, *grid)
    with torch.no_grad():
        bits = grid_bits(tiny_prior(num_codes=num_codes)(everything), everything)
    assert bits.std() > 0.1
    assert torch.exp2(-bits).sum().item() == pytest.approx(1, rel=1e-12)


def test_half_precision_logits_are_summed_in_more() -> None:
    logits, codes = some(2, 5, (16, 24))
    half = logits.bfloat16()
    expected = nats_slowly(half.double(), codes)
    assert cross_entropy(half, codes).dtype == torch.float32
    assert cross_entropy(half, codes).item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert grid_bits(half, codes).sum().item() == pytest.approx(sum(expected) / math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_codes_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, codes = some(2, 5, (2, 4))
    assert cross_entropy(logits, codes.to(dtype)) == cross_entropy(logits, codes)
    assert torch.equal(grid_bits(logits, codes.to(dtype)), grid_bits(logits, codes))


def test_the_gradient_of_the_loss_is_softmax_minus_one_hot() -> None:
    logits, codes = some(2, 5, (2, 4))
    (gradient,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), codes), logits)
    one_hot = torch.nn.functional.one_hot(codes, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(gradient, (logits.softmax(dim=1) - one_hot).detach() / 16)


def test_bits_per_dim() -> None:
    assert bits_per_dim(9.0, (8, 8), (3, 32, 32)) == 9 * 64 / 3072  # 0.1875
    assert bits_per_dim(4.0, (8, 16), (1, 32, 64)) == 0.25
    assert bits_per_dim(3.0, (4, 6), (1, 4, 6)) == 3  # a code for each grey pixel: the same number
