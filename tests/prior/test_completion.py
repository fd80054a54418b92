"""Completion against the exact conditional distribution, by enumerating every grid; and what resampling promises."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prior import complete_codes, sample_codes
from prior.completion import known_after_unknown

from .filter_oracles import (
    code_shares,
    conditional,
    distance,
    filtered_slowly,
    law_of_the_filter,
    marked,
    two_sample_tail,
)
from .oracles import Grid, all_grids, chi_square_tail, count, generator, sizes_of_networks, tiny_prior

SURE = 1e-3  # as in test_sampling
LATER: list[dict[tuple[int, int], int]] = [{(1, 0): 1}, {(0, 2): 1}, {(0, 2): 1, (1, 1): 2}, {(0, 1): 2, (1, 0): 2}]
LATER_IN: list[Grid] = [(2, 2), (1, 3), (2, 3), (3, 2)]


# The distribution


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("grid", "marks"), zip(LATER_IN, LATER, strict=True))
def test_particles_bring_the_samples_to_the_exact_conditional(
    grid: Grid, marks: dict[tuple[int, int], int], seed: int
) -> None:
    """A known code after unknown ones. As near as 3000 draws come: of the exact one they are up to 0.05 away."""
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked(grid, marks)
    share, _ = conditional(prior, known)
    drawn = {
        m: complete_codes(prior, known.expand(3000, *grid), candidates=m, generator=generator(seed)) for m in (1, 32)
    }
    assert distance(drawn[1], share) > 0.3  # nothing is conditioned on what comes later
    assert distance(drawn[32], share) < 0.08
    for codes in drawn.values():
        assert ((codes == known) | (known == -1)).all()
        assert codes.min() >= 0


@pytest.mark.parametrize("num_particles", [2, 3, 4])
@pytest.mark.parametrize(("grid", "place"), [((1, 2), (0, 1)), ((2, 1), (1, 0)), ((3, 1), (1, 0))])
def test_few_particles_have_the_law_that_enumeration_gives(
    grid: Grid, place: tuple[int, int], num_particles: int
) -> None:
    """The hard middle: the bias of m particles is what it must be, and not that of dependent random numbers.

    On the last grid a row follows the known code, so that particles are resampled before it.
    """
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked(grid, {place: 1})
    law = law_of_the_filter(prior, known, num_particles)
    drawn = complete_codes(prior, known.expand(8000, *grid), candidates=num_particles, generator=generator(5))
    counts = torch.tensor(count(drawn, 3))
    possible = law > 0
    assert int(counts[~possible].sum()) == 0
    assert math.isclose(float(law.sum()), 1)
    assert chi_square_tail(counts[possible].tolist(), law[possible].tolist()) > SURE
    share, _ = conditional(prior, known)
    assert distance(drawn, law) < 0.03
    if num_particles == 2:
        assert float((law - share).abs().sum() / 2) > 0.04  # so that the exact conditional is not taken for the law


@torch.no_grad()
@pytest.mark.parametrize("num_particles", [2, 4])
def test_weights_of_several_rows_agree_with_a_slow_filter(num_particles: int) -> None:
    """Known codes in two rows, the second after a resampling: two samples of the same law, as far as 4000 can tell."""
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked((3, 2), {(0, 1): 1, (1, 1): 2})
    source = random.Random(0)
    shares = code_shares(prior, (3, 2))
    slow = torch.tensor([filtered_slowly(shares, known, num_particles, source) for _ in range(4000)])
    fast = complete_codes(prior, known.expand(6000, 3, 2), candidates=num_particles, generator=generator(1))
    for places in ([(0, 0), (1, 0)], [(1, 0), (2, 0)], [(2, 0), (2, 1)]):
        one, other = (
            torch.bincount(3 * drawn[:, places[0][0], places[0][1]] + drawn[:, places[1][0], places[1][1]], minlength=9)
            for drawn in (slow, fast)
        )
        assert two_sample_tail(one.tolist(), other.tolist()) > SURE


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_what_is_known_first_is_kept_and_the_rest_drawn_as_sampling_draws_it(grid: Grid) -> None:
    """The same codes, at the cost of one particle, also where nothing or all is known."""
    prior = tiny_prior(num_codes=3, seed=7, num_classes=2)
    labels = torch.arange(6) % 2
    codes = torch.randint(3, (6, *grid), generator=generator(1))
    before = torch.arange(math.prod(grid)).view(grid) < torch.arange(1, 7)[:, None, None] % 7
    for known in (torch.where(before, codes, -1), torch.full((6, *grid), -1), codes):
        choice: dict[str, Any] = {"labels": labels, "temperature": 0.8, "top_k": 2}
        found = complete_codes(prior, known, generator=generator(2), **choice)
        assert torch.equal(found, sample_codes(prior, 6, grid, known=known, generator=generator(2), **choice))


def test_one_particle_is_used_where_all_known_codes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_networks(monkeypatch)
    known = torch.full((3, 2, 2), -1)
    known[:, 0] = 1
    complete_codes(tiny_prior(), known, candidates=7)
    complete_codes(tiny_prior(), known.flip(1), candidates=7)
    complete_codes(tiny_prior(), torch.full((3, 2, 2), -1), candidates=7)
    assert sizes == [3, 21, 3]


@pytest.mark.parametrize(
    ("known", "later"),
    [
        ([[-1, -1], [-1, -1]], False),
        ([[1, 1], [1, 1]], False),
        ([[1, 0], [-1, -1]], False),
        ([[1, -1], [-1, -1]], False),
        ([[-1, 0], [-1, -1]], True),
        ([[1, -1], [0, -1]], True),
        ([[-1, -1], [-1, 0]], True),
    ],
)
def test_known_after_unknown_in_raster_order(known: list[list[int]], later: bool) -> None:
    assert known_after_unknown(torch.tensor([known])).tolist() == [later]
    assert known_after_unknown(torch.tensor([[[-1, -1], [-1, -1]], known])).tolist() == [False, later]


@pytest.mark.parametrize("marks", [{(1, 1): 2}, {(0, 0): 1}, {(0, 1): 0, (1, 0): 1}])
def test_what_is_known_chooses_among_labels(marks: dict[tuple[int, int], int]) -> None:
    """p(label | known) with labels equally likely before, by enumeration; also where all that is known comes first."""
    prior = tiny_prior(num_codes=3, seed=1, num_classes=2)
    known = marked((2, 2), marks)
    given = [conditional(prior, known, torch.tensor(label)) for label in (0, 1)]
    likely = torch.tensor([mass for _, mass in given], dtype=torch.float64)
    posterior = likely / likely.sum()
    exact = sum(share * p for (share, _), p in zip(given, posterior, strict=True))
    labels = (torch.arange(32) % 2).expand(3000, 32)
    drawn = complete_codes(prior, known.expand(3000, 2, 2), labels=labels, generator=generator(0))
    assert distance(drawn, exact) < 0.06
    assert distance(drawn, (given[0][0] + given[1][0]) / 2) > 0.09  # each label half of the time
    assert ((drawn == known) | (known == -1)).all()


def test_labels_of_particles_belong_to_their_grid() -> None:
    """Each grid has one label for all its particles: the same as giving the label itself."""
    prior = tiny_prior(num_codes=3, seed=4, num_classes=3)
    labels = torch.tensor([2, 0, 1, 1])
    known = marked((2, 3), {(1, 1): 2}).expand(4, 2, 3)
    found = complete_codes(prior, known, candidates=5, labels=labels[:, None].expand(4, 5), generator=generator(0))
    assert torch.equal(found, complete_codes(prior, known, candidates=5, labels=labels, generator=generator(0)))
    other = complete_codes(prior, known, candidates=5, labels=labels.flip(0), generator=generator(0))
    assert not torch.equal(found, other)


@torch.no_grad()
def test_weights_are_the_priors_own_whatever_is_drawn_from() -> None:
    """A low temperature is for what is drawn; what is known weighs as much as the prior says."""
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked((1, 3), {(0, 2): 1})
    everything, _ = all_grids(prior, (1, 3))
    logits = prior(everything)
    own, cold = ((logits / t).softmax(dim=1).gather(1, everything[:, None])[:, 0, 0] for t in (1, 0.5))
    fits = everything[:, 0, 2] == 1
    expected, all_cold = (cold[:, 0] * cold[:, 1] * last[:, 2] * fits for last in (own, cold))
    drawn = complete_codes(prior, known.expand(3000, 1, 3), candidates=64, temperature=0.5, generator=generator(0))
    assert distance(drawn, expected / expected.sum()) < 0.06
    assert distance(drawn, all_cold / all_cold.sum()) > 0.12


# Seeds, state and shape


def test_the_seed_and_the_index_decide() -> None:
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked((2, 3), {(1, 1): 2})

    def complete(n: int, seed: int, **more: Any) -> Tensor:
        return complete_codes(prior, known.expand(n, 2, 3), candidates=4, generator=generator(seed), **more)

    most = complete(9, 0)
    assert torch.equal(complete(9, 0), most)
    assert not torch.equal(complete(9, 1), most)
    assert torch.equal(complete(3, 0), most[:3])
    assert torch.equal(complete(2, 0, first=7), most[7:])
    assert len(most.unique(dim=0)) > 3


def test_a_grid_knows_nothing_of_the_others() -> None:
    prior = tiny_prior(num_codes=3, seed=7)
    known = marked((2, 3), {(1, 1): 2}).repeat(40, 1, 1)
    other = known.clone()
    other[1:, 0, 2] = 1
    found, others = (complete_codes(prior, k, candidates=4, generator=generator(0)) for k in (known, other))
    assert torch.equal(found[0], others[0])
    assert not torch.equal(found[1:, 0, :2], others[1:, 0, :2])


def test_the_known_codes_given_and_the_mode_of_the_prior_stay() -> None:
    prior = tiny_prior(dropout=0.9)
    known = marked((2, 3), {(1, 1): 2})[None]
    before = known.clone()
    rows: list[int] = []
    found = complete_codes(prior, known, candidates=3, generator=generator(0), on_row=rows.append)
    assert torch.equal(complete_codes(prior.train(), known, candidates=3, generator=generator(0)), found)
    assert all(module.training for module in prior.modules())
    assert torch.equal(known, before)
    assert rows == [1, 2]


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_was_completed_can_be_trained_on(candidates: int) -> None:
    prior = tiny_prior()
    codes = complete_codes(prior, marked((2, 3), {(1, 1): 2})[None], candidates=candidates)
    assert codes.dtype == torch.int64
    assert not codes.is_inference()
    prior(codes).sum().backward()


KNOWN = torch.full((2, 3, 4), -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 0}, "candidates: expected at least 1, got 0"),
        ({"candidates": -2}, "candidates: expected at least 1, got -2"),
        ({"known": KNOWN[0]}, r"known: expected codes \[n,H,W\], got the shape \[3, 4\]"),
        ({"known": KNOWN[:0]}, "at least 1 sample .*, got 0 of 3x4"),
        ({"known": KNOWN + 6}, "known: expected codes from 0 to 4, or -1, got 5 to 5"),
        ({"known": KNOWN - 1}, "known: expected codes from 0 to 4, or -1, got -2 to -2"),
        ({"temperature": -1}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected"),
        ({"top_p": 0}, "top_p: expected"),
        ({"labels": None}, "3 classes: expected labels"),
        ({"labels": torch.tensor([0])}, "one label for each of 2 grids"),
        ({"labels": torch.tensor([0, 3])}, "labels from 0 to 2"),
        ({"labels": torch.tensor(1)}, r"labels: expected \[n\] or \[n,m\] = \[2, 5\], got \[\]"),
        ({"labels": torch.zeros(2, 4).long()}, r"labels: expected \[n\] or \[n,m\] = \[2, 5\], got \[2, 4\]"),
        ({"labels": torch.zeros(5, 2).long()}, r"labels: expected \[n\] or \[n,m\] = \[2, 5\], got \[5, 2\]"),
        ({"labels": torch.full((2, 5), 3)}, "labels from 0 to 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"known": KNOWN, "candidates": 5, "labels": torch.tensor([0, 2]), **arguments}
    complete: Callable[..., Tensor] = complete_codes
    with pytest.raises(ValueError, match=message):
        complete(tiny_prior(num_classes=3), **fields)


def test_a_prior_without_classes_refuses_labels() -> None:
    for labels in (torch.zeros(2).long(), torch.zeros(2, 5).long()):
        with pytest.raises(ValueError, match="without labels"):
            complete_codes(tiny_prior(), KNOWN, candidates=5, labels=labels)


def test_the_last_choice_is_by_weight() -> None:
    """On one row nothing is resampled: of two candidates, one a label, the second is chosen by its share."""
    prior = tiny_prior(num_codes=3, seed=20, num_classes=2)
    known = marked((1, 2), {(0, 0): 1})
    masses = [conditional(prior, known, torch.tensor(label))[1] for label in (0, 1)]
    p = masses[1] / sum(masses)
    after = [conditional(prior, known, torch.tensor(label))[0].view(3, 3)[1] for label in (0, 1)]
    labels = torch.tensor([0, 1]).expand(4000, 2)
    drawn = complete_codes(prior, known.expand(4000, 1, 2), candidates=2, labels=labels, generator=generator(0))
    counts = drawn[:, 0, 1].bincount(minlength=3).tolist()
    assert chi_square_tail(counts, ((1 - p) * after[0] + p * after[1]).tolist()) > SURE
    assert chi_square_tail(counts, ((after[0] + after[1]) / 2).tolist()) < 1e-6
