"""A run that is stopped, in whatever way, and resumed is the run that never stopped.

Runs go through the command line where a user's would.
"""

import gc
import json
import math
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
from pipeline.errors import InputError
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import load_training, read_info, read_run
from pipeline.models.loading import load_tokenizer
from pipeline.runtime.optimizer import Optimizers
from pipeline.training import loop
from pipeline.training.loop import run_training
from pipeline.training.tokenizer_stage import TokenizerStage

from ..conftest import Codegrid, Trained
from ..support import digest_of, load_weights
from .training_runs import (
    Killed,
    Toy,
    during,
    kill,
    lines_of,
    no_step_twice,
    run_again,
    same_run,
    settings_of,
    stop_at,
    toy_info,
)


@pytest.fixture(params=["tokenizer", "gradient tokenizer in bf16", "prior"])
def command(request: pytest.FixtureRequest, trained: Trained) -> list[object]:
    """A run whose 4 steps are more than one epoch, and whose random numbers matter (revival, dropout, labels)."""
    if request.param == "prior":
        small = ["--channels", 4, "--num-layers", 2, "--dropout", 0.5, "--label-dropout", 0.5]
        return ["train-prior", "--codes", trained.codes, "--tokenizer", trained.tokenizer, "--batch-size", 4, *small]
    other = [] if request.param == "tokenizer" else ["--codebook-update", "gradient", "--precision", "bf16"]
    return ["train-tokenizer", "--data", trained.images, "--num-codes", 16, "--batch-size", 4, *other]


