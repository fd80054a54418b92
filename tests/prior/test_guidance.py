"""Guided sampling: against a sampler that makes both predictions at every position, and against enumeration of its law.

Legend: s guidance, c logits with the label, u logits without.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prior import GatedPixelCNN, SamplingParameters, sample_codes, sampling
from prior.choosing import guided_logits
from prior.model import NO_LABEL
from prior.sampling import most_at_once

from .oracles import (
    Grid,
    all_grids,
    count,
    generator,
    sample_slowly,
    sizes_of_networks,
    tail_of_common_grids,
    tiny_prior,
)

SURE = 1e-3  # as in test_sampling
GUIDANCE = [0.0, 0.5, 1.5, 3.0, 5.0]


def guided_prior(**fields: Any) -> GatedPixelCNN:
    return tiny_prior(**{"num_classes": 3, "label_dropout": 0.1, **fields})


def milder_prior(*, seed: int, labels: float, logits: float) -> GatedPixelCNN:
    """A prior over three codes and two labels, with the effect of the labels, and all logits, scaled down."""
    prior = guided_prior(num_codes=3, num_classes=2, seed=seed)
    with torch.no_grad():
        prior.to_logits[-1].weight.mul_(logits)
        for layer in prior.layers:
            layer.label_bias.weight.mul_(labels)
    return prior


def mild_prior() -> GatedPixelCNN:
    """The guided law is still spread at s = 5, and differs between any two s and labels."""
    return milder_prior(seed=3, labels=0.15, logits=0.25)


# The mixture of logits


@pytest.mark.parametrize("guidance", [*GUIDANCE, 1.0, 0.123, 40.0])
def test_guided_logits_are_u_and_s_times_the_difference(guidance: float) -> None:
    conditional, unconditional = (4 * torch.randn(6, 9, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    found = guided_logits(conditional, unconditional, guidance).tolist()
    for row, (c, u) in enumerate(zip(conditional.tolist(), unconditional.tolist(), strict=True)):
        assert found[row] == pytest.approx([b + guidance * (a - b) for a, b in zip(c, u, strict=True)], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_of_0_and_1_give_one_of_them_to_the_bit(dtype: torch.dtype) -> None:
    conditional, unconditional = (30 * torch.randn(50, 64, generator=generator(i), dtype=dtype) for i in (0, 1))
    assert torch.equal(guided_logits(conditional, unconditional, 0), unconditional)
    assert torch.equal(guided_logits(conditional, unconditional, 1), conditional)


def test_guided_logits_of_half_precision_are_mixed_in_single() -> None:
    conditional, unconditional = (30 * torch.randn(50, 64, generator=generator(i)).bfloat16() for i in (0, 1))
    found = guided_logits(conditional, unconditional, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 3 * conditional.double() - 2 * unconditional.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.5, 3.0, 5.0, 100.0])
def test_tiny_probabilities_do_not_blow_up(guidance: float) -> None:
    """Logits 60 apart, of codes with probability e-60 under the one or the other: finite, and the law to 1e-4."""
    conditional = torch.tensor([[0.0, 30.0, -30.0, 29.0, -29.5]])
    unconditional = torch.tensor([[30.0, -30.0, 0.0, 29.5, -30.0]])
    found = guided_logits(conditional, unconditional, guidance)
    assert found.isfinite().all()
    exact = unconditional.double() + guidance * (conditional.double() - unconditional.double())
    torch.testing.assert_close(found.softmax(dim=1).double(), exact.softmax(dim=1), rtol=0, atol=1e-4)


# The same codes as the slow sampler


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("grid", [(1, 5), (5, 1), (3, 5), (5, 3)])
def test_the_slow_sampler_draws_the_same_codes(grid: Grid, guidance: float, num_samples: int) -> None:
    prior, labels = guided_prior(seed=1), torch.tensor([2, 0, NO_LABEL, 1, 1])[:num_samples]
    found = sample_codes(prior, num_samples, grid, labels=labels, guidance=guidance, generator=generator(2))
    slow = sample_slowly(prior, num_samples, grid, labels=labels, guidance=guidance, seed=2)
    assert torch.equal(found, slow)
    assert found.dtype == torch.int64


@pytest.mark.parametrize(("first", "kernel", "layers"), [(3, 3, 1), (7, 3, 4), (3, 5, 3), (5, 1, 2), (7, 7, 2)])
def test_the_slow_sampler_draws_the_same_codes_with_any_kernels(first: int, kernel: int, layers: int) -> None:
    prior = guided_prior(first_kernel_size=first, kernel_size=kernel, num_layers=layers)
    choice: dict[str, Any] = {"labels": torch.tensor([2, 0]), "guidance": 2.5}
    found = sample_codes(prior, 2, (4, 6), generator=generator(3), **choice)
    assert torch.equal(found, sample_slowly(prior, 2, (4, 6), seed=3, **choice))


@pytest.mark.parametrize(
    "cut",
    [
        {"temperature": 0.0},
        {"temperature": 1.7},
        {"top_k": 2},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 3, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_temperature_and_cuts_come_after_guidance(guidance: float, cut: dict[str, Any]) -> None:
    """Cut before, the codes left by c and by u would be others."""
    prior, labels = guided_prior(seed=3), torch.arange(12) % 3
    choice: dict[str, Any] = {"labels": labels, "guidance": guidance, **cut}
    found = sample_codes(prior, 12, (3, 4), generator=generator(4), **choice)
    assert torch.equal(found, sample_slowly(prior, 12, (3, 4), seed=4, **choice))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_known_codes_condition_both_predictions(guidance: float) -> None:
    prior, labels = guided_prior(seed=4), torch.arange(6) % 3
    codes = torch.randint(5, (6, 3, 5), generator=generator(5))
    known = torch.where(torch.rand(6, 3, 5, generator=generator(6)) < 0.5, codes, -1)
    choice: dict[str, Any] = {"labels": labels, "known": known, "guidance": guidance}
    found = sample_codes(prior, 6, (3, 5), generator=generator(7), **choice)
    assert torch.equal(found, sample_slowly(prior, 6, (3, 5), seed=7, **choice))
    assert torch.equal(found[known >= 0], known[known >= 0])


# The law


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(("grid", "draws"), [((1, 2), 8000), ((2, 1), 8000), ((2, 2), 12000)])
def test_grids_are_drawn_with_their_guided_probability(grid: Grid, draws: int, guidance: float) -> None:
    """p_s by enumeration, for each of two labels; and neither p_s of another s, nor of the other label."""
    prior = mild_prior()
    labels = torch.arange(draws) % 2
    drawn = sample_codes(prior, draws, grid, labels=labels, guidance=guidance, generator=generator(0))
    for label in (0, 1):
        counts = count(drawn[labels == label], 3)
        (_, law), (_, stronger), (_, other) = (
            all_grids(prior, grid, torch.tensor(of), s)
            for of, s in ((label, guidance), (label, guidance + 1), (1 - label, guidance))
        )
        assert tail_of_common_grids(counts, law) > SURE
        assert tail_of_common_grids(counts, stronger) < 1e-6
        assert guidance == 0 or tail_of_common_grids(counts, other) < 1e-6


def test_the_law_holds_at_tiny_conditional_probabilities_in_single_precision() -> None:
    """s = 5 with logits up to 60 apart: what is left is still drawn as enumeration in float64 says."""
    prior = guided_prior(num_codes=3, num_classes=2, seed=54)
    with torch.no_grad():
        prior.to_logits[-1].weight.mul_(8)
    labels = torch.zeros(4000, dtype=torch.long)
    apart = prior(torch.zeros(1, 1, 2, dtype=torch.long), labels[:1]).detach()
    assert float(apart.amax() - apart.amin()) > 20
    _, law = all_grids(prior, (1, 2), labels[0], 5.0)
    drawn = sample_codes(prior.float(), 4000, (1, 2), labels=labels, guidance=5.0, generator=generator(0))
    shares = torch.tensor(count(drawn, 3)) / 4000
    assert float((shares - torch.tensor(law)).abs().max()) < 0.03


# Guidance 1 is the plain prior, and 0 the one without labels


def test_guidance_of_1_is_the_plain_prior_to_the_bit_and_at_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a prior that cannot be guided."""
    sizes = sizes_of_networks(monkeypatch)
    for prior in (guided_prior(), tiny_prior(num_classes=3), tiny_prior()):
        labels = torch.arange(4) % 3 if prior.config.num_classes else None
        plain, guided = (
            sample_codes(prior.float(), 4, (3, 5), labels=labels, generator=generator(0), **choice)
            for choice in ({}, {"guidance": 1.0})
        )
        assert torch.equal(plain, guided)
    assert sizes == [4] * 6


