"""Bytes of an image, against numbers by hand, plain numpy, and Pillow at each of the 100 qualities."""

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from pipeline.compression import rate as rate_module
from pipeline.compression.image_formats import JpegRate, jpeg_at_psnr, mean_png_bytes, measure_jpeg, rate_at, scan_bytes
from pipeline.compression.rate import SplitRate, rate_table, subset_of
from pipeline.errors import InputError
from pipeline.evaluation.evaluate import evaluate
from pipeline.images.image_set import ImageSplit, open_images
from pipeline.models.inference import BLOCK
from prior import GatedPixelCNN
from tokenizer.config import Bottleneck

from ..conftest import CLASS_NAMES, Codegrid, Trained
from ..support import (
    CELL,
    GRID,
    HEIGHT,
    LEVELS,
    STEP,
    WIDTH,
    brightness_baseline,
    brightness_tokenizer,
    save_prior,
    save_tokenizer,
    tiny_prior,
)

CODES = math.prod(GRID)
SUBSAMPLINGS = {1: ["4:4:4"], 3: ["4:2:0", "4:4:4"]}
SCAN_HEADER = {
    "L": bytes.fromhex("ffda 0008 01 0100 003f00"),
    "RGB": bytes.fromhex("ffda 000c 03 0100 0211 0311 003f00"),
}


def measure_rate(*folders: Any, **options: Any) -> dict[str, Any]:
    """What the command writes as JSON."""
    return rate_module.measure_rate(*folders, **options).to_json()


@pytest.fixture
def rough(tmp_path: Path) -> Path:
    """90 grey pictures in 3 classes; the mean of a cell is a level, its pixels are not."""
    random = np.random.default_rng(0)
    for i in range(90):
        levels = random.choice([2, 3, 5, 8, 13], GRID, p=[0.5, 0.2, 0.1, 0.1, 0.1])
        pixels = np.kron(levels * STEP, np.ones((CELL, CELL), dtype=np.int64))
        deviation = random.integers(0, 26, GRID)
        pixels[::2, ::2] += deviation
        pixels[1::2, 1::2] -= deviation
        path = tmp_path / "rough" / CLASS_NAMES[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "rough"


@pytest.fixture
def tokenizer(tmp_path: Path, rough: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), rough, CLASS_NAMES)
    return tmp_path / "tokenizer"


def fingerprint_of(tokenizer: Path) -> str:
    found: str = json.loads((tokenizer / "config.json").read_text("utf-8"))["fingerprint"]
    return found


def uniform_prior(num_codes: int = LEVELS) -> GatedPixelCNN:
    model = tiny_prior(num_codes)
    with torch.no_grad():
        for parameter in model.to_logits.parameters():
            parameter.zero_()
    return model


def soft(channels: int, count: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Waves of light and fainter ones of colour, with a little noise: uint8 [count,channels,height,width]."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    high, wide = random.uniform(3, 9, (2, count, 1, 1, 1))
    light = 128 + 70 * np.sin(rows / high + columns / wide)
    colour = 15 * np.sin(rows / 4 + columns / random.uniform(4, 9, (count, channels, 1, 1)))
    noise = random.normal(0, 2, (count, channels, height, width))
    return np.clip(light + colour + noise, 0, 255).astype(np.uint8)


def striped() -> np.ndarray:
    """Columns of red and blue in turn, which half the resolution of colours makes violet: [2,3,16,24]."""
    image = np.zeros((2, 3, 16, 24), dtype=np.uint8)
    image[:, 0, :, ::2] = 200
    image[:, 2, :, 1::2] = 200
    image[1] //= 2
    return image


def picture_of(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1).squeeze()))


def file_of(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, optimize=True, **options)
    return buffer.getvalue()


def psnr(original: np.ndarray, reconstructed: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(original.astype(float) - reconstructed).mean()))


def every_quality(images: np.ndarray, subsampling: str) -> np.ndarray:
    """[100,3] PSNR, bytes of a file, and bytes between the header of the scan and the last marker, by Pillow alone."""
    pictures = [picture_of(image) for image in images]
    originals = np.stack([np.asarray(picture) for picture in pictures])
    found = []
    for quality in range(1, 101):
        files = [file_of(picture, "JPEG", quality=quality, subsampling=subsampling) for picture in pictures]
        reconstructed = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        scans = [len(file.partition(SCAN_HEADER[pictures[0].mode])[2]) - 2 for file in files]
        found.append([psnr(originals, reconstructed), np.mean([len(file) for file in files]), np.mean(scans)])
    return np.array(found)


