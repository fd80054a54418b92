"""The verdict on a codebook, from histograms whose answer a reader knows, and its picture."""

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.codebook_health import codebook_health
from pipeline.evaluation.codebook_picture import BARS, COLUMNS, TILE, code_tiles, codebook_picture
from pipeline.images.png import GAP

from ..support import LEVELS, STEP, brightness_tokenizer


def even(num_codes: int, used: int, each: int = 100) -> Tensor:
    """`used` of the codes `each` times, the others never."""
    return torch.tensor([each] * used + [0] * (num_codes - used))


@pytest.mark.parametrize(
    ("histogram", "half"),
    [([5, 5], 1), ([4, 3, 3], 2), ([1, 9, 1, 1], 1), ([2, 2, 2, 2, 2], 3), ([0, 7, 0], 1), ([0, 0], 1), ([3, 1, 2], 1)],
)
def test_half_is_the_fewest_codes_that_carry_half(histogram: list[int], half: int) -> None:
    slow = next(
        n for n in range(1, len(histogram) + 1) if 2 * sum(sorted(histogram, reverse=True)[:n]) >= sum(histogram)
    )
    assert codebook_health(torch.tensor(histogram)).half == half == slow


@pytest.mark.parametrize(
    ("histogram", "verdict"),
    [
        (even(512, 509), "healthy: 509 of 512 codes in use, perplexity 509"),
        (even(512, 512, 1), "healthy: 512 of 512 codes in use, perplexity 512"),
        (even(512, 300), "partly dead: 300 of 512 codes in use, perplexity 300; try fewer --num-codes or more --steps"),
        (
            even(512, 28),
            "collapsing: 14 codes carry half of all vectors, 28 of 512 codes in use; "
            "try a lower --lr, a smaller --code-dim or fewer --num-codes",
        ),
        (
            torch.tensor([10_000] + [10] * 127),
            "alive but uneven: 128 of 128 codes in use, yet 1 code carries half of all vectors; "
            "normal where much of each image is plain background",
        ),
        (even(512, 30, 2), "too early to tell: 30 of 512 codes in use by 60 vectors; 4 for each code would tell"),
    ],
)
def test_the_verdict_says_what_the_histogram_shows(histogram: Tensor, verdict: str) -> None:
    shuffled = histogram[torch.randperm(len(histogram), generator=torch.Generator().manual_seed(0))]
    health = codebook_health(shuffled)
    assert health.verdict == verdict
    assert torch.equal(health.histogram, shuffled)


def test_a_tile_is_what_its_code_decodes_to() -> None:
    """Code k of the brightness tokenizer is the grey value 17 k."""
    tiles = code_tiles(brightness_tokenizer(), torch.arange(LEVELS))
    assert tiles.shape == (LEVELS, 1, TILE, TILE)
    for code, picture in enumerate(tiles):
        assert picture.unique().tolist() == [STEP * code]


def test_the_picture_shows_the_most_used_code_first_and_no_unused_one() -> None:
    histogram = torch.zeros(LEVELS, dtype=torch.int64)
    histogram[3], histogram[9] = 10, 40
    picture = codebook_picture(brightness_tokenizer(), histogram)[0]
    width = COLUMNS * (TILE + GAP) + GAP
    assert picture.shape == (BARS + TILE + 2 * GAP, width)
    first, second, third = (
        picture[BARS + GAP : BARS + GAP + TILE, GAP + i * (TILE + GAP) :][:, :TILE] for i in range(3)
    )
    assert (first == 9 * STEP).all()
    assert (second == 3 * STEP).all()
    assert (third == 255).all()
    black = (picture[:BARS] == 0).sum(dim=0)  # height of the bar in each column of pixels
    assert black[0] == BARS
    assert black[width // LEVELS + 2] == BARS // 4
    assert black[-1] == 0
