"""`train-tokenizer --bottleneck vae --likelihood`: recorded, resumed, loaded and evaluated; and runs from before it."""

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
from pipeline.models.checkpoint import read_info
from pipeline.models.loading import load_trained_autoencoder
from pipeline.training.recipes import TokenizerSettings
from pipeline.training.run_folder import RunFolder
from pipeline.training.settings import resolve
from pipeline.training.train_tokenizer import train_tokenizer
from tokenizer import Baseline, TokenizerConfig

from ..conftest import Codegrid
from ..models.forgery import DELETED, change, config_of
from ..support import HEIGHT, WIDTH, digest_of, load_weights
from .training_runs import lines_of

VALUES = 3 * HEIGHT * WIDTH  # of an image of `image_folder`
SMALL: dict[str, Any] = {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "code_dim": 4}
LIKELIHOODS = ["gaussian", "bernoulli"]


def train(out: Path, images: Path, likelihood: str | None, *, steps: int = 2, resume: bool = False) -> Path:
    overrides = {"data": str(images), "bottleneck": "vae", "likelihood": likelihood, "precision": "fp32", **SMALL}
    train_tokenizer(RunFolder(out=out, device="cpu", resume=resume), {**overrides, "steps": steps})
    return out


@pytest.fixture(scope="module")
def bernoulli(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    return train(tmp_path_factory.mktemp("likelihood") / "bernoulli", image_folder, "bernoulli")


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    return train(tmp_path_factory.mktemp("likelihood") / "gaussian", image_folder, None)


def before_likelihoods(run: Path, to: Path) -> Path:
    """Return a copy of a run as it was written before there was a choice."""
    shutil.copytree(run, to)
    for folder in (to, *to.glob("previous")):
        change(folder, config__likelihood=DELETED, training__likelihood=DELETED)
    return to


# The command


@pytest.mark.parametrize(
    ("options", "likelihood", "weight"),
    [
        ([], "gaussian", 0.1),
        (["--likelihood", "gaussian"], "gaussian", 0.1),
        (["--likelihood", "bernoulli"], "bernoulli", 1.0),
        (["--likelihood", "bernoulli", "--kl-weight", 0.1], "bernoulli", 0.1),
        (["--kl-weight", 1], "gaussian", 1.0),
    ],
)
def test_the_likelihood_and_its_kl_weight_are_recorded_and_act(
    tmp_path: Path, image_folder: Path, options: list[Any], likelihood: str, weight: float, codegrid: Codegrid
) -> None:
    """The loss is per value of an image; the terms of a Bernoulli's are per image."""
    command = ["train-tokenizer", "--data", image_folder, "--bottleneck", "vae", "--code-dim", 4, "--batch-size", 4]
    outcome = codegrid(*command, "--steps", 1, "--precision", "fp32", "--out", tmp_path / "run", *options)
    assert outcome.status == 0
    content = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    for part in ("config", "training"):
        assert (content[part]["likelihood"], content[part]["kl_weight"]) == (likelihood, weight)
    (line,) = lines_of(tmp_path / "run", "train")
    nats = likelihood == "bernoulli"
    reconstruction = line["reconstruction"] / (VALUES if nats else 1)
    assert line["loss"] == pytest.approx(reconstruction + weight * line["kl"] / VALUES, rel=1e-5)
    assert ("reconstruction and kl are nats per image" in outcome.out) == nats
    if nats:  # a decoder that knows nothing takes one bit, 0.69 nats, for each value
        assert 0.5 < line["reconstruction"] / VALUES < 1


def test_the_help_says_which_kl_weight_is_the_default_of_which_likelihood(codegrid: Codegrid) -> None:
    text = " ".join(codegrid("train-tokenizer", "--help").out.split())
    assert "--likelihood [gaussian|bernoulli]" in text
    assert "[default: 0.1, with --likelihood bernoulli 1]" in text


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_settings_and_config_have_the_same_kl_weight_by_default(likelihood: Any) -> None:
    config = TokenizerConfig(bottleneck="vae", likelihood=likelihood)
    assert TokenizerSettings(bottleneck="vae", likelihood=likelihood).kl_weight == config.kl_weight


def test_four_steps_are_two_and_two_more(tmp_path: Path, image_folder: Path, bernoulli: Path) -> None:
    resumed = Path(shutil.copytree(bernoulli, tmp_path / "resumed"))
    torch.manual_seed(99)
    train(resumed, image_folder, "bernoulli", steps=4, resume=True)
    uninterrupted = train(tmp_path / "uninterrupted", image_folder, "bernoulli", steps=4)
    for name in ("config.json", "model.safetensors", "training.safetensors"):
        assert (resumed / name).read_bytes() == (uninterrupted / name).read_bytes()


# Loaded, evaluated, reconstructed


def test_what_was_trained_decodes_by_the_sigmoid(bernoulli: Path) -> None:
    model = load_trained_autoencoder(bernoulli, "cpu").model
    assert isinstance(model, Baseline)
    latents = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.decode(latents), model.decoder(latents).sigmoid())


