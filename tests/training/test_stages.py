"""What the two stages report to the loop and the loop logs, against slow counts; and that every setting acts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.codes.dataset import CodeDataset
from pipeline.evaluation import simple_predictors
from pipeline.evaluation.codebook_picture import codebook_picture
from pipeline.evaluation.simple_predictors import SimplePredictors, in_words, share_in_words
from pipeline.generation.guidance import DEFAULT_GUIDANCE
from pipeline.images.holdout import MOST_HELD_OUT, held_out, split_rows
from pipeline.images.image_set import ImageSplit, open_images
from pipeline.images.png import save_grid
from pipeline.images.preprocessing import to_uint8
from pipeline.models.checkpoint import read_info
from pipeline.models.loading import load_prior, load_tokenizer
from pipeline.training.loop import run_training
from pipeline.training.prior_stage import PREVIEW_SAMPLES, PriorStage
from pipeline.training.recipes import PriorSettings, TokenizerSettings
from pipeline.training.stage import Evaluation
from pipeline.training.tokenizer_stage import TokenizerStage
from pipeline.training.train_prior import config_for as prior_config_for
from pipeline.training.train_tokenizer import config_for as tokenizer_config_for
from prior import sample_codes

from ..conftest import CLASS_NAMES, Codegrid, Trained
from ..support import LEVELS, brightness_tokenizer, cells_of, fill_with_cells, save_tokenizer, tiny_prior
from .training_runs import Toy, lines_of, losses_of, settings_of, toy_info


@pytest.fixture
def images(grey_folder: Path) -> ImageSplit:
    return open_images(str(grey_folder)).train


@pytest.fixture
def stage(images: ImageSplit) -> TokenizerStage:
    """The stage of a tokenizer whose codes are those of `cells_of`, and which is not trained."""
    return TokenizerStage(brightness_tokenizer().eval(), images)


def codes_of(images: ImageSplit, rows: np.ndarray, folder: Path) -> np.ndarray:
    """The codes [n,H,W] of images, read off the pictures."""
    return np.stack([cells_of(folder / images.names[row]) for row in rows])


# The stage of the tokenizer


def test_the_codes_in_use_are_those_since_the_last_time(
    stage: TokenizerStage, images: ImageSplit, grey_folder: Path
) -> None:
    found = []
    for indices in ([0], [1], [0, 1, 2], []):
        for index in indices:
            losses_of(stage, [index])
        codes = codes_of(images, stage.train_rows[indices], grey_folder) if indices else np.empty(0)
        found.append((stage.status()["codes_in_use"], len(np.unique(codes))))
    assert [reported for reported, _ in found] == [counted for _, counted in found]
    assert found[-1] == (0, 0)
    assert found[2] > found[0]


def test_revivals_are_those_since_the_last_time(stage: TokenizerStage) -> None:
    found = []
    for revived in (5, 2, 0):
        stage.model.quantizer.revived += revived
        found.append(stage.status()["revived"])
    assert found == [5, 2, 0]


def test_the_share_of_codes_that_changed_since_the_last_evaluation(
    stage: TokenizerStage, images: ImageSplit, grey_folder: Path
) -> None:
    """All at first, none when nothing was learned; then code 3 has moved away, and its cells take another."""
    assert [stage.evaluate().numbers["codes_changed"] for _ in range(2)] == [1, 0]
    codebook = stage.model.quantizer.codebook.clone()
    codebook[3] = 100
    stage.model.quantizer.set_codebook(codebook)
    share = (codes_of(images, stage.held_out_rows, grey_folder) == 3).mean()
    assert 0 < share < 0.5
    assert stage.evaluate().numbers["codes_changed"] == pytest.approx(share)


def test_the_picture_of_the_codebook_is_of_the_codes_of_the_held_out_images(
    tmp_path: Path, stage: TokenizerStage, images: ImageSplit, grey_folder: Path
) -> None:
    codes = codes_of(images, stage.held_out_rows, grey_folder)
    histogram = torch.from_numpy(np.bincount(codes.ravel(), minlength=LEVELS))
    assert len(histogram.unique()) > 2
    stage.preview(tmp_path / "step.png", stage.evaluate())
    picture = np.asarray(Image.open(tmp_path / "step-codebook.png"))
    np.testing.assert_array_equal(picture, codebook_picture(stage.model, histogram)[0])


# The stage of the prior


def test_the_loss_of_a_prior_is_that_of_the_labels_of_its_rows() -> None:
    model, codes, labels = tiny_prior(num_classes=3), torch.randint(LEVELS, (6, 3, 5)), torch.tensor([2, 0, 1, 1, 0, 2])

    class Grids:
        def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            return codes[indices], labels[indices]

    held_out_mask = np.array([True, False, False, True, False, False])
    rows = torch.tensor([1, 2, 4, 5])
    found = losses_of(PriorStage(model, Grids(), held_out_mask), [3, 0])["loss"]
    chosen = rows[[3, 0]]
    expected = torch.nn.functional.cross_entropy(model(codes[chosen], labels[chosen]), codes[chosen])
    torch.testing.assert_close(found, expected)
    other = torch.nn.functional.cross_entropy(model(codes[chosen], labels[chosen].flip(0)), codes[chosen])
    assert abs(float((found - other).detach())) > 1e-3


@pytest.mark.parametrize("num_classes", [0, 3])
def test_simple_predictors_learn_and_are_measured_on_the_rows_of_the_prior(num_classes: int) -> None:
    """An evaluation logs the share of the way from the histogram to zero, and says it in words."""
    random = np.random.default_rng(0)
    codes, labels = random.integers(0, 5, (30, 3, 5)), random.integers(0, 3, 30)
    held_out_mask = np.arange(30) % 5 == 0
    read = list[np.ndarray]()

    class Grids:
        def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(indices)
            return torch.from_numpy(codes[indices]), torch.from_numpy(labels[indices])

    stage = PriorStage(tiny_prior(num_codes=5, num_classes=num_classes), Grids(), held_out_mask)
    assert read == []
    state = torch.get_rng_state()
    learned = SimplePredictors.fit(codes[~held_out_mask], labels[~held_out_mask], 5, num_classes)
    expected = learned.bits(codes[held_out_mask], labels[held_out_mask])
    assert stage.simple_bits == expected
    assert (expected.histogram_given_label is None) == (num_classes == 0)
    read.clear()
    for _ in range(2):
        found = stage.evaluate()
        bits = found.numbers["bits_per_code"]
        assert found.numbers == {"bits_per_code": bits, "bits_share_explained": 1 - bits / expected.histogram}
        assert found.summary == share_in_words(bits, expected)
        assert found.score_name == "bits_per_code"
    assert len(read) == 2  # counted once, measured twice
    assert torch.equal(torch.get_rng_state(), state)


def test_of_many_grids_a_stage_reads_no_more_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grids:
        def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            assert len(indices) <= 20
            return torch.zeros(len(indices), 3, 5, dtype=torch.int64), torch.zeros(len(indices), dtype=torch.int64)

    monkeypatch.setattr(simple_predictors.training_rows, "__defaults__", (20 * 15,))
    stage = PriorStage(tiny_prior(), Grids(), np.arange(100) % 10 == 0)
    assert stage.simple_bits.histogram < 0.1


def test_a_run_says_at_its_start_what_simple_predictors_reach_and_says_it_again_when_it_resumes(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--out", tmp_path / "run"]
    first, again = (codegrid(*command, *extra) for extra in (["--steps", 1], ["--steps", 2, "--resume"]))
    codes = CodeDataset(trained.codes)
    held = held_out(codes.names())
    grids, labels = (tensor.numpy() for tensor in codes.batch(np.arange(len(codes))))
    expected = SimplePredictors.fit(grids[~held], labels[~held], 16, 3).bits(grids[held], labels[held])
    line = f"simple predictors on the held-out codes: {in_words(expected)}"
    assert [outcome.out.splitlines().count(line) for outcome in (first, again)] == [1, 1]
    logged = lines_of(tmp_path / "run", "held_out")
    assert [line["step"] for line in logged] == [1, 2]
    for line in logged:
        assert line["bits_share_explained"] == pytest.approx(1 - line["bits_per_code"] / expected.histogram)
    assert f"  {share_in_words(logged[0]['bits_per_code'], expected)}\n" in first.out


def test_one_grid_is_measured_on_itself(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """Nothing is held out of a single image, and the line says so."""
    images = fill_with_cells(tmp_path / "one", ["1.png"])
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    command = ["train-prior", "--tokenizer", tmp_path / "tokenizer", "--channels", 2, "--num-layers", 1, "--steps", 1]
    outcome = codegrid(*command, "--out", tmp_path / "run")
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert "\nsimple predictors on the training codes: guessing 4.00 bits, histogram " in outcome.out


def test_the_picture_of_a_prior_shows_guided_samples_with_the_classes_in_turn(tmp_path: Path, trained: Trained) -> None:
    prior, step = load_prior(trained.prior), read_info(trained.prior, "prior").step  # whose weights are kept
    labels = torch.arange(PREVIEW_SAMPLES) % len(CLASS_NAMES)
    source, grid = torch.Generator().manual_seed(0), CodeDataset(trained.codes).manifest.grid
    assert prior.config.label_dropout > 0
    codes = sample_codes(prior, PREVIEW_SAMPLES, grid, labels=labels, guidance=DEFAULT_GUIDANCE, generator=source)
    save_grid(to_uint8(load_tokenizer(trained.tokenizer).decode(codes)), tmp_path / "expected.png", columns=8)
    preview = trained.prior / "pictures" / f"step-{step:07d}.png"
    assert preview.read_bytes() == (tmp_path / "expected.png").read_bytes()


# The settings


def shared_fields(settings: Any, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that settings and config share: their values in each."""
    shared = sorted(vars(settings).keys() & vars(config).keys())
    return {name: getattr(settings, name) for name in shared}, {name: getattr(config, name) for name in shared}


