"""Guided completion: it draws from p_s given the known codes, p_s(grid) the product of the guided probabilities.

Legend: s guidance, m particles of a grid, K codes.
"""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from prior import GatedPixelCNN, complete_codes, sample_codes, sampling
from prior.model import NO_LABEL
from prior.sampling import most_at_once

from .filter_oracles import (
    code_shares,
    conditional,
    distance,
    filtered_slowly,
    law_of_the_filter,
    marked,
    two_sample_tail,
)
from .oracles import Grid, all_grids, chi_square_tail, count, generator, sizes_of_networks, tail_of_common_grids
from .test_guidance import GUIDANCE, guided_prior, mild_prior, milder_prior

SURE = 1e-3  # as in test_sampling
LABEL = torch.tensor(1)


def filter_prior() -> GatedPixelCNN:
    """What a later code is says much about those before it, at any s, and no particle weighs very much."""
    return milder_prior(seed=65, labels=0.3, logits=0.5)


# The distribution


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(("grid", "places"), [((1, 3), [(0, 0)]), ((2, 2), [(0, 0), (0, 1)]), ((3, 1), [(0, 0)])])
def test_after_what_is_known_first_the_law_is_exact(grid: Grid, places: list[Grid], guidance: float) -> None:
    """With m particles allowed, of which one is used."""
    prior, known = mild_prior(), marked(grid, dict.fromkeys(places, 1))
    share, _ = conditional(prior, known, LABEL, guidance)
    drawn = complete_codes(
        prior, known.expand(4000, *grid), labels=LABEL.expand(4000), guidance=guidance, generator=generator(0)
    )
    counts, possible = torch.tensor(count(drawn, 3)), share > 0
    assert int(counts[~possible].sum()) == 0
    assert tail_of_common_grids(counts[possible].tolist(), share[possible].tolist()) > SURE
    stronger, _ = conditional(prior, known, LABEL, guidance + 1)
    assert tail_of_common_grids(counts[possible].tolist(), stronger[possible].tolist()) < 1e-3


@pytest.mark.parametrize("num_particles", [1, 2, 4])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("grid", "place"), [((1, 2), (0, 1)), ((2, 1), (1, 0)), ((3, 1), (1, 0))])
def test_few_particles_have_the_law_that_enumeration_gives(
    grid: Grid, place: tuple[int, int], guidance: float, num_particles: int
) -> None:
    """Each is weighed by p_s of the known code: by the guided logits, and not by those of the label alone."""
    prior, known = filter_prior(), marked(grid, {place: 1})
    law = law_of_the_filter(prior, known, num_particles, LABEL, guidance)
    assert math.isclose(float(law.sum()), 1)
    drawn = complete_codes(
        prior,
        known.expand(8000, *grid),
        candidates=num_particles,
        labels=LABEL.expand(8000),
        guidance=guidance,
        generator=generator(5),
    )
    counts, possible = torch.tensor(count(drawn, 3)), law > 0
    assert int(counts[~possible].sum()) == 0
    assert distance(drawn, law) < 0.03
    assert tail_of_common_grids(counts[possible].tolist(), law[possible].tolist()) > SURE


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, 5.0])
@pytest.mark.parametrize("grid", [(2, 2), (3, 1)])
def test_particles_bring_the_samples_to_the_exact_conditional(grid: Grid, guidance: float) -> None:
    prior, known = filter_prior(), marked(grid, {(1, 0): 1})
    share, _ = conditional(prior, known, LABEL, guidance)
    away = {}
    for m in (1, 4, 32):
        choice: dict[str, Any] = {"candidates": m, "labels": LABEL.expand(3000), "guidance": guidance}
        drawn = complete_codes(prior, known.expand(3000, *grid), generator=generator(1), **choice)
        assert ((drawn == known) | (known == -1)).all()
        away[m] = distance(drawn, share)
    assert away[1] > 0.18  # nothing is conditioned on what comes later
    assert away[1] > 1.5 * away[4]
    assert away[32] < 0.05


