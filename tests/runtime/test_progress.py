"""Progress: the right numbers, by a clock that the test sets; one line on a terminal, calm lines elsewhere."""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest

from pipeline.runtime import console
from pipeline.runtime.console import end_status, note
from pipeline.runtime.progress import FIRST_LINE_AFTER, NEXT_LINES_AFTER, Progress, duration, with_progress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Terminal(io.StringIO):
    """A terminal, as far as anyone asks."""

    def isatty(self) -> bool:
        return True


def screen(written: str, width: int = 500) -> list[str]:
    """Return the lines that a terminal shows: a carriage return goes back to the start of the line."""
    lines, column = [[" "] * width], 0
    for character in written:
        if character == "\r":
            column = 0
        elif character == "\n":
            lines.append([" "] * width)
            column = 0
        else:
            lines[-1][column] = character
            column += 1
    return ["".join(line).rstrip() for line in lines]


# The line


def test_the_line_says_what_is_done_how_fast_and_how_long_it_takes(clock: Clock) -> None:
    with Progress(50_000, "encoding train", clock=clock, shown=False) as progress:
        assert progress.line() == "encoding train: 0 of 50,000 images (0 %)"
        clock.now += 4
        progress.update(12_000)
        assert progress.line() == "encoding train: 12,000 of 50,000 images (24 %), 3,000 images/s, 13 s left"


def test_the_line_of_training_counts_steps_and_shows_images(clock: Clock) -> None:
    with Progress(1500, unit="step", batch_size=32, clock=clock, shown=False) as progress:
        progress.set_numbers("loss 0.123, 512 codes in use")
        clock.now += 8
        progress.update(812)
        assert progress.line() == "step 812 of 1,500 (54 %), loss 0.123, 512 codes in use, 3,248 images/s, 7 s left"


def test_what_was_done_before_a_resume_counts_neither_for_the_rate_nor_for_the_time_left(clock: Clock) -> None:
    """As if only the rest had been to do: 2 steps a second, where all steps over the time would be 12."""
    with Progress(200, unit="step", clock=clock, shown=False) as progress:
        clock.now += 30  # while the state is read
        progress.start_at(100)
        assert progress.line() == "step 100 of 200 (50 %)"
        for _ in range(20):
            clock.now += 0.5
            progress.update()
        assert progress.line() == "step 120 of 200 (60 %), 2 steps/s, 40 s left"


def test_the_rate_forgets_a_slow_start(clock: Clock) -> None:
    """It is the mean of about the last minute, whatever came before; the oracle is that minute counted by hand."""
    with Progress(10_000, clock=clock, shown=False) as progress:
        clock.now += 100  # the first step compiles
        progress.update()
        for _ in range(70):
            clock.now += 1
            progress.update(20)
        assert re.search(r", 20 images/s, 7:10 left$", progress.line())


@pytest.mark.parametrize(("steps", "shown"), [(1, "0.1"), (3, "0.3"), (25, "2.5"), (99, "9.9"), (12345, "1,234")])
def test_rates_have_two_digits_or_more(clock: Clock, steps: int, shown: str) -> None:
    with Progress(10**6, clock=clock, shown=False) as progress:
        clock.now += 10
        progress.update(steps)
        assert f" {shown} images/s" in progress.line()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (9.6, "10 s"), (59.4, "59 s"), (59.6, "1:00"), (70, "1:10"), (3599.7, "1:00:00"), (7270, "2:01:10")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_one_of_it_and_nothing_to_do(clock: Clock) -> None:
    assert Progress(1, "verifying", "shard").line() == "verifying: 0 of 1 shard (0 %)"
    with Progress(0, "encoding", clock=clock, shown=False) as progress:
        assert progress.line() == "encoding: 0 of 0 images"
        progress.reset(8)
        clock.now += 2
        progress.move_to(2.5)
        assert progress.line() == "encoding: 2 of 8 images (31 %), 1.2 images/s, 4 s left"


def test_a_name_in_a_description_is_harmless() -> None:
    assert Progress(2, "preparing \x1b[2J\n").line() == "preparing \\x1b[2J\\n: 0 of 2 images (0 %)"


def test_where_there_is_little_room_the_numbers_are_cut_short(clock: Clock) -> None:
    with Progress(1500, unit="step", batch_size=32, clock=clock, shown=False) as progress:
        progress.set_numbers("loss 0.123, 512 codes in use")
        clock.now += 8
        progress.update(812)
        complete = progress.line()
        assert progress.line(len(complete)) == complete
        assert progress.line(70) == "step 812 of 1,500 (54 %), loss 0.123, 512..., 3,248 images/s, 7 s left"
        for width in range(52, 100):
            assert len(progress.line(width)) <= width
            assert progress.line(width).endswith(", 3,248 images/s, 7 s left")


# In a file or a pipe