def test_guidance_of_0_is_no_label_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_networks(monkeypatch)
    prior, labels = guided_prior().float(), torch.arange(4) % 3
    found = sample_codes(prior, 4, (3, 5), labels=labels, guidance=0, generator=generator(0))
    hidden = torch.full((4,), NO_LABEL)
    assert torch.equal(found, sample_codes(prior, 4, (3, 5), labels=hidden, generator=generator(0)))
    assert not torch.equal(found, sample_codes(prior, 4, (3, 5), labels=labels, generator=generator(0)))
    assert sizes == [4] * 3


def test_guidance_does_nothing_without_a_label() -> None:
    prior, hidden = guided_prior(), torch.full((4,), NO_LABEL)
    one, other = (sample_codes(prior, 4, (3, 5), labels=hidden, guidance=s, generator=generator(0)) for s in (1.0, 3.0))
    assert torch.equal(one, other)


def test_guidance_makes_labels_likelier() -> None:
    """What it is for: the posterior of the label, in the mean over the samples, rises with s."""
    prior = mild_prior()
    (everything, zero), (_, one) = (all_grids(prior, (2, 2), torch.tensor(label)) for label in (0, 1))
    assert len(everything) == 81
    posterior = torch.tensor([a / (a + b) for a, b in zip(zero, one, strict=True)])
    means = []
    for guidance in (0.0, 1.0, 2.0, 4.0):
        labels = torch.zeros(4000, dtype=torch.long)
        drawn = sample_codes(prior, 4000, (2, 2), labels=labels, guidance=guidance, generator=generator(0))
        means.append(float(posterior @ torch.tensor(count(drawn, 3)).float()) / 4000)
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