def test_four_steps_are_two_and_two_more(tmp_path: Path, command: list[object], codegrid: Codegrid) -> None:
    """G9, bit for bit; that a longer run differs shows that the comparison can fail."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert codegrid(*command, "--out", uninterrupted, "--steps", 4).status == 0
    assert codegrid(*command, "--out", resumed, "--steps", 2).status == 0
    with pytest.raises(AssertionError):
        same_run(uninterrupted, resumed)
    assert codegrid(*command, "--out", resumed, "--steps", 4, "--resume").status == 0
    same_run(uninterrupted, resumed)
    no_step_twice(resumed, 4)
    assert {tensor.dtype for tensor in load_weights(resumed).values()} <= {
        torch.float32,
        torch.bool,
        torch.int64,
    }  # never bf16
    assert codegrid(*command, "--out", resumed, "--steps", 5, "--resume").status == 0
    assert load_training(resumed).values["step"] == 5


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_four_steps_with_either_optimizer_are_two_and_two_more(
    tmp_path: Path, trained: Trained, stage: str, optimizer: str, codegrid: Codegrid
) -> None:
    """Wide enough for Muon to have weights; it is the default, and a resumed run need not be told either."""
    commands: dict[str, list[object]] = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16],
        "prior": ["train-prior", "--codes", trained.codes, "--tokenizer", trained.tokenizer, "--channels", 16],
    }
    command = [*commands[stage], "--batch-size", 4, *([] if optimizer == "muon" else ["--optimizer", optimizer])]
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert codegrid(*command, "--out", uninterrupted, "--steps", 4).status == 0
    assert codegrid(*command, "--out", resumed, "--steps", 2).status == 0
    assert codegrid(command[0], "--out", resumed, "--steps", 4, "--resume").status == 0
    same_run(uninterrupted, resumed)
    no_step_twice(resumed, 4)
    optimizers = {name.split("/")[1] for name in load_training(resumed).tensors if name.startswith("optimizer/")}
    assert optimizers == ({"muon", "adam"} if optimizer == "muon" else {"adam"})
    assert read_info(resumed, stage).training["optimizer"] == optimizer


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_stopped_by_ctrl_c_resumes_as_if_it_had_not(
    tmp_path: Path, command: list[object], stopped: int, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of a step; --resume then needs no other option."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert codegrid(*command, "--out", uninterrupted, "--steps", 4).status == 0
    with monkeypatch.context() as patch:
        during(patch, stopped, lambda: os.kill(os.getpid(), signal.SIGINT))
        outcome = codegrid(*command, "--out", resumed, "--steps", 4)
    assert outcome.status == 130
    assert f"stopped at step {stopped} and saved; --resume continues" in outcome.err
    assert load_training(resumed).values["step"] == stopped
    assert codegrid(command[0], "--out", resumed, "--resume").status == 0
    same_run(uninterrupted, resumed)
    no_step_twice(resumed, 4)


def test_a_run_killed_after_its_last_save_repeats_the_lost_steps(
    tmp_path: Path, command: list[object], codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was logged and previewed after that save is dropped, a line cut short too."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert codegrid(*command, "--out", uninterrupted, "--steps", 4).status == 0
    with monkeypatch.context() as patch:
        during(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert codegrid(*command, "--out", resumed, "--steps", 4).status == 130
    with monkeypatch.context() as patch:
        during(patch, 3, kill)  # steps 2 and 3 are done, and not saved
        with pytest.raises(Killed):
            cli.main([*map(str, command), "--out", str(resumed), "--resume"])
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "part": "tr')
    assert load_training(resumed).values["step"] == 1
    assert codegrid(command[0], "--out", resumed, "--resume").status == 0
    same_run(uninterrupted, resumed)
    no_step_twice(resumed, 4)


def test_a_run_is_saved_by_the_clock(
    tmp_path: Path, command: list[object], codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    out = tmp_path / "run"
    during(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        cli.main([*map(str, command), "--out", str(out), "--steps", "4"])
    assert load_training(out).values["step"] == 3


def test_the_same_seed_gives_the_same_weights_and_another_others(
    tmp_path: Path, command: list[object], codegrid: Codegrid
) -> None:
    digests = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        torch.manual_seed(len(digests))
        assert codegrid(*command, "--out", tmp_path / name, "--steps", 2, "--seed", seed).status == 0
        digests.append((tmp_path / name / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]
    assert read_info(tmp_path / "c", str(command[0]).removeprefix("train-")).training["seed"] == 8


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_exit_with_their_status(
    tmp_path: Path,
    trained: Trained,
    number: signal.Signals,
    status: int,
    codegrid: Codegrid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(number)
    during(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1]
    assert codegrid(*command, "--out", tmp_path / "run", "--steps", 4).status == status
    assert load_training(tmp_path / "run").values["step"] == 2
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_it_at_once(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1, "--out", tmp_path / "run"]
    assert codegrid(*command, "--steps", 2).status == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    during(monkeypatch, 1, twice)
    assert codegrid(*command, "--steps", 4, "--resume").status == 130
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert load_training(tmp_path / "run").values["step"] == 2


def test_a_run_in_a_thread_has_no_signals_and_needs_none(tmp_path: Path) -> None:
    before, toy = signal.getsignal(signal.SIGINT), Toy()
    found: list[object] = []
    toy.at_step = lambda step: found.append(signal.getsignal(signal.SIGINT))
    arguments = (toy, toy_info(), settings_of(steps=2), tmp_path)
    thread = threading.Thread(target=run_training, args=arguments)
    thread.start()
    thread.join()
    assert found == [before, before]
    assert load_training(tmp_path).values["step"] == 2


# Losses and scores that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_again_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path, command: list[object], value: float, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert codegrid(*command, "--out", out, "--steps", 2).status == 0
    before = {name: digest for name, digest in digest_of(out).items() if name.endswith(("safetensors", "config.json"))}
    bad = torch.tensor(value, requires_grad=True)
    with monkeypatch.context() as patch:
        for step in (2, 4):  # of those that this process takes: one is repeated from the last save
            during(patch, step, lambda: {"loss": bad * 1})
        outcome = codegrid(*command, "--out", out, "--steps", 4, "--resume")
    assert outcome.status == 1
    assert f"loss = {value} at step 4, in the batch of " in outcome.out
    assert ": back to step 2, this once, with 0.5 times the learning rate" in outcome.out
    errors = [line for line in outcome.error_lines if line.startswith("Error: ")]
    assert len(errors) == len(outcome.error_lines) == 1
    rate = json.loads((out / "config.json").read_text("utf-8"))["training"]["lr"]
    assert f"expected finite losses, got loss = {value} at step 4, in the batch of " in errors[0]
    assert re.search(rf"\S+\.png, .*; lower --lr \(now {rate:g}\)", errors[0])
    after = digest_of(out)
    assert {name: after[name] for name in before} == before
    assert codegrid(*command, "--out", out, "--steps", 4, "--resume").status == 0
    no_step_twice(out, 4)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_learning_rate_that_destroys_the_model_is_reported_in_one_line(
    tmp_path: Path, trained: Trained, stage: str, codegrid: Codegrid
) -> None:
    """Nothing is simulated: the weights overflow after the first step."""
    commands = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16],
        "prior": ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2],
    }
    out = tmp_path / "run"
    outcome = codegrid(*commands[stage], "--out", out, "--steps", 4, "--lr", 1e30, "--precision", "fp32")
    assert outcome.status == 1
    # A progress bar that is still open would precede "Error: " on its line.
    assert [line[:7] for line in outcome.error_lines] == ["Error: "]
    assert re.search(r"finite .*; lower (--lr|the learning rate)", outcome.error_lines[0])
    assert not (out / "config.json").exists()
    assert "the last good state is kept" not in outcome.error_lines[0]


def test_one_step_that_destroys_the_model_is_reported_as_clearly(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """The loss of the only step is finite; its evaluation is not."""
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2, "--precision", "fp32"]
    outcome = codegrid(*command, "--out", tmp_path / "run", "--steps", 1, "--lr", 1e36)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.search(r"Error: expected .*finite.* got .*--lr", outcome.error_lines[0])


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    toy = Toy()
    toy.losses = lambda indices: {  # type: ignore[method-assign]
        "loss": toy.model.weight.sum(),
        "commitment": toy.model.weight.sum() / 0,
    }
    with pytest.raises(InputError, match=r"got commitment = nan at step 1, in the batch of 2\.png, 4\.png; lower"):
        run_training(toy, toy_info(), settings_of(), tmp_path)
    assert toy.weight == 0  # no step was taken


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run(
    tmp_path: Path, wrong: float, keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from weights that are not finite, which no later step repairs; what was saved before stays."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    scores = iter([3.0, 2.0, wrong, wrong])
    settings = settings_of(steps=4, keep_best=keep_best)
    with pytest.raises(InputError, match=rf"expected finite .*, got score = {wrong} at step 3; lower --lr"):
        run_training(Toy(lambda weight: next(scores)), toy_info(), settings, tmp_path)
    assert (read_info(tmp_path, "prior").step, read_info(tmp_path, "prior").metrics["score"]) == (2, 2.0)
    assert load_training(tmp_path).values["step"] == 2


def nan_at(toy: Toy, *calls: int) -> None:
    """Make the loss of the toy NaN in these calls, counted from 1."""
    real = toy.losses

    def losses(indices: np.ndarray) -> dict[str, torch.Tensor]:
        found = real(indices)
        return {"loss": found["loss"] * math.nan} if len(toy.seen) in calls else found

    toy.losses = losses  # type: ignore[method-assign]


@pytest.mark.parametrize("saved_at", [None, 4])
def test_a_loss_that_is_not_finite_takes_the_run_back_once(tmp_path: Path, saved_at: int | None) -> None:
    """To its beginning, or to what was saved; the batches that follow are the same ones, the steps half as long."""
    settings = settings_of(steps=12, evaluations=3, batch_size=3)
    expected = Toy()
    run_training(expected, toy_info(), settings, tmp_path / "expected")
    toy, out = Toy(), tmp_path / "run"
    if saved_at is not None:
        toy.at_step = stop_at(saved_at)
        with pytest.raises(KeyboardInterrupt):
            run_training(toy, toy_info(), settings, out)
    toy, back = Toy(), saved_at or 0
    nan_at(toy, 7 - back)
    if saved_at is None:
        run_training(toy, toy_info(), settings, out)
    else:
        run_again(toy, settings, out)
    before, after = toy.seen[: 7 - back], toy.seen[7 - back :]
    assert before == expected.seen[back:7]
    assert after == expected.seen[back:]
    steps = np.diff([*toy.weights[7 - back :], toy.weight])
    assert steps == pytest.approx(0.5 * np.diff([*expected.weights[back:], expected.weight]), rel=1e-4)
    assert [line["step"] for line in lines_of(out, "train")] == list(range(1, 13))  # none twice
    assert load_training(out).values["learning_rate_scale"] == 0.5


def test_vectors_that_are_not_finite_take_the_run_back_too(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """The quantizer refuses them before there is a loss. Nothing is simulated: the weights overflow at once."""
    command = ["train-tokenizer", "--data", trained.images, "--num-codes", 16, "--precision", "fp32"]
    outcome = codegrid(*command, "--out", tmp_path / "run", "--steps", 20, "--lr", 1e30)
    assert outcome.status == 1
    assert re.search(r"finite vectors.*, in the batch of \S+\.png, .*: back to step 0, this once", outcome.out)
    (line,) = outcome.error_lines
    assert re.search(
        r"^Error: expected finite .* at step \d+, in the batch of .*; lower --lr .*; nothing was saved", line
    )


def test_the_lower_rate_survives_a_stop_and_a_second_time_ends_the_run(tmp_path: Path) -> None:
    settings = settings_of(steps=12)
    toy = Toy()
    nan_at(toy, 2)
    toy.at_step = stop_at(6)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings, tmp_path)
    before = digest_of(tmp_path)
    toy = Toy()
    nan_at(toy, 3)
    with pytest.raises(InputError, match=r"loss = nan at step \d, in the batch of \d.png, \d.png; lower --lr"):
        run_again(toy, settings, tmp_path)
    after = digest_of(tmp_path)
    assert {name: after[name] for name in before if "metrics" not in name} == {
        name: digest for name, digest in before.items() if "metrics" not in name
    }


# What cannot be written and is no checkpoint never ends a training


def test_a_log_and_pictures_that_cannot_be_written_are_one_warning_each(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder is in the place of the log's file, made while the run is on; a file in that of the pictures."""
    out = tmp_path / "run"
    command = ["train-prior", "--codes", trained.codes, "--tokenizer", trained.tokenizer, "--channels", 4]
    with pytest.MonkeyPatch.context() as patch:

        def spoil() -> None:
            (out / "metrics.jsonl").mkdir(parents=True)
            (out / "pictures").write_text("in the way")

        during(patch, 1, spoil)
        outcome = codegrid(*command, "--num-layers", 1, "--out", out, "--steps", 20)
    assert outcome.status == 0
    assert len(caplog.messages) == 2
    assert "the log cannot be written" in caplog.messages[0]
    assert "the pictures cannot be written" in caplog.messages[1]
    assert load_training(out).values["step"] == 20


