"""The metrics, against slow oracles that read the pictures themselves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.codes.statistics import perplexity
from pipeline.compression import rate
from pipeline.errors import InputError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation import likelihood, prior_numbers
from pipeline.evaluation.codebook_health import CodebookHealth
from pipeline.evaluation.likelihood import code_bits, measure_prior
from pipeline.evaluation.prior_numbers import Likelihood
from pipeline.evaluation.reconstruction import measure_decoders, measure_reconstruction
from pipeline.evaluation.simple_predictors import SimpleBits, SimplePredictors
from pipeline.images.image_set import ImageSplit, open_images
from pipeline.models import inference
from pipeline.models.checkpoint import read_info, save_checkpoint
from pipeline.models.inference import BLOCK
from pipeline.training.recipes import TokenizerSettings
from pipeline.training.train_tokenizer import config_for, pixel_variance
from prior import GatedPixelCNN
from prior.objective import bits_per_dim
from tokenizer import VQVAE
from tokenizer.config import Bottleneck

from ..conftest import CLASS_NAMES, Trained
from ..support import (
    CELL,
    GRID,
    HEIGHT,
    LEVELS,
    STEP,
    WIDTH,
    bits_of,
    brightness_baseline,
    brightness_tokenizer,
    cells_of,
    save_prior,
    save_tokenizer,
    tiny_prior,
)


def evaluate(*folders: Any, **options: Any) -> dict[str, Any]:
    """What the command writes as JSON."""
    return evaluation.evaluate(*folders, **options).to_json()


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """15 grey pictures of random pixels, far from what can be reconstructed; no mean lies between two levels."""
    random = np.random.default_rng(0)
    for i in range(15):
        path = tmp_path / "noise" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
        sums = np.rint(means_of_cells(pixels[None])[0] * CELL**2).astype(int)
        pixels[::CELL, ::CELL] ^= (sums % (4 * STEP) == 2 * STEP).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "noise"


def pixels_of(folder: Path, split: ImageSplit) -> np.ndarray:
    """[n,H',W'] on [0,1] in float64, read by Pillow alone."""
    return np.stack([np.asarray(Image.open(folder / name)) for name in split.names]) / 255


def means_of_cells(pixels: np.ndarray) -> np.ndarray:
    """[n,H',W'] -> [n,H,W]"""
    return pixels.reshape(len(pixels), GRID[0], CELL, GRID[1], CELL).mean(axis=(2, 4))


# A tokenizer


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_numbers_of_a_tokenizer_against_numpy(tmp_path: Path, noise: Path, split: str) -> None:
    """E12: the histogram is of the complete split; nmse is in units of the variance of all training pixels."""
    images = open_images(str(noise))
    pixels = pixels_of(noise, images.train if split == "train" else images.test)
    variance = pixels_of(noise, images.train).var()
    model = brightness_tokenizer(data_variance=pixel_variance(images.train))
    save_tokenizer(tmp_path / "tokenizer", model, noise)

    scaled = means_of_cells(pixels) * (LEVELS - 1)
    assert abs(scaled % 1 - 0.5).min() > 1e-4  # no mean lies between two levels
    codes = np.rint(scaled).astype(int)
    decoded = np.kron(codes / (LEVELS - 1), np.ones((1, CELL, CELL)))
    mse = ((decoded - pixels) ** 2).mean()
    shares = np.bincount(codes.ravel()) / codes.size
    entropy = -sum(share * math.log(share) for share in shares if share)

    numbers = evaluate(tmp_path / "tokenizer", split=split, device="cpu")
    assert numbers["mse"] == pytest.approx(mse, rel=1e-5)
    assert numbers["psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)
    assert numbers["nmse"] == pytest.approx(mse / variance, rel=1e-5)
    assert numbers["codes_used"] == len(np.unique(codes))
    assert numbers["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-9)
    assert numbers["images"] == len(pixels)
    assert numbers["split"] == split


@pytest.mark.parametrize("at_once", [1, 4, 1024])
def test_the_variance_is_that_of_all_training_pixels(noise: Path, at_once: int) -> None:
    images = open_images(str(noise))
    expected = pixels_of(noise, images.train).var()
    assert pixel_variance(images.train, at_once) == pytest.approx(expected, rel=1e-9)
    config = config_for(TokenizerSettings(num_codes=8, downsample=2), images)
    assert config.data_variance == pytest.approx(expected, rel=1e-9)
    assert (config.in_channels, config.num_codes, config.downsample) == (1, 8, 2)


def test_predicting_the_mean_scores_one(noise: Path) -> None:
    """Q9: error and variance are on the same scale."""
    images = open_images(str(noise))
    model = brightness_tokenizer(data_variance=pixel_variance(images.train))
    mean = float(pixels_of(noise, images.train).mean())
    model.quantizer.set_codebook(torch.full((LEVELS, 1), mean))
    numbers, health = measure_reconstruction(model, images.train)
    assert numbers.nmse == pytest.approx(1, rel=1e-5)
    assert health is not None
    assert (health.codes_used, health.perplexity) == (1, 1)


def test_a_perfect_reconstruction_has_no_error(grey_folder: Path) -> None:
    images = open_images(str(grey_folder))
    numbers, _ = measure_reconstruction(brightness_tokenizer(), images.train)
    assert numbers.mse < 1e-12
    assert 110 < numbers.psnr < math.inf


def test_a_picture_of_one_colour_has_a_variance_to_divide_by() -> None:
    split = ImageSplit(np.full((2, 1, 4, 6), 77, dtype=np.uint8), np.array([-1, -1]), ("a", "b"))
    assert pixel_variance(split) > 0


def test_the_batch_size_changes_nothing(trained: Trained, noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E12 and P18, with a last batch that is smaller."""
    images, tokenizer = open_images(str(noise)), brightness_tokenizer()
    found = []
    for size in (1, 4, 5, 256):
        monkeypatch.setattr(inference, "BLOCK", size)
        monkeypatch.setattr(likelihood, "BATCH", size)
        numbers, health = measure_reconstruction(tokenizer, images.train)
        assert isinstance(health, CodebookHealth)
        both = evaluate(trained.tokenizer, trained.prior, split="train", device="cpu")
        floats = [value for value in both.values() if isinstance(value, float)]
        found.append([*vars(numbers).values(), health.codes_used, health.perplexity, *floats])
    assert len(found[0]) == 5 + 11
    for others in found[1:]:
        assert others == pytest.approx(found[0], rel=1e-6)


