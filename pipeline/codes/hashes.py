"""Comparing files of any size with the SHA-256 that the manifest names."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..runtime.untrusted_files import regular_size, sha256_of


@dataclass(frozen=True)
class HashedFile:
    """A file of a data set, and the SHA-256 that it should have."""

    path: Path
    sha256: str  # 64 hex digits

    def problem(self) -> str | None:
        """Return what is wrong with the file, such as "is missing"; None if it has this hash. All of it is read."""
        try:
            size = regular_size(self.path)
            found = sha256_of(self.path)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        except ValueError as error:
            return f"cannot be read ({error})"
        if found != self.sha256:
            return f"has other bytes than when it was written ({size:,} bytes, another SHA-256)"
        return None

    def check(self) -> None:
        """Raise InputError unless the file has this hash. All of it is read."""
        if problem := self.problem():
            raise InputError(
                expected=f"{self.path} as its manifest says",
                got=f"a file that {problem}",
                do="see what else is damaged with verify-codes, and export the codes again",
            )
