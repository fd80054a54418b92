"""Completing pictures: hidden pixels have no effect, kept pixels are unchanged, and which codes are known."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import InputError
from pipeline.generation.image_pipeline import ImagePipeline, Sampled, open_labels
from pipeline.generation.keep_mask import half_mask, hide_pixels, keep_pixels, known_codes, mask_from_file
from prior import complete_codes

from ..support import CELL, GRID, HEIGHT, LEVELS, STEP, WIDTH

SIZE = (HEIGHT, WIDTH)


def random_images(count: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, *SIZE), generator=generator).byte()


def random_mask(seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) < share


def kept_cells(mask: Tensor, cell: int) -> Tensor:
    """Return [H,W] whether every pixel of a cell is kept, one cell after the other."""
    height, width = mask.shape
    rows = [[mask[y : y + cell, x : x + cell].all() for x in range(0, width, cell)] for y in range(0, height, cell)]
    return torch.tensor(rows)


# What is known


def test_a_code_is_known_if_all_its_pixels_are_kept(unlabelled: ImagePipeline) -> None:
    """Every subset of the 4 pixels of a cell."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    for index, pixels in enumerate(itertools.product([False, True], repeat=CELL * CELL)):
        row, column = divmod(index, GRID[1])
        mask[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = torch.tensor(pixels).view(CELL, CELL)
    levels = torch.randint(LEVELS, (1, *GRID), generator=torch.Generator().manual_seed(1))
    images = (levels * STEP / 255).repeat_interleave(CELL, dim=1).repeat_interleave(CELL, dim=2)[:, None]
    known = known_codes(unlabelled.tokenizer, images, mask[None])
    assert (known >= 0).flatten().tolist() == [index == 15 for index in range(GRID[0] * GRID[1])]
    assert known[0, 2, 3] == levels[0, 2, 3]


@pytest.mark.parametrize("seed", [0, 1])
def test_known_codes_of_masks_that_differ(unlabelled: ImagePipeline, seed: int) -> None:
    masks = torch.stack([random_mask(seed, 0.9), half_mask("left", SIZE), torch.ones(SIZE, dtype=torch.bool)])
    images = random_images(3, 1, seed).float() / 255
    expected = unlabelled.tokenizer.encode(images)  # a code of this tokenizer depends on its own cell alone
    kept = torch.stack([kept_cells(mask, CELL) for mask in masks])
    assert 0 < int(kept[0].sum()) < 24
    assert torch.equal(known_codes(unlabelled.tokenizer, images, masks), torch.where(kept, expected, -1))


def test_hidden_pixels_become_the_mean_of_the_kept_ones() -> None:
    images = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[1], keep[2] = False, True
    found = hide_pixels(images, keep)
    for channel in range(3):
        mean = images[0, channel][keep[0]].mean()
        torch.testing.assert_close(found[0, channel][~keep[0]], mean.expand(int((~keep[0]).sum())))
        assert torch.equal(found[0, channel][keep[0]], images[0, channel][keep[0]])
    assert (found[1] == 0.5).all()
    assert torch.equal(found[2], images[2])


def complete(pipeline: ImagePipeline, images: Tensor, mask: Tensor, **options: Any) -> Sampled:
    return pipeline.complete(images, mask, candidates=4, seed=0, **options)


@pytest.mark.parametrize("half", ["top", "bottom", "left", "right", "scattered"])
def test_the_result_does_not_depend_on_hidden_pixels(colour: ImagePipeline, half: str) -> None:
    mask = random_mask(3, 0.95) if half == "scattered" else half_mask(half, SIZE)
    images, others = random_images(3, 3, 0), random_images(3, 3, 1)
    others = torch.where(mask, images, others)
    assert not torch.equal(images, others)
    found, other = complete(colour, images, mask), complete(colour, others, mask)
    assert torch.equal(found.codes, other.codes)
    assert torch.equal(found.images, other.images)
    inverted = complete(colour, 255 - images, mask)  # but it depends on the kept ones
    assert not torch.equal(found.images, inverted.images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0])
