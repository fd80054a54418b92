"""`train-prior --label-dropout`: its default, what it refuses, and that labels are hidden in training alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.codes.export import export_codes
from pipeline.errors import InputError
from pipeline.models.checkpoint import load_training, read_info
from pipeline.models.loading import load_prior
from pipeline.training.prior_stage import PriorStage
from pipeline.training.recipes import LABEL_DROPOUT, PriorSettings
from pipeline.training.train_prior import config_for
from prior import GatedPixelCNN
from prior.uniforms import draw_uniforms

from ..conftest import Codegrid, Trained
from ..support import LEVELS, brightness_tokenizer, digest_of, fill_with_cells, save_tokenizer, tiny_prior
from .training_runs import evaluations_of, losses_of

SMALL = ["--channels", 2, "--num-layers", 1, "--steps", 1]


class Grids:
    """40 grids of 3x5 random codes with labels of 3 classes."""

    codes = torch.randint(LEVELS, (40, 3, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.codes[indices], self.labels[indices]

    def names(self) -> list[str]:
        return [str(i) for i in range(40)]


def stage_of(model: GatedPixelCNN) -> PriorStage:
    return PriorStage(model, Grids(), np.arange(40) % 4 == 0)


# In training


def test_the_loss_is_that_of_the_labels_that_are_left() -> None:
    """Dropped by the keys of the items: about half of 30, some of each class."""
    model, rows = tiny_prior(num_classes=3, label_dropout=0.5), np.arange(40)[np.arange(40) % 4 != 0]
    hidden = draw_uniforms(range(30), 1)[:, 0] < 0.5
    found = losses_of(stage_of(model), np.arange(30))["loss"]
    codes, labels = Grids().batch(rows)
    assert 8 < int(hidden.sum()) < 22
    left = torch.where(hidden, -1, labels)
    torch.testing.assert_close(found, F.cross_entropy(model(codes, left), codes))
    assert abs(float((found - F.cross_entropy(model(codes, labels), codes)).detach())) > 1e-3


def test_a_prior_without_label_dropout_hides_none_and_takes_no_random_number() -> None:
    model, rows = tiny_prior(num_classes=3), np.arange(40)[np.arange(40) % 4 != 0]
    state, (codes, labels) = torch.get_rng_state(), Grids().batch(rows)
    expected = F.cross_entropy(model(codes, labels), codes)
    torch.testing.assert_close(losses_of(stage_of(model), np.arange(30))["loss"], expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prior_is_evaluated_with_its_labels() -> None:
    model, rows = tiny_prior(num_classes=3, label_dropout=0.9), np.arange(0, 40, 4)
    codes, labels = Grids().batch(rows)
    bits = float(F.cross_entropy(model(codes, labels), codes).detach()) / np.log(2)
    assert stage_of(model).evaluate().numbers["bits_per_code"] == pytest.approx(bits, rel=1e-6)
    without = float(F.cross_entropy(model(codes, torch.full((10,), -1)), codes).detach()) / np.log(2)
    assert abs(bits - without) > 1e-3


# The default


def test_the_default_is_for_codes_with_labels(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    images = fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(12)])
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    unlabelled = ["--tokenizer", tmp_path / "tokenizer", "--codes", export_of(tmp_path)]
    for name, options, share in (
        ("labelled", ["--codes", trained.codes], LABEL_DROPOUT),
        ("chosen", ["--codes", trained.codes, "--label-dropout", 0.25], 0.25),
        ("none", ["--codes", trained.codes, "--label-dropout", 0], 0),
        ("unlabelled", unlabelled, 0),
        ("none to drop", [*unlabelled, "--label-dropout", 0], 0),
    ):
        outcome = codegrid("train-prior", *options, *SMALL, "--out", tmp_path / name)
        assert (outcome.status, outcome.error_lines) == (0, [])
        info = read_info(tmp_path / name, "prior")
        assert (info.config["label_dropout"], info.training["label_dropout"]) == (share, share)
        assert load_prior(tmp_path / name).config.label_dropout == share


def export_of(folder: Path) -> Path:
    """Export the codes of the tokenizer's images."""
    export_codes(folder / "tokenizer", folder / "codes", device="cpu")
    return folder / "codes"


