"""A folder of sampled or completed images: a contact sheet, a PNG of each, their codes, and a record.

Several processes take turns with the batches of samples, and the main process alone writes; so the folder is that of
one process to the last bit, and Ctrl-C keeps what is finished as it does there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from prior import SamplingParameters
from prior.choosing import AS_TRAINED

from ..codes.shard import npy_bytes
from ..errors import InputError
from ..images.png import save_grid
from ..images.png_folder import ImageFolder
from ..images.preprocessing import IMAGE_ERRORS, Preprocessing, read_image, to_float, to_uint8, why_unreadable
from ..models.loading import TrainedPrior
from ..models.shares import check_same, map_on_all
from ..runtime.console import note
from ..runtime.interrupts import Terminated
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import Progress
from .guidance import with_default_guidance
from .image_pipeline import ImagePipeline, Sampled
from .keep_best import check_kept_by_label, check_share
from .keep_mask import HALVES, half_mask, hide_pixels, mask_from_file
from .sample_record import (
    CODES,
    COMPLETION,
    GRID,
    SAMPLE,
    Fingerprints,
    SampleRecord,
    earlier_samples,
    only_run_in,
    sample_files,
)

MOST_IN_GRID = 1024  # images in the contact sheet
AT_ONCE = {"cpu": 64, "cuda": 1024, "mps": 256}  # images sampled in a batch; finished batches are kept if interrupted


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The options of `sample_to_folder` and `complete_to_folder`, which they record with the images."""

    n: int
    labels: tuple[str, ...] = ()  # names or indices, taken in turn; all classes if empty
    seed: int = 0
    parameters: SamplingParameters = AS_TRAINED
    default_guidance: bool = False  # take the guidance that suits the prior in place of that of `parameters`
    keep_best: float = 1.0  # share of the candidates that are kept; 1 samples no others

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: expected at least 1 image, got {self.n}")
        check_share(self.keep_best)

    @classmethod
    def of(
        cls,
        *,
        n: int,
        labels: tuple[str, ...] = (),
        seed: int = 0,
        guidance: float | None = None,
        keep_best: float = 1.0,
        **parameters: Any,
    ) -> "SampleOptions":
        """Return the options of a command line, which has the fields of `SamplingParameters` as separate options.

        No guidance is that which suits the prior.
        """
        return cls(
            n=n,
            labels=labels,
            seed=seed,
            parameters=SamplingParameters(guidance=1.0 if guidance is None else guidance, **parameters),
            default_guidance=guidance is None,
            keep_best=keep_best,
        )

    def for_prior(self, prior: TrainedPrior) -> "SampleOptions":
        """Return the same options with a number for the guidance."""
        if not self.default_guidance:
            return self
        return replace(self, parameters=with_default_guidance(self.parameters, prior), default_guidance=False)


def sample_to_folder(
    pipeline: ImagePipeline, options: SampleOptions, out: Path, *, force: bool = False, group: ProcessGroup = ALONE
) -> Path:
    """Sample images into `out`: grid.png, images/, codes.npy, sample.json; return the path of grid.png.

    Args:
        pipeline: to sample from.
        options: how many, and how.
        out: the folder to write.
        force: replace what earlier runs wrote.
        group: processes that share the sampling; each must call this with the same models, and the main one writes.

    Raises:
        InputError: an unknown label, a folder that cannot be used, or images that cannot be written; the images that
            were finished are kept, and the record says how many.
        ValueError: an option out of its range.
        KeyboardInterrupt: Ctrl-C; the images that were finished are kept, too, as after SIGTERM and SIGHUP.
    """
    options = options.for_prior(pipeline.trained_prior)
    labels = group.run_on_all(lambda: _sampled_labels(pipeline, options))
    record = _record(pipeline, options, labels)
    check_same(group, {"options": record.options, **asdict(record.fingerprints)})
    batches: list[Sampled] = []  # that are written; other processes than the main one write none
    with ExitStack() as stack:

        def open_folder() -> ImageFolder:
            stack.enter_context(only_run_in(out, SAMPLE, options.n, force=force))
            return stack.enter_context(_image_folder(out, SAMPLE, record, pipeline))

        def write(batch: Sampled) -> None:
            if folder is not None:
                folder.add(batch.images)
                batches.append(batch)

        folder = group.run_on_all(lambda: open_folder() if group.is_main else None)
        try:
            with _progress(options.n) as bar:
                for batch in sample_in_batches(pipeline, options, labels, bar, group):
                    group.run_on_all(partial(write, batch))  # so that a full disk ends all processes
        except (KeyboardInterrupt, Terminated):
            if group.is_main:
                finished = sum(len(batch.codes) for batch in batches)
                note(f"stopped: {finished} of {options.n} images are in {out}")
            raise
        finally:
            if folder is not None and batches:
                images, codes = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
                _finish(folder, codes, images[:MOST_IN_GRID])
    return out / GRID


