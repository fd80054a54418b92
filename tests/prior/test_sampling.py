"""Sampling: against a sampler that runs the network on the whole grid at every position, and known distributions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prior import complete_codes, raster, sample_codes, sampling
from prior.choosing import choose_codes
from prior.incremental import IncrementalPrior
from prior.sampling import most_at_once

from .oracles import Grid, all_grids, chi_square_tail, count, generator, sample_slowly, sizes_of_networks, tiny_prior

SURE = 1e-3  # a test of a distribution fails one seed in a thousand; the seeds here are fixed


# The network run on everything at every position draws the same codes.


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (7, 7), (8, 16), (16, 8)])
def test_the_slow_sampler_draws_the_same_codes(grid: Grid, num_samples: int) -> None:
    prior = tiny_prior(num_classes=3, seed=1)
    labels = torch.arange(num_samples) % 3
    found = sample_codes(prior, num_samples, grid, labels=labels, generator=generator(2))
    assert torch.equal(found, sample_slowly(prior, num_samples, grid, labels=labels, seed=2))
    assert found.dtype == torch.int64
    assert math.prod(grid) < 9 or len(found.unique()) > 2  # not one code for ever


@pytest.mark.parametrize(("first", "kernel", "layers"), [(3, 3, 1), (7, 3, 4), (3, 5, 3), (5, 1, 2), (7, 7, 2)])
def test_the_slow_sampler_draws_the_same_codes_with_any_kernels(first: int, kernel: int, layers: int) -> None:
    prior = tiny_prior(first_kernel_size=first, kernel_size=kernel, num_layers=layers)
    found = sample_codes(prior, 2, (5, 7), generator=generator(3))
    assert torch.equal(found, sample_slowly(prior, 2, (5, 7), seed=3))


@pytest.mark.parametrize(
    "choice", [{"temperature": 0.0}, {"temperature": 1.7}, {"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}]
)
def test_the_slow_sampler_draws_the_same_codes_with_any_choice(choice: dict[str, Any]) -> None:
    prior = tiny_prior()
    found = sample_codes(prior, 3, (3, 5), generator=generator(4), **choice)
    assert torch.equal(found, sample_slowly(prior, 3, (3, 5), seed=4, **choice))


@pytest.mark.parametrize("grid", [(4, 6), (6, 4)])
def test_the_slow_sampler_draws_the_same_codes_around_known_ones(grid: Grid) -> None:
    """Known: anything, a row, a column, the end alone, all, nothing; in one batch, and in batches of one kind."""
    prior = tiny_prior()
    codes = torch.randint(5, (6, *grid), generator=generator(5))
    chosen = torch.zeros(6, *grid, dtype=torch.bool)
    chosen[0] = torch.rand(grid, generator=generator(6)) < 0.5
    chosen[1, 1], chosen[2, :, 2], chosen[3, -1, -1], chosen[4] = True, True, True, True
    mixed = torch.where(chosen, codes, -1)
    for known in (mixed, *(kind.repeat(2, 1, 1) for kind in mixed)):
        found = sample_codes(prior, len(known), grid, known=known, generator=generator(7))
        assert torch.equal(found, sample_slowly(prior, len(known), grid, known=known, seed=7))
        assert torch.equal(found[known >= 0], known[known >= 0])


def test_a_float32_prior_draws_what_the_slow_sampler_draws() -> None:
    prior = tiny_prior().float()
    found = sample_codes(prior, 3, (5, 7), generator=generator(8))
    assert torch.equal(found, sample_slowly(prior, 3, (5, 7), seed=8))


# The draws have the distribution of the prior.


def test_bf16_draws_with_the_same_joint_probability() -> None:
    """Nearly: what 4,000 grids cannot tell from it. The second row sees the first through bfloat16."""
    prior = tiny_prior(num_codes=3, seed=39).float()
    _, joint = all_grids(prior, (2, 1))
    counts = count(sample_codes(prior, 4000, (2, 1), precision="bf16", generator=generator(0)), 3)
    assert chi_square_tail(counts, joint) > SURE


def test_bf16_is_of_the_vertical_stack_and_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    class Watched(IncrementalPrior):
        def __init__(self, *args: Any, vertical_dtype: torch.dtype | None = None, **others: Any) -> None:
            dtypes.append(vertical_dtype)
            super().__init__(*args, vertical_dtype=vertical_dtype, **others)

    monkeypatch.setattr(raster, "IncrementalPrior", Watched)
    prior = tiny_prior()
    sample_codes(prior, 2, (2, 3))
    sample_codes(prior, 2, (2, 3), precision="bf16")
    complete_codes(prior, torch.full((1, 2, 3), -1), precision="bf16")
    assert dtypes == [None, torch.bfloat16, torch.bfloat16]
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16, got fp16"):
        sample_codes(prior, 2, (2, 3), precision="fp16")


@pytest.mark.parametrize("grid", [(1, 2), (2, 1)])
def test_grids_are_drawn_with_the_joint_probability_of_their_codes(grid: Grid) -> None:
    prior = tiny_prior(num_codes=3, seed=39)
    everything, joint = all_grids(prior, grid)
    counts = count(sample_codes(prior, 4000, grid, generator=generator(0)), 3)
    assert chi_square_tail(counts, joint) > SURE
    first, second = (
        [sum(p for g, p in zip(everything.flatten(1).tolist(), joint, strict=True) if g[at] == k) for k in range(3)]
        for at in (0, 1)
    )
    independent = [a * b for a in first for b in second]
    assert chi_square_tail(counts, independent) < 1e-9  # the second code was drawn given the first


def test_labels_choose_the_distribution() -> None:
    prior = tiny_prior(num_codes=3, seed=50, num_classes=2)
    labels = torch.arange(4000) % 2
    drawn = sample_codes(prior, 4000, (1, 2), labels=labels, generator=generator(1))
    for label in (0, 1):
        counts = count(drawn[labels == label], 3)
        assert chi_square_tail(counts, all_grids(prior, (1, 2), torch.tensor(label))[1]) > SURE
        assert chi_square_tail(counts, all_grids(prior, (1, 2), torch.tensor(1 - label))[1]) < 1e-9


def test_known_codes_condition_those_after_them_and_not_those_before() -> None:
    prior = tiny_prior(num_codes=3, seed=39)
    _, joint = all_grids(prior, (1, 2))
    free = sample_codes(prior, 3000, (1, 2), generator=generator(2))
    for code in range(3):
        known = torch.full((3000, 1, 2), -1)
        known[:, 0, 0] = code
        drawn = sample_codes(prior, 3000, (1, 2), known=known, generator=generator(2))
        given_first = [p / sum(joint[3 * code : 3 * code + 3]) for p in joint[3 * code : 3 * code + 3]]
        assert (drawn[:, 0, 0] == code).all()
        assert chi_square_tail(drawn[:, 0, 1].bincount(minlength=3).tolist(), given_first) > SURE
        drawn = sample_codes(prior, 3000, (1, 2), known=known.flip(2), generator=generator(2))
        assert (drawn[:, 0, 1] == code).all()
        assert torch.equal(drawn[:, 0, 0], free[:, 0, 0])


def test_the_histogram_of_one_position_is_its_softmax() -> None:
    prior = tiny_prior()
    shares = prior(torch.zeros(1, 1, 1, dtype=torch.long))[0, :, 0, 0].softmax(dim=0).tolist()
    counts = sample_codes(prior, 4000, (1, 1), generator=generator(3)).flatten().bincount(minlength=5).tolist()
    assert chi_square_tail(counts, shares) > SURE
    assert chi_square_tail(counts, [0.2] * 5) < 1e-9


# What is known, and greedy sampling.


def test_code_k_is_drawn_as_code_k() -> None:
    """All 1000 of them, by the logits and by what is known."""
    logits = 50 * torch.eye(1000)
    assert choose_codes(logits, torch.full((1000,), 0.5)).tolist() == list(range(1000))
    known = torch.arange(1000).view(1, 25, 40)
    assert torch.equal(sample_codes(tiny_prior(num_codes=1000, num_layers=1), 1, (25, 40), known=known), known)


def test_greedy_ignores_the_numbers() -> None:
    prior = tiny_prior()
    drawn = [sample_codes(prior, 2, (3, 5), temperature=0, generator=generator(seed)) for seed in (0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][0], drawn[0][1])
    logits = prior(drawn[0])
    assert torch.equal(logits.argmax(dim=1), drawn[0])
    for same in ({"top_k": 1}, {"top_p": 1e-12}):
        assert torch.equal(sample_codes(prior, 2, (3, 5), generator=generator(2), **same), drawn[0])


# Seeds and batches.


def test_the_seed_decides() -> None:
    prior = tiny_prior()
    drawn = [sample_codes(prior, 2, (3, 5), generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_generator_goes_on() -> None:
    prior, source = tiny_prior(), generator(0)
    drawn = [sample_codes(prior, 2, (3, 5), generator=source) for _ in range(2)]
    assert not torch.equal(drawn[0], drawn[1])


def test_without_a_generator_torch_decides() -> None:
    prior, drawn = tiny_prior(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(sample_codes(prior, 2, (3, 5)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("num_samples", [1, 3, 63, 64, 65])
def test_a_sample_depends_on_its_index_and_not_on_their_number(num_samples: int) -> None:
    prior = tiny_prior(num_classes=3)
    most = sample_codes(prior, 70, (3, 5), labels=torch.arange(70) % 3, generator=generator(0))
    labels = torch.arange(num_samples) % 3
    drawn = sample_codes(prior, num_samples, (3, 5), labels=labels, generator=generator(0))
    assert drawn.shape == (num_samples, 3, 5)
    assert torch.equal(drawn, most[:num_samples])
    assert len(most.unique(dim=0)) > 60  # the samples differ


@pytest.mark.parametrize("first", [1, 3, 4, 62])
def test_a_sample_can_be_drawn_alone_by_its_index(first: int) -> None:
    prior = tiny_prior(num_classes=3)
    labels = torch.arange(64) % 3
    most = sample_codes(prior, 64, (3, 5), labels=labels, generator=generator(0))
    for some in (1, 2):
        own = labels[first : first + some]
        drawn = sample_codes(prior, some, (3, 5), labels=own, first=first, generator=generator(0))
        assert torch.equal(drawn, most[first : first + some])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 99])
def test_drawing_in_parts_draws_the_same_codes(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, known codes and `first` belong to the samples of each part; the last part may be smaller."""
    prior, labels = tiny_prior(num_classes=3), torch.arange(8) % 3
    known = torch.randint(-1, 5, (8, 3, 5), generator=generator(1))
    choice: dict[str, Any] = {"labels": labels, "known": known, "first": 5}
    expected = sample_codes(prior, 8, (3, 5), generator=generator(0), **choice)
    sizes = sizes_of_networks(monkeypatch)
    one = sampling.MOST_ACTIVATIONS // most_at_once(prior, (3, 5))
    monkeypatch.setattr(sampling, "MOST_ACTIVATIONS", one * parts + one // 2)
    assert torch.equal(sample_codes(prior, 8, (3, 5), generator=generator(0), **choice), expected)
    assert sizes == [min(parts, 8 - start) for start in range(0, 8, parts)]


def test_at_least_one_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample_codes(tiny_prior(), 3, (2, 3), generator=generator(0))
    monkeypatch.setattr(sampling, "MOST_ACTIVATIONS", 1)
    assert torch.equal(sample_codes(tiny_prior(), 3, (2, 3), generator=generator(0)), expected)


@pytest.mark.parametrize(
    "fields", [{}, {"num_layers": 6}, {"channels": 16}, {"kernel_size": 5, "num_layers": 6}, {"first_kernel_size": 3}]
)
@pytest.mark.parametrize("width", [3, 16])
def test_what_a_network_keeps_is_about_what_is_counted(fields: dict[str, Any], width: int) -> None:
    """The tensors of one network against the share of MOST_ACTIVATIONS that one sample is given."""
    prior = tiny_prior(**{"num_layers": 4, "channels": 8, **fields})
    fewer, more = (elements_in(IncrementalPrior(prior, n, width, None)) for n in (64, 128))
    assert 0.5 < (more - fewer) / 64 * most_at_once(prior, (9, width)) / sampling.MOST_ACTIVATIONS < 2.5


@pytest.mark.parametrize(("every", "grid"), [(1, (9, 3)), (2, (5, 16)), (3, (2, 4))])
@torch.no_grad()
def test_what_a_network_with_attention_keeps_in_the_last_row_is_about_what_is_counted(every: int, grid: Grid) -> None:
    """The keys and values of all positions, which are more than all else in a high grid."""
    prior = tiny_prior(num_layers=4, channels=8, attention_every=every)
    networks = [IncrementalPrior(prior, n, grid[1], None) for n in (64, 128)]
    for network in networks:
        for _ in range(grid[0]):
            network.start_row()
    fewer, more = map(elements_in, networks)
    assert 0.5 < (more - fewer) / 64 * most_at_once(prior, grid) / sampling.MOST_ACTIVATIONS < 2


def elements_in(network: IncrementalPrior) -> int:
    """Of all tensors that it holds, in whatever it holds them; those that share memory count once."""
    found: dict[int, int] = {}

    def visit(held: Any) -> None:
        if isinstance(held, Tensor):
            found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes() // held.element_size()
        elif isinstance(held, (list, tuple)):
            for item in held:
                visit(item)
        elif hasattr(held, "__dict__"):
            visit(list(vars(held).values()))

    visit(network)
    return sum(found.values())


def test_a_sample_knows_nothing_of_the_others() -> None:
    prior = tiny_prior(num_classes=3).train()
    known = torch.full((4, 3, 5), -1)
    plain = sample_codes(prior, 4, (3, 5), labels=torch.tensor([1, 0, 0, 0]), known=known, generator=generator(0))
    known[1:, :2] = 3
    other = sample_codes(prior, 4, (3, 5), labels=torch.tensor([1, 2, 2, 2]), known=known, generator=generator(0))
    assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[1:, 2], other[1:, 2])


