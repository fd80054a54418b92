"""The streams of random numbers behind samples: uniform, unrelated to each other, and other for any other seed."""

import pytest
import torch

from prior import complete_codes, sample_codes
from prior.uniforms import draw_seed, draw_uniforms, seeded_generator

from .oracles import chi_square_tail, generator, tiny_prior

SURE = 1e-3  # as in test_sampling


def test_numbers_are_uniform_and_unrelated() -> None:
    """Within a stream, and between those of neighbouring seeds, at the same and at the next place."""
    numbers = draw_uniforms(range(4, 4004), 3)
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    thirds = (numbers * 3).long()
    first, second = thirds[:, 0], thirds[:, 1]
    for one, other in ((first, second), (first[:-1], first[1:]), (first[:-1], second[1:])):
        assert chi_square_tail((one * 3 + other).bincount(minlength=9).tolist(), [1 / 9] * 9) > SURE


def test_streams_of_one_call_differ_pairwise() -> None:
    """Every number of every stream: 2000 neighbouring samples of 5 numbers each, none of which occurs twice."""
    first = draw_seed(generator(3))
    assert draw_uniforms(range(first, first + 2000), 5).unique().numel() == 10_000


def test_a_longer_stream_begins_as_a_shorter_one() -> None:
    assert torch.equal(draw_uniforms([7, 2**61 + 3], 9)[:, :4], draw_uniforms([7, 2**61 + 3], 4))


@pytest.mark.parametrize("low", [0, 1, 5, 2**32 - 1])
def test_seeds_that_differ_above_bit_32_draw_other_codes(low: int) -> None:
    """torch's own CPU generator would give each of these seeds the same numbers."""
    seeds = [low, *(low + (high << 32) for high in (1, 2, 3, 2**20, 2**31 - 1))]
    known = torch.full((1, 4, 6), -1)
    known[0, 3, 5] = 2
    prior = tiny_prior()
    for draw in (
        lambda seed: sample_codes(prior, 1, (4, 6), generator=generator(seed)),
        lambda seed: complete_codes(prior, known, candidates=3, generator=generator(seed)),
    ):
        drawn = [tuple(draw(seed).flatten().tolist()) for seed in seeds]
        assert len(set(drawn)) == len(seeds)
        assert drawn == [tuple(draw(seed).flatten().tolist()) for seed in seeds]


def test_a_generator_continues_after_its_seed_was_drawn() -> None:
    source = generator(2**40)
    assert len({draw_seed(source) for _ in range(100)}) == 100


def test_a_seed_may_have_any_size() -> None:
    seeds = [0, 9, 2**32, 2**32 + 9, 2**64 - 1, 2**64, 2**64 + 9, 10**23, 10**23 + 1]
    assert len({draw_seed(seeded_generator(seed)) for seed in seeds}) == len(seeds)
    assert [draw_seed(seeded_generator(seed)) for seed in seeds] == [draw_seed(seeded_generator(s)) for s in seeds]
    assert draw_seed(seeded_generator(9)) == draw_seed(generator(9))
    assert draw_seed(seeded_generator(None)) != draw_seed(seeded_generator(None))
