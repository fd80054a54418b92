"""The image transform: every mode Pillow opens, turned upright, scaled to cover the size, cropped to its centre."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.errors import InputError
from pipeline.images.preprocessing import (
    IMAGE_ERRORS,
    Preprocessing,
    is_grey,
    prepare,
    read_image,
    to_float,
    to_uint8,
    upright_size,
)

WIDTH, HEIGHT = 5, 3  # not square anywhere in this file
RGB = Preprocessing(height=HEIGHT, width=WIDTH, channels=3)
GREY = Preprocessing(height=HEIGHT, width=WIDTH, channels=1)


def noise(channels: int, seed: int = 0) -> np.ndarray:
    """Return random uint8 [HEIGHT, WIDTH, channels], or [HEIGHT, WIDTH] for one channel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def luma(rgb: np.ndarray) -> np.ndarray:
    """Convert [3, H, W] to [1, H, W] by ITU-R 601 as Pillow does."""
    weights = np.array([19595, 38470, 7471])
    return ((rgb.astype(np.int64) * weights[:, None, None]).sum(0, keepdims=True) + 0x8000) >> 16


def check(image: Image.Image, rgb: np.ndarray) -> None:
    """Assert that `prepare` returns exactly `rgb` [3, H, W], and its luma where grey is requested."""
    np.testing.assert_array_equal(prepare(image, RGB), rgb)
    np.testing.assert_array_equal(prepare(image, GREY), luma(rgb))


def test_rgb_keeps_every_pixel_in_its_place() -> None:
    pixels = noise(3)
    result = prepare(Image.fromarray(pixels), RGB)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    check(Image.fromarray(pixels), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_formats_without_loss_give_what_was_saved(tmp_path: Path, suffix: str) -> None:
    pixels = noise(3)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}", RGB), pixels.transpose(2, 0, 1))


def test_grey_becomes_three_equal_channels_and_one_stays_as_it_was() -> None:
    pixels = noise(1)
    np.testing.assert_array_equal(prepare(Image.fromarray(pixels), RGB), np.stack([pixels] * 3))
    np.testing.assert_array_equal(prepare(Image.fromarray(pixels), GREY), pixels[None])


@pytest.mark.parametrize("mode", ["RGBA", "RGBa"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    pixels = noise(4)
    pixels[:, :, 3] = np.resize([0, 255], (HEIGHT, WIDTH))
    opaque = pixels[:, :, 3:] == 255
    expected = np.where(opaque, pixels[:, :, :3], 255).transpose(2, 0, 1)
    check(Image.fromarray(pixels).convert(mode), expected)


def test_half_transparent_black_is_mid_grey() -> None:
    for image in (Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 128)), Image.new("LA", (WIDTH, HEIGHT), (0, 128))):
        assert set(prepare(image, RGB).flat) == {127}


@pytest.mark.parametrize("mode", ["LA", "La", "PA"])
def test_grey_and_palette_with_alpha(mode: str) -> None:
    image = Image.new("PA" if mode == "PA" else "LA", (WIDTH, HEIGHT), (40, 255))
    image.putpixel((4, 0), (40, 0))
    if mode == "PA":
        image.putpalette([level for level in range(256) for _ in range(3)])
    result = prepare(image.convert(mode), RGB)
    assert (result[:, 0, 4] == 255).all()
    assert (result[:, :, :4] == 40).all()


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path: Path, transparent: bool) -> None:
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((4, 0), 1)
    image.save(tmp_path / "a.png", **({"transparency": 1} if transparent else {}))
    result = read_image(tmp_path / "a.png", RGB)
    assert tuple(result[:, 2, 0]) == (10, 20, 30)
    assert tuple(result[:, 0, 4]) == ((255, 255, 255) if transparent else (200, 100, 50))


def test_one_transparent_grey_level_of_a_png(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 7).save(tmp_path / "a.png", transparency=7)
    assert set(read_image(tmp_path / "a.png", GREY).flat) == {255}


