"""What the time of a run is used for, with a clock that the tests turn."""

import pytest

from pipeline.training.time_use import TimeUse


class Clock:
    """A clock that stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shares_by_hand() -> None:
    clock = Clock()
    use = TimeUse(clock)
    clock.now += 70  # steps
    with use.of("evaluating"):
        clock.now += 20
    with use.of("saving"):
        clock.now += 7
    with use.of("saving"):
        clock.now += 1
    use.add("waiting", 1.5)  # seconds of those of the steps
    clock.now += 2
    assert use.numbers() == {"waiting_share": 0.015, "evaluating_share": 0.2, "saving_share": 0.08}
    assert use.line() == "time: 70.5 % training, 1.5 % waiting for data, 20.0 % evaluating and pictures, 8.0 % saving"


def test_time_within_another_kind_is_counted_once() -> None:
    clock = Clock()
    use = TimeUse(clock)
    with use.of("evaluating"):
        clock.now += 3
        with use.of("saving"):
            clock.now += 4
        with use.of("waiting"):
            clock.now += 1
        clock.now += 2
    assert use.numbers() == {"waiting_share": 0.1, "evaluating_share": 0.5, "saving_share": 0.4}


def test_time_that_ends_in_an_error_is_counted() -> None:
    clock = Clock()
    use = TimeUse(clock)

    def fail() -> None:
        with use.of("saving"):
            clock.now += 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5
    assert use.share("saving") == 0.5


def test_the_line_adds_up_to_100_after_rounding() -> None:
    clock = Clock()
    use = TimeUse(clock)
    for kind in ("waiting", "evaluating", "saving"):
        use.add(kind, 0.24)
    clock.now += 100
    assert use.line() == "time: 99.4 % training, 0.2 % waiting for data, 0.2 % evaluating and pictures, 0.2 % saving"


def test_before_any_time_has_passed() -> None:
    use = TimeUse(Clock())
    assert set(use.numbers().values()) == {0.0}
    assert use.line().startswith("time: 100.0 % training, 0.0 %")


def test_an_unknown_kind() -> None:
    use = TimeUse(Clock())
    with pytest.raises(ValueError, match="kind: expected one of waiting, evaluating, saving, got 'dreaming'"):
        use.add("dreaming", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'dreaming'"), use.of("dreaming"):  # type: ignore[arg-type]
        pass