def crossings(scan: np.ndarray, target: float) -> list[list[float]]:
    """Quality, bytes of a file and of its scan, wherever the PSNR rises from below the target to it or above."""
    found = []
    for quality, (low, high) in enumerate(itertools.pairwise(scan), 1):
        if low[0] < target <= high[0]:
            share = (target - low[0]) / (high[0] - low[0])
            found.append([quality + share, *(low + share * (high - low))[1:]])
    return found


def rising(quality: int) -> JpegRate:
    return JpegRate(quality=quality, subsampling="4:4:4", psnr=20 + quality / 4, file=300.0 + quality**2, scan=quality)


# Codes


@pytest.mark.parametrize(("num_codes", "size"), [(2, 3), (16, 12), (512, 27), (513, 30)])
def test_packed_bytes_of_a_grid_of_24_codes(tmp_path: Path, rough: Path, num_codes: int, size: int) -> None:
    save_tokenizer(tmp_path / "own", brightness_tokenizer(num_codes), rough)
    numbers = measure_rate(tmp_path / "own", splits=["test"], device="cpu")["splits"]["test"]
    assert (numbers["num_codes"], numbers["grid"]) == (num_codes, [4, 6])
    assert numbers["bytes_per_image"]["packed"] == size
    assert numbers["bits_per_code"]["packed"] == size * 8 / 24


def test_every_number_of_both_splits(rough: Path, tokenizer: Path) -> None:
    """The codes and what they decode to are read off the pictures; a cell of level k is one of grey value 17 k."""
    rate = measure_rate(tokenizer, device="cpu")
    assert (rate["data"], list(rate["splits"]), rate["remarks"]) == (str(rough), ["train", "test"], [])
    images = open_images(str(rough))
    assert len(images.train) > BLOCK
    for name, split in (("train", images.train), ("test", images.test)):
        numbers = rate["splits"][name]
        pixels = np.stack([np.asarray(Image.open(rough / file)) for file in split.names])
        codes = pixels.reshape(len(split), GRID[0], CELL, GRID[1], CELL).mean(axis=(2, 4)) / STEP
        shares = np.bincount(codes.astype(int).ravel()) / codes.size
        entropy = -sum(share * math.log2(share) for share in shares if share)
        assert 1 < entropy < 2.5
        assert (numbers["images"], numbers["image"], numbers["grid"]) == (len(split), [1, HEIGHT, WIDTH], list(GRID))
        assert numbers["psnr"] == pytest.approx(psnr(pixels, np.kron(codes * STEP, np.ones((CELL, CELL)))), rel=1e-12)
        assert numbers["bits_per_code"] == {"packed": 4, "entropy": pytest.approx(entropy)}
        jpeg = jpeg_at_psnr(numbers["psnr"], pixels[:, None])
        assert (numbers["jpeg_psnr"], numbers["jpeg_quality"]) == (numbers["psnr"], jpeg.quality)
        assert numbers["bytes_per_image"] == {
            "raw": HEIGHT * WIDTH,
            "png": np.mean([len(file_of(Image.fromarray(image), "PNG")) for image in pixels]),
            "jpeg": jpeg.file,
            "jpeg_scan": jpeg.scan,
            "packed": 12,
            "entropy": pytest.approx(entropy * CODES / 8),
        }
    assert json.loads(json.dumps(rate, allow_nan=False)) == rate


def test_the_psnr_is_of_rounded_pixels(tmp_path: Path, rough: Path) -> None:
    """Of 100 codes, level 1 is a grey value of 2.58, which a picture cannot hold."""
    save_tokenizer(tmp_path / "own", brightness_tokenizer(100), rough)
    numbers = measure_rate(tmp_path / "own", splits=["train"], device="cpu")["splits"]["train"]
    split = open_images(str(rough)).train
    pixels = np.asarray(split.images)[:, 0]
    means = pixels.reshape(len(split), GRID[0], CELL, GRID[1], CELL).mean(axis=(2, 4))
    decoded = np.rint(np.rint(means / 255 * 99) / 99 * 255)
    assert numbers["psnr"] == pytest.approx(psnr(pixels, np.kron(decoded, np.ones((CELL, CELL)))), rel=1e-12)
    evaluated = evaluate(tmp_path / "own", split="train", device="cpu").reconstruction.psnr
    assert numbers["psnr"] != pytest.approx(evaluated, rel=1e-7)


