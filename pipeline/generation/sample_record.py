"""The record of sampled images, `sample.json` or `complete.json`: their options, and which files were written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..images.png_folder import read_record, written_count
from ..runtime.atomic_files import to_json
from ..runtime.folder_lock import only_writer
from ..runtime.output_paths import OutputFiles, check_output_folder

SAMPLE, COMPLETION = "sample.json", "complete.json"
RUNS = {SAMPLE: "sampling run", COMPLETION: "completion"}  # what writes the record, in words
GRID, CODES = "grid.png", "codes.npy"


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """SHA-256 of the weights of both stages, and of the sharp decoder."""

    tokenizer: str
    decoder: str | None  # None: the tokenizer's own, plain decoder made the images
    prior: str


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """The content of the record; the names of the fields are the JSON keys."""

    labels: Sequence[int] | None  # of each image; None without classes, or if a completion was to choose them
    class_names: Sequence[str] | None  # of each image, by its label
    seed: int
    options: dict[str, int | float | str | None]  # n, the sampling parameters, and the options of a completion
    finished: int  # images; 0 while they are being written
    fingerprints: Fingerprints
    versions: dict[str, str]  # of the libraries

    def of_first(self, finished: int) -> "SampleRecord":
        """Return the record of the first `finished` images alone."""
        labels = None if self.labels is None else self.labels[:finished]
        class_names = None if self.class_names is None else self.class_names[:finished]
        return replace(self, labels=labels, class_names=class_names, finished=finished)

    def to_bytes(self) -> bytes:
        """Return the record as the bytes of its file."""
        return to_json(asdict(self))


def sample_files(record: str, count: int) -> OutputFiles:
    """Return the files of `count` sampled images whose record has this name."""
    return OutputFiles(
        record=record, numbered="images/{:05d}.png", indices=range(count), others=frozenset({GRID, CODES})
    )


def earlier_samples(folder: Path) -> list[OutputFiles]:
    """Return the files that earlier runs wrote into `folder`, according to their records."""
    counts = {name: _count(folder / name) for name in (SAMPLE, COMPLETION)}
    return [sample_files(name, count) for name, count in counts.items() if count is not None]


def check_sample_folder(folder: Path, record: str, count: int, *, force: bool) -> None:
    """Raise InputError unless `count` images and their record can be written into `folder`; create and remove nothing.

    Raises:
        InputError: the folder cannot be written, or it holds files; with `force`, files in the way of the new ones that
            no record names.
    """
    written = sample_files(record, count)
    check_output_folder(folder, force=force, written=written, earlier=earlier_samples(folder))


@contextmanager
def only_run_in(folder: Path, record: str, count: int, *, force: bool) -> Iterator[None]:
    """Hold the lock of `folder` for the duration of `with`, once `check_sample_folder` has accepted it.

    Raises:
        InputError: the folder cannot be used, or another run writes into it.
    """
    with only_writer(folder, RUNS[record]):
        check_sample_folder(folder, record, count, force=force)  # here, where no other run can change what it holds
        yield


def check_run_in(folder: Path, record: str, count: int, *, force: bool) -> None:
    """Raise InputError if `only_run_in` would, so that it is known before models are loaded."""
    with only_run_in(folder, record, count, force=force):
        pass


def _count(path: Path) -> int | None:
    """Return how many images the run with this record may have written, None if it is no record of this program."""
    content = read_record(path) or {}
    options = content.get("options")
    if not {"seed", "fingerprints", "finished"} <= content.keys() or not isinstance(options, dict):
        return None
    return written_count(content["finished"], options.get("n"))
