"""Two decoders in numbers: which one each number is of, against the pixels by hand."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.errors import InputError
from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.quality_table import how_decoded, quality_table
from pipeline.evaluation.reconstruction import measure_decoders
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import read_info
from pipeline.models.loading import load_trained_tokenizer

from ..conftest import CLASS_NAMES, Codegrid, Trained
from ..decoders import LIFT, add_sharp_decoder, save_decoder, wide_decoder, with_random_decoder
from ..support import brightness_baseline, brightness_tokenizer, save_prior, save_tokenizer, tiny_prior
from .judged_sets import quick_judges
from .test_sample_quality import N, Run, made

VARIANCE = 0.05


@pytest.fixture
def folder(tmp_path: Path, grey_folder: Path) -> Path:
    """A tokenizer whose plain decoder draws its images perfectly, and whose sharp one lifts them."""
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(data_variance=VARIANCE), grey_folder, CLASS_NAMES)
    add_sharp_decoder(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def error_of_lifting(images: Path, split: str = "test") -> float:
    """The oracle: the mean squared error of images of levels that are LIFT grey values brighter."""
    names = getattr(open_images(str(images)), split).names
    pixels = np.stack([np.asarray(Image.open(images / name)) for name in names]).astype(float)
    return float((((pixels + LIFT).clip(max=255) - pixels) ** 2).mean() / 255**2)


def expected_numbers(mse: float) -> dict[str, float]:
    return {
        "mse": pytest.approx(mse, rel=1e-5),
        "psnr": pytest.approx(-10 * math.log10(mse), rel=1e-5),
        "nmse": pytest.approx(mse / VARIANCE, rel=1e-5),
    }


def test_auto_measures_the_plain_decoder_with_the_sharp_one_beside_it(folder: Path, grey_folder: Path) -> None:
    numbers = evaluate(folder, device="cpu").to_json()
    assert numbers["decoder"] == "plain"
    assert numbers["mse"] < 1e-10
    assert numbers["sharp_decoder"] == expected_numbers(error_of_lifting(grey_folder))
    plain = evaluate(folder, device="cpu", decoder="plain").to_json()
    assert plain == {name: value for name, value in numbers.items() if name != "sharp_decoder"}


def test_sharp_measures_that_one_alone(folder: Path, grey_folder: Path) -> None:
    numbers = evaluate(folder, device="cpu", decoder="sharp", split="train").to_json()
    assert numbers["decoder"] == "sharp"
    assert {name: numbers[name] for name in ("mse", "psnr", "nmse")} == expected_numbers(
        error_of_lifting(grey_folder, "train")
    )
    assert "sharp_decoder" not in numbers


@pytest.mark.parametrize(("choice", "decodings"), [("auto", 2), ("plain", 1), ("sharp", 1)])
def test_each_image_is_encoded_once_and_decoded_once_by_each(folder: Path, choice: Any, decodings: int) -> None:
    calls = {"encoder": 0, "decoder": 0}

    def count(module: nn.Module, given: Any, result: Any) -> None:
        name = type(module).__name__.lower()
        if name in calls:
            calls[name] += 1

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        evaluate(folder, device="cpu", decoder=choice)
    finally:
        hook.remove()
    assert calls == {"encoder": 1, "decoder": decodings}


def test_the_second_decoder_changes_no_number_of_the_first(trained: Trained, tmp_path: Path) -> None:
    """Of colour images and a trained tokenizer, and a prior; to the last bit."""
    with_random_decoder(trained.tokenizer, tmp_path / "both")
    before = evaluate(trained.tokenizer, trained.prior, device="cpu", split="train").to_json()
    after = evaluate(tmp_path / "both", trained.prior, device="cpu", split="train").to_json()
    sharp = evaluate(tmp_path / "both", device="cpu", split="train", decoder="sharp").to_json()
    assert after.pop("sharp_decoder") == {name: sharp[name] for name in ("mse", "psnr", "nmse")}
    assert after == before
    assert sharp["mse"] > before["mse"]


def test_on_errors_hears_of_the_first_decoder(folder: Path, grey_folder: Path) -> None:
    split, trained, found = open_images(str(grey_folder)).train, load_trained_tokenizer(folder, "cpu"), []
    plain = trained.with_plain_decoder()
    measure_decoders(plain.model, trained.model, split, on_errors=found.append)
    assert float(torch.cat(found).max()) < 1e-8
    found.clear()
    measured = measure_decoders(trained.model, plain.model, split, on_errors=found.append)
    assert torch.cat(found).shape == (len(split),)
    assert float(torch.cat(found).min()) > 0.01
    assert measured.other is not None
    assert measured.numbers.mse > 1000 * measured.other.mse


def test_a_baseline_is_measured_as_before(tmp_path: Path, grey_folder: Path) -> None:
    info = save_tokenizer(tmp_path / "baseline", brightness_baseline("ae"), grey_folder)
    save_decoder(tmp_path / "baseline" / "decoder", wide_decoder(), info)
    numbers = evaluate(tmp_path / "baseline", device="cpu").to_json()
    assert numbers["decoder"] == "plain"
    assert "sharp_decoder" not in numbers
    with pytest.raises(InputError, match="got one with --bottleneck ae"):
        evaluate(tmp_path / "baseline", device="cpu", decoder="sharp")


def test_a_decoder_whose_error_is_not_finite_is_named(folder: Path) -> None:
    decoder = wide_decoder()
    with torch.no_grad():
        decoder.layers[0].weight.fill_(3e38)  # finite weights, and pixels that are not
        decoder.layers[0].weight[0].fill_(-3e38)
    save_decoder(folder / "decoder", decoder, read_info(folder, "tokenizer"))
    with pytest.raises(InputError, match=rf"finite numbers of the model in {folder / 'decoder'}, got mse = nan"):
        evaluate(folder, device="cpu")
    evaluate(folder, device="cpu", decoder="plain")


def test_the_command_says_whose_numbers_they_are(
    folder: Path, grey_folder: Path, codegrid: Codegrid, tmp_path: Path
) -> None:
    lines, pictures = {}, {}
    for choice in ("auto", "plain", "sharp"):
        path = tmp_path / f"{choice}.json"
        more = ["--json", path, "--picture", tmp_path / f"{choice}.png", "--decoder", choice]
        outcome = codegrid("evaluate", "--tokenizer", folder, "--device", "cpu", *more)
        assert (outcome.status, outcome.error_lines) == (0, [])
        lines[choice] = [line.strip() for line in outcome.out.splitlines()]
        pictures[choice] = np.asarray(Image.open(tmp_path / f"{choice}.png"))
        assert json.loads(path.read_text()) == evaluate(folder, device="cpu", decoder=choice).to_json()
    mse = error_of_lifting(grey_folder)
    beside = f"sharp_decoder  mse {mse:.6g}, psnr {-10 * math.log10(mse):.6g}, nmse {mse / VARIANCE:.6g}"
    assert [line for line in lines["auto"] if line.startswith("sharp")] == [beside]
    assert ["decoder  plain" in lines[choice] for choice in ("auto", "plain", "sharp")] == [True, True, False]
    assert "decoder  sharp" in lines["sharp"]
    # Below the title the picture is of the decoder whose numbers they are.
    assert pictures["auto"].shape == pictures["plain"].shape
    assert np.array_equal(pictures["auto"][60:], pictures["plain"][60:])
    assert not np.array_equal(pictures["auto"][:60], pictures["plain"][:60])
    assert pictures["sharp"].shape != pictures["auto"].shape or not np.array_equal(
        pictures["sharp"][60:], pictures["auto"][60:]
    )


# Samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with quick_judges(600):
        found = made(tmp_path_factory.mktemp("sharp"))
        add_sharp_decoder(found.tokenizer)
        yield found


@pytest.mark.parametrize(("choice", "word"), [("auto", "sharp"), ("sharp", "sharp"), ("plain", "plain")])
def test_the_pictures_that_are_judged_are_of_the_chosen_decoder(run: Run, choice: Any, word: str) -> None:
    """Reconstructions and samples, with the error of exactly these reconstructions."""
    found = evaluate(run.tokenizer, run.prior, device="cpu", quality=QualityOptions(samples=N), decoder=choice)
    assert found.decoder == ("sharp" if choice == "sharp" else "plain")
    pipeline = ImagePipeline.from_pretrained(run.tokenizer, run.prior, "cpu", decoder=word)  # type: ignore[arg-type]
    expected = SampleQuality(pipeline, run.open(), QualityOptions(samples=N), "cpu").measure()
    assert found.quality == expected
    assert found.quality is not None
    assert found.quality.decoder == found.quality.to_json()["decoder"] == word
    images = run.open()
    rows = Comparison.of(images, N, seed=0).test_rows
    test = images.test.images[rows].astype(int)
    plain = ImagePipeline.from_pretrained(run.tokenizer, run.prior, "cpu", decoder="plain")
    drawn = plain.reconstruct(torch.from_numpy(images.test.images[rows])).numpy().astype(int)
    drawn = (drawn + LIFT).clip(max=255) if word == "sharp" else drawn
    mse = float(((drawn - test) ** 2).mean()) / 255**2
    assert found.quality.reconstructions.nmse == pytest.approx(mse, rel=1e-9)  # the variance of this tokenizer is 1
    assert found.quality.reconstructions.psnr == pytest.approx(-10 * math.log10(mse), rel=1e-9)
    for column in (found.quality.test, found.quality.samples):
        assert (column.nmse, column.psnr) == (None, None)


def test_the_two_decoders_draw_the_same_samples_brighter(run: Run) -> None:
    images = {
        word: SampleQuality(
            ImagePipeline.from_pretrained(run.tokenizer, run.prior, "cpu", decoder=word),  # type: ignore[arg-type]
            run.open(),
            QualityOptions(samples=N),
            "cpu",
        )
        .samples()
        .images.long()
        for word in ("plain", "sharp")
    }
    assert torch.equal((images["plain"] + LIFT).clamp(max=255), images["sharp"])


def test_the_table_has_the_error_in_the_column_of_the_reconstructions(run: Run) -> None:
    found = evaluate(run.tokenizer, run.prior, device="cpu", quality=QualityOptions(samples=N))
    metrics = found.quality
    assert metrics is not None
    lines = quality_table(metrics)
    rows = {line.split()[0]: line for line in lines if line.split()[0] in ("nmse", "psnr")}
    heads = lines[1]
    for name, row in rows.items():
        value = getattr(metrics.reconstructions, name)
        end = heads.index("reconstructions") + len("reconstructions")
        assert row[:end].split() == [name, f"{value:.4g}"]
        assert row[: heads.index("test images") + len("test images")].split() == [name]
    assert rows["nmse"].endswith("squared error / variance of training pixels")
    assert rows["psnr"].endswith("dB, of that error")
    assert lines.count(how_decoded(metrics)) == 1
    assert how_decoded(metrics).startswith(
        "the reconstructions and the samples are by the sharp decoder, which invents"
    )
    assert how_decoded(replace(metrics, decoder="plain")).endswith("are by the plain decoder")


def test_the_old_prior_has_the_same_likelihood(tmp_path: Path, grey_folder: Path) -> None:
    info = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder, CLASS_NAMES)
    save_prior(tmp_path / "prior", tiny_prior(num_classes=3), info.fingerprint, CLASS_NAMES)
    before = evaluate(tmp_path / "tokenizer", tmp_path / "prior", device="cpu").likelihood
    add_sharp_decoder(tmp_path / "tokenizer")
    for choice in ("auto", "sharp"):
        assert evaluate(tmp_path / "tokenizer", tmp_path / "prior", device="cpu", decoder=choice).likelihood == before  # type: ignore[arg-type]
