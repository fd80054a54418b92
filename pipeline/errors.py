"""The one error that is meant for the person at the keyboard."""


class InputError(Exception):
    """Says in one line why something the user gave cannot be used: what was expected, what came, what to do.

    Raise it where the value is used, and only for what the user can put right; the command line prints it as
    `Error: ...` without a traceback.
    """

    def __init__(self, *, expected: str, got: str, do: str) -> None:
        line = f"expected {expected}, got {got}; {do}"
        super().__init__(" ".join(line.split("\n")))
        self.expected, self.got, self.do = expected, got, do