def test_evaluate_and_reconstruct_work_as_for_the_others(tmp_path: Path, bernoulli: Path, codegrid: Codegrid) -> None:
    outcome = codegrid("evaluate", "--tokenizer", bernoulli, "--json", tmp_path / "numbers.json")
    assert (outcome.status, outcome.error_lines) == (0, [])
    numbers = json.loads((tmp_path / "numbers.json").read_text("utf-8"))
    assert set(numbers) == {"data", "split", "images", "decoder", "mse", "psnr", "nmse"}
    assert numbers["nmse"] == pytest.approx(numbers["mse"] / read_info(bernoulli, "tokenizer").config["data_variance"])
    command = ["reconstruct", "--tokenizer", bernoulli, "--split", "train", "--out", tmp_path / "picture.png"]
    assert codegrid(*command).status == 0
    with Image.open(tmp_path / "picture.png") as image:
        assert len(np.unique(np.asarray(image))) > 20


# Runs from before there was a choice


def test_a_checkpoint_without_a_likelihood_is_gaussian(tmp_path: Path, gaussian: Path) -> None:
    old = before_likelihoods(gaussian, tmp_path / "old")
    assert "likelihood" not in config_of(old)["config"]
    model, now = (load_trained_autoencoder(folder, "cpu").model for folder in (old, gaussian))
    assert (model.config.likelihood, model.config.kl_weight) == ("gaussian", 0.1)
    assert model.config == now.config
    change(old, config__kl_weight=DELETED)  # of a version before that
    assert load_trained_autoencoder(old, "cpu").model.config == now.config


@pytest.mark.parametrize("likelihood", [None, "gaussian"])
def test_a_run_from_before_resumes_as_if_it_were_of_today(
    tmp_path: Path, image_folder: Path, gaussian: Path, likelihood: str | None
) -> None:
    old = before_likelihoods(gaussian, tmp_path / "old")
    train(old, image_folder, likelihood, steps=4, resume=True)
    uninterrupted = train(tmp_path / "uninterrupted", image_folder, None, steps=4)
    for name in ("config.json", "model.safetensors", "training.safetensors"):
        assert (old / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize("old", [False, True])
def test_a_gaussian_run_does_not_resume_as_a_bernoulli(
    tmp_path: Path, gaussian: Path, codegrid: Codegrid, old: bool
) -> None:
    run = tmp_path / "run"
    _ = before_likelihoods(gaussian, run) if old else shutil.copytree(gaussian, run)
    before = digest_of(run)
    outcome = codegrid("train-tokenizer", "--out", run, "--resume", "--steps", 3, "--likelihood", "bernoulli")
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert "expected --resume with likelihood gaussian, as the run was started, got bernoulli; omit" in line
    assert digest_of(run) == before


def test_recorded_settings_keep_the_kl_weight_that_they_name() -> None:
    old = resolve(TokenizerSettings, {}, {"bottleneck": "vae", "kl_weight": 0.1})
    assert (old.likelihood, old.kl_weight) == ("gaussian", 0.1)
    new = resolve(TokenizerSettings, {}, {"bottleneck": "vae", "likelihood": "bernoulli", "kl_weight": 0.1})
    assert (new.likelihood, new.kl_weight) == ("bernoulli", 0.1)


# A stranger's config.json


@pytest.mark.parametrize("value", [None, 3, "other", "", ["gaussian"], {}, True])
def test_rubbish_in_the_place_of_a_likelihood_is_refused(tmp_path: Path, bernoulli: Path, value: Any) -> None:
    for part in ("config", "training"):
        folder = Path(shutil.copytree(bernoulli, tmp_path / part))
        change(folder, **{f"{part}__likelihood": value})
        with pytest.raises((InputError, ValueError), match="likelihood") as error:
            train_tokenizer(RunFolder(out=folder, device="cpu", resume=True), {"steps": 4})
        assert "\n" not in str(error.value)
        if part == "config":
            with pytest.raises(InputError, match=re.escape(str(folder))):
                load_trained_autoencoder(folder, "cpu")


def test_a_null_kl_weight_is_refused(tmp_path: Path, bernoulli: Path) -> None:
    """The default of the dataclass is for Python alone: a file has a number."""
    folder = Path(shutil.copytree(bernoulli, tmp_path / "run"))
    change(folder, config__kl_weight=None)
    with pytest.raises(InputError, match="kl_weight"):
        load_trained_autoencoder(folder, "cpu")


def test_codes_or_a_plain_autoencoder_with_a_bernoulli_are_refused(tmp_path: Path, bernoulli: Path) -> None:
    for bottleneck in ("vq", "ae"):
        folder = Path(shutil.copytree(bernoulli, tmp_path / bottleneck))
        change(folder, config__bottleneck=bottleneck)
        with pytest.raises(InputError, match="likelihood"):
            load_trained_autoencoder(folder, "cpu")


def test_the_weights_of_a_bernoulli_are_of_the_same_names_and_shapes(gaussian: Path, bernoulli: Path) -> None:
    one, other = ({name: t.shape for name, t in load_weights(folder).items()} for folder in (gaussian, bernoulli))
    assert one == other