def test_every_setting_of_a_prior_reaches_the_model(trained: Trained) -> None:
    numbers = {"channels": 10, "num_layers": 3, "kernel_size": 5, "dropout": 0.5}
    numbers |= {"attention_every": 1, "label_dropout": 0.25}
    settings = PriorSettings(**numbers)  # type: ignore[arg-type]
    chosen, found = shared_fields(settings, prior_config_for(settings, CodeDataset(trained.codes)))
    assert found == chosen == numbers
    assert all(chosen[name] != getattr(PriorSettings(), name) for name in chosen)


@pytest.mark.parametrize(
    ("bottleneck", "update", "likelihood"), [("vq", "gradient", "gaussian"), ("vae", "ema", "bernoulli")]
)
def test_every_setting_of_a_tokenizer_reaches_the_model(
    grey_folder: Path, bottleneck: str, update: str, likelihood: str
) -> None:
    numbers = {"num_codes": 33, "code_dim": 5, "downsample": 2, "hidden_channels": 6, "num_residual_layers": 1}
    others = {"residual_channels": 3, "commitment_weight": 0.5, "kl_weight": 0.25}
    names = {"bottleneck": bottleneck, "codebook_update": update, "likelihood": likelihood}
    settings = TokenizerSettings(**numbers, **others, **names)  # type: ignore[arg-type]
    chosen, found = shared_fields(settings, tokenizer_config_for(settings, open_images(str(grey_folder))))
    assert found == chosen == {**numbers, **others, **names}