# Batches


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 99])
def test_drawing_in_parts_draws_the_same_codes(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of n grids is a network of 2n, and as large as a part of 2n grids without guidance."""
    prior = guided_prior()
    choice: dict[str, Any] = {"labels": torch.arange(8) % 3, "guidance": 2.5, "first": 5}
    choice["known"] = torch.randint(-1, 5, (8, 3, 5), generator=generator(1))
    expected = sample_codes(prior, 8, (3, 5), generator=generator(0), **choice)
    sizes = sizes_of_networks(monkeypatch)
    one = sampling.MOST_ACTIVATIONS // most_at_once(prior, (3, 5))
    monkeypatch.setattr(sampling, "MOST_ACTIVATIONS", one * 2 * parts + one // 2)
    assert torch.equal(sample_codes(prior, 8, (3, 5), generator=generator(0), **choice), expected)
    assert sizes == [2 * min(parts, 8 - start) for start in range(0, 8, parts)]


def test_at_least_one_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_networks(monkeypatch)
    monkeypatch.setattr(sampling, "MOST_ACTIVATIONS", 1)
    sample_codes(guided_prior(), 3, (2, 3), labels=torch.arange(3), guidance=2.0)
    assert sizes == [2, 2, 2]


def test_a_sample_knows_nothing_of_the_others() -> None:
    prior = guided_prior()
    plain, other = (
        sample_codes(prior, 4, (3, 5), labels=torch.tensor(labels), guidance=2.0, generator=generator(0))
        for labels in ([1, 0, 0, 0], [1, 2, 2, 2])
    )
    assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[1:], other[1:])


# What is refused


@pytest.mark.parametrize("guidance", [-0.1, -1, math.nan, math.inf, -math.inf])
def test_guidance_out_of_range_is_refused_in_one_line(guidance: float) -> None:
    message = f"guidance: expected a finite number of 0 or more, got {guidance}"
    draw: Callable[..., Tensor] = sample_codes
    for refuse in (
        lambda: SamplingParameters(guidance=guidance),
        lambda: draw(guided_prior(), 2, (3, 4), labels=torch.tensor([0, 2]), guidance=guidance),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            refuse()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("guidance", [0, 0.5, 2.0])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_prior_without_label_dropout_cannot_be_guided(num_classes: int, guidance: float) -> None:
    prior, labels = tiny_prior(num_classes=num_classes), torch.tensor([0, 2]) if num_classes else None
    with pytest.raises(ValueError, match=f"guidance: expected 1, for .* without label dropout, got {guidance}"):
        sample_codes(prior, 2, (3, 4), labels=labels, guidance=guidance)


@pytest.mark.parametrize("guidance", [0.5, 2.0])
def test_logits_that_are_not_finite_are_refused(guidance: float) -> None:
    """Also where only those without a label are not."""
    prior = guided_prior(num_layers=1)
    with torch.no_grad():
        prior.layers[0].label_bias.weight[-1] = torch.nan
    labels = torch.tensor([0, 2])
    sample_codes(prior, 2, (3, 4), labels=labels)
    with pytest.raises(ValueError, match="finite logits of the prior, got NaN or infinity in row 0"):
        sample_codes(prior, 2, (3, 4), labels=labels, guidance=guidance)