def test_hidden_pixels_may_have_any_value(unlabelled: ImagePipeline, value: float) -> None:
    mask = half_mask("top", SIZE)
    images = random_images(2, 1).float() / 255
    found = complete(unlabelled, torch.where(mask, images, value), mask)
    assert torch.equal(found.images, complete(unlabelled, images, mask).images)


@pytest.mark.parametrize("seed", range(3))
def test_kept_pixels_are_unchanged_bit_for_bit(colour: ImagePipeline, seed: int) -> None:
    """Also those whose code is not known; the other pixels are those of the decoded codes."""
    mask = random_mask(seed, 0.7)
    images = random_images(4, 3, seed)
    found = complete(colour, images, mask)
    assert found.images.dtype == torch.uint8
    assert torch.equal(found.images[:, :, mask], images[:, :, mask])
    assert torch.equal(found.images[:, :, ~mask], colour.decode(found.codes)[:, :, ~mask])
    assert not torch.equal(found.images, images)


def test_keep_pixels_takes_each_pixel_from_the_right_image() -> None:
    images, sampled = random_images(2, 3, 0), random_images(2, 3, 1)
    keep = torch.stack([random_mask(0), random_mask(1)])
    found = keep_pixels(images, sampled, keep)
    for n, c, y, x in itertools.product(range(2), range(3), range(HEIGHT), range(WIDTH)):
        assert found[n, c, y, x] == (images if keep[n, y, x] else sampled)[n, c, y, x]


# Through the pipeline


def test_the_codes_are_those_of_complete_codes(unlabelled: ImagePipeline) -> None:
    images, mask = random_images(3, 1), half_mask("right", SIZE)
    known = known_codes(unlabelled.tokenizer, images.float() / 255, mask.expand(3, *SIZE))
    parameters: dict[str, Any] = {"temperature": 0.9, "top_k": 9, "top_p": 0.9}
    generator = torch.Generator().manual_seed(0)
    expected = complete_codes(unlabelled.prior, known, candidates=4, generator=generator, **parameters)
    found = complete(unlabelled, images, mask, **parameters)
    assert torch.equal(found.codes, expected)
    assert torch.equal(found.codes[:, :, 3:], known[:, :, 3:])
    assert not torch.equal(complete(unlabelled, images, mask).codes, expected)
    assert found.codes.shape == (3, *GRID)


def test_uint8_and_float_images_are_the_same_images(colour: ImagePipeline) -> None:
    images, mask = random_images(3, 3), half_mask("bottom", SIZE)
    found, floats = complete(colour, images, mask), complete(colour, images.float() / 255, mask)
    assert torch.equal(found.codes, floats.codes)
    assert torch.equal(found.images, floats.images)


def test_one_mask_for_all_or_one_for_each(colour: ImagePipeline) -> None:
    images, mask = random_images(3, 3), half_mask("left", SIZE)
    found = complete(colour, images, mask)
    assert torch.equal(complete(colour, images, mask.expand(3, *SIZE)).images, found.images)
    assert torch.equal(complete(colour, images, mask.byte()).images, found.images)  # a mask of 0 and 1
    each = torch.stack([mask, half_mask("right", SIZE), half_mask("top", SIZE)])
    found = complete(colour, images, each)
    for index, own in enumerate(each):
        assert torch.equal(found.images[index][:, own], images[index][:, own])
        assert not torch.equal(found.images[index], images[index])


def test_one_image_alone(colour: ImagePipeline) -> None:
    """P16, with each half kept."""
    images = random_images(2, 3)
    for half in ("top", "bottom", "left", "right"):
        mask = half_mask(half, SIZE)
        assert torch.equal(complete(colour, images[:1], mask).images, complete(colour, images, mask).images[:1])


def test_keeping_all_gives_the_image_and_keeping_nothing_a_sample(unlabelled: ImagePipeline) -> None:
    images, everything = random_images(2, 1), torch.ones(SIZE, dtype=torch.bool)
    found = complete(unlabelled, images, everything)
    assert torch.equal(found.images, images)
    assert torch.equal(found.codes, unlabelled.tokenizer.encode(images.float() / 255))
    found = complete(unlabelled, images, ~everything)
    assert torch.equal(found.codes, unlabelled.sample(2, seed=0).codes)