# A state that is not finite is never saved


def poison_the_gradient(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    """The loss is finite, the weight after the step is not."""
    toy.model.weight.register_hook(lambda gradient: gradient * math.nan)


def poison_a_buffer(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    toy.model.average.fill_(-math.inf)  # type: ignore[operator, union-attr]


def poison_the_optimizer(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    """Its moments alone."""
    real = Optimizers.tensors
    patch.setattr(Optimizers, "tensors", lambda self: {name: t * math.nan for name, t in real(self).items()})


def poison_the_best_weights(toy: Toy, patch: pytest.MonkeyPatch) -> None:
    """The weights that model.safetensors is to hold, while those in training are finite."""
    trainers = [found for found in gc.get_objects() if type(found) is loop._Trainer and found.stage is toy]
    assert len(trainers) == 1
    assert trainers[0].best_weights is not None
    trainers[0].best_weights["weight"] *= math.nan


POISONS = {
    "weight": poison_the_gradient,
    "average": poison_a_buffer,
    "optimizer": poison_the_optimizer,
    "best weights": poison_the_best_weights,
}


def toy_with_a_buffer() -> Toy:
    toy = Toy()
    toy.model.register_buffer("average", torch.zeros(2))
    return toy


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_stop_never_saves_a_state_that_is_not_finite(
    tmp_path: Path, poison: str, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in step 34 of 200, where no evaluation is due; the losses are finite to the end."""
    settings = settings_of(steps=200, evaluations=20, keep_best=True)
    if existing:
        toy = toy_with_a_buffer()
        toy.at_step = stop_at(25)
        with pytest.raises(KeyboardInterrupt):
            run_training(toy, toy_info(), settings, tmp_path)
    before = digest_of(tmp_path)
    toy = toy_with_a_buffer()

    def at_step(step: int) -> None:
        if step == (9 if existing else 34):
            os.kill(os.getpid(), signal.SIGINT)
            POISONS[poison](toy, monkeypatch)

    toy.at_step = at_step
    saved = read_run(tmp_path, "prior") if existing else None
    with pytest.raises((InputError, KeyboardInterrupt)) as raised:
        run_training(toy, toy_info(), settings, tmp_path, resume=saved)
    assert re.match(r"expected a finite state .* at step 34; lower --lr \(now 0.1\)", str(raised.value))
    kept = f"the last good state is kept in {tmp_path}" if existing else "nothing was saved yet"
    assert kept in str(raised.value)
    assert poison.split()[-1] in str(raised.value)
    after = digest_of(tmp_path)
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        assert after.get(name) == before.get(name)
        assert (name in after) == existing


def test_a_state_that_is_saved_by_the_clock_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    toy = toy_with_a_buffer()
    toy.at_step = lambda step: poison_a_buffer(toy, monkeypatch) if step >= 3 else None
    with pytest.raises(InputError, match=r"got model/average .* at step 3"):
        run_training(toy, toy_info(), settings_of(), tmp_path)
    assert load_training(tmp_path).values["step"] == 2


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_ctrl_c_after_a_step_that_destroys_the_weights_is_reported_in_one_line(
    tmp_path: Path, trained: Trained, stage: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is taken with a learning rate that overflows; nothing checks the model before the stop."""
    commands = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16, "--num-residual-layers", 0],
        "prior": ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1],
    }
    out = tmp_path / "run"
    command = [*commands[stage], "--out", out, "--precision", "fp32", "--lr", 1e36, "--steps", 900]
    during(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(loop, "learning_rate_at", lambda *arguments, **options: math.inf)
    outcome = codegrid(*command)
    assert outcome.status == 1
    errors = [line for line in outcome.error_lines if "Error: " in line]
    assert len(errors) == 1
    assert re.search(r"expected a finite state to save, got \S+ with .*; lower --lr \(now 1e\+36\)", errors[0])
    assert not (out / "config.json").exists()


def test_a_codebook_that_was_set_by_hand_is_a_finite_state(tmp_path: Path, trained: Trained) -> None:
    """Its count of updates is infinite on purpose."""
    model = load_tokenizer(trained.tokenizer)
    model.quantizer.set_codebook(model.quantizer.codebook.clone())
    assert any(bool(tensor.isinf().any()) for tensor in model.state_dict().values())
    stage = TokenizerStage(model, open_images(str(trained.images)).train)
    run_training(stage, toy_info(), settings_of(learning_rate=1e-3), tmp_path)
    assert load_training(tmp_path).values["step"] == 6
