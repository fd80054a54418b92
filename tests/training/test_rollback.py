"""A loss or a score that is not finite takes a run back once; then it ends, and names the step and the batch."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.codes.dataset import CodeDataset
from pipeline.errors import InputError
from pipeline.images.holdout import held_out
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import load_training, read_info, read_run
from pipeline.models.loading import load_prior, load_tokenizer
from pipeline.training import loop
from pipeline.training.divergence import NAMED, DivergedError, Divergence
from pipeline.training.loop import run_training
from pipeline.training.prior_stage import PriorStage
from pipeline.training.schedule import DataOrder
from pipeline.training.stage import Evaluation, Stage
from pipeline.training.tokenizer_stage import TokenizerStage

from ..conftest import Codegrid, Trained
from ..support import digest_of
from .training_runs import Toy, during, lines_of, no_step_twice, run_again, settings_of, stop_at, toy_info


def nan_in(toy: Toy, *calls: int) -> Toy:
    """Make the loss of the toy NaN in these calls, counted from 1."""
    real = toy.losses

    def losses(indices: np.ndarray) -> dict[str, Tensor]:
        found = real(indices)
        return {"loss": found["loss"] * math.nan} if len(toy.seen) in calls else found

    toy.losses = losses  # type: ignore[method-assign]
    return toy


def scores(*values: float) -> Callable[[float], float]:
    """Return a score that takes these values in turn."""
    left = iter(values)
    return lambda weight: next(left)


# Back, once


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keep_best", [False, True])
def test_a_score_that_is_not_finite_takes_the_run_back(tmp_path: Path, wrong: float, keep_best: bool) -> None:
    """To its beginning, for nothing was saved; the evaluation in question is neither recorded nor logged twice."""
    toy = Toy(scores(5.0, 4.0, wrong, 5.0, 4.0, 3.0, 2.0))
    info = run_training(toy, toy_info(), settings_of(steps=4, keep_best=keep_best), tmp_path)
    no_step_twice(tmp_path, 4)
    assert [line["score"] for line in lines_of(tmp_path, "held_out")] == [5.0, 4.0, 3.0, 2.0]
    assert info.metrics == {"step": 4, "score": 2.0}
    assert len(toy.seen) == 3 + 4
    assert toy.seen[:3] == toy.seen[3:6]


def test_a_score_takes_a_resumed_run_back_to_its_save(tmp_path: Path) -> None:
    toy = Toy(scores(5.0, 4.0))
    toy.at_step = stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings_of(steps=4), tmp_path)
    toy = Toy(scores(math.nan, 3.0, 2.0))
    run_again(toy, settings_of(steps=4), tmp_path)
    assert len(toy.seen) == 1 + 2
    no_step_twice(tmp_path, 4)
    assert load_training(tmp_path).values["learning_rate_scale"] == loop.LOWER_RATE


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("first", "second"), [(2, 8), (5, 12), (6, 7)])
def test_a_second_time_in_another_step_ends_the_run(tmp_path: Path, resumed: bool, first: int, second: int) -> None:
    """Whatever was trained since; in a process of its own, too. The calls of the losses are counted over all steps."""
    settings = settings_of(steps=12)
    if resumed:
        toy = Toy()
        toy.at_step = stop_at(1)
        with pytest.raises(KeyboardInterrupt):
            run_training(toy, toy_info(), settings, tmp_path)
    toy = nan_in(Toy(), first, second)
    before = digest_of(tmp_path)
    saved = read_run(tmp_path, "prior") if resumed else None
    with pytest.raises(InputError, match=r"got loss = nan at step \d+, in the batch of \d.png, \d.png; lower") as error:
        run_training(toy, toy_info(), settings, tmp_path, resume=saved)
    step = second - first + (1 if resumed else 0)
    assert f"at step {step}, " in str(error.value)
    names = [f"{index}.png" for index in DataOrder(5, 2, 0).batch(step - 1)]
    assert f"in the batch of {', '.join(names)};" in str(error.value)
    assert {name: digest for name, digest in digest_of(tmp_path).items() if "metrics" not in name} == {
        name: digest for name, digest in before.items() if "metrics" not in name
    }
    assert [line["step"] for line in lines_of(tmp_path, "train")] == list(range(1, step))


def test_a_stop_between_the_two_changes_nothing(tmp_path: Path) -> None:
    """The run remembers that it was taken back, in what it saves."""
    toy = nan_in(Toy(), 3)
    toy.at_step = stop_at(8)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings_of(steps=12), tmp_path)
    assert load_training(tmp_path).values["learning_rate_scale"] == loop.LOWER_RATE
    with pytest.raises(InputError, match="got loss = nan at step"):
        run_again(nan_in(Toy(), 2), settings_of(steps=12), tmp_path)


def test_a_run_without_nan_records_nothing_about_it(tmp_path: Path) -> None:
    """So its files are those of a version that knew no way back."""
    run_training(Toy(), toy_info(), settings_of(steps=3), tmp_path)
    assert set(load_training(tmp_path).values) == {"step", "best"}


# The names


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_the_names_are_those_of_the_images_of_the_batch(
    trained: Trained, kind: str, tmp_path: Path, codegrid: Codegrid
) -> None:
    """The batch of step 2, of 7 images, of which the first five are named."""
    commands = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16],
        "prior": ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1],
    }
    command = [*commands[kind], "--batch-size", 7, "--steps", 3, "--out", tmp_path / "run"]
    bad = torch.tensor(math.nan, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        for call in (2, 4):
            during(patch, call, lambda: {"loss": bad * 1})
        outcome = codegrid(*command)
    assert outcome.status == 1
    images, codes = open_images(str(trained.images)).train, CodeDataset(trained.codes)
    stages: dict[str, Stage] = {
        "tokenizer": TokenizerStage(load_tokenizer(trained.tokenizer), images),
        "prior": PriorStage(load_prior(trained.prior), codes, held_out(list(codes.names()))),
    }
    stage = stages[kind]
    expected = [images.names[row] for row in stage.train_rows[DataOrder(stage.num_items, 7, 0).batch(1)]]  # type: ignore[attr-defined]
    assert list(codes.names()) == list(images.names)
    (error,) = outcome.error_lines
    assert f"loss = nan at step 2, in the batch of {', '.join(expected[:NAMED])} and 2 more; lower --lr" in error


# What it costs


def test_noting_the_losses_waits_for_no_device() -> None:
    """On the meta device a number that is read raises an error, as reading it on a GPU would wait for it."""
    meta = torch.device("meta")
    divergence = Divergence(Toy(), DataOrder(5, 2, 0), 0.1, meta)
    losses = {"loss": torch.empty((), device=meta, requires_grad=True), "other": torch.empty((), device=meta)}
    for step in range(3):
        divergence.note(losses, step)
    assert divergence._first_bad.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        divergence.check(losses, 1)


def test_the_first_step_that_was_not_finite_is_noted() -> None:
    """And named, though it is found out later; after a return the count begins anew."""
    divergence = Divergence(Toy(), DataOrder(5, 2, 0), 0.1, torch.device("cpu"))
    values = [1.0, 2.0, math.inf, 1.0, math.nan]
    for step, value in enumerate(values):
        divergence.note({"loss": torch.tensor(value)}, step)
    with pytest.raises(DivergedError, match=r"got score = nan at step 3, in the batch of ") as error:
        divergence.check({"score": math.nan}, 5)
    assert error.value.do.endswith("nothing was saved yet")
    divergence.forget()
    with pytest.raises(DivergedError, match=r"got score = nan at step 5; lower"):
        divergence.check({"score": math.nan}, 5)


def test_large_losses_are_no_divergence() -> None:
    """Their sum in float32 may overflow, which is noted; but nothing is raised for it alone."""
    divergence = Divergence(Toy(), DataOrder(5, 2, 0), 0.1, torch.device("cpu"))
    divergence.note({"a": torch.tensor(3e38), "b": torch.tensor(3e38)}, 0)
    divergence.check({"a": torch.tensor(3e38), "b": torch.tensor(3e38)}, 1)


# The pictures


def test_pictures_of_a_model_that_cannot_sample_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()

    def preview(path: Path, evaluation: Evaluation) -> None:
        raise ValueError("expected finite logits")

    toy.preview = preview  # type: ignore[method-assign]
    run_training(toy, toy_info(), settings_of(steps=4), tmp_path)
    assert len(caplog.messages) == 1
    assert re.search(r"the pictures cannot be .* \(expected finite logits\)", caplog.messages[0])
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["step"] == 4
    assert read_info(tmp_path, "prior").metrics["step"] == 4
