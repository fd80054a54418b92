"""Logits that are not finite are refused while sampling, not drawn from."""

import pytest
import torch
from torch import Tensor

from prior import complete_codes, sample_codes
from prior.incremental import IncrementalPrior
from prior.raster import check_finite

from ..support import tiny_prior

GRID = (3, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_is_enough(value: float) -> None:
    logits = torch.zeros(4, 16)
    check_finite(logits, 0)
    logits[2, 7] = value
    with pytest.raises(
        ValueError, match="expected finite logits of the prior, got NaN or infinity in row 2 of the grid"
    ):
        check_finite(logits, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_weights_with_one_nan_draw_nothing(temperature: float, top_k: int | None) -> None:
    prior = tiny_prior()
    with torch.no_grad():
        list(prior.parameters())[-1].view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match="row 0"):
        sample_codes(prior, 2, GRID, temperature=temperature, top_k=top_k)


@pytest.mark.parametrize("column", range(GRID[1]))
def test_one_position_is_enough(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that overflow at one position spread no NaN to the next: the code drawn there is any, and a valid one."""
    columns: list[int] = []
    logits, features = IncrementalPrior.logits, IncrementalPrior.features

    def recorded(prior: IncrementalPrior, position: int) -> Tensor:
        columns.append(position)
        return features(prior, position)

    def overflown(prior: IncrementalPrior, seen: Tensor) -> Tensor:
        is_there = len(columns) == GRID[1] + column + 1
        return logits(prior, seen).index_fill(1, torch.tensor([3]), torch.nan if is_there else 0)

    monkeypatch.setattr(IncrementalPrior, "features", recorded)
    monkeypatch.setattr(IncrementalPrior, "logits", overflown)
    with pytest.raises(ValueError, match="row 1"):
        sample_codes(tiny_prior(), 2, GRID)
    assert columns == [*range(GRID[1])] * 2


@pytest.mark.parametrize("keep", ["first row", "last row", "nothing"])
def test_completion_refuses_them_too(keep: str) -> None:
    """Also where the codes of a row are known, and the prior only says how likely they are."""
    prior = tiny_prior()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1e20)
    known = torch.full((2, *GRID), -1)
    if keep != "nothing":
        known[:, 0 if keep == "first row" else -1] = 3
    with pytest.raises(ValueError, match="finite logits"):
        complete_codes(prior, known, candidates=4)