def complete_to_folder(
    pipeline: ImagePipeline,
    image: Path,
    keep: str,
    options: SampleOptions,
    out: Path,
    *,
    candidates: int = 32,
    force: bool = False,
) -> Path:
    """Complete a picture n times into `out`, with the files of `sample_to_folder`; return the path of grid.png.

    The contact sheet shows the original, the kept pixels, and the n completions; the record is complete.json.

    Args:
        pipeline: of the two stages.
        image: the path of a picture, which is preprocessed as the training images were.
        keep: top, bottom, left, right, or the path of a picture that is white where pixels are kept.
        options: how many completions, and how to sample them.
        out: the folder to write.
        candidates: as in `ImagePipeline.complete`.
        force: replace what earlier runs wrote.

    Raises:
        InputError: a picture, mask, label or folder that cannot be used.
        ValueError: an option out of its range.
    """
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    options = options.for_prior(pipeline.trained_prior)
    labels = pipeline.completed_labels_for(options.n, options.labels or None, options.parameters.guidance)
    check_kept_by_label(options.keep_best, labels, "completions without a label")
    original = _read(image, Preprocessing(**pipeline.tokenizer_info.preprocessing))
    size = (original.shape[1], original.shape[2])
    mask = half_mask(keep, size) if keep in HALVES else mask_from_file(Path(keep), size)
    if bool(mask.all()):
        raise InputError(
            expected="a mask that leaves something to draw",
            got="one that keeps all",
            do="make the pixels to draw black",
        )
    kept = to_uint8(hide_pixels(to_float(original[None]), mask[None]))
    record = _record(pipeline, options, labels, image=str(image), keep=keep, candidates=candidates)
    with (
        only_run_in(out, COMPLETION, options.n, force=force),
        _image_folder(out, COMPLETION, record, pipeline) as folder,
    ):
        with _progress(options.n) as bar:
            completed = pipeline.complete(
                repeat(original, "c h w -> n c h w", n=options.n),
                mask,
                labels=labels,
                candidates=candidates,
                on_row=_rows_on(bar, 0, options.n, pipeline.grid[0]),
                seed=options.seed,
                keep_best=options.keep_best,
                **asdict(options.parameters),
            )
        folder.add(completed.images)
        _finish(folder, completed.codes, torch.cat([original[None], kept, completed.images]), columns=options.n + 2)
    return out / GRID


def sample_in_batches(
    pipeline: ImagePipeline,
    options: SampleOptions,
    labels: Tensor | None,
    bar: Progress,
    group: ProcessGroup = ALONE,
) -> Iterator[Sampled]:
    """Yield `options.n` samples in batches of AT_ONCE candidates, on the CPU.

    Args:
        pipeline: to sample from.
        options: of which `labels` is not looked at.
        labels: of the samples, int64 [n] in the prior's numbering; None for all classes in turn, if there are any and
            the guidance is not 0.
        bar: counts finished samples, and parts of them.
        group: processes that sample a batch each at a time; each must call this, and gets all batches in order.
    """
    options = options.for_prior(pipeline.trained_prior)
    labels = pipeline.labels_for(options.n, None, options.parameters.guidance) if labels is None else labels
    at_once = group.gather(_at_once(pipeline, options))[0]
    starts = range(0, options.n, at_once)
    for turn in (starts[i : i + group.count] for i in range(0, len(starts), group.count)):
        finished = range(turn[0], min(turn[-1] + at_once, options.n))  # once the turn is over

        def sample(start: int, finished: range = finished) -> Sampled:
            count = min(at_once, options.n - start)
            sampled = pipeline.sample(
                count,
                labels=None if labels is None else labels[start : start + count],
                seed=options.seed,
                keep_best=options.keep_best,
                first=start,
                on_row=_rows_on(bar, finished.start, len(finished), pipeline.grid[0]),
                **asdict(options.parameters),
            )
            return Sampled(sampled.images, sampled.codes.cpu())

        yield from map_on_all(sample, turn, group)