def test_a_subset_of_the_rows(noise: Path) -> None:
    images, model = open_images(str(noise)), brightness_tokenizer()
    rows = np.array([5, 2, 7])
    split = ImageSplit(images.train.images[rows], images.train.labels[rows], ("a", "b", "c"))
    subset, alone = measure_reconstruction(model, images.train, rows), measure_reconstruction(model, split)
    assert subset == alone != measure_reconstruction(model, images.train)
    assert subset[1] is not None
    assert alone[1] is not None
    assert torch.equal(subset[1].histogram, alone[1].histogram)
    assert int(subset[1].histogram.sum()) == 3 * math.prod(GRID)


@pytest.mark.parametrize("bottleneck", ["vae", "ae"])
def test_a_baseline_loses_what_the_mean_of_a_cell_loses(tmp_path: Path, noise: Path, bottleneck: Bottleneck) -> None:
    """It has no codes to count, and a Gaussian's mean is decoded: its deviation here is e."""
    pixels = pixels_of(noise, open_images(str(noise)).train)
    mse = ((np.kron(means_of_cells(pixels), np.ones((1, CELL, CELL))) - pixels) ** 2).mean()
    save_tokenizer(tmp_path / "baseline", brightness_baseline(bottleneck, data_variance=0.05), noise)
    numbers = evaluate(tmp_path / "baseline", split="train", device="cpu")
    assert set(numbers) == {"data", "split", "images", "decoder", "mse", "psnr", "nmse"}
    assert numbers["decoder"] == "plain"
    assert numbers["mse"] == pytest.approx(mse, rel=1e-5)
    assert numbers["psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)
    assert numbers["nmse"] == pytest.approx(mse / 0.05, rel=1e-5)


@pytest.mark.parametrize("histogram", [[4, 0, 0, 0], [3, 3, 3, 3], [1, 2, 3, 4], [1, 0, 999, 0]])
def test_perplexity_against_a_sum(histogram: list[int]) -> None:
    total = sum(histogram)
    expected = math.prod((count / total) ** -(count / total) for count in histogram if count)
    assert perplexity(torch.tensor(histogram)) == pytest.approx(expected, rel=1e-12)


def test_measuring_changes_neither_the_model_nor_its_mode(noise: Path) -> None:
    model, split = brightness_tokenizer().train(), open_images(str(noise)).train
    before, state = bits_of(model), torch.get_rng_state()
    measure_reconstruction(model, split)
    assert bits_of(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# A prior


@torch.no_grad()
def bits_one_by_one(model: GatedPixelCNN, codes: torch.Tensor, labels: torch.Tensor | None) -> float:
    """-log2 of each code's probability, looked up one at a time, divided by their number."""
    bits = []
    for i, grid in enumerate(codes):
        shares = model(grid[None], None if labels is None else labels[i : i + 1])[0].double().softmax(dim=0)
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                bits.append(-math.log2(float(shares[grid[row, column], row, column])))
    return sum(bits) / len(bits)


def test_bits_per_code_against_one_probability_at_a_time() -> None:
    """P18: exact for any batches, the last one smaller."""
    model = tiny_prior(num_classes=3)
    codes, labels = torch.randint(LEVELS, (5, *GRID)), torch.tensor([0, 1, 2, 0, 1])
    expected = bits_one_by_one(model, codes, labels)
    assert abs(expected - math.log2(LEVELS)) > 0.01  # not the uniform model
    for size in (1, 2, 5):
        batches = zip(codes.split(size), labels.split(size), strict=True)
        assert measure_prior(model, batches) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_large_batches_are_run_over_in_parts_that_fit_memory(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny_prior(num_classes=num_classes), []
    codes, labels = torch.randint(LEVELS, (5, *GRID)), torch.tensor([0, 1, 2, 0, 1])
    expected = measure_prior(model, [(codes, labels)])
    model.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    monkeypatch.setattr(likelihood, "pairs_at_once", lambda prior, positions: 2 if positions == codes[0].numel() else 5)
    assert measure_prior(model, [(codes, labels)]) == pytest.approx(expected, rel=1e-6)
    assert code_bits(model, codes.numpy(), labels.numpy()).mean() == pytest.approx(expected, rel=1e-6)
    assert sizes == [2, 2, 1] * 2


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_bits_of_each_code_against_one_probability_at_a_time(
    num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their mean is what `measure_prior` says; of any integer type, in any batches, the last one smaller."""
    model = tiny_prior(num_classes=num_classes).train()
    codes = np.random.default_rng(0).integers(0, LEVELS, (5, *GRID), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1])
    mean = measure_prior(model, likelihood.code_batches(codes, labels))
    monkeypatch.setattr(likelihood, "BATCH", 2)
    found = code_bits(model, codes, labels)
    assert model.training
    assert (found.dtype, found.shape) == (np.float32, (5, *GRID))
    assert float(found.mean(dtype=np.float64)) == pytest.approx(mean, rel=1e-6)
    grids, named = torch.from_numpy(codes).long(), torch.from_numpy(labels) if num_classes else None
    for index in range(5):
        with torch.no_grad():
            shares = model.eval()(grids[index : index + 1], None if named is None else named[index : index + 1])[0]
        for row, column in np.ndindex(GRID):
            share = float(shares.double().softmax(dim=0)[grids[index, row, column], row, column])
            assert found[index, row, column] == pytest.approx(-math.log2(share), rel=1e-4, abs=1e-5)


def test_a_uniform_prior_needs_log2_of_the_number_of_codes() -> None:
    model = tiny_prior()
    with torch.no_grad():
        for parameter in model.to_logits.parameters():
            parameter.zero_()
    batches = [(torch.randint(LEVELS, (2, *GRID)), torch.tensor([-1, -1]))]
    assert measure_prior(model, batches) == pytest.approx(math.log2(LEVELS), rel=1e-6)


def test_bits_of_a_checkpoint_by_hand(tmp_path: Path, grey_folder: Path) -> None:
    """P19 and P12: labels matched by class name, though the prior has them in another order; bits_per_dim from it."""
    tokenizer, prior = tmp_path / "tokenizer", tmp_path / "prior"
    fingerprint = save_tokenizer(tokenizer, brightness_tokenizer(), grey_folder, CLASS_NAMES).fingerprint
    order = [CLASS_NAMES[2], CLASS_NAMES[0], CLASS_NAMES[1]]
    model = tiny_prior(num_classes=3)
    save_prior(prior, model, fingerprint, order)

    split = open_images(str(grey_folder)).train
    codes = torch.from_numpy(np.stack([cells_of(grey_folder / name) for name in split.names])).long()
    labels = torch.tensor([order.index(name.partition("/")[0]) for name in split.names])
    expected = bits_one_by_one(model, codes, labels)
    assert bits_one_by_one(model, codes, torch.from_numpy(split.labels)) != pytest.approx(expected, rel=1e-4)

    numbers = evaluate(tokenizer, prior, split="train", device="cpu")
    assert numbers["bits_per_code"] == pytest.approx(expected, rel=1e-5)
    assert numbers["bits_per_dim"] == pytest.approx(expected * (4 * 6) / (1 * 8 * 12), rel=1e-5)


def test_simple_predictors_count_the_training_images_and_are_measured_on_the_split(
    tmp_path: Path, grey_folder: Path, encoded: list[int]
) -> None:
    """With the labels of the images, in any numbering; the training images are encoded once more, or not again."""
    tokenizer, prior = tmp_path / "tokenizer", tmp_path / "prior"
    fingerprint = save_tokenizer(tokenizer, brightness_tokenizer(), grey_folder, CLASS_NAMES).fingerprint
    save_prior(prior, tiny_prior(num_classes=3), fingerprint, CLASS_NAMES[::-1])
    images = open_images(str(grey_folder))
    codes = {
        name: np.stack([cells_of(grey_folder / each) for each in split.names])
        for name, split in (("train", images.train), ("test", images.test))
    }
    predictors = SimplePredictors.fit(codes["train"], images.train.labels, LEVELS, 3)
    for name, split in (("train", images.train), ("test", images.test)):
        encoded.clear()
        numbers = evaluate(tokenizer, prior, split=name, device="cpu")
        assert len(encoded) == (1 if name == "train" else 2)
        expected = predictors.bits(codes[name], split.labels)
        assert numbers["bits_uniform"] == expected.uniform == math.log2(LEVELS)
        assert numbers["bits_histogram"] == expected.histogram
        assert numbers["bits_histogram_given_label"] == expected.histogram_given_label
        assert numbers["bits_above_and_left"] == expected.above_and_left
        assert numbers["bits_share_explained"] == 1 - numbers["bits_per_code"] / expected.histogram


def test_images_without_labels_have_no_histogram_given_the_label(tmp_path: Path, noise: Path) -> None:
    fingerprint = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), noise).fingerprint
    save_prior(tmp_path / "prior", tiny_prior(), fingerprint)
    numbers = evaluate(tmp_path / "tokenizer", tmp_path / "prior", device="cpu")
    assert "bits_histogram_given_label" not in numbers
    assert numbers["bits_above_and_left"] > 0


def test_the_words_about_a_prior() -> None:
    simple = SimpleBits(uniform=9.0, histogram=8.0, histogram_given_label=None, above_and_left=6.0)
    assert Likelihood(bits_per_code=4.0, bits_per_dim=0.1, simple=simple).lines() == [
        "what a code costs, in bits:",
        "         9.000  guessing: all codes equally likely",
        "         8.000  the histogram: how often each code occurs in the training images",
        "         6.000  given the code above and the one to the left",
        "         4.000  this prior: 50 % of the way from the histogram to zero (code above and to the left: 25 %)",
    ]
    labelled = Likelihood(bits_per_code=4.0, bits_per_dim=0.1, simple=replace(simple, histogram_given_label=7.5))
    assert labelled.lines()[3] == "         7.500  the histogram of the training images with the label"


def test_bits_per_dim_of_a_colour_image_that_is_not_square() -> None:
    assert bits_per_dim(6.0, (4, 6), (3, 16, 24)) == pytest.approx(6 * 24 / 1152)


def test_the_keys_are_those_of_the_contract(trained: Trained) -> None:
    keys = {"mse", "psnr", "nmse", "codes_used", "perplexity"}
    alone, both = evaluate(trained.tokenizer, device="cpu"), evaluate(trained.tokenizer, trained.prior, device="cpu")
    assert set(alone) == keys | {"data", "split", "images", "decoder", "codebook"}
    simple = {"bits_uniform", "bits_histogram", "bits_histogram_given_label", "bits_above_and_left"}
    assert set(both) == set(alone) | simple | {"bits_per_code", "bits_per_dim", "bits_share_explained"}
    assert {name: both[name] for name in alone} == alone
    assert json.loads(json.dumps(both, allow_nan=False)) == both


# Each image is encoded once, and to the same codes by every command


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of items in each call of `VQVAE.encode`."""
    calls: list[int] = []
    real = VQVAE.encode

    def encode(self: VQVAE, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return real(self, images)

    monkeypatch.setattr(VQVAE, "encode", encode)
    return calls


def test_a_prior_is_measured_on_the_codes_that_were_reconstructed(
    tmp_path: Path, trained: Trained, noise: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on those of export-codes and measure-rate, to the last code; of noise, near ties included."""
    many = tmp_path / "many"
    for i in range(2 * BLOCK + 9):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        path = many / CLASS_NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    seen: dict[str, list[torch.Tensor]] = {"evaluate": [], "rate": []}
    for name, module in (("evaluate", prior_numbers), ("rate", rate)):

        def measured(prior: GatedPixelCNN, batches: Any, name: str = name, **options: Any) -> float:
            kept = list(batches)
            seen[name] += [codes for codes, _ in kept]
            return measure_prior(prior, kept, **options)

        monkeypatch.setattr(module, "measure_prior", measured)
    evaluate(trained.tokenizer, trained.prior, data=str(many), split="train", device="cpu")
    blocks = -(-len(open_images(str(many)).train) // BLOCK)
    assert encoded == [BLOCK] * blocks
    rate.measure_rate(trained.tokenizer, trained.prior, data=str(many), splits=["train"], device="cpu")
    manifest = export_codes(trained.tokenizer, tmp_path / "codes", data=str(many), device="cpu")
    exported = CodeDataset(tmp_path / "codes").batch(np.arange(manifest.count))[0]
    assert len(exported) > BLOCK  # and with --split train the simple predictors take the codes that are there
    assert torch.equal(torch.cat(seen["evaluate"]), exported)
    assert torch.equal(torch.cat(seen["rate"]), exported)


def test_on_errors_gets_the_error_of_each_image(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "BLOCK", 2)
    split, found = open_images(str(noise)).train, list[torch.Tensor]()
    measure_decoders(brightness_tokenizer(), None, split, on_errors=found.append)
    pixels = pixels_of(noise, split)
    decoded = np.rint(means_of_cells(pixels) * (LEVELS - 1)) / (LEVELS - 1)
    expected = ((np.kron(decoded, np.ones((1, CELL, CELL))) - pixels) ** 2).sum(axis=(1, 2))
    assert torch.cat(found).tolist() == pytest.approx(expected, rel=1e-5)


def test_on_codes_gets_the_codes_in_the_order_of_the_rows(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "BLOCK", 2)
    split, rows, found = open_images(str(noise)).train, np.array([5, 2, 7, 0, 1]), list[torch.Tensor]()
    health = measure_decoders(brightness_tokenizer(), None, split, rows, on_codes=found.append).codebook
    means = means_of_cells(pixels_of(noise, split))[rows]
    assert torch.equal(torch.cat(found), torch.from_numpy(np.rint(means * (LEVELS - 1))).long())
    assert health is not None
    assert torch.equal(health.histogram, torch.bincount(torch.cat(found).flatten(), minlength=LEVELS))
    measure_decoders(brightness_baseline("ae"), None, split, on_codes=lambda codes: pytest.fail("it has none"))


def test_labels_that_do_not_fit_are_refused_before_anything_is_encoded(
    tmp_path: Path, grey_folder: Path, encoded: list[int]
) -> None:
    own = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder).fingerprint
    save_prior(tmp_path / "prior", tiny_prior(num_classes=2), own, ["disc", "line"])
    for run in (evaluate, rate.measure_rate):
        with pytest.raises(InputError, match="got the class été"):
            run(tmp_path / "tokenizer", tmp_path / "prior", device="cpu")
    assert encoded == []


# What is refused


def test_a_prior_of_another_tokenizer(tmp_path: Path, grey_folder: Path) -> None:
    own = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder).fingerprint
    save_prior(tmp_path / "prior", tiny_prior(), "e" * 64)
    with pytest.raises(InputError) as error:
        evaluate(tmp_path / "tokenizer", tmp_path / "prior", device="cpu")
    assert own in str(error.value)
    assert "e" * 64 in str(error.value)


def test_classes_that_the_prior_does_not_know(tmp_path: Path, grey_folder: Path, noise: Path) -> None:
    own = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder).fingerprint
    save_prior(tmp_path / "prior", tiny_prior(num_classes=2), own, ["disc", "line"])
    with pytest.raises(InputError, match="got the class été; use images with those classes, or omit --prior"):
        evaluate(tmp_path / "tokenizer", tmp_path / "prior", device="cpu")
    with pytest.raises(InputError, match="got images without labels"):
        evaluate(tmp_path / "tokenizer", tmp_path / "prior", data=str(noise), device="cpu")


def test_an_empty_test_split(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "one" / "1.png")
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), tmp_path / "one")
    with pytest.raises(InputError, match=r"expected images in the test split of .*, got none; use the other --split"):
        evaluate(tmp_path / "tokenizer", device="cpu")
    assert evaluate(tmp_path / "tokenizer", split="train", device="cpu")["images"] == 1


def test_other_images_than_the_tokenizers_own(tmp_path: Path, grey_folder: Path, noise: Path) -> None:
    model = brightness_tokenizer()
    save_tokenizer(tmp_path / "tokenizer", model, grey_folder)
    numbers = evaluate(tmp_path / "tokenizer", data=str(noise), split="train", device="cpu")
    assert numbers["data"] == str(noise)
    assert numbers["mse"] == pytest.approx(measure_reconstruction(model, open_images(str(noise)).train)[0].mse)
    assert numbers["mse"] > 0.01  # its own are reconstructed perfectly


def test_the_recorded_images_have_moved(tmp_path: Path, grey_folder: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder)
    info = read_info(tmp_path / "tokenizer", "tokenizer")
    gone = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "tokenizer", replace(info, training={"data": gone}), brightness_tokenizer().state_dict())
    with pytest.raises(InputError, match=f"got '{gone}', which is neither"):
        evaluate(tmp_path / "tokenizer", device="cpu")