@pytest.mark.parametrize("num_particles", [2, 4])
def test_weights_of_several_rows_agree_with_a_slow_filter(num_particles: int) -> None:
    """Known codes in two rows, the second after a resampling, which selects both predictions of a particle."""
    prior, known = filter_prior(), marked((3, 2), {(0, 1): 1, (1, 1): 2})
    source = random.Random(0)
    shares = code_shares(prior, (3, 2), 1, 3.0)
    slow = torch.tensor([filtered_slowly(shares, known, num_particles, source) for _ in range(4000)])
    fast = complete_codes(
        prior,
        known.expand(6000, 3, 2),
        candidates=num_particles,
        labels=LABEL.expand(6000),
        guidance=3.0,
        generator=generator(1),
    )
    for places in ([(0, 0), (1, 0)], [(1, 0), (2, 0)], [(2, 0), (2, 1)]):
        one, other = (
            torch.bincount(3 * drawn[:, places[0][0], places[0][1]] + drawn[:, places[1][0], places[1][1]], minlength=9)
            for drawn in (slow, fast)
        )
        assert two_sample_tail(one.tolist(), other.tolist()) > SURE


@pytest.mark.parametrize("guidance", [0.5, 2.0])
@pytest.mark.parametrize(("place", "code", "seed"), [((1, 1), 2, 39), ((0, 0), 1, 31)])
def test_what_is_known_chooses_among_labels(place: tuple[int, int], code: int, seed: int, guidance: float) -> None:
    """With labels open, each label counts by p_s(known | label), by enumeration."""
    prior, known = milder_prior(seed=seed, labels=0.6, logits=0.6), marked((2, 2), {place: code})
    given = [conditional(prior, known, torch.tensor(label), guidance) for label in (0, 1)]
    exact = sum(share * mass for share, mass in given) / sum(mass for _, mass in given)
    labels = (torch.arange(32) % 2).expand(3000, 32)
    drawn = complete_codes(prior, known.expand(3000, 2, 2), labels=labels, guidance=guidance, generator=generator(0))
    assert distance(drawn, exact) < 0.06
    assert distance(drawn, (given[0][0] + given[1][0]) / 2) > 0.15  # each label half of the time


@torch.no_grad()
def test_weights_are_guided_and_not_cooled() -> None:
    """A low temperature and guidance: what is known weighs as p_s says, without the temperature."""
    prior, known = guided_prior(num_codes=3, num_classes=2, seed=7), marked((1, 2), {(0, 1): 1})
    everything, joint = all_grids(prior, (1, 2), torch.tensor(0), 2.0)
    table = torch.tensor(joint, dtype=torch.float64).view(3, 3)
    first = table.sum(dim=1)
    cold = first**2 / (first**2).sum()
    expected = cold * table[:, 1] / first
    assert len(everything) == 9
    drawn = complete_codes(
        prior,
        known.expand(4000, 1, 2),
        candidates=64,
        labels=torch.zeros(4000, dtype=torch.long),
        temperature=0.5,
        guidance=2.0,
        generator=generator(0),
    )
    counts = drawn[:, 0, 0].bincount(minlength=3) / 4000
    assert float((counts - expected / expected.sum()).abs().sum() / 2) < 0.04


# Guidance 1 and 0


def known_later(count: int) -> Tensor:
    return marked((3, 4), {(1, 1): 2}).repeat(count, 1, 1)


def test_guidance_of_1_is_the_plain_prior_to_the_bit_and_at_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, labels = guided_prior().float(), torch.arange(5) % 3
    sizes = sizes_of_networks(monkeypatch)
    plain, same, guided = (
        complete_codes(prior, known_later(5), candidates=4, labels=labels, generator=generator(0), **choice)
        for choice in ({}, {"guidance": 1.0}, {"guidance": 3.0})
    )
    assert torch.equal(plain, same)
    assert not torch.equal(plain, guided)
    assert sizes == [20, 20, 40]


