"""What is printed: no name, no encoding and no reader who leaves breaks it."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import LONGEST, InputError, printable
from pipeline.runtime import console
from pipeline.runtime.console import (
    check_output,
    end_status,
    hide_status,
    note,
    output_closed,
    prepare_console,
    say,
    show_status,
)

from ..support import ROOT


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_lost", None)


# printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, été, 猫, 🐈, family 👨‍👩‍👧, عربى", "plain, été, 猫, 🐈, family 👨‍👩‍👧, عربى"),
        ("two  spaces and \\n as two characters", "two  spaces and \\n as two characters"),
        ("a\nb\r\nc\td", "a\\nb\\r\\nc\\td"),
        ("\x1b[31mred\x1b[0m\x07", "\\x1b[31mred\\x1b[0m\\x07"),
        ("\x9b2J\x85\x7f\x00", "\\x9b2J\\x85\\x7f\\x00"),
        ("gpj.\u202eevil\u2066x\u2069", "gpj.\\u202eevil\\u2066x\\u2069"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable_escapes_what_acts_on_a_terminal_and_nothing_else(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_every_character_is_safe_once_printable() -> None:
    """Over all of Unicode: the result is one line, can be encoded, and only a few hundred characters change."""
    changed = [code for code in range(sys.maxunicode + 1) if printable(chr(code)) != chr(code)]
    assert len(changed) == 32 + 33 + 7 + 4 + 2048  # C0; DEL and C1; 2028 to 202e; 2066 to 2069; surrogates
    for code in range(sys.maxunicode + 1):
        text = printable(f"a{chr(code)}b")
        assert text.splitlines() == [text]
        text.encode()


def test_an_input_error_is_one_harmless_line_and_keeps_its_parts() -> None:
    error = InputError(expected="a file", got="\x1b[2J\nError: forged", do="rename \udcff")
    assert str(error) == "expected a file, got \\x1b[2J\\nError: forged; rename \\xff"
    assert (error.got, error.do) == ("\x1b[2J\nError: forged", "rename \udcff")


# say and note


def test_each_text_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo", "three")
    note("four\x1b", "five")
    assert tuple(capsys.readouterr()) == ("one\\ntwo\nthree\n", "four\\x1b\nfive\n")


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    prepare_console()
    say("été 🐈")
    note("猫 \udcff")
    assert streams["stdout"].buffer.getvalue() == "été \\U0001f408\n".encode("cp1252")  # type: ignore[attr-defined]
    assert streams["stderr"].buffer.getvalue() == b"\\u732b \\xff\n"  # type: ignore[attr-defined]


def test_what_an_encoding_lacks_is_escaped_in_a_stream_that_nobody_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another program imports this one: a run must not end because it names a picture."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    say("été 🐈", "b")
    assert stream.buffer.getvalue() == "été \\U0001f408\nb\n".encode("cp1252")  # type: ignore[attr-defined]


def test_warnings_are_printed_once_each_on_a_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    prepare_console()
    prepare_console()
    logging.getLogger("pipeline.images.folder").warning("Warning: skipped %s", "a\nb\x1b.png")
    assert capsys.readouterr().err == "Warning: skipped a\\nb\\x1b.png\n"


class Recorded:
    """A status line that records when it is cleared and drawn."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def clear(self) -> None:
        self.events.append("clear")

    def refresh(self) -> None:
        self.events.append("refresh")


def test_lines_are_printed_above_the_status_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = Recorded()
    show_status(line)
    say("a")
    note("b")
    assert line.events == ["clear", "refresh"] * 2
    hide_status(line)
    hide_status(line)
    say("c")
    assert line.events == ["clear", "refresh"] * 2
    assert tuple(capsys.readouterr()) == ("a\nc\n", "b\n")


def test_status_lines_of_work_that_has_ended_are_removed() -> None:
    lines = [Recorded(), Recorded()]
    for line in lines:
        show_status(line)
    end_status()
    note("an error")
    assert [line.events for line in lines] == [["clear"]] * 2


# Streams that cannot be written


def run(code: str, **streams: int) -> "subprocess.CompletedProcess[str]":
    """Run a program that imports the console; what it does not redirect is captured."""
    program = f"import sys\nfrom pipeline.runtime.console import *\nprepare_console()\n{code}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, timeout=60, **options)  # type: ignore


@pytest.fixture
def closed_pipe() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_line_that_nobody_reads_is_recorded_and_raises_nothing(closed_pipe: int) -> None:
    code = "say('a')\nsay('b')\nprint(output_closed(), file=sys.stderr)\nprint('by another')\ncheck_output()"
    ended = run(code, stdout=closed_pipe)
    assert (ended.returncode, ended.stderr) == (141, "True\n")


def test_standard_error_that_nobody_reads_changes_nothing(closed_pipe: int) -> None:
    code = "note('a')\nprint('by another', file=sys.stderr)\nsay(str(output_closed()))\ncheck_output()"
    ended = run(code, stderr=closed_pipe)
    assert (ended.returncode, ended.stdout) == (0, "False\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes streams")
def test_streams_that_are_closed_from_the_start_take_everything() -> None:
    """Nor does a file that is opened later become standard output."""
    code = "import sys; from pipeline.runtime.console import *; prepare_console(); say('a'); note('b'); check_output()"
    code += "; file = open('/dev/null'); sys.exit(file.fileno() < 3)"
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        ended = run(
            "say('a')\nprint(output_closed(), file=sys.stderr)\ntry:\n    check_output()\n"
            "except Exception as error:\n    print(error, file=sys.stderr)",
            stdout=full.fileno(),
        )
    expected = "expected standard output that can be written, got No space left on device; send it to another place"
    assert (ended.returncode, ended.stderr.splitlines()) == (0, ["False", expected])


def test_a_handler_of_a_signal_that_prints_while_the_stream_is_written_loses_its_line_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(sys, "stdout", Busy())
    say("a")
    assert not output_closed()
    check_output()


@pytest.mark.parametrize("character", ["x", "\x1b", "\u202e", "\U0001f600"])
def test_a_line_is_short_whatever_a_stranger_names(character: str) -> None:
    error = InputError(expected=character * 10**5, got="y" * 700, do="do this")
    assert len(str(error)) < 2 * LONGEST + 50
    assert str(error).startswith(f"expected {printable(character)}")
    assert str(error).endswith("y; do this")
    assert error.expected == character * 10**5


def test_a_line_of_ordinary_length_is_complete() -> None:
    assert str(InputError(expected="a" * LONGEST, got="b", do="c")) == f"expected {'a' * LONGEST}, got b; c"
