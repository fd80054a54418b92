"""The estimate of how long a run takes, with a clock that a test sets."""

import pytest

from pipeline.training.cost import FIRST, LAST, SHORTEST, CostEstimate, duration, two_digits


def estimate(steps: int, seconds_per_step: float, *, start: int = 0, slow_start: float = 0.0) -> list[tuple[int, str]]:
    """Return (step, line) of each estimate of a run, or of a run resumed at `start`."""
    now = 0.0
    cost = CostEstimate(steps, clock=lambda: now)
    lines = []
    for step in range(start + 1, steps + 1):
        now += seconds_per_step + (slow_start if step - start < FIRST else 0)
        line = cost.after_step(step)
        if line is not None:
            lines.append((step, line))
    return lines


def test_one_line_after_the_first_steps_with_half_of_the_rest_as_an_offer() -> None:
    """1,620 steps of 1.25 s: 1,600 are left, 2,000 s; --steps 820 would be 1,000 s."""
    line = "about 33 minutes to go, evaluations aside; --steps 820 would be 17 minutes"
    assert estimate(1620, 1.25) == [(LAST, line)]


def test_the_first_steps_which_are_slow_do_not_count() -> None:
    assert estimate(1620, 1.25, slow_start=60) == estimate(1620, 1.25)


def test_a_resumed_run_estimates_what_is_left() -> None:
    """Resumed at 1,000 of 3,020 steps: after 20 more 2,000 are left; half of them end at 2,020, about 2,000."""
    (found,) = estimate(3020, 1.8, start=1000)
    assert found == (1020, "about 60 minutes to go, evaluations aside; --steps 2000 would be 29 minutes")


@pytest.mark.parametrize("steps", [1, LAST - 1, LAST])
def test_a_run_of_few_steps_has_none(steps: int) -> None:
    assert estimate(steps, 1000.0) == []


def test_a_run_that_is_over_soon_has_none() -> None:
    short = (SHORTEST - 1) / 100
    assert estimate(100 + LAST, short) == []
    assert len(estimate(100 + LAST, SHORTEST / 100 + 0.01)) == 1


def test_no_offer_that_is_no_shorter() -> None:
    """Of 22 steps 2 are left; half of them is step 21, and two digits of that 21; of 1,022 it is 1,000, before now."""
    (found,) = estimate(22, 100.0)
    assert found[1] == "about 3 minutes to go, evaluations aside; --steps 21 would be 2 minutes"
    (found,) = estimate(1022, 100.0, start=1000)
    assert found[1] == "about 3 minutes to go, evaluations aside"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"),
        (50.4, "50 seconds"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (34 * 60, "34 minutes"),
        (89 * 60, "89 minutes"),
        (90 * 60, "1.5 hours"),
        (2.5 * 3600, "2.5 hours"),
        (3.1 * 86_400, "3.1 days"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_two_digits() -> None:
    rounded = {1: 1, 99: 99, 104: 100, 1234: 1200, 996: 1000, 25_600: 26_000}
    assert {number: two_digits(number) for number in rounded} == rounded
