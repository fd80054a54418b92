"""The images of a checkpoint: those it was trained on, or others in the same size and channels."""

from .checkpoint import CheckpointInfo
from .errors import InputError
from .sources import ImageSet, ImageSplit, open_images


def images_of(info: CheckpointInfo, *, data: str | None = None, data_root: str | None = None) -> ImageSet:
    """Open `data` (by default what the tokenizer was trained on) in the size and channels that the tokenizer takes.

    Raises:
        InputError: the images cannot be opened.
    """
    own = data is None
    return open_images(
        info.training["data"] if data is None else data,
        image_size=(info.preprocessing["height"], info.preprocessing["width"]),
        channels=info.preprocessing["channels"],
        data_root=data_root or (info.training.get("data_root") if own else None),
    )


def part_of(images: ImageSet, split: str) -> ImageSplit:
    """The "train" or the "test" part. Raises InputError if it is empty."""
    part = images.train if split == "train" else images.test
    if len(part) == 0:
        raise InputError(
            expected=f"images in the {split} part of {images.source}", got="none", do="use the other --split"
        )
    return part