def test_one_bit() -> None:
    image = Image.new("1", (WIDTH, HEIGHT))
    image.putpixel((4, 0), 1)
    expected = np.zeros((1, HEIGHT, WIDTH))
    expected[0, 0, 4] = 255
    np.testing.assert_array_equal(prepare(image, GREY), expected)


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / f"a{suffix}", quality=100)
    result = read_image(tmp_path / f"a{suffix}", RGB)
    np.testing.assert_allclose(result[:, 1, 2], [0, 255, 255], atol=3)  # cyan


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces(mode: str) -> None:
    white = {"YCbCr": (255, 128, 128), "HSV": (0, 0, 255), "LAB": (255, 128, 128)}[mode]
    image = Image.new(mode, (WIDTH, HEIGHT), white)
    np.testing.assert_allclose(prepare(image, RGB), 255, atol=2)
    np.testing.assert_allclose(prepare(image, GREY), 255, atol=2)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_spans_the_eight_bits(mode: str) -> None:
    values = np.resize([0, 257, 128 * 257, 65535, 40000], (HEIGHT, WIDTH))
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (WIDTH, HEIGHT), values.astype(dtype).tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(prepare(image, GREY)[0], np.resize([0, 1, 128, 255, 156], (HEIGHT, WIDTH)))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_files(tmp_path: Path, suffix: str) -> None:
    values = np.full((HEIGHT, WIDTH), 65535, np.uint16)
    values[0, 0] = 0
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    result = read_image(tmp_path / f"a{suffix}", RGB)
    assert result[0, 0, 0] == 0
    assert (result[:, 1:] == 255).all()


def test_floating_point_counts_to_one_or_to_255() -> None:
    to_one = Image.fromarray(np.resize(np.float32([0, 0.5, 1, -3, np.nan]), (HEIGHT, WIDTH)))
    to_255 = Image.fromarray(np.resize(np.float32([0, 128, 255, -3, 999]), (HEIGHT, WIDTH)))
    np.testing.assert_array_equal(prepare(to_one, GREY)[0, 0], [0, 128, 255, 0, 0])
    np.testing.assert_array_equal(prepare(to_255, GREY)[0, 0], [0, 128, 255, 0, 255])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Against Pillow's own `exif_transpose`, and the corner pixel by hand."""
    pixels = noise(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=exif, lossless=True)
    with Image.open(tmp_path / f"a{suffix}") as image:
        height, width = upright_size(image)
        upright = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    result = read_image(tmp_path / f"a{suffix}", Preprocessing(height=height, width=width, channels=3))
    np.testing.assert_array_equal(result, upright)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    np.testing.assert_array_equal(result[:, 0, 0], pixels[corner[orientation]])


def test_an_exif_block_of_rubbish_is_no_orientation(tmp_path: Path) -> None:
    pixels = noise(3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0rubbish")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", RGB), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_of_several_frames(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.n_frames == 3
        for frame in (0, 2):
            image.seek(frame)
            assert tuple(prepare(image, RGB)[:, 0, 0]) == (255, 0, 0)


@pytest.mark.parametrize(("size", "crop"), [((24, 6), (9, 0, 15, 6)), ((6, 24), (0, 9, 6, 15))])
def test_covers_and_crops_the_centre(size: tuple[int, int], crop: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", size, "red")
    image.paste("blue", crop)
    result = prepare(image, Preprocessing(height=6, width=6, channels=3))
    np.testing.assert_array_equal(result, np.broadcast_to(np.array([0, 0, 255])[:, None, None], (3, 6, 6)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5), (640, 3)])
def test_any_size(size: tuple[int, int]) -> None:
    result = prepare(Image.new("L", size, 9), RGB)
    assert result.shape == (3, HEIGHT, WIDTH)
    assert (result == 9).all()


def test_a_file_cut_short_raises_what_callers_catch(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(IMAGE_ERRORS, match="truncated"):
        read_image(path, RGB)


def test_grey_by_the_header() -> None:
    grey = ["1", "L", "LA", "I", "F", "I;16"]
    assert all(is_grey(Image.new(mode, (2, 1))) for mode in grey)
    assert not any(is_grey(Image.new(mode, (2, 1))) for mode in ["P", "RGB", "RGBA", "CMYK", "YCbCr"])


def test_to_float_is_the_level_divided_by_255_rounded_once() -> None:
    """Not multiplied by the rounded inverse, which gives other bits for about half of the levels."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    before = levels.clone()
    expected = (levels.numpy().astype(np.float64) / 255).astype(np.float32)
    assert torch.equal(to_float(levels), torch.from_numpy(expected))
    assert torch.equal(to_float(levels), levels.float() / 255)
    assert not torch.equal(to_float(levels), levels.float() * (1 / torch.tensor(255.0)))
    assert torch.equal(levels, before)


def test_to_float_and_back_is_exact_for_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    assert (to_float(levels).min(), to_float(levels).max()) == (0, 1)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_to_uint8_clamps_and_rounds() -> None:
    values = torch.tensor([-2.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]


def test_preprocessing_goes_through_json_and_refuses_nonsense() -> None:
    assert Preprocessing(**json.loads(json.dumps(dataclasses.asdict(RGB)))) == RGB
    with pytest.raises(InputError, match="expected an image size of at least 1x1 pixels, got 0x5; "):
        Preprocessing(height=0, width=5, channels=3)
    with pytest.raises(InputError, match="got 2; "):
        Preprocessing(height=3, width=5, channels=2)
