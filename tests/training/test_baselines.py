"""Stage one without codes: trained, resumed, evaluated and shown as any other; refused wherever codes are needed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.models.checkpoint import load_training, read_info
from pipeline.models.loading import load_tokenizer, load_trained_autoencoder
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_tokenizer import train_tokenizer
from tokenizer import Baseline

from ..conftest import Codegrid, Trained
from ..support import HEIGHT, WIDTH, digest_of, load_weights
from .training_runs import lines_of

BOTTLENECKS = ["vae", "ae"]
SMALL = ["--code-dim", 4, "--batch-size", 4, "--precision", "fp32", "--device", "cpu"]

parametrize_bottlenecks = pytest.mark.parametrize("bottleneck", BOTTLENECKS)


@pytest.fixture(scope="module", params=BOTTLENECKS)
def baseline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A run of two steps, in a folder named like its bottleneck."""
    out = tmp_path_factory.mktemp("baselines") / str(request.param)
    overrides: dict[str, Any] = {"data": str(image_folder), "bottleneck": request.param, "steps": 2}
    overrides |= {"kl_weight": 0.25} if request.param == "vae" else {}
    overrides |= {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "code_dim": 4}
    train_tokenizer(RunFolder(out=out, device="cpu"), {**overrides, "precision": "fp32"})
    return out


def without_logs(folder: Path) -> dict[str, str]:
    """Return the digests of the files of a run, without the log and without the save before the last."""
    digests = digest_of(folder).items()
    return {name: digest for name, digest in digests if not name.endswith(".jsonl") and "previous" not in name}


# Trained and resumed


@pytest.mark.parametrize(
    ("bottleneck", "latents"), [("vae", "Gaussians of 4 dimensions"), ("ae", "vectors of 4 dimensions")]
)
def test_training_says_what_an_image_becomes_and_promises_no_prior(
    tmp_path: Path, image_folder: Path, bottleneck: str, latents: str, codegrid: Codegrid
) -> None:
    out = tmp_path / "run"
    command = ["train-tokenizer", "--data", image_folder, "--out", out, "--bottleneck", bottleneck, *SMALL]
    outcome = codegrid(*command, "--steps", 2)
    assert outcome.status == 0
    assert f"becomes 2x3 {latents} (a baseline: no codes, no prior)" in outcome.out
    assert re.search(r"done: 2 steps; mse \d\S*, psnr \d\S*, nmse \d\S*$", outcome.out, re.MULTILINE)
    assert "train-prior" not in outcome.out + outcome.err
    assert {frozenset(line) & {"mse", "psnr", "nmse"} for line in lines_of(out, "held_out")} == {
        frozenset({"mse", "psnr", "nmse"})
    }
    assert [line["kl"] > 0 for line in lines_of(out, "train")] == [bottleneck == "vae"] * 2
    assert {path.name for path in (out / "pictures").iterdir()} == {"step-0000001.png", "step-0000002.png"}


def test_the_kl_weight_is_recorded_and_acts(tmp_path: Path, image_folder: Path, codegrid: Codegrid) -> None:
    command = ["train-tokenizer", "--data", image_folder, "--bottleneck", "vae", *SMALL, "--steps", 1]
    for name, option, expected in (("chosen", ["--kl-weight", 7.5], 7.5), ("default", [], 0.1)):
        assert codegrid(*command, *option, "--out", tmp_path / name).status == 0
        content = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert content["config"]["kl_weight"] == content["training"]["kl_weight"] == expected
        assert content["config"]["bottleneck"] == content["training"]["bottleneck"] == "vae"
        (line,) = lines_of(tmp_path / name, "train")
        penalty = expected * line["kl"] / (3 * HEIGHT * WIDTH)
        assert line["loss"] - line["reconstruction"] == pytest.approx(penalty, rel=1e-3)


