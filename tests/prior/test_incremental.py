"""The network run a column at a time says what one forward pass says."""

import pytest
import torch
from torch import Tensor

from prior import GatedPixelCNN
from prior.incremental import IncrementalPrior

from .oracles import Grid, generator, tiny_prior


@torch.no_grad()
def logits_column_by_column(prior: GatedPixelCNN, codes: Tensor, labels: Tensor | None) -> Tensor:
    """[n,K,H,W]; the codes of a position are put only after its logits are there."""
    samples, height, width = codes.shape
    network = IncrementalPrior(prior, samples, width, labels)
    logits = torch.full((samples, prior.config.num_codes, height, width), torch.nan, dtype=torch.float64)
    for row in range(height):
        network.start_row()
        for column in range(width):
            logits[:, :, row, column] = network.logits(network.features(column))
            network.put(column, codes[:, row, column])
    return logits


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (7, 7), (8, 16), (16, 8)])
@torch.no_grad()
def test_logits_are_those_of_the_forward_pass(grid: Grid, num_samples: int) -> None:
    prior = tiny_prior(num_classes=3)
    codes = torch.randint(5, (num_samples, *grid), generator=generator())
    labels = torch.arange(num_samples) % 3
    found = logits_column_by_column(prior, codes, labels)
    torch.testing.assert_close(found, prior(codes, labels), rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4)])
@pytest.mark.parametrize(("first", "kernel", "layers"), [(3, 3, 1), (7, 3, 4), (3, 5, 3), (5, 1, 2), (7, 7, 2)])
@torch.no_grad()
def test_logits_are_those_of_the_forward_pass_with_any_kernels(
    first: int, kernel: int, layers: int, grid: Grid
) -> None:
    prior = tiny_prior(first_kernel_size=first, kernel_size=kernel, num_layers=layers)
    codes = torch.randint(5, (2, *grid), generator=generator())
    torch.testing.assert_close(logits_column_by_column(prior, codes, None), prior(codes), rtol=0, atol=1e-10)
