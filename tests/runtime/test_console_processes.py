"""Of several processes the first prints; the others print what went wrong with them, and nothing else."""

import io
import logging
import signal
import sys

import pytest

import cli
from pipeline.runtime import console
from pipeline.runtime.console import is_silent, note, prepare_console, report, say
from pipeline.runtime.interrupts import StopSignal
from pipeline.runtime.membership import OtherProcessError
from pipeline.runtime.progress import Progress


@pytest.fixture(autouse=True)
def _alone_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_process", (0, 1))


def print_all() -> None:
    say("said")
    note("noted")
    logging.getLogger("pipeline.images.folder").warning("warned")
    report("Error: mine")


@pytest.mark.parametrize(("rank", "count"), [("0", "8"), ("0", "1"), ("3", "1"), ("x", "8"), ("3", ""), ("", "")])
def test_the_first_process_and_one_alone_print_all(
    rank: str, count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    prepare_console()
    print_all()
    assert tuple(capsys.readouterr()) == ("said\n", "noted\nwarned\nError: mine\n")


def test_another_process_prints_its_errors_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    prepare_console()
    assert is_silent()
    print_all()
    assert tuple(capsys.readouterr()) == ("", "process 3 of 8: Error: mine\n")


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_the_first_process_alone_shows_progress(rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stderr", terminal)
    prepare_console()
    with Progress(4, "encoding") as progress:
        progress.update(4)
    assert (terminal.getvalue() != "") == shown


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("mine"), 1, "process 2 of 2: Error: mine\n"),
        (OtherProcessError(), 1, ""),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_how_a_command_of_another_process_ends(
    error: BaseException,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(arguments: list[str]) -> None:
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "run_command", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == status
    assert tuple(capsys.readouterr()) == ("", printed)


def test_a_signal_to_another_process_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepare_console()
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    with pytest.raises(SystemExit):
        stop.exit("saved at step 3")
    assert tuple(capsys.readouterr()) == ("", "")
