"""Folders of drawn images: a picture of all, one PNG each, their codes, and what they were drawn with."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from tqdm import tqdm

from prior import SamplingParameters

from .code_shards import npy_bytes
from .completion import HALVES, half_mask, hidden, mask_from_file
from .errors import InputError
from .files import to_json, write_atomic
from .folders import claim_folder
from .generate import ImagePipeline, Sampled
from .images import IMAGE_ERRORS, Preprocessing, read_image, to_float, to_uint8, why_unreadable
from .pictures import save_grid, save_png

OUR_FILES = ("grid.png", "images/[0-9]*.png", "codes.npy", "sample.json", "complete.json")
MOST_IN_GRID = 1024  # images in the picture of all
AT_ONCE = {"cpu": 64, "cuda": 1024, "mps": 256}  # images drawn together, and kept if the rest is interrupted


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How `sample_to_folder` and `complete_to_folder` draw; recorded beside what they drew."""

    n: int
    labels: tuple[str, ...] = ()  # names or indices, in turn; all classes if empty
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: expected at least 1 image, got {self.n}")
        SamplingParameters(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def choice(self) -> dict[str, Any]:
        """What `ImagePipeline` calls these."""
        return {"seed": self.seed, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def sample_to_folder(pipeline: ImagePipeline, options: SampleOptions, out: Path, *, force: bool = False) -> Path:
    """Draw images into `out`: grid.png, images/, codes.npy, sample.json; returns the path of grid.png.

    Raises:
        InputError: an unknown label, or a folder that cannot be used.
        ValueError: an option out of its range.
        KeyboardInterrupt: Ctrl-C; the images that were finished are kept, and the record says how many.
    """
    labels = pipeline.labels_for(options.n, options.labels or None)
    claim_folder(out, force=force, ours=OUR_FILES)
    at_once = AT_ONCE[next(pipeline.prior.parameters()).device.type]
    parts: list[Sampled] = []
    try:
        with _progress(options.n) as bar:
            for start in range(0, options.n, at_once):
                count = min(at_once, options.n - start)
                some = None if labels is None else labels[start : start + count]
                done = _Rows(bar, start, count, pipeline.grid[0])
                part = pipeline.sample(count, labels=some, first=start, on_row=done, **options.choice())
                for index, image in enumerate(part.images, start):
                    save_png(image, out / "images" / f"{index:05d}.png")
                parts.append(part)
    except KeyboardInterrupt:
        finished = sum(len(part.codes) for part in parts)
        for path in (out / "images").glob("[0-9]*.png"):
            if int(path.stem) >= finished:  # of the part that was being written
                path.unlink()
        print(f"stopped: {finished} of {options.n} images are in {out}", file=sys.stderr)
        raise
    finally:
        if parts:
            images, codes = (torch.cat([part[i] for part in parts]) for i in (0, 1))
            _write(pipeline, options, out, codes, "sample.json", labels=labels)
            save_grid(images[:MOST_IN_GRID], out / "grid.png")
    return out / "grid.png"


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
    """Draw the missing part of a picture n times into `out`, as `sample_to_folder` does; returns the path of grid.png.

    The picture of all shows the original, what was kept, and the n completions.

    Args:
        pipeline: of the two stages.
        image: a picture, prepared as those of the training were.
        keep: top, bottom, left, right, or the path of a picture that is white where pixels are kept.
        options: how to draw.
        out: the folder.
        candidates: as in `ImagePipeline.complete`.
        force: replace what is there.

    Raises:
        InputError: a picture, mask, label or folder that cannot be used.
        ValueError: an option out of its range.
    """
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    labels = pipeline.labels_for(options.n, options.labels) if options.labels else None
    original = _read(image, Preprocessing(**pipeline.tokenizer_info.preprocessing))
    size = (original.shape[1], original.shape[2])
    mask = half_mask(keep, size) if keep in HALVES else mask_from_file(Path(keep), size)
    if bool(mask.all()):
        raise InputError(expected="a mask that leaves something to draw", got="one that keeps all", do="blacken a part")
    claim_folder(out, force=force, ours=OUR_FILES)
    with _progress(options.n) as bar:
        images = repeat(original, "c h w -> n c h w", n=options.n)
        done = _Rows(bar, 0, options.n, pipeline.grid[0])
        drawn, codes = pipeline.complete(
            images, mask, labels=labels, candidates=candidates, on_row=done, **options.choice()
        )
    for index, completed in enumerate(drawn):
        save_png(completed, out / "images" / f"{index:05d}.png")
    more = {"image": str(image), "keep": keep, "candidates": candidates}
    _write(pipeline, options, out, codes, "complete.json", labels=labels, **more)
    kept = to_uint8(hidden(to_float(original[None]), mask[None]))
    save_grid(torch.cat([original[None], kept, drawn]), out / "grid.png", columns=options.n + 2)
    return out / "grid.png"


class _Rows:
    """Turns finished rows of the grids into finished images on a bar."""

    def __init__(self, bar: "tqdm[None]", start: int, count: int, height: int) -> None:
        self.bar, self.start, self.count, self.height = bar, start, count, height

    def __call__(self, rows: int) -> None:
        self.bar.update(self.start + self.count * rows / self.height - self.bar.n)


def _progress(n: int) -> "tqdm[None]":
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
    return tqdm(total=n, desc="drawing images", bar_format=shape, dynamic_ncols=True)


def _read(path: Path, preprocessing: Preprocessing) -> Tensor:
    """A picture as uint8 [C,H',W']."""
    try:
        return torch.from_numpy(read_image(path, preprocessing).copy())  # some are read-only
    except IMAGE_ERRORS as error:
        raise InputError(
            expected=f"a picture as --image {path}", got=why_unreadable(error), do="name a picture that Pillow reads"
        ) from None


def _write(
    pipeline: ImagePipeline,
    options: SampleOptions,
    out: Path,
    codes: Tensor,
    name: str,
    *,
    labels: Tensor | None,
    **more: Any,
) -> None:
    """codes.npy, and the record of how the images came to be."""
    write_atomic(out / "codes.npy", npy_bytes(codes.cpu().numpy()))
    drawn = None if labels is None else labels.tolist()[: len(codes)]
    record = {
        "labels": drawn,
        "class_names": None if drawn is None else [pipeline.class_names[i] for i in drawn],
        "seed": options.seed,
        "options": {k: v for k, v in vars(options).items() if k not in ("labels", "seed")} | more,
        "finished": len(codes),
        "fingerprints": {
            "tokenizer": pipeline.tokenizer_info.fingerprint,
            "prior": pipeline.prior_info.fingerprint,
        },
        "versions": pipeline.prior_info.versions,
    }
    write_atomic(out / name, to_json(record))
