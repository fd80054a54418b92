"""The likelihood of a grid under each label: against enumeration, and one forward pass for each label."""

import math

import pytest
import torch

from prior import GatedPixelCNN, posterior
from prior.objective import grid_bits
from prior.posterior import label_log_likelihoods, pairs_at_once

from .oracles import all_grids, generator, tiny_prior


def some_codes(count: int) -> torch.Tensor:
    return torch.randint(5, (count, 3, 4), generator=generator(1))


@pytest.mark.parametrize("label_dropout", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(1, 3), (3, 1)])
def test_every_grid_under_every_label_by_enumeration(grid: tuple[int, int], label_dropout: float) -> None:
    """Of a prior that hides labels too: the labels alone, and not what it knows without one."""
    prior = tiny_prior(num_codes=3, num_classes=4, label_dropout=label_dropout)
    laws = [all_grids(prior, grid, torch.tensor(label)) for label in range(4)]
    found = label_log_likelihoods(prior, laws[0][0])
    assert found.shape == (27, 4)
    assert found.dtype == torch.float64
    expected = torch.tensor([law for _, law in laws], dtype=torch.float64).T
    torch.testing.assert_close(found.exp(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.exp().sum(dim=0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("at_once", [1, 2, 5, 7, 20, 21, 22])
def test_blocks_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 pairs of 7 grids and 3 labels, in even blocks and uneven ones, which may end within a grid."""
    prior, codes = tiny_prior(num_classes=3), some_codes(7)
    with torch.no_grad():
        expected = [-grid_bits(prior(codes, torch.full((7,), label)), codes) * math.log(2) for label in range(3)]
    sizes: list[int] = []
    prior.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    monkeypatch.setattr(posterior, "pairs_at_once", lambda prior, positions: at_once)
    found = label_log_likelihoods(prior, codes)
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=0, atol=1e-11)
    assert sizes == [min(at_once, 21 - start) for start in range(0, 21, at_once)]


def test_blocks_are_of_bounded_memory() -> None:
    """So many that about MOST_VALUES numbers are held, whatever n and C; a large grid is a block of its own."""
    prior = tiny_prior(num_codes=512, channels=64, output_channels=256, num_classes=3)
    held = pairs_at_once(prior, 64) * 64 * (3 * 512 + 256 + 12 * 64)
    assert 0.9 * posterior.MOST_VALUES < held <= posterior.MOST_VALUES
    assert pairs_at_once(prior, 4 * 64) == pairs_at_once(prior, 64) // 4
    assert pairs_at_once(prior, 10**9) == 1


def test_blocks_count_the_scores_of_attention() -> None:
    """Of each of 4 heads from every position to every other and to none, before and after the softmax."""
    prior = tiny_prior(num_codes=512, channels=64, output_channels=256, num_classes=3, attention_every=2)
    held = pairs_at_once(prior, 1024) * 1024 * (3 * 512 + 256 + 12 * 64 + 2 * 4 * 1025)
    assert 0.8 * posterior.MOST_VALUES < held <= posterior.MOST_VALUES


def test_the_size_of_the_blocks_follows_from_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, sizes = tiny_prior(num_classes=3), []
    prior.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    monkeypatch.setattr(posterior, "MOST_VALUES", 4 * 12 * (3 * 5 + 16 + 12 * 4))
    label_log_likelihoods(prior, some_codes(3))
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize("training", [True, False])
def test_it_evaluates_and_leaves_the_prior_as_it_was(training: bool) -> None:
    prior, codes = tiny_prior(num_classes=3, dropout=0.5), some_codes(4)
    expected = label_log_likelihoods(prior, codes)
    found = label_log_likelihoods(prior.train(training), codes.to(torch.uint8))
    assert torch.equal(found, expected)
    assert prior.training == training
    assert not found.requires_grad
    assert not found.is_inference()


def test_no_grids_have_no_likelihoods() -> None:
    assert label_log_likelihoods(tiny_prior(num_classes=3), some_codes(0)).shape == (0, 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a prior with classes, got one without"):
        label_log_likelihoods(tiny_prior(), some_codes(2))
    with pytest.raises(ValueError, match=r"expected codes \[n,H,W\], got the shape \[3, 4\]"):
        label_log_likelihoods(tiny_prior(num_classes=3), some_codes(2)[0])


def test_single_precision_says_nearly_the_same() -> None:
    prior, codes = tiny_prior(num_classes=3), some_codes(6)
    exact = label_log_likelihoods(prior, codes)
    single: GatedPixelCNN = prior.float()
    torch.testing.assert_close(label_log_likelihoods(single, codes), exact, rtol=1e-4, atol=1e-4)
