"""Systematic resampling of particles: what it promises of each particle's copies."""

import pytest
import torch

from prior.particles import resample

from .oracles import generator


def copies_of(weights: list[float], uniform: float) -> list[int]:
    """Return how many copies of each particle there are."""
    log_weights = torch.tensor([weights], dtype=torch.float64).log()
    ancestors, left = resample(log_weights, torch.tensor([uniform], dtype=torch.float64))
    assert left.tolist() == [[0] * len(weights)]
    return ancestors.bincount(minlength=len(weights)).tolist()


@pytest.mark.parametrize("weights", [[0.05, 0.75, 0.1, 0.1, 0, 0], [0, 0, 0, 0, 0, 1], [1e-9, 0.0, 0.3, 0.7, 0, 0]])
def test_copies_of_a_particle_are_its_share_rounded_up_or_down(weights: list[float]) -> None:
    """Systematic resampling: floor or ceil, whatever the uniform, and the share itself in the mean over all of them."""
    steps = [(i + 0.5) / 1000 for i in range(1000)]
    counts = torch.tensor([copies_of(weights, uniform) for uniform in (0.0, *steps, 1 - 2.0**-40)])
    shares = 6 * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert (counts >= shares.floor()).all()
    assert (counts <= shares.ceil()).all()
    assert (counts.sum(dim=1) == 6).all()
    torch.testing.assert_close(counts[1:-1].double().mean(dim=0), shares, rtol=0, atol=2e-3)


def test_a_particle_without_weight_has_no_copies() -> None:
    for impossible in ([0, 1, 2], [3, 4, 5], [0, 5], [1, 2, 4]):
        weights = [0.0 if i in impossible else 0.01 for i in range(6)]
        weights[next(i for i in range(6) if i not in impossible)] = 3.0
        for uniform in (0.0, 1e-12, 0.5, 1 - 2.0**-40):
            copies = copies_of(weights, uniform)
            assert [copies[i] for i in impossible] == [0] * len(impossible)


def test_only_grids_with_uneven_weights_are_resampled() -> None:
    """Their effective number of particles falls below half; other grids keep their particles and their weights."""
    weights = torch.tensor(
        [[0.2, 0.3, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01], [1, 1, 1, 1], [0.5, 0.5, 0, 0], [0.6, 0.4, 0, 0]]
    )
    log_weights = weights.double().log()
    ancestors, left = resample(log_weights, torch.full((5,), 0.3, dtype=torch.float64))
    assert ancestors.view(5, 4).tolist()[:4] == [[0, 1, 2, 3], [4, 4, 4, 4], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert ancestors.view(5, 4).tolist()[4] == [16, 16, 16, 17]  # 4 x 0.6 at 0.3, 1.3, 2.3 | 3.3
    even = [0, 2, 3]
    assert torch.equal(left[even], log_weights[even])
    assert left[[1, 4]].tolist() == [[0] * 4] * 2


def test_a_scale_of_the_weights_changes_nothing() -> None:
    log_weights = 5 * torch.randn(20, 8, dtype=torch.float64, generator=generator(0))
    uniforms = torch.rand(20, dtype=torch.float64, generator=generator(1))
    plain, moved = resample(log_weights, uniforms)[0], resample(log_weights - 2000, uniforms)[0]
    assert torch.equal(plain, moved)
    assert len(set(plain.tolist())) < 160
