"""The one error that is meant for the person at the keyboard, and what makes any text safe to print on one line."""

import re
from functools import partial
from typing import Any

# Control characters (C0, C1), line and paragraph separators, what turns the direction of writing, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

LONGEST = 600  # characters of each of the three parts of an error


def printable(text: str) -> str:
    r"""Return `text` with an escape in place of every character that breaks a line, or acts on a terminal.

    So no name of a file or a class can move the cursor, colour the screen or forge a line: ESC becomes `\x1b`, a line
    break `\n`, a byte of a name that is not UTF-8 `\xff`. All other Unicode stays. To escape twice changes nothing.
    """
    return _UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


class InputError(Exception):
    """Says in one line why something the user gave cannot be used: what was expected, what came, what to do.

    Raise it where the value is used, and only for what the user can put right; the command line prints it as
    `Error: ...` without a traceback.
    """

    def __init__(self, *, expected: str, got: str, do: str) -> None:
        shown = [_shortened(printable(part)) for part in (expected, got, do)]
        super().__init__("expected {}, got {}; {}".format(*shown))
        self.expected, self.got, self.do = expected, got, do

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes the same error elsewhere: processes of a group send theirs to one another."""
        return partial(type(self), expected=self.expected, got=self.got, do=self.do), ()


def _shortened(text: str) -> str:
    """Return a text of LONGEST characters at most, its middle left out if it has more, as a stranger's name may."""
    half = LONGEST // 2 - 3
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def _escape(character: str) -> str:
    """Return the escape of one character; of one that Python put in place of an undecodable byte, that of the byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