@parametrize_bottlenecks
def test_four_steps_of_a_baseline_are_two_and_two_more(
    tmp_path: Path, image_folder: Path, bottleneck: str, codegrid: Codegrid
) -> None:
    """Every file but the log, which holds times; a seed of the process in between changes nothing."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    command = ["train-tokenizer", "--data", image_folder, "--bottleneck", bottleneck, *SMALL]
    assert codegrid(*command, "--out", uninterrupted, "--steps", 4).status == 0
    assert codegrid(*command, "--out", resumed, "--steps", 2).status == 0
    same = without_logs(resumed) == without_logs(uninterrupted)
    assert not same
    torch.manual_seed(99)
    assert codegrid("train-tokenizer", "--out", resumed, "--steps", 4, "--resume").status == 0
    assert without_logs(resumed) == without_logs(uninterrupted)
    for split in ("train", "held_out"):
        one, other = (
            [{**line, "seconds": 0} for line in lines_of(folder, split)] for folder in (uninterrupted, resumed)
        )
        assert one == other


@pytest.mark.parametrize("other", ["vq", "vae", "ae"])
def test_a_baseline_resumes_with_its_own_bottleneck_or_not_at_all(
    tmp_path: Path, baseline: Path, other: str, codegrid: Codegrid
) -> None:
    run = tmp_path / "run"
    shutil.copytree(baseline, run)
    before = digest_of(run)
    outcome = codegrid("train-tokenizer", "--out", run, "--resume", "--steps", 3, "--bottleneck", other)
    if other == baseline.name:
        assert outcome.status == 0
        assert load_training(run).values["step"] == 3
        return
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    message = f"Error: expected --resume with bottleneck {baseline.name}, as the run was started, got {other}; omit "
    assert outcome.error_lines[0].startswith(message)
    assert digest_of(run) == before


def test_a_run_does_not_resume_with_another_kl_weight(baseline: Path, codegrid: Codegrid) -> None:
    before, weight = digest_of(baseline), {"vae": 0.25, "ae": 0.1}[baseline.name]
    outcome = codegrid("train-tokenizer", "--out", baseline, "--resume", "--steps", 3, "--kl-weight", 0.5)
    assert outcome.status == 1
    assert f"expected --resume with kl-weight {weight}, as the run was started, got 0.5" in outcome.error_lines[0]
    assert digest_of(baseline) == before


# An option that could do nothing is refused


@pytest.mark.parametrize(
    ("bottleneck", "option", "value", "user"),
    [
        ("vq", "--kl-weight", 0.5, "vae"),
        ("vq", "--kl-weight", 0.1, "vae"),  # the default, which does nothing either
        ("ae", "--kl-weight", 0.5, "vae"),
        *((other, "--likelihood", name, "vae") for other in ("vq", "ae") for name in ("gaussian", "bernoulli")),
        *((bottleneck, "--num-codes", 16, "vq") for bottleneck in BOTTLENECKS),
        *(
            (bottleneck, "--codebook-update", update, "vq")
            for bottleneck in BOTTLENECKS
            for update in ("ema", "gradient")
        ),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_option_of_another_bottleneck_is_refused_and_nothing_written(
    tmp_path: Path,
    image_folder: Path,
    bottleneck: str,
    option: str,
    value: object,
    user: str,
    existing: bool,
    codegrid: Codegrid,
) -> None:
    """Into a new folder, and with --force over what another run logged."""
    out = tmp_path / "run"
    command = ["train-tokenizer", "--data", image_folder, "--out", out, "--steps", 1, option, value]
    if existing:
        out.mkdir()
        (out / "metrics.jsonl").write_text("mine")
        command.append("--force")
    outcome = codegrid(*command, *(["--bottleneck", bottleneck] if bottleneck != "vq" else []))
    assert outcome.status == 1
    assert outcome.error_lines == [
        f"Error: expected {option} with --bottleneck {user} only, got --bottleneck {bottleneck}; omit {option}"
    ]
    assert digest_of(tmp_path).keys() == ({"run/metrics.jsonl"} if existing else set())
    assert out.exists() == existing
    assert not existing or (out / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize("weight", ["inf", "-inf", "nan"])
def test_a_kl_weight_that_is_no_number_is_refused_and_nothing_written(
    tmp_path: Path, image_folder: Path, weight: str, codegrid: Codegrid
) -> None:
    command = ["train-tokenizer", "--data", image_folder, "--bottleneck", "vae", "--steps", 1]
    outcome = codegrid(*command, "--kl-weight", weight, "--out", tmp_path / "run")
    assert outcome.status == 2
    (line,) = outcome.error_lines
    assert re.match(rf"Error: .*kl.weight.*\b{weight.removeprefix('-')}\b", line)
    assert list(tmp_path.iterdir()) == []


# Loaded, evaluated, reconstructed


def test_what_was_trained_is_loaded(baseline: Path) -> None:
    model = load_trained_autoencoder(baseline, "cpu").model
    assert isinstance(model, Baseline)
    assert model.config.bottleneck == baseline.name
    assert not model.training
    weights = load_weights(baseline)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_evaluate_prints_and_writes_the_error_and_nothing_about_codes(
    tmp_path: Path, baseline: Path, codegrid: Codegrid
) -> None:
    outcome = codegrid("evaluate", "--tokenizer", baseline, "--json", tmp_path / "numbers.json")
    assert (outcome.status, outcome.error_lines) == (0, [])
    numbers = json.loads((tmp_path / "numbers.json").read_text("utf-8"))
    assert set(numbers) == {"data", "split", "images", "decoder", "mse", "psnr", "nmse"}
    assert {line.split()[0] for line in outcome.out.splitlines()} == set(numbers)
    assert numbers["nmse"] == pytest.approx(numbers["mse"] / read_info(baseline, "tokenizer").config["data_variance"])


def test_the_recorded_score_is_that_of_the_weights(baseline: Path) -> None:
    """The last evaluation in training and one of the checkpoint give the same numbers, though a VAE samples."""
    last = lines_of(baseline, "held_out")[-1]
    metrics = read_info(baseline, "tokenizer").metrics
    assert {name: last[name] for name in ("mse", "psnr", "nmse")} == {
        name: value for name, value in metrics.items() if name != "step"
    }


def test_reconstruct_writes_a_picture(tmp_path: Path, baseline: Path, codegrid: Codegrid) -> None:
    for name in ("first", "second"):
        picture = tmp_path / "new" / f"{name}.png"
        command = ["reconstruct", "--tokenizer", baseline, "--split", "train", "--out", picture]
        assert codegrid(*command).status == 0
        with Image.open(picture) as image:
            assert image.mode == "RGB"
            assert image.size[1] > 2 * HEIGHT
            assert len(np.unique(np.asarray(image))) > 20
    assert (tmp_path / "new" / "first.png").read_bytes() == picture.read_bytes()  # the mean, not a sample


# Refused where codes are needed

NEED_CODES = {
    "export-codes": "export-codes --tokenizer {baseline} --out {new}",
    "train-prior": "train-prior --tokenizer {baseline} --out {new}",
    "train-prior with codes": "train-prior --codes {codes} --tokenizer {baseline} --out {new}",
    "train-prior, resumed": "train-prior --tokenizer {baseline} --out {existing} --resume",
    "train-prior over another": "train-prior --tokenizer {baseline} --out {existing} --force",
    "export-codes over another": "export-codes --tokenizer {baseline} --out {existing}/codes --force",
    "sample": "sample --tokenizer {baseline} --prior {prior} --out {new}",
    "sample without a prior": "sample --tokenizer {baseline} --prior {nosuch} --out {new}",
    "evaluate": "evaluate --tokenizer {baseline} --prior {prior}",
    "evaluate into a file": "evaluate --tokenizer {baseline} --prior {prior} --json {new}",
}


@pytest.mark.parametrize("case", NEED_CODES)
def test_what_needs_codes_is_refused_in_one_line_and_writes_nothing(
    tmp_path: Path, baseline: Path, trained: Trained, case: str, codegrid: Codegrid
) -> None:
    new, existing = tmp_path / "new", tmp_path / "existing"
    shutil.copytree(trained.prior, existing)
    shutil.copytree(trained.codes, existing / "codes")
    names = {**vars(trained), "baseline": baseline, "new": new, "existing": existing, "nosuch": tmp_path / "nosuch"}
    before = digest_of(baseline), digest_of(existing)
    outcome = codegrid(*(word.format(**names) for word in NEED_CODES[case].split()))
    assert outcome.status == 1
    assert outcome.error_lines == [
        f"Error: expected a tokenizer with codes in {baseline}, got one with --bottleneck {baseline.name}, "
        "which has none; name one that was trained with --bottleneck vq"
    ]
    assert "Traceback" not in outcome.err
    assert not new.exists()
    assert (digest_of(baseline), digest_of(existing)) == before


def test_a_baseline_in_the_default_place_makes_no_codes_and_hinders_none(
    tmp_path: Path, baseline: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(baseline, tmp_path / "checkpoints" / "tokenizer")
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1, "--steps", 1]
    outcome = codegrid(*command)
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert "which has none" in outcome.out
    assert "training continues without pictures" in outcome.out
    outcome = codegrid("train-prior", "--out", "another")
    assert outcome.status == 1
    assert f"got one with --bottleneck {baseline.name}" in outcome.error_lines[0]
    assert not Path("another").exists()


def test_python_raises_the_same_error(baseline: Path, trained: Trained) -> None:
    for load in (load_tokenizer, lambda folder: ImagePipeline.from_pretrained(folder, trained.prior, device="cpu")):
        with pytest.raises(InputError, match=f"expected a tokenizer with codes .* --bottleneck {baseline.name}"):
            load(baseline)
