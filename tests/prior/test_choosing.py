"""From logits to a code: against plain steps one after the other, and closed forms."""

import math
from typing import Any

import pytest
import torch

from prior import SamplingParameters
from prior.choosing import choose_codes, code_probabilities

from .oracles import choose_slowly, generator, probabilities_slowly

HALVES = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),  # p^2
        ({"temperature": 1 / 3}, [1 / 74, 64 / 74, 1 / 74, 8 / 74]),  # p^3
        ({"temperature": 1e6}, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 4}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 99}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"top_p": 0.9}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # of the two left, the first holds 2/3
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # of the squares, it holds 16/22
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.9}, [0, 4 / 5, 0, 1 / 5]),
    ],
)
def test_probabilities_in_closed_form(choice: dict[str, Any], expected: list[float]) -> None:
    found = code_probabilities(HALVES, SamplingParameters(**choice))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-6, rtol=1e-9)
    assert (found > 0).tolist() == [[share > 0 for share in expected]]


@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 0.3}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 5, "top_p": 0.8}]
)
def test_probabilities_and_choices_are_those_of_the_slow_way(choice: dict[str, Any]) -> None:
    logits = 2 * torch.randn(40, 7, dtype=torch.float64, generator=generator(5))
    numbers = torch.rand(40, dtype=torch.float64, generator=generator(6))
    expected = [probabilities_slowly(row, **choice) for row in logits.tolist()]
    torch.testing.assert_close(
        code_probabilities(logits, SamplingParameters(**choice)), torch.tensor(expected, dtype=torch.float64)
    )
    chosen = [
        choose_slowly(row, number, **choice) for row, number in zip(logits.tolist(), numbers.tolist(), strict=True)
    ]
    assert choose_codes(logits, numbers, SamplingParameters(**choice)).tolist() == chosen
    assert len(set(chosen)) > 3


@pytest.mark.parametrize("choice", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-12}, {"temperature": 1e-4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_to_the_most_likely_code(choice: dict[str, Any], dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(200, 9, dtype=dtype, generator=generator(7))
    numbers = torch.rand(200, dtype=torch.float64, generator=generator(8))
    assert torch.equal(choose_codes(logits, numbers, SamplingParameters(**choice)), logits.argmax(dim=1))


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-12}])
def test_of_equally_likely_codes_every_way_takes_the_one_greedy_takes(choice: dict[str, Any]) -> None:
    logits = torch.randint(3, (200, 16), generator=generator(9)).double()
    numbers = torch.rand(200, dtype=torch.float64, generator=generator(10))
    assert torch.equal(
        choose_codes(logits, numbers, SamplingParameters(**choice)),
        choose_codes(logits, numbers, SamplingParameters(temperature=0)),
    )


@pytest.mark.parametrize("temperature", [1e-30, 1e-307, 5e-324])
def test_no_temperature_is_too_low(temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, -5.0]])
    assert code_probabilities(logits, SamplingParameters(temperature=temperature)).tolist() == [[0, 1, 0]]


def test_numbers_are_places_on_the_shares_laid_end_to_end() -> None:
    almost = 1 - 2.0**-53
    cuts = [(0.0, 0), (0.12, 0), (0.13, 1), (0.62, 1), (0.63, 2), (0.74, 2), (0.76, 3), (almost, 3)]
    numbers = torch.tensor([number for number, _ in cuts], dtype=torch.float64)
    assert choose_codes(HALVES.expand(8, 4), numbers).tolist() == [code for _, code in cuts]


@pytest.mark.parametrize("possible", [[0, 1], [1], [2, 3], [0, 3], [1, 2]])
def test_an_impossible_code_is_never_chosen(possible: list[int]) -> None:
    logits = torch.full((5, 4), -math.inf)
    logits[:, possible] = 0.1
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    assert set(choose_codes(logits, numbers).tolist()) == set(possible)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.1}, r"top_p: expected above 0 and at most 1, got 1\.1"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParameters(**fields)