def test_labels_that_are_not_there_cannot_be_dropped(tmp_path: Path, codegrid: Codegrid) -> None:
    """Refused in one line; where the tokenizer has no classes, before its images are encoded."""
    images = fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(12)])
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    codes, before = export_of(tmp_path), digest_of(tmp_path)
    for options, what in (
        (["--codes", codes], f"codes in {codes}"),
        ([], f"images of the tokenizer in {tmp_path / 'tokenizer'}"),
    ):
        command = ["train-prior", "--tokenizer", tmp_path / "tokenizer", *options, *SMALL, "--out", tmp_path / "out"]
        outcome = codegrid(*command, "--label-dropout", 0.25)
        assert (outcome.status, outcome.out) == (1, "")
        (line,) = outcome.error_lines
        assert line == (
            f"Error: expected {what} with a label for each, so that --label-dropout 0.25 can act, got some or all "
            "without; omit the option, or train on a folder with one subfolder a class"
        )
        assert digest_of(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_one_grid_without_a_label_is_enough_to_refuse() -> None:
    class Shard:
        labels = np.array([0, 1, -1])

    class Manifest:
        class_names, num_codes, grid = ("a", "b"), 16, (3, 5)

    class Codes:
        manifest, location = Manifest(), "here"

        def shards(self) -> list[Shard]:
            return [Shard()]

    codes: Any = Codes()
    assert config_for(PriorSettings(), codes).label_dropout == 0
    with pytest.raises(InputError, match=r"expected codes in here with a label for each, .* --label-dropout 0\.1"):
        config_for(PriorSettings(label_dropout=0.1), codes)


# Runs that are resumed


@pytest.fixture
def from_before(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> Path:
    """A run of one step as versions before label dropout left it: neither the config nor the settings name it."""
    out = tmp_path / "before"
    assert codegrid("train-prior", "--codes", trained.codes, *SMALL, "--label-dropout", 0, "--out", out).status == 0
    content = json.loads((out / "config.json").read_text("utf-8"))
    del content["config"]["label_dropout"], content["training"]["label_dropout"], content["checksum"]
    (out / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def test_a_run_from_before_resumes_without_label_dropout(
    tmp_path: Path, trained: Trained, from_before: Path, codegrid: Codegrid
) -> None:
    command = ["train-prior", "--codes", trained.codes, *SMALL[:-1]]
    outcome = codegrid(*command, 3, "--out", from_before, "--resume")
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert load_training(from_before).values["step"] == 3
    assert codegrid(*command, 3, "--label-dropout", 0, "--out", tmp_path / "new").status == 0
    assert load_prior(from_before).config.label_dropout == 0
    assert digest_of(from_before)["model.safetensors"] == digest_of(tmp_path / "new")["model.safetensors"]


def test_a_run_keeps_its_own_label_dropout(trained: Trained, from_before: Path, codegrid: Codegrid) -> None:
    """The same number once more is no conflict, also where the first line did not name it; another is refused."""
    for folder, own, other in ((trained.prior, LABEL_DROPOUT, 0), (from_before, 0, LABEL_DROPOUT)):
        out = folder.parent / f"resumed {folder.name}"
        shutil.copytree(folder, out)
        command = ["train-prior", "--out", out, "--codes", trained.codes, "--steps", 4, "--resume", "--label-dropout"]
        before = digest_of(out)
        outcome = codegrid(*command, other)
        assert outcome.status == 1
        message = rf"expected --resume with label-dropout {own}(\.0)?, as the run was started, got {other}"
        assert re.search(message, outcome.error_lines[0])
        assert digest_of(out) == before
        assert codegrid(*command, own).status == 0
        assert load_prior(out).config.label_dropout == own
        assert evaluations_of(out)[-1]["step"] == 4
        shutil.rmtree(out)
