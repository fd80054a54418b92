"""A folder of numbered PNGs, and the record that tells which files a run wrote into it.

The folder is prepared when the first image is ready. From then on the record says that 0 images are finished, until
`close`. After a kill it still says so, and every file that the run was going to write counts as written by it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..runtime.atomic_files import write_atomic
from ..runtime.output_paths import (
    OutputFiles,
    missing_folders,
    prepare_output,
    remove_files,
    remove_if_empty,
    remove_run,
)
from .png import save_png


class ImageFolder:
    """Writes images into `folder` within `with`; if that ends without `close`, removes them again.

    Args:
        folder: one that `check_output_folder` has accepted.
        files: what the run is going to write.
        earlier: what earlier runs wrote, removed right before the first image is written.
        record: returns the content of the record, given the number of finished images.
    """

    def __init__(
        self, folder: Path, files: OutputFiles, earlier: Sequence[OutputFiles], record: Callable[[int], bytes]
    ) -> None:
        self.folder, self.files, self.earlier, self.record = folder, files, earlier, record
        self.written = 0  # images
        self._made: list[Path] = []  # folders that were not there before
        self._prepared = self._closed = False

    def __enter__(self) -> "ImageFolder":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._prepared and not self._closed:
            remove_run(self.folder, self.files)
            remove_if_empty(self._made)

    def add(self, images: Iterable[Tensor]) -> None:
        """Write the next images, each uint8 [C,H',W']."""
        for image in images:
            if not self._prepared:
                self._prepare()
            index = self.files.indices[self.written]
            save_png(image, self.folder / self.files.numbered.format(index))
            self.written += 1

    def close(self, finished: int) -> None:
        """Keep the first `finished` images, remove the others, and record how many there are."""
        self._closed = True
        later = self.files.from_position(finished)
        remove_files(self.folder, lambda name: name in later and name != later.record, subfolder=later.subfolder)
        write_atomic(self.folder / self.files.record, self.record(finished))

    def _prepare(self) -> None:
        """Make the folder, remove the files of earlier runs, write the record."""
        inner = self.folder / self.files.subfolder
        self._made = missing_folders(inner)
        self._prepared = True
        prepare_output(self.folder, self.earlier)
        write_atomic(self.folder / self.files.record, self.record(0))
        inner.mkdir(exist_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that a record holds, None if there is no such file or it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def written_count(finished: object, n: object) -> int | None:
    """Return how many images a run may have written: all `n` if it was killed before it recorded how many it finished.

    None if the values are no numbers of images, so that no run wrote the record.
    """
    if not (isinstance(finished, int) and isinstance(n, int) and 0 <= finished <= n):
        return None
    return finished or n