# What the loop does with them


def test_a_line_of_the_log_is_the_mean_of_the_losses_since_the_line_before(tmp_path: Path) -> None:
    """20 lines in 60 steps, of 3 each; the loss of a step is the negative of the weight before it."""
    toy = Toy()
    run_training(toy, toy_info(), settings_of(steps=60, evaluations=1), tmp_path)
    lines = lines_of(tmp_path, "train")
    assert [line["step"] for line in lines] == list(range(3, 61, 3))
    means = -np.reshape(toy.weights, (20, 3)).mean(axis=1)
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-5)


def test_at_most_so_many_are_evaluated_and_none_of_the_rest_is_trained_on() -> None:
    held_out_mask = np.arange(3 * MOST_HELD_OUT) % 2 == 0
    train_rows, held_out_rows = split_rows(held_out_mask)
    assert len(set(held_out_rows.tolist())) == MOST_HELD_OUT
    assert not (held_out_rows % 2).any()
    np.testing.assert_array_equal(train_rows, np.arange(1, 3 * MOST_HELD_OUT, 2))


def test_a_prior_keeps_its_best_weights_and_a_tokenizer_its_last(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three evaluations the second is the best: a prior may overfit, the codebook of a tokenizer is at its end."""
    scores = iter(2 * [2.0, 1.0, 3.0])
    evaluate = TokenizerStage.evaluate

    def of_prior(stage: PriorStage) -> Evaluation:
        return Evaluation(numbers={"bits_per_code": next(scores)}, score_name="bits_per_code")

    def of_tokenizer(stage: TokenizerStage) -> Evaluation:
        return replace(evaluate(stage), numbers={"nmse": next(scores)})

    monkeypatch.setattr(PriorStage, "evaluate", of_prior)
    monkeypatch.setattr(TokenizerStage, "evaluate", of_tokenizer)
    prior = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1]
    tokenizer = ["train-tokenizer", "--data", trained.images, "--hidden-channels", 4]
    assert codegrid(*prior, "--steps", 3, "--out", tmp_path / "prior").status == 0
    assert codegrid(*tokenizer, "--steps", 3, "--out", tmp_path / "tokenizer").status == 0
    assert read_info(tmp_path / "prior", "prior").step == 2
    assert read_info(tmp_path / "tokenizer", "tokenizer").step == 3
    assert list(scores) == []