@pytest.mark.parametrize("open_labels", [False, True])
def test_guidance_of_0_is_no_label_in_one_batch(open_labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, labels = guided_prior().float(), torch.arange(5) % 3
    if open_labels:
        labels = labels[:, None].repeat(1, 4)
    sizes = sizes_of_networks(monkeypatch)
    found = complete_codes(prior, known_later(5), candidates=4, labels=labels, guidance=0, generator=generator(0))
    hidden = torch.full_like(labels, NO_LABEL)
    assert torch.equal(
        found, complete_codes(prior, known_later(5), candidates=4, labels=hidden, generator=generator(0))
    )
    assert sizes == [20, 20]


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_what_is_known_first_is_completed_as_sampling_draws_it(guidance: float) -> None:
    prior, labels = guided_prior(), torch.arange(6) % 3
    known = torch.full((6, 3, 4), -1)
    known[:, 0] = 2
    choice: dict[str, Any] = {"labels": labels, "guidance": guidance, "top_k": 3}
    found = complete_codes(prior, known, generator=generator(2), **choice)
    assert torch.equal(found, sample_codes(prior, 6, (3, 4), known=known, generator=generator(2), **choice))


# Batches, and what is refused


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_drawing_in_parts_draws_the_same_codes(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of n grids of 4 particles is a network of 8n."""
    prior = guided_prior()
    choice: dict[str, Any] = {"candidates": 4, "labels": torch.arange(5) % 3, "guidance": 2.5}
    expected = complete_codes(prior, known_later(5), generator=generator(0), **choice)
    sizes = sizes_of_networks(monkeypatch)
    one = sampling.MOST_ACTIVATIONS // most_at_once(prior, (3, 4))
    monkeypatch.setattr(sampling, "MOST_ACTIVATIONS", one * 8 * parts + one // 2)
    assert torch.equal(complete_codes(prior, known_later(5), generator=generator(0), **choice), expected)
    assert sizes == [8 * min(parts, 5 - start) for start in range(0, 5, parts)]


@pytest.mark.parametrize("guidance", [-0.1, math.nan, math.inf])
def test_guidance_out_of_range_is_refused(guidance: float) -> None:
    with pytest.raises(ValueError, match=f"guidance: expected a finite number of 0 or more, got {guidance}"):
        complete_codes(guided_prior(), known_later(1), labels=torch.tensor([0]), guidance=guidance)


def test_a_prior_without_label_dropout_is_neither_guided_nor_knows_no_label() -> None:
    prior = guided_prior(label_dropout=0)
    with pytest.raises(ValueError, match=r"guidance: expected 1, for .* without label dropout, got 2"):
        complete_codes(prior, known_later(1), labels=torch.tensor([0]), guidance=2)
    for labels in (torch.tensor([NO_LABEL]), torch.full((1, 32), NO_LABEL)):
        with pytest.raises(ValueError, match=r"labels from 0 to 2, got \[-1\]"):
            complete_codes(prior, known_later(1), labels=labels)


def test_one_position_at_guidance_2_is_c_squared_over_u() -> None:
    """The law of a single position at s = 2, by hand: c^2 / u, scaled to sum to 1."""
    prior = mild_prior()
    nothing = torch.zeros(2, 1, 1, dtype=torch.long)
    with torch.no_grad():
        c, u = prior(nothing, torch.tensor([1, NO_LABEL]))[:, :, 0, 0].softmax(dim=1)
    drawn = complete_codes(
        prior, torch.full((4000, 1, 1), -1), labels=LABEL.expand(4000), guidance=2, generator=generator(0)
    )
    squared = c**2 / u
    counts = drawn.flatten().bincount(minlength=3).tolist()
    assert chi_square_tail(counts, (squared / squared.sum()).tolist()) > SURE
    assert chi_square_tail(counts, c.tolist()) < 1e-6
