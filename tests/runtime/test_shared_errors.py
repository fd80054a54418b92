"""What processes say about an error in one of them, as threads that act as processes."""

import pytest

from pipeline.errors import InputError
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup

from ..process_threads import run_in_threads


def raising(*errors: Exception | None) -> list[object]:
    """Return what three processes raise or return, of which each raises its own of these errors in `run_on_all`."""

    def work(group: ProcessGroup) -> int:
        def act() -> int:
            error = errors[group.rank]
            if error is not None:
                raise error
            return group.rank

        return group.run_on_all(act)

    return run_in_threads(len(errors), work)


def wrong(expected: str) -> InputError:
    return InputError(expected=expected, got="x", do="y")


def test_numbers_that_are_not_finite_in_one_process_are_an_error_in_all() -> None:
    """All go back to the last good state; a process that has no such numbers, or nothing to do, would wait for ever."""
    found = raising(None, FloatingPointError("nan"), None)
    assert [type(each) for each in found] == [FloatingPointError] * 3
    assert {str(each) for each in found} == {"nan"}


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ((None, wrong("b"), wrong("c")), "expected b, got x; y"),
        ((FloatingPointError("nan"), None, wrong("c")), "expected c, got x; y"),
        ((None, None, ValueError("steps: expected 1")), "steps: expected 1"),
        ((ValueError("v"), wrong("b"), None), "expected b, got x; y"),
    ],
)
def test_the_main_process_has_the_line_and_the_others_none(errors: tuple[Exception | None, ...], line: str) -> None:
    first, *others = raising(*errors)
    assert str(first) == line
    assert isinstance(first, InputError) == line.startswith("expected")
    assert all(isinstance(each, OtherProcessError) for each in others)


def test_one_process_alone_raises_its_own_error() -> None:
    error = ValueError("its own")
    with pytest.raises(ValueError, match="its own") as raised:
        ProcessGroup().run_on_all(lambda: (_ for _ in ()).throw(error))
    assert raised.value is error