# The prior


@pytest.mark.parametrize(("num_codes", "bits"), [(16, 4), (512, 9), (5, math.log2(5))])
def test_a_uniform_prior_costs_log2_k_bits(tmp_path: Path, rough: Path, num_codes: int, bits: float) -> None:
    own = save_tokenizer(tmp_path / "own", brightness_tokenizer(num_codes), rough).fingerprint
    save_prior(tmp_path / "prior", uniform_prior(num_codes), own)
    for numbers in measure_rate(tmp_path / "own", tmp_path / "prior", n=2, device="cpu")["splits"].values():
        assert numbers["bits_per_code"]["prior"] == pytest.approx(bits, rel=1e-6)
        assert numbers["bytes_per_image"]["prior"] == pytest.approx(bits * CODES / 8, rel=1e-6)


def test_the_prior_costs_what_evaluate_says(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its classes in another order than the images', in several batches."""
    monkeypatch.setattr("pipeline.evaluation.likelihood.BATCH", 13)
    save_prior(tmp_path / "prior", tiny_prior(num_classes=3), fingerprint_of(tokenizer), CLASS_NAMES[::-1])
    rate = measure_rate(tokenizer, tmp_path / "prior", device="cpu")
    for split, numbers in rate["splits"].items():
        likelihood = evaluate(tokenizer, tmp_path / "prior", split=split, device="cpu").likelihood
        assert likelihood is not None
        bits = likelihood.bits_per_code
        assert numbers["bits_per_code"]["prior"] == pytest.approx(bits, rel=1e-6)
        assert numbers["bytes_per_image"]["prior"] == pytest.approx(bits * CODES / 8, rel=1e-6)


def test_a_prior_of_another_tokenizer_or_of_other_classes(tmp_path: Path, tokenizer: Path) -> None:
    save_prior(tmp_path / "prior", tiny_prior(), "e" * 64)
    with pytest.raises(InputError, match=f"made with this tokenizer .*{fingerprint_of(tokenizer)}.*, got .*eeee"):
        measure_rate(tokenizer, tmp_path / "prior", device="cpu")
    save_prior(tmp_path / "classes", tiny_prior(num_classes=2), fingerprint_of(tokenizer), ["disc", "line"])
    with pytest.raises(InputError, match="got the class été"):
        measure_rate(tokenizer, tmp_path / "classes", device="cpu")


@pytest.mark.parametrize("bottleneck", ["vae", "ae"])
def test_a_tokenizer_without_codes(tmp_path: Path, bottleneck: Bottleneck) -> None:
    """Said before its images are looked for."""
    save_tokenizer(tmp_path / "baseline", brightness_baseline(bottleneck), tmp_path / "nosuch")
    with pytest.raises(InputError, match=f"expected a tokenizer with codes in .*bottleneck {bottleneck}") as error:
        measure_rate(tmp_path / "baseline", device="cpu")
    assert "\n" not in str(error.value)


# Which images


def test_a_subset_is_a_fixed_choice_of_images_with_their_labels_and_names() -> None:
    rows = np.arange(50)
    split = ImageSplit(
        np.broadcast_to(rows[:, None, None, None], (50, 1, 4, 6)).astype(np.uint8), rows + 100, tuple(map(str, rows))
    )
    subset = subset_of(split, 7)
    chosen = subset.images[:, 0, 0, 0].astype(int)
    assert subset.images.shape == (7, 1, 4, 6)
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == (subset.labels - 100).tolist() == [int(name) for name in subset.names]
    assert chosen.tolist() != list(range(7))
    assert len(set(subset_of(split, 49).names)) == 49
    np.testing.assert_array_equal(subset_of(split, 7).labels, subset.labels)
    assert subset_of(split, None) is subset_of(split, 50) is subset_of(split, 51) is split


def test_n_images_of_each_split(tokenizer: Path) -> None:
    everything = measure_rate(tokenizer, device="cpu")
    test = everything["splits"]["test"]["images"]
    subset = measure_rate(tokenizer, n=test + 1, device="cpu")
    assert subset["splits"]["train"]["images"] == test + 1 < everything["splits"]["train"]["images"]
    assert subset["splits"]["train"]["psnr"] != everything["splits"]["train"]["psnr"]
    assert subset["splits"]["test"] == everything["splits"]["test"]
    assert measure_rate(tokenizer, n=test + 1, device="cpu") == subset


def test_a_split_without_images_is_omitted(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("L", (WIDTH, HEIGHT), 40).save(tmp_path / "one" / "1.png")
    save_tokenizer(tmp_path / "own", brightness_tokenizer(), tmp_path / "one")
    rate = measure_rate(tmp_path / "own", device="cpu")
    assert list(rate["splits"]) == ["train"]
    assert "test: no images" in rate["remarks"]
    with pytest.raises(InputError, match=r"expected images in the test split of .*, got none"):
        measure_rate(tmp_path / "own", splits=["test"], device="cpu")


def test_other_images_than_the_tokenizers_own(tokenizer: Path, grey_folder: Path) -> None:
    rate = measure_rate(tokenizer, data=str(grey_folder), splits=["test"], device="cpu")
    assert rate["data"] == str(grey_folder)
    assert rate["splits"]["test"]["psnr"] == pytest.approx(120)


# PNG and JPEG


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_what_pillow_writes(channels: int) -> None:
    images = soft(channels)
    assert mean_png_bytes(images) == np.mean([len(file_of(picture_of(image), "PNG")) for image in images])


@pytest.mark.parametrize("images", [soft(1), soft(3), striped()], ids=["grey", "soft", "striped"])
def test_the_search_agrees_with_all_hundred_qualities(images: np.ndarray) -> None:
    """Where the PSNR falls as the quality rises, as for stripes, any quality that meets it will do."""
    scanned = {subsampling: every_quality(images, subsampling) for subsampling in SUBSAMPLINGS[images.shape[1]]}
    levels = scanned["4:4:4"][:, 0]
    for target in map(float, (levels[0] + 0.01, *np.quantile(levels, [0.1, 0.4, 0.7, 0.9]), levels[-1] - 0.01)):
        crossed = {name: found for name, scan in scanned.items() if (found := crossings(scan, target))}
        found = jpeg_at_psnr(target, images)
        assert found.psnr == target
        assert pytest.approx([found.quality, found.file, found.scan]) in crossed[found.subsampling]
        assert all(found.file <= max(file for _, file, _ in rates) for rates in crossed.values())


def test_the_search_between_two_qualities_by_hand() -> None:
    """Quality 40 has 30 dB and 1900 bytes, 41 has 30.25 dB and 1981."""
    found = rate_at(30.0625, rising)
    assert found == JpegRate(quality=40.25, subsampling="4:4:4", psnr=30.0625, file=1920.25, scan=40.25)
    assert rate_at(30.0, rising) == rising(40)


@pytest.mark.parametrize("target", [20.3, 26.0, 31.1, 44.9])
def test_the_search_measures_no_quality_twice_and_few_of_them(target: float) -> None:
    requested = []

    def measure(quality: int) -> JpegRate:
        requested.append(quality)
        return rising(quality)

    rate_at(target, measure)
    assert len(requested) == len(set(requested)) <= 8


@pytest.mark.parametrize(("target", "quality"), [(3.0, 1), (20.25, 1), (45.0, 100), (45.01, 100), (120.0, 100)])
def test_a_quality_that_no_jpeg_has_gives_the_nearest(target: float, quality: int) -> None:
    assert rate_at(target, rising) == rising(quality)


def test_codes_that_are_better_than_any_jpeg(tmp_path: Path, grey_folder: Path) -> None:
    """Here they are lossless."""
    save_tokenizer(tmp_path / "own", brightness_tokenizer(), grey_folder)
    rate = measure_rate(tmp_path / "own", splits=["train"], device="cpu")
    numbers, best = rate["splits"]["train"], every_quality(open_images(str(grey_folder)).train.images, "4:4:4")[99]
    assert (numbers["psnr"], numbers["jpeg_quality"]) == (pytest.approx(120), 100)
    sizes = numbers["bytes_per_image"]
    assert [numbers["jpeg_psnr"], sizes["jpeg"], sizes["jpeg_scan"]] == pytest.approx(list(best))
    assert rate["remarks"] == [
        f"train: JPEG has only {best[0]:.2f} dB at quality 100, less than the codes with 120.00 dB"
    ]


def test_codes_that_are_worse_than_any_jpeg(tmp_path: Path, rough: Path) -> None:
    """Here they all decode to black."""
    model = brightness_tokenizer(2)
    model.quantizer.set_codebook(torch.tensor([[0.0], [-9.0]]))
    save_tokenizer(tmp_path / "own", model, rough)
    rate = measure_rate(tmp_path / "own", splits=["train"], device="cpu")
    numbers, worst = rate["splits"]["train"], every_quality(open_images(str(rough)).train.images, "4:4:4")[0]
    sizes = numbers["bytes_per_image"]
    assert (numbers["jpeg_quality"], sizes["entropy"]) == (1, 0)
    assert [numbers["jpeg_psnr"], sizes["jpeg"], sizes["jpeg_scan"]] == pytest.approx(list(worst))
    assert rate["remarks"] == [
        f"train: JPEG has {worst[0]:.2f} dB even at quality 1, more than the codes with {numbers['psnr']:.2f} dB"
    ]


def test_the_scan_of_a_file_made_by_hand() -> None:
    """Marker bytes inside another segment do not count; the scan holds a stuffed ff and a restart marker."""
    start, end = "ffd8", "ffd9"
    comment = "fffe 0008 ffda ffd9 0000"
    header = "ffda 0008 01 0100 003f00"
    scan = "12 ff00 34 ffd0 d9 56"
    file = bytes.fromhex(" ".join([start, comment, "ffdb 0002", header, scan, end]))
    assert scan_bytes(file) == 8
    assert scan_bytes(file + b"anything") == 8


def test_noise_at_the_highest_quality_can_be_written() -> None:
    """Larger than the buffer that Pillow makes for it."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, 200, 210), dtype=np.uint8)
    before = ImageFile.MAXBLOCK
    found = measure_jpeg(noise, 100, subsampling="4:4:4")
    assert found.scan > 2 * 200 * 210
    assert found.psnr > 40
    assert before == ImageFile.MAXBLOCK


# What is printed


def test_the_table() -> None:
    rate = SplitRate(
        images=1234,
        image=(3, 32, 48),
        grid=(8, 12),
        num_codes=512,
        decoder="sharp",
        psnr=25.444,
        jpeg_psnr=25.444,
        jpeg_quality=14.72,
        jpeg_subsampling="4:2:0",
        bits_per_code={"packed": 9.0, "entropy": 8.6754},
        bytes_per_image={"raw": 4608.0, "jpeg_scan": 98.76, "packed": 108.0, "entropy": 104.1},
    )
    assert rate_table(rate).splitlines() == [
        "1,234 images of 3x32x48, 8x12 codes of 512",
        "PSNR 25.44 dB (sharp decoder), JPEG 25.44 dB at quality 14.7 (4:2:0)",
        "           bytes per image  bits per code",
        "raw                4,608.0",
        "jpeg_scan             98.8",
        "packed               108.0          9.000",
        "entropy              104.1          8.675",
    ]


def test_the_command(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    path = tmp_path / "new" / "rate.json"
    command = ["measure-rate", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu"]
    outcome = codegrid(*command, "--n", 3, "--json", path)
    assert (outcome.status, outcome.error_lines) == (0, [])
    rate = json.loads(path.read_text("utf-8"))
    assert rate == measure_rate(trained.tokenizer, trained.prior, n=3, device="cpu")
    for split, numbers in rate["splits"].items():
        assert f"{split}: {rate_table(SplitRate(**numbers))}\n" in outcome.out
    assert all(warning in outcome.out for warning in rate["remarks"])
    before = path.read_bytes()
    assert codegrid(*command, "--json", path).status == 1
    assert path.read_bytes() == before
    outcome = codegrid(*command, "--split", "test", "--json", path, "--force")
    assert outcome.status == 0
    assert "train:" not in outcome.out
    assert list(json.loads(path.read_text("utf-8"))["splits"]) == ["test"]