def _at_once(pipeline: ImagePipeline, options: SampleOptions) -> int:
    """Return how many images are sampled in a batch."""
    return max(1, int(AT_ONCE[next(pipeline.prior.parameters()).device.type] * options.keep_best))


def _sampled_labels(pipeline: ImagePipeline, options: SampleOptions) -> Tensor | None:
    """Return the labels of the samples [n], None if they have none. Raise InputError if they cannot be sampled so."""
    labels = pipeline.labels_for(options.n, options.labels or None, options.parameters.guidance)
    check_kept_by_label(options.keep_best, labels, "samples without them")
    return labels


def _rows_on(bar: Progress, start: int, count: int, height: int) -> Callable[[int], None]:
    """Return a function that is told the finished rows of images start .. start + count - 1 and moves the bar."""

    def show(rows: int) -> None:
        bar.move_to(start + count * rows / height)

    return show


def _progress(n: int) -> Progress:
    return Progress(n, "sampling")


def _read(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Return a picture as uint8 [C,H',W']. Raise InputError if it cannot be read."""
    try:
        return torch.from_numpy(read_image(path, preprocessing).copy())  # the array may be read-only
    except IMAGE_ERRORS as error:
        raise InputError(
            expected=f"a picture as --image {path}", got=why_unreadable(error), do="name a picture that Pillow reads"
        ) from None


def _record(
    pipeline: ImagePipeline, options: SampleOptions, labels: Tensor | None, **completion: int | str
) -> SampleRecord:
    """Return the record of all n images; the options of a completion include those of the `completion` itself."""
    chosen = None if labels is None else labels.tolist()
    fingerprints = Fingerprints(
        tokenizer=pipeline.tokenizer_info.fingerprint,
        decoder=None if pipeline.decoder_info is None else pipeline.decoder_info.fingerprint,
        prior=pipeline.prior_info.fingerprint,
    )
    return SampleRecord(
        labels=chosen,
        class_names=None if chosen is None else [pipeline.class_names[i] for i in chosen],
        seed=options.seed,
        options={"n": options.n, **asdict(options.parameters), "keep_best": options.keep_best, **completion},
        finished=options.n,
        fingerprints=fingerprints,
        versions=pipeline.prior_info.versions,
    )


def _image_folder(out: Path, name: str, record: SampleRecord, pipeline: ImagePipeline) -> ImageFolder:
    """Return the folder for the images of `record`, whose file has this name."""
    files, size = sample_files(name, record.finished), pipeline.tokenizer_info.preprocessing
    codes = record.finished * math.prod(pipeline.grid) * torch.int64.itemsize
    sheet = min(record.finished, MOST_IN_GRID) * size["channels"] * size["height"] * size["width"]
    return ImageFolder(
        out,
        files,
        earlier_samples(out),
        lambda finished: record.of_first(finished).to_bytes(),
        other_bytes=codes + sheet,
    )


def _finish(folder: ImageFolder, codes: Tensor, shown: Tensor, columns: int | None = None) -> None:
    """Keep the images of these codes [n,H,W], and write the codes and a contact sheet of the images `shown`."""
    folder.close(len(codes), {CODES: npy_bytes(codes.cpu().numpy())})
    save_grid(shown, folder.folder / GRID, columns=columns)