def test_the_caller_keeps_the_known_codes_as_they_were() -> None:
    known = torch.full((1, 2, 3), -1)
    known[0, 0, 1] = 4
    before = known.clone()
    assert sample_codes(tiny_prior(), 1, (2, 3), known=known).min() >= 0
    assert torch.equal(known, before)


def test_known_codes_may_be_stored_in_any_order() -> None:
    """A transposed view, whose rows are columns in memory."""
    known = torch.randint(-1, 5, (4, 5, 3), generator=generator(1)).mT
    assert not known.is_contiguous()
    found, expected = (
        sample_codes(tiny_prior(), 4, (3, 5), known=codes, generator=generator(0))
        for codes in (known, known.contiguous())
    )
    assert torch.equal(found, expected)


# What happens around it.


@pytest.mark.parametrize("known", [None, torch.full((2, 3, 5), -1)])
def test_what_was_drawn_can_be_trained_on(known: Tensor | None) -> None:
    prior = tiny_prior()
    codes = sample_codes(prior, 2, (3, 5), known=known)
    assert not codes.is_inference()
    prior(codes).sum().backward()
    assert prior.embedding.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_inside_there_is_no_gradient_and_no_training(training: bool) -> None:
    prior = tiny_prior(dropout=0.9).train(training)
    inside = []
    drawn = sample_codes(
        prior,
        2,
        (3, 5),
        generator=generator(0),
        on_row=lambda row: inside.append((row, torch.is_grad_enabled(), any(m.training for m in prior.modules()))),
    )
    assert inside == [(1, False, False), (2, False, False), (3, False, False)]
    assert all(module.training == training for module in prior.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(drawn, sample_slowly(prior.eval(), 2, (3, 5), seed=0))  # no dropout acted
    assert all(parameter.grad is None for parameter in prior.parameters())


def test_the_mode_comes_back_when_it_is_interrupted() -> None:
    def interrupt(row: int) -> None:
        raise KeyboardInterrupt

    prior = tiny_prior().train()
    with pytest.raises(KeyboardInterrupt):
        sample_codes(prior, 1, (2, 3), on_row=interrupt)
    assert all(module.training for module in prior.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (3, 5)])