def test_every_finished_row_is_reported(unlabelled: ImagePipeline) -> None:
    rows: list[int] = []
    complete(unlabelled, random_images(2, 1), half_mask("top", SIZE), on_row=rows.append)
    assert rows == list(range(1, GRID[0] + 1))


@pytest.mark.parametrize(
    ("images", "mask"),
    [
        ((2, 3, HEIGHT, WIDTH), SIZE),  # colour for a grey tokenizer
        ((2, 1, WIDTH, HEIGHT), SIZE),
        ((2, 1, WIDTH, HEIGHT), (WIDTH, HEIGHT)),
        ((1, HEIGHT, WIDTH), SIZE),
        ((2, 1, HEIGHT + 2, WIDTH), (HEIGHT + 2, WIDTH)),
        ((2, 1, HEIGHT, WIDTH), (WIDTH, HEIGHT)),
        ((2, 1, HEIGHT, WIDTH), (WIDTH,)),
        ((2, 1, HEIGHT, WIDTH), (3, HEIGHT, WIDTH)),
        ((2, 1, HEIGHT, WIDTH), (2, 1, HEIGHT, WIDTH)),
    ],
)
def test_wrong_shapes_are_refused(unlabelled: ImagePipeline, images: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        complete(unlabelled, torch.zeros(images, dtype=torch.uint8), torch.ones(mask, dtype=torch.bool))
    assert f"expected images [n,1,{HEIGHT},{WIDTH}] and a mask" in str(error.value)
    assert f"got {list(images)} and {list(mask)}" in str(error.value)


# Labels


def test_labels_are_those_requested_or_open(labelled: ImagePipeline) -> None:
    """Requested: taken in turn. Open: the known codes choose, so there are particles of every class."""
    images, mask = random_images(4, 1), half_mask("right", SIZE)
    known = known_codes(labelled.tokenizer, images.float() / 255, mask.expand(4, *SIZE))

    def expected(labels: Tensor) -> Tensor:
        return complete_codes(
            labelled.prior, known, candidates=6, labels=labels, generator=torch.Generator().manual_seed(0)
        )

    def found(labels: Any) -> Tensor:
        return labelled.complete(images, mask, labels=labels, candidates=6, seed=0).codes

    one, other = expected(torch.tensor([1, 1, 1, 1])), expected(torch.tensor([0, 2, 0, 2]))
    assert not torch.equal(one, other)
    for labels in ("ring", 1, ["ring"]):
        assert torch.equal(found(labels), one)
    assert torch.equal(found(["2", "0"]), other)
    generator = torch.Generator().manual_seed(0)
    labels = open_labels(4, 6, 3, generator)
    assert torch.equal(
        found(None), complete_codes(labelled.prior, known, candidates=6, labels=labels, generator=generator)
    )


@pytest.mark.parametrize(("num_particles", "num_classes"), [(6, 3), (7, 3), (2, 5), (1, 4)])
def test_an_open_label_is_any_class_equally_often(num_particles: int, num_classes: int) -> None:
    """Also where the particles are no multiple of the classes, or fewer; an image's do not depend on other images."""
    labels = open_labels(3000, num_particles, num_classes, torch.Generator().manual_seed(0))
    share = torch.bincount(labels.flatten(), minlength=num_classes) / labels.numel()
    assert float((share - 1 / num_classes).abs().max()) < 0.03
    each = torch.nn.functional.one_hot(labels, num_classes).sum(dim=1)
    assert int(each.max() - each.min()) <= 1 + (num_classes == 3 and num_particles == 7)
    assert torch.equal(open_labels(2, num_particles, num_classes, torch.Generator().manual_seed(0)), labels[:2])


def test_the_class_is_open_also_where_the_top_is_kept(labelled: ImagePipeline) -> None:
    """The chosen class is the one under which the known codes are the most likely."""
    mask = half_mask("top", SIZE)
    hits = 0
    for label in range(3):
        sampled = labelled.sample(1, labels=label, seed=label, temperature=0)
        images, codes = sampled.images.repeat(20, 1, 1, 1), sampled.codes
        nats = [
            torch.nn.functional.cross_entropy(
                labelled.prior(codes, torch.tensor([i]))[:, :, :2], codes[:, :2], reduction="sum"
            ).item()
            for i in range(3)
        ]
        best = int(np.argmin(nats))
        assert sorted(nats)[1] - sorted(nats)[0] > 5  # a class that nothing else comes near
        found = labelled.complete(images, mask, candidates=9, seed=1, temperature=0).codes
        requested = labelled.complete(images, mask, labels=best, candidates=9, seed=1, temperature=0).codes
        hits += torch.equal(found, requested)
    assert hits == 3


@pytest.mark.parametrize("labels", ["nosuch", 3, [], ["ring", "-1"]])
def test_an_unknown_label_is_refused(labelled: ImagePipeline, labels: Any) -> None:
    with pytest.raises(InputError, match="label"):
        complete(labelled, random_images(2, 1), half_mask("top", SIZE), labels=labels)


def test_a_label_for_a_prior_without_classes_is_refused(unlabelled: ImagePipeline) -> None:
    with pytest.raises(InputError, match="expected no label"):
        complete(unlabelled, random_images(2, 1), half_mask("top", SIZE), labels=["ring"])


# Masks


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (5, 6), (1, 4), (3, 1)])
def test_halves_of_even_and_odd_sizes(size: tuple[int, int]) -> None:
    """The smaller half of an odd side, so that two halves never meet."""
    height, width = size
    expected = {
        "top": [[y < height // 2 for _ in range(width)] for y in range(height)],
        "bottom": [[y > height - 1 - height // 2 for _ in range(width)] for y in range(height)],
        "left": [[x < width // 2 for x in range(width)] for _ in range(height)],
        "right": [[x > width - 1 - width // 2 for x in range(width)] for _ in range(height)],
    }
    for half, mask in expected.items():
        found = half_mask(half, size)
        assert found.dtype == torch.bool
        assert found.tolist() == mask
    assert int(half_mask("top", size).sum()) == int(half_mask("bottom", size).sum()) == height // 2 * width
    assert not (half_mask("left", size) & half_mask("right", size)).any()


def test_white_pixels_of_a_file_are_kept(tmp_path: Path) -> None:
    """128 or more, in any mode."""
    pixels = np.arange(7 * 36, dtype=np.uint8).reshape(7, 36)
    pixels[0, :4] = 127, 128, 0, 255
    for mode in ("L", "RGB", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / "mask.png")
        assert torch.equal(mask_from_file(tmp_path / "mask.png", (7, 36)), torch.from_numpy(pixels >= 128))
    Image.fromarray(pixels >= 128).save(tmp_path / "mask.png")
    assert torch.equal(mask_from_file(tmp_path / "mask.png", (7, 36)), torch.from_numpy(pixels >= 128))


def test_a_dark_grey_of_16_bits_is_not_white(tmp_path: Path) -> None:
    pixels = np.full(SIZE, 1000, dtype=np.uint16)  # of 65535
    pixels[:, :5] = 60_000
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert torch.equal(mask_from_file(tmp_path / "mask.png", SIZE), torch.from_numpy(pixels == 60_000))


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH + 1), (GRID[0], GRID[1])])
def test_a_mask_of_another_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", (size[1], size[0]), 255).save(tmp_path / "mask.png")
    with pytest.raises(InputError) as error:
        mask_from_file(tmp_path / "mask.png", SIZE)
    assert f"expected a mask of {HEIGHT}x{WIDTH} pixels" in str(error.value)
    assert f"got {size[0]}x{size[1]} in {tmp_path / 'mask.png'}" in str(error.value)


def write_unreadable(problem: str, path: Path) -> None:
    if problem == "folder":
        path.mkdir()
    elif problem == "text":
        path.write_text("white")
    elif problem == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-40])
    elif problem == "huge":
        Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize("problem", ["missing", "folder", "text", "truncated", "huge"])
def test_a_mask_that_cannot_be_read(tmp_path: Path, problem: str) -> None:
    write_unreadable(problem, tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"expected top, bottom, left, right or a picture, .*mask.png, got ."):
        mask_from_file(tmp_path / "mask.png", SIZE)