def test_plain_lines_come_at_a_calm_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A first one after a few seconds, then one in NEXT_LINES_AFTER, however often the count changes."""
    times = []
    with Progress(10_000, "encoding", clock=clock) as progress:
        for _ in range(800):
            clock.now += 0.125
            progress.update()
            if capsys.readouterr().err:
                times.append(clock.now - 1000)
    assert times == [FIRST_LINE_AFTER + k * NEXT_LINES_AFTER for k in range(7)]


def test_plain_lines_hold_no_carriage_return_and_no_bar(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(40, "encoding", clock=clock) as progress:
        for _ in range(40):
            clock.now += 1
            progress.update()
    assert capsys.readouterr().err == (
        "encoding: 5 of 40 images (12 %), 1 images/s, 35 s left\n"
        "encoding: 20 of 40 images (50 %), 1 images/s, 20 s left\n"
        "encoding: 35 of 40 images (87 %), 1 images/s, 5 s left\n"
    )


def test_short_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert [*with_progress(range(500), 500, "reading headers")] == [*range(500)]
    with Progress(10, "encoding", clock=clock) as progress:
        clock.now += FIRST_LINE_AFTER - 0.1
        progress.update(10)
    assert tuple(capsys.readouterr()) == ("", "")


def test_what_is_not_shown_draws_nothing(clock: Clock) -> None:
    with redirect_stderr(Terminal()) as terminal, Progress(10, "encoding", shown=False, clock=clock) as progress:
        clock.now += 100
        progress.update(5)
        assert progress.done == 5
    assert terminal.getvalue() == ""


# On a terminal


def test_one_line_is_redrawn_and_gone_at_the_end(clock: Clock) -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), Progress(40, "encoding", clock=clock) as progress:
        for done in range(1, 11):
            clock.now += 1
            progress.update()
            assert screen(terminal.getvalue())[-1].startswith(f"encoding: {done} of 40 images ({done * 100 // 40} %)")
    assert "\n" not in terminal.getvalue()
    assert screen(terminal.getvalue()) == [""]
    assert console._status_lines == []


def test_it_is_redrawn_ten_times_a_second_at_most(clock: Clock) -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), Progress(10_000, "encoding", clock=clock) as progress:
        before = terminal.getvalue().count("\r")
        for _ in range(1000):
            clock.now += 0.001
            progress.update()
        assert 5 <= terminal.getvalue().count("\r") - before <= 11


def test_lines_are_printed_above_it(clock: Clock) -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), Progress(40, "encoding", clock=clock) as progress:
        clock.now += 1
        progress.update()
        note("Warning: skipped a.png")
        shown = screen(terminal.getvalue())
        assert shown[0] == "Warning: skipped a.png"
        assert shown[1].startswith("encoding: 1 of 40 images")
    assert screen(terminal.getvalue()) == ["Warning: skipped a.png", ""]


def test_an_error_ends_it_too(clock: Clock) -> None:
    terminal = Terminal()
    with redirect_stderr(terminal), pytest.raises(ZeroDivisionError), Progress(40, "encoding", clock=clock):
        _ = 1 / 0
    assert screen(terminal.getvalue()) == [""]
    assert console._status_lines == []


# Standard error that cannot be written


def broken(kind: str) -> io.TextIOBase | None:
    """Return a standard error that takes nothing."""
    if kind == "none":
        return None
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")  # noqa: SIM115
    if kind == "closed":
        stream.close()
    elif kind == "terminal that has gone":
        stream.isatty = lambda: True  # type: ignore[method-assign]
    return stream


@pytest.mark.parametrize("kind", ["none", "closed", "nobody reads", "terminal that has gone"])
def test_it_never_raises(clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with monkeypatch.context() as patch:
        stream = broken(kind)
        patch.setattr(sys, "stderr", stream)
        with Progress(40, "encoding", clock=clock) as progress:
            for _ in range(40):
                clock.now += 1
                progress.update()
            note("a line")
        if stream is not None:
            stream.close()


# with_progress


def test_items_count_once_the_caller_is_done_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Progress] = []
    real = Progress.__init__

    def remember(self: Progress, *arguments: object, **options: object) -> None:
        made.append(self)
        real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Progress, "__init__", remember)
    size: Callable[[str], int] = len
    seen = [(item, made[0].done) for item in with_progress(iter(["aa", "b", "ccc"]), 6, "decoding", size=size)]
    assert seen == [("aa", 0), ("b", 2), ("ccc", 3)]
    assert made[0].done == 6


def test_work_that_an_error_left_in_the_middle_leaves_no_line(clock: Clock) -> None:
    """The error holds on to the generator, whose `with` has not ended."""
    terminal = Terminal()
    with redirect_stderr(terminal):
        abandoned = with_progress(range(9), 9, "evaluating")
        next(abandoned)
        end_status()
        note("Error: expected")
        assert screen(terminal.getvalue()) == ["Error: expected", ""]
        abandoned.close()
    assert screen(terminal.getvalue()) == ["Error: expected", ""]