@pytest.mark.parametrize("fill", [-1, 2])
def test_rows_are_reported_once_each(grid: Grid, fill: int) -> None:
    """Also those in which nothing is left to draw."""
    rows: list[int] = []
    known = torch.full((2, *grid), fill)
    drawn = sample_codes(tiny_prior(), 2, grid, known=known, on_row=rows.append)
    assert rows == list(range(1, grid[0] + 1))
    assert drawn.shape == (2, *grid)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 0
    assert drawn.max() < 5


@pytest.mark.parametrize(("at_once", "told"), [(1, [0, 0, 1, 1, 1, 2, 2, 2, 3]), (2, [0, 1, 2, 2, 2, 3])])
def test_rows_of_parts_are_reported_as_the_mean(at_once: int, told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples of three rows."""
    monkeypatch.setattr(sampling, "most_at_once", lambda prior, grid: at_once)
    rows: list[int] = []
    sample_codes(tiny_prior(), 3, (3, 2), on_row=rows.append)
    assert rows == told


@pytest.mark.parametrize("at_once", [1, 4, 7, 10, 99])
@pytest.mark.parametrize("height", [1, 6])
def test_the_report_never_falls_and_ends_at_the_height(
    height: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "most_at_once", lambda prior, grid: at_once)
    rows: list[int] = []
    sample_codes(tiny_prior(num_layers=1), 10, (height, 2), on_row=rows.append)
    assert rows == sorted(rows)
    assert rows[-1] == height
    assert len(rows) == height * -(-10 // at_once)


UNKNOWN = torch.full((2, 3, 4), -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "at least 1 sample .*, got 0 of 3x4"),
        ({"num_samples": -1}, "at least 1 sample .*, got -1 of 3x4"),
        ({"grid": (0, 4)}, "at least 1x1, got 2 of 0x4"),
        ({"grid": (3, 0)}, "at least 1x1, got 2 of 3x0"),
        ({"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_k": -3}, "top_k: expected at least 1, got -3"),
        ({"top_p": 0.0}, r"top_p: expected above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.1}, r"top_p: expected above 0 and at most 1, got 1\.1"),
        ({"top_p": math.nan}, "top_p: expected above 0 and at most 1, got nan"),
        ({"labels": None}, "3 classes: expected labels"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "one label for each of 2 grids"),
        ({"labels": torch.zeros(2, 1, dtype=torch.long)}, "one label for each of 2 grids"),
        ({"labels": torch.tensor([0, 3])}, r"labels from 0 to 2, got \[0, 3\]"),
        ({"labels": torch.tensor([-1, 0])}, r"labels from 0 to 2, got \[-1, 0\]"),
        ({"known": UNKNOWN[:1]}, r"known: expected the shape \[2, 3, 4\], got \[1, 3, 4\]"),
        ({"known": UNKNOWN[0]}, r"known: expected the shape \[2, 3, 4\], got \[3, 4\]"),
        ({"known": UNKNOWN.mT}, r"known: expected the shape \[2, 3, 4\], got \[2, 4, 3\]"),
        ({"known": UNKNOWN + 6}, "known: expected codes from 0 to 4, or -1, got 5 to 5"),
        ({"known": UNKNOWN - 1}, "known: expected codes from 0 to 4, or -1, got -2 to -2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"num_samples": 2, "grid": (3, 4), "labels": torch.tensor([0, 2]), **arguments}
    draw: Callable[..., Tensor] = sample_codes
    with pytest.raises(ValueError, match=message):
        draw(tiny_prior(num_classes=3), **fields)


def test_a_prior_without_classes_refuses_labels() -> None:
    with pytest.raises(ValueError, match="without labels"):
        sample_codes(tiny_prior(), 2, (3, 4), labels=torch.zeros(2, dtype=torch.long))
