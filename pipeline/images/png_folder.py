"""A folder of numbered PNGs, and the record that tells which files a run wrote into it.

The folder is prepared when the first image is ready. From then on the record says that 0 images are finished, until
`close`. After a kill it still says so, and every file that the run was going to write counts as written by it.

The space for all that is written after the images is reserved before them, in the temporary file of the record: a disk
that is full takes the last images, and not the means to keep the others.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from torch import Tensor

from ..errors import InputError
from ..runtime.atomic_files import SCRATCH, TEMPORARY, cannot_write, write_atomic
from ..runtime.filesystem import is_regular, make_folder, missing_folders, remove_if_empty
from ..runtime.output_paths import OutputFiles, prepare_output, remove_file, remove_files, remove_run
from ..runtime.untrusted_files import parse_json, read_regular
from .png import save_png

MOST_IMAGES = 10**8  # of a run; what claims to be the record of more is none
MOST_RECORD_BYTES = 2**24  # that of a million images has as many


class ImageFolder:
    """Writes images into `folder` within `with`; if that ends without `close`, removes them again.

    Args:
        folder: one that `check_output_folder` has accepted.
        files: what the run is going to write.
        earlier: what earlier runs wrote, removed right before the first image is written.
        record: returns the content of the record, given the number of finished images.
        other_bytes: size of the other files that are written after the images, reserved before them.
    """

    def __init__(
        self,
        folder: Path,
        files: OutputFiles,
        earlier: Sequence[OutputFiles],
        record: Callable[[int], bytes],
        *,
        other_bytes: int = 0,
    ) -> None:
        self.folder, self.files, self.earlier, self.record = folder, files, earlier, record
        self.written = 0  # images
        self._other_bytes = other_bytes
        self._made: list[Path] = []  # folders that were not there before
        self._prepared = self._closed = False

    def __enter__(self) -> "ImageFolder":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prepared and not self._closed:
            with suppress(InputError):  # the folder is gone, or has become read-only: the error above says so
                remove_run(self.folder, self.files)
            remove_if_empty(self._made)

    def add(self, images: Iterable[Tensor]) -> None:
        """Write the next images, each uint8 [C,H',W']. Raise InputError if they cannot be written."""
        for image in images:
            if not self._prepared:
                self._prepare()
            self._check_still_there()
            index = self.files.indices[self.written]
            save_png(image, self.folder / self.files.numbered.format(index))
            self.written += 1

    def close(self, finished: int, others: Mapping[str, bytes] | None = None) -> None:
        """Keep the first `finished` images, write `others` by name, and record how many images there are.

        Raises:
            InputError: one of the files cannot be written; the images are then removed at the end of `with`.
        """
        self._closed = True  # a second Ctrl-C from here on leaves what there is, like a kill
        try:
            self._check_still_there()
            self._remove_after(finished)
            for name, content in (others or {}).items():
                write_atomic(self.folder / name, content)
            write_atomic(self.folder / self.files.record, self.record(finished))
        except (InputError, OSError):
            self._closed = False
            raise

    def _prepare(self) -> None:
        """Make the folder, remove the files of earlier runs, write the record, reserve the space."""
        inner = self.folder / self.files.subfolder
        self._made = missing_folders(inner)
        self._prepared = True
        prepare_output(self.folder, self.earlier)
        write_atomic(self.folder / self.files.record, self.record(0), temporary=self.folder / SCRATCH)
        make_folder(inner)
        self._reserve(len(self.record(len(self.files.indices))) + self._other_bytes)

    def _reserve(self, size: int) -> None:
        """Write `size` bytes, which `close` removes. Raise InputError if there is no space for them."""
        try:
            with open(self._reserved, "wb") as file:
                for start in range(0, size, 2**20):
                    file.write(bytes(min(2**20, size - start)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.folder, size, error) from None

    @property
    def _reserved(self) -> Path:
        """The file that holds the reserved space."""
        return self.folder / f"{self.files.record}{TEMPORARY}"

    def _remove_after(self, finished: int) -> None:
        """Remove all images but the first `finished`, and the reserved space."""
        later = self.files.from_position(finished)
        remove_files(self.folder, lambda name: name in later and name != later.record, subfolder=later.subfolder)
        remove_file(self._reserved)

    def _check_still_there(self) -> None:
        """Raise InputError if the record is gone: files would be written into another folder of that name."""
        if not is_regular(self.folder / self.files.record):
            raise InputError(
                expected=f"{self.folder} with its {self.files.record} to be there until all images are written",
                got="a folder that was removed or whose disk is gone",
                do="find out why, and run the same command again",
            )


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that a record holds, None if there is no such file or it holds none."""
    try:
        content = parse_json(read_regular(path, MOST_RECORD_BYTES, follow_links=False))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def written_count(finished: object, n: object) -> int | None:
    """Return how many images a run may have written: all `n` if it was killed before it recorded how many it finished.

    None if the values are no numbers of images, so that no run wrote the record.
    """
    if not (is_count(finished) and is_count(n) and finished <= n):
        return None
    return finished or n


def is_count(value: object) -> TypeGuard[int]:
    """Return whether the value is a number of images that a run may have, or the number of an image."""
    return type(value) is int and 0 <= value <= MOST_IMAGES
