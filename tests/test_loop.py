"""Training: order of the data, learning rate, which weights are kept; stopping, and going on as if never stopped.

Runs go through the command line where a user's would; a `Toy` stage shows what the loop does with any model.
"""

import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cli
from pipeline import loop
from pipeline.checkpoint import CheckpointInfo, load_prior, load_tokenizer, load_training, load_weights, read_info
from pipeline.codes import CodeDataset
from pipeline.errors import InputError
from pipeline.evaluate import measure_prior, measure_tokenizer
from pipeline.loop import WARMUP_STEPS, DataOrder, LoopSettings, learning_rate_at, run_training, split_rows
from pipeline.metrics_log import MetricsLog
from pipeline.settings import RunFolder, settle
from pipeline.sources import held_out, open_images
from pipeline.train_prior import PriorSettings, PriorStage, train_prior
from pipeline.train_tokenizer import TokenizerStage
from tokenizer import VQVAE, TokenizerConfig

from .conftest import Codegrid, Trained
from .support import bits_of, brightness_tokenizer, digest_of, save_tokenizer

# The order of the data


@pytest.mark.parametrize(("num_items", "batch_size"), [(7, 3), (7, 7), (5, 12), (1, 4), (100, 32)])
def test_every_epoch_is_another_permutation(num_items: int, batch_size: int) -> None:
    """G5, cut out of the batches put end to end; also a batch larger than an epoch."""
    order, epochs = DataOrder(num_items, batch_size, seed=0), 6
    steps = math.ceil(epochs * num_items / batch_size)
    batches = [order.batch(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    indices = np.concatenate(batches)[: epochs * num_items].reshape(epochs, num_items)
    for epoch in indices:
        assert sorted(epoch) == list(range(num_items))
    if num_items >= 7:
        assert len({tuple(epoch) for epoch in indices}) == epochs
        assert list(range(num_items)) not in indices.tolist()


def test_a_batch_depends_on_the_seed_and_its_step_alone() -> None:
    forwards = [DataOrder(7, 3, 5).batch(step).tolist() for step in range(9)]
    order = DataOrder(7, 3, 5)
    assert [order.batch(step).tolist() for step in reversed(range(9))] == forwards[::-1]
    assert [DataOrder(7, 3, 6).batch(step).tolist() for step in range(9)] != forwards


@pytest.mark.parametrize("aside", [[0, 0, 1, 0, 1], [0], [0, 1]])
def test_rows_to_train_on_and_rows_held_out(aside: list[int]) -> None:
    train, held = split_rows(np.array(aside, dtype=bool))
    expected = [i for i, out in enumerate(aside) if not out]
    assert train.tolist() == expected
    assert held.tolist() == ([i for i, out in enumerate(aside) if out] or expected)


# The learning rate


def settings_of(**changes: Any) -> LoopSettings:
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 2, "learning_rate": 0.1, "seed": 0, "precision": "fp32"}
    return LoopSettings(**{**defaults, **changes}, device=torch.device("cpu"))


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = settings_of(steps=500, learning_rate=0.3)
    rates = [learning_rate_at(step, settings) for step in range(500)]
    assert rates[0] == pytest.approx(0.3 / WARMUP_STEPS)
    assert rates[WARMUP_STEPS - 1] == pytest.approx(0.3)
    assert max(rates) == pytest.approx(0.3)
    assert rates[:WARMUP_STEPS] == sorted(rates[:WARMUP_STEPS])
    assert rates[WARMUP_STEPS:] == sorted(rates[WARMUP_STEPS:], reverse=True)
    assert rates[(WARMUP_STEPS + 500) // 2] == pytest.approx(0.15)
    assert 0 < rates[-1] < 1e-4
    assert all(rate > 0 for rate in rates)


# What the loop does with any model


class Toy:
    """One weight that the loss pushes up by Adam's step, and scores that are told beforehand or follow from it."""

    score = "score"
    remark = ""

    def __init__(self, score_of: Callable[[float], float] = lambda weight: weight, num_items: int = 5) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.num_items, self.score_of = num_items, score_of
        self.seen: list[list[int]] = []
        self.weights: list[float] = []  # before each step
        self.at_step: Callable[[int], None] = lambda step: None

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        assert self.model.training
        self.seen.append(indices.tolist())
        self.weights.append(self.weight)
        self.at_step(len(self.seen))
        return {"loss": -self.model.weight.sum()}

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> dict[str, float]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        return {"score": self.score_of(self.weight)}

    def draw(self, path: Path) -> None:
        assert re.fullmatch(r"step-\d{7}.png", path.name)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert state == {}


def toy_info() -> CheckpointInfo:
    return CheckpointInfo(kind="prior", config={}, step=0, class_names=[], preprocessing={}, training={})


def stop_at(step: int) -> Callable[[int], None]:
    return lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None


def test_adam_takes_its_first_step_at_the_rate_of_step_0(tmp_path: Path) -> None:
    """G7: with one sign of gradient, Adam moves a weight by exactly the learning rate."""
    toy, settings = Toy(), settings_of(steps=3, learning_rate=0.5)
    run_training(toy, toy_info(), settings, tmp_path, resume=False)
    moved = np.diff([*toy.weights, toy.weight])
    np.testing.assert_allclose(moved, [learning_rate_at(step, settings) for step in range(3)], rtol=1e-4)


def test_the_loop_takes_the_batches_in_order(tmp_path: Path) -> None:
    toy = Toy(num_items=5)
    run_training(toy, toy_info(), settings_of(steps=6, batch_size=3, seed=9), tmp_path, resume=False)
    order = DataOrder(5, 3, 9)
    assert toy.seen == [order.batch(step).tolist() for step in range(6)]


def valley(lowest_at: float) -> Callable[[float], float]:
    return lambda weight: (weight - lowest_at) ** 2


def test_the_kept_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    """G6: evaluated again they give the recorded score; the last ones are worse."""
    settings = settings_of(steps=8, learning_rate=1.0, keep_best=True)
    toy = Toy(valley(0.1))  # the weight after t steps is 0.01 t (t + 1) / 2: nearest after 4
    info = run_training(toy, toy_info(), settings, tmp_path, resume=False)
    assert read_info(tmp_path, "prior") == info
    assert (info.step, info.metrics["step"]) == (4, 4)
    kept = load_weights(tmp_path)["weight"].item()
    assert valley(0.1)(kept) == info.metrics["score"]
    assert kept == toy.weights[4]
    assert info.metrics["score"] < toy.score_of(toy.weight)
    assert load_training(tmp_path).tensors["model/weight"].item() == toy.weight != kept


def test_without_keep_best_the_last_weights_are_kept(tmp_path: Path) -> None:
    toy = Toy(valley(0.1))
    info = run_training(toy, toy_info(), settings_of(steps=8, learning_rate=1.0), tmp_path, resume=False)
    assert info.step == 8
    assert load_weights(tmp_path)["weight"].item() == toy.weight


@pytest.mark.parametrize("stopped", range(1, 8))
def test_the_best_weights_outlive_a_stop_before_or_after_them(tmp_path: Path, stopped: int) -> None:
    settings = settings_of(steps=8, learning_rate=1.0, keep_best=True)
    whole = run_training(Toy(valley(0.1)), toy_info(), settings, tmp_path / "whole", resume=False)
    toy = Toy(valley(0.1))
    toy.at_step = stop_at(stopped)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings, tmp_path / "part", resume=False)
    assert run_training(Toy(valley(0.1)), toy_info(), settings, tmp_path / "part", resume=True) == whole
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run(
    tmp_path: Path, wrong: float, keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from weights that are not finite, which no later step mends; what was saved before stays."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    scores = iter([3.0, 2.0, wrong, 1.0])
    settings = settings_of(steps=4, keep_best=keep_best)
    with pytest.raises(InputError, match=rf"expected finite .*, got score = {wrong} at step 3; lower --lr"):
        run_training(Toy(lambda weight: next(scores)), toy_info(), settings, tmp_path, resume=False)
    assert (read_info(tmp_path, "prior").step, read_info(tmp_path, "prior").metrics["score"]) == (2, 2.0)
    assert load_training(tmp_path).values["step"] == 2


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_recorded_step_is_that_of_the_weights(tmp_path: Path, keep_best: bool) -> None:
    """Evaluations are due 8 times in 100 steps; the stop comes between the first and the second."""
    toy = Toy()  # the first evaluation is the best
    toy.at_step = stop_at(16)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings_of(steps=100, keep_best=keep_best), tmp_path, resume=False)
    (evaluated,) = (line["step"] for line in lines_of(tmp_path) if line["part"] == "held_out")
    assert evaluated < 16
    kept = load_weights(tmp_path)["weight"].item()
    assert kept == (toy.weights[evaluated] if keep_best else toy.weight)
    assert read_info(tmp_path, "prior").step == (evaluated if keep_best else 16)
    assert load_training(tmp_path).values["step"] == 16


def test_evaluating_and_drawing_change_nothing_that_is_learned(trained: Trained) -> None:
    images = open_images(str(trained.images)).train
    torch.manual_seed(0)
    config = TokenizerConfig(hidden_channels=4, residual_channels=2, num_codes=16, code_dim=2)
    start = VQVAE(config).state_dict()
    learned = []
    for evaluations in (1, 6):
        model = VQVAE(config)
        model.load_state_dict(start)
        stage = TokenizerStage(model, images)
        noisy = stage.evaluate
        stage.evaluate = lambda noisy=noisy: (torch.rand(7), noisy())[1]  # type: ignore[method-assign, misc]
        folder = trained.tokenizer.parent / f"evaluated-{evaluations}"
        torch.manual_seed(1)
        run_training(stage, toy_info(), settings_of(evaluations=evaluations), folder, resume=False)
        learned.append(bits_of(model))
    assert learned[0] == learned[1]


# The scores that are recorded


def test_the_recorded_score_of_a_tokenizer_is_that_of_its_weights(trained: Trained) -> None:
    images = open_images(str(trained.images)).train
    rows = np.flatnonzero(held_out(images.names))
    assert 0 < len(rows) < len(images)
    info = read_info(trained.tokenizer, "tokenizer")
    assert info.step == 3
    found = vars(measure_tokenizer(load_tokenizer(trained.tokenizer), images, rows))
    assert found == {name: info.metrics[name] for name in found}


def test_the_recorded_score_of_a_prior_is_that_of_its_weights(trained: Trained) -> None:
    codes, info = CodeDataset(trained.codes), read_info(trained.prior, "prior")
    rows = np.flatnonzero(held_out(list(codes.names())))
    found = measure_prior(load_prior(trained.prior), [codes.batch(rows)])
    assert found == info.metrics["bits_per_code"]
    lines = [json.loads(line) for line in (trained.prior / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["bits_per_code"] for line in lines if line["part"] == "held_out"}
    assert info.step == min(scores, key=lambda step: scores[step])
    assert scores[info.step] == found


def test_held_out_rows_are_never_trained_on(trained: Trained) -> None:
    images, codes = open_images(str(trained.images)).train, CodeDataset(trained.codes)
    aside = held_out(list(codes.names()))
    for stage in (
        TokenizerStage(load_tokenizer(trained.tokenizer), images),
        PriorStage(load_prior(trained.prior), codes, aside),
    ):
        train, held = set(stage.train_rows.tolist()), set(stage.held_out_rows.tolist())
        assert held == set(np.flatnonzero(aside).tolist())
        assert not train & held
        assert train | held == set(range(len(images)))
        assert stage.num_items == len(train)


# Stopping and going on, through the command line


@pytest.fixture(params=["tokenizer", "gradient tokenizer in bf16", "prior"])
def command(request: pytest.FixtureRequest, trained: Trained) -> list[object]:
    """A run whose 4 steps are more than one epoch, and whose random numbers matter (revival, dropout)."""
    if request.param == "prior":
        small = ["--channels", 4, "--num-layers", 2, "--dropout", 0.5]
        return ["train-prior", "--codes", trained.codes, "--tokenizer", trained.tokenizer, "--batch-size", 4, *small]
    other = [] if request.param == "tokenizer" else ["--codebook-update", "gradient", "--precision", "bf16"]
    return ["train-tokenizer", "--data", trained.images, "--num-codes", 16, "--batch-size", 4, *other]


def same_run(one: Path, other: Path) -> None:
    """Two run folders hold the same weights, state to go on from, and evaluations.

    Asserted on a bool: where CI is set, pytest would diff megabytes to explain a difference.
    """
    same = (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert same
    states = load_training(one), load_training(other)
    same = states[0].values == states[1].values
    assert same
    same = states[0].tensors.keys() == states[1].tensors.keys()
    assert same
    for name, tensor in states[0].tensors.items():
        same = tensor.numpy().tobytes() == states[1].tensors[name].numpy().tobytes()
        assert same
    infos = [json.loads((folder / "config.json").read_text("utf-8")) for folder in (one, other)]
    same = infos[0] == infos[1]
    assert same
    same = evaluations_of(one) == evaluations_of(other)
    assert same
    same = digest_of(one / "pictures") == digest_of(other / "pictures")
    assert same
    same = len(list((one / "pictures").glob("step-*[0-9].png"))) == len(evaluations_of(one))
    assert same


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in lines_of(folder) if line["part"] == "held_out"]


def no_step_twice(folder: Path, steps: int) -> None:
    for part in ("train", "held_out"):
        assert [line["step"] for line in lines_of(folder) if line["part"] == part] == list(range(1, steps + 1))


def test_four_steps_are_two_and_two_more(tmp_path: Path, command: list[object], codegrid: Codegrid) -> None:
    """G9, bit for bit; that a longer run differs shows that the comparison can fail."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert codegrid(*command, "--out", whole, "--steps", 4).status == 0
    assert codegrid(*command, "--out", parts, "--steps", 2).status == 0
    with pytest.raises(AssertionError):
        same_run(whole, parts)
    assert codegrid(*command, "--out", parts, "--steps", 4, "--resume").status == 0
    same_run(whole, parts)
    no_step_twice(parts, 4)
    assert {tensor.dtype for tensor in load_weights(parts).values()} <= {
        torch.float32,
        torch.bool,
        torch.int64,
    }  # never bf16
    assert codegrid(*command, "--out", parts, "--steps", 5, "--resume").status == 0
    assert load_training(parts).values["step"] == 5


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not(
    tmp_path: Path, command: list[object], stopped: int, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of a step; --resume then needs no other option."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert codegrid(*command, "--out", whole, "--steps", 4).status == 0
    with monkeypatch.context() as patch:
        during(patch, stopped, lambda: os.kill(os.getpid(), signal.SIGINT))
        outcome = codegrid(*command, "--out", parts, "--steps", 4)
    assert outcome.status == 130
    assert f"stopped at step {stopped} and saved; --resume continues" in outcome.err
    assert load_training(parts).values["step"] == stopped
    assert codegrid(command[0], "--out", parts, "--resume").status == 0
    same_run(whole, parts)
    no_step_twice(parts, 4)


def during(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Let `act` happen within a step, counted from 1, of either stage."""
    calls = []
    for stage in (TokenizerStage, PriorStage):

        def losses(self: Any, indices: np.ndarray, real: Any = stage.losses) -> dict[str, Tensor]:
            calls.append(indices)
            found: dict[str, Tensor] = real(self, indices)
            changed = act() if len(calls) == step else None
            return changed if isinstance(changed, dict) else found

        patch.setattr(stage, "losses", losses)


class Killed(BaseException):
    """What `kill -9` looks like from inside."""


def kill() -> None:
    raise Killed


def test_a_run_killed_after_its_last_save_does_the_lost_steps_again(
    tmp_path: Path, command: list[object], codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was logged and drawn after that save is forgotten, a line cut short too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert codegrid(*command, "--out", whole, "--steps", 4).status == 0
    with monkeypatch.context() as patch:
        during(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert codegrid(*command, "--out", parts, "--steps", 4).status == 130
    with monkeypatch.context() as patch:
        during(patch, 3, kill)  # steps 2 and 3 are done, and not saved
        with pytest.raises(Killed):
            cli.main([*map(str, command), "--out", str(parts), "--resume"])
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "part": "tr')
    assert load_training(parts).values["step"] == 1
    assert codegrid(command[0], "--out", parts, "--resume").status == 0
    same_run(whole, parts)
    no_step_twice(parts, 4)


def test_a_run_is_saved_now_and_then(
    tmp_path: Path, command: list[object], codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    out = tmp_path / "run"
    during(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        cli.main([*map(str, command), "--out", str(out), "--steps", "4"])
    assert load_training(out).values["step"] == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
        raise AssertionError("still going")

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
    thread = threading.Thread(target=run_training, args=arguments, kwargs={"resume": False})
    thread.start()
    thread.join()
    assert found == [before, before]
    assert load_training(tmp_path).values["step"] == 2


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


# Losses that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path, command: list[object], value: float, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert codegrid(*command, "--out", out, "--steps", 2).status == 0
    before = {name: digest for name, digest in digest_of(out).items() if name.endswith(("safetensors", "config.json"))}
    bad = torch.tensor(value, requires_grad=True)
    with monkeypatch.context() as patch:
        during(patch, 2, lambda: {"loss": bad * 1})
        outcome = codegrid(*command, "--out", out, "--steps", 4, "--resume")
    assert outcome.status == 1
    errors = [line for line in outcome.error_lines if line.startswith("Error: ")]
    assert len(errors) == len(outcome.error_lines) == 1
    assert re.search(rf"expected finite losses, got loss = {value} at step 3; lower --lr \(now 0.00[12]\)", errors[0])
    after = digest_of(out)
    assert {name: after[name] for name in before} == before
    assert codegrid(*command, "--out", out, "--steps", 4, "--resume").status == 0
    no_step_twice(out, 4)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_learning_rate_that_destroys_the_model_is_told_in_one_line(
    tmp_path: Path, trained: Trained, stage: str, codegrid: Codegrid
) -> None:
    """Nothing simulated: the weights overflow after the first step."""
    commands = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16],
        "prior": ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2],
    }
    out = tmp_path / "run"
    outcome = codegrid(*commands[stage], "--out", out, "--steps", 4, "--lr", 1e30, "--precision", "fp32")
    assert outcome.status == 1
    # A bar that is still open would have "Error: " behind it on its own line.
    assert [line[:7] for line in outcome.error_lines] == ["Error: "]
    assert re.search(r"finite .*; lower (--lr|the learning rate)", outcome.error_lines[0])
    assert not (out / "config.json").exists()
    assert "the last good state is kept" not in outcome.error_lines[0]


def test_one_step_that_destroys_the_model_is_told_as_clearly(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """The loss of the only step is finite; its evaluation is not."""
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2, "--precision", "fp32"]
    outcome = codegrid(*command, "--out", tmp_path / "run", "--steps", 1, "--lr", 1e36)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.search(r"Error: expected .*finite.* got .*--lr", outcome.error_lines[0])


# What --resume may change, and what it refuses


@pytest.mark.parametrize(
    "changed",
    [
        ["--lr", 0.5],
        ["--seed", 1],
        ["--batch-size", 5],
        ["--num-codes", 8],
        ["--code-dim", 3],
        ["--downsample", 2],
        ["--image-size", "8x8"],
        ["--channels", 1],
        ["--codebook-update", "gradient"],
        ["--data", "glyphs"],
    ],
)
def test_a_tokenizer_goes_on_as_it_was_started_or_not_at_all(
    trained: Trained, changed: Sequence[object], codegrid: Codegrid
) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-tokenizer", "--out", trained.tokenizer, "--steps", 9, "--resume", *changed)
    name = str(changed[0]).removeprefix("--")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.match(
        rf"Error: expected --resume with {name} .*, as the run was started, got .*; leave the option away",
        outcome.error_lines[0],
    )
    assert digest_of(trained.tokenizer) == before


@pytest.mark.parametrize(
    "changed", [["--lr", 0.5], ["--channels", 5], ["--num-layers", 3], ["--dropout", 0.1], ["--codes", "elsewhere"]]
)
def test_a_prior_goes_on_as_it_was_started_or_not_at_all(
    trained: Trained, changed: Sequence[object], codegrid: Codegrid
) -> None:
    before = digest_of(trained.prior)
    outcome = codegrid("train-prior", "--out", trained.prior, "--steps", 9, "--resume", *changed)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert f"expected --resume with {str(changed[0]).removeprefix('--')} " in outcome.error_lines[0]
    assert digest_of(trained.prior) == before


def test_the_same_options_again_are_no_conflict(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual way to go on is the same line with --resume; paths are then as relative as they were."""
    monkeypatch.chdir(trained.images.parent)
    out, size = tmp_path / "run", ["--image-size", "8x12", "--channels", 3, "--num-codes", 16, "--lr", 2e-3]
    command = ["train-tokenizer", "--data", f"./{trained.images.name}", "--out", out, *size]
    assert codegrid(*command, "--steps", 1).status == 0
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert (outcome.status, outcome.error_lines) == (0, [])


@pytest.mark.parametrize("way", ["{}/", "./{}", "{}"])
def test_a_path_written_another_way_is_no_conflict(
    tmp_path: Path, trained: Trained, way: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell completes a folder's name with a slash."""
    monkeypatch.chdir(trained.tokenizer.parent)
    paths = ["--codes", way.format("codes"), "--tokenizer", way.format("tokenizer")]
    command = ["train-prior", *paths, "--out", tmp_path / "run", "--channels", 2, "--num-layers", 1]
    assert codegrid(*command, "--steps", 1).status == 0
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert (outcome.status, outcome.error_lines) == (0, [])


def test_going_on_with_a_finished_run_changes_nothing_and_tells_its_numbers(
    trained: Trained, codegrid: Codegrid
) -> None:
    kept = ("model.safetensors", "config.json", "training.safetensors", "metrics.jsonl")
    for stage in ("tokenizer", "prior"):
        folder = getattr(trained, stage)
        before, info = digest_of(folder), read_info(folder, stage)
        outcome = codegrid(f"train-{stage}", "--out", folder, "--resume")
        assert outcome.status == 0
        assert {name: digest_of(folder)[name] for name in kept} == {name: before[name] for name in kept}
        assert re.search(rf"^done: .*\b{info.step}\b.*; \w+ \d", outcome.out, re.MULTILINE)


def test_resume_where_nothing_is_starts_anew(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    assert codegrid(*command, "--out", tmp_path / "a", "--resume").status == 0
    assert codegrid(*command, "--out", tmp_path / "b").status == 0
    same_run_without_pictures = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert same_run_without_pictures[0] == same_run_without_pictures[1]


def test_resume_after_a_kill_before_the_first_save_starts_anew(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 2]
    with monkeypatch.context() as patch:
        during(patch, 2, kill)
        with pytest.raises(Killed):
            cli.main([*map(str, command), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "config.json").exists()
    assert codegrid(*command, "--out", tmp_path / "run").status == 1
    assert codegrid(*command, "--out", tmp_path / "run", "--resume").status == 0
    no_step_twice(tmp_path / "run", 2)


def test_a_setting_that_an_older_checkpoint_lacks_acts_when_it_is_given(trained: Trained) -> None:
    """An option acts or is refused; it is never dropped in silence."""
    info = read_info(trained.prior, "prior")
    older = replace(info, training={name: value for name, value in info.training.items() if name != "dropout"})
    # FAILS until `settle` also takes what `before` does not have: `if name in MAY_CHANGE or name not in before`.
    assert settle(PriorSettings, {"dropout": 0.5, "steps": None}, older).dropout == 0.5
    assert settle(PriorSettings, {"dropout": None}, older).dropout == PriorSettings().dropout
    assert settle(PriorSettings, {}, older).channels == info.training["channels"] != PriorSettings().channels


def test_a_tokenizer_that_has_moved_is_named_anew(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """Its fingerprint tells that it is the same one."""
    shutil.copytree(trained.prior, tmp_path / "prior")
    shutil.copytree(trained.tokenizer, tmp_path / "moved")
    command = ["train-prior", "--out", tmp_path / "prior", "--resume", "--steps", 4]
    assert codegrid(*command, "--tokenizer", tmp_path / "moved").status == 0
    assert load_training(tmp_path / "prior").values["step"] == 4


def test_force_leaves_what_no_run_wrote(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.prior, out)
    mine = [out / "pictures" / "holiday.jpg", out / "notes.txt"]
    for path in mine:
        path.write_bytes(b"...")
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    assert codegrid(*command, "--out", out, "--force").status == 0
    assert all(path.read_bytes() == b"..." for path in mine)
    assert evaluations_of(out)[-1]["step"] == 1  # the old log is gone
    assert load_prior(out).config.channels == 2


@pytest.mark.parametrize("name", ["pictures/holiday.jpg", "model.safetensors"])
def test_resume_never_removes_what_no_run_wrote(
    tmp_path: Path, trained: Trained, name: str, codegrid: Codegrid
) -> None:
    """Only --force may replace what is there, and a folder with somebody's pictures or weights alone is no run."""
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"...")
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    outcome = codegrid(*command, "--out", tmp_path / "mine", "--resume")
    assert mine.exists(), outcome
    assert mine.read_bytes() == b"..."


def test_resume_and_force_together_are_refused(trained: Trained, codegrid: Codegrid) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-tokenizer", "--out", trained.tokenizer, "--resume", "--force")
    assert outcome.status in (1, 2)
    assert len(outcome.error_lines) == 1
    assert re.match("Error: .*--resume.*--force", outcome.error_lines[0])
    assert digest_of(trained.tokenizer) == before


def test_the_evaluations_are_spread_evenly(tmp_path: Path) -> None:
    for steps, evaluations in ((4, 8), (40, 8), (45, 8), (8, 1)):
        folder = tmp_path / f"{steps}-{evaluations}"
        run_training(Toy(), toy_info(), settings_of(steps=steps, evaluations=evaluations), folder, resume=False)
        found = [line["step"] for line in lines_of(folder) if line["part"] == "held_out"]
        assert found[-1] == steps
        assert len(found) == min(steps, evaluations)
        gaps = np.diff([0, *found])
        assert gaps.max() - gaps.min() <= 1


def test_resume_with_the_other_kind_or_a_broken_state_loses_nothing(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-prior", "--codes", trained.codes, "--out", trained.tokenizer, "--resume")
    assert outcome.status == 1
    assert "got a tokenizer checkpoint" in outcome.error_lines[0]
    assert digest_of(trained.tokenizer) == before
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--out", tmp_path / "run"]
    assert codegrid(*command, "--steps", 1).status == 0
    state = tmp_path / "run" / "training.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    before = digest_of(tmp_path / "run")
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.search(r"expected the training state .*, got a file that cannot be read", outcome.error_lines[0])
    assert digest_of(tmp_path / "run") == before


def test_a_prior_without_pictures_can_be_gone_on_with(tmp_path: Path, trained: Trained) -> None:
    """The default tokenizer is there, but made other codes: training goes on without pictures, also when resumed."""
    other = tmp_path / "checkpoints" / "tokenizer"
    save_tokenizer(other, brightness_tokenizer())
    given = {"codes": str(trained.codes), "channels": 2, "num_layers": 1, "precision": "fp32"}
    train_prior(RunFolder(out=tmp_path / "prior", device="cpu"), {**given, "steps": 1}, other)
    train_prior(RunFolder(out=tmp_path / "prior", device="cpu", resume=True), {**given, "steps": 2}, other)
    assert load_training(tmp_path / "prior").values["step"] == 2


# The log


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "sub" / "metrics.jsonl")
    log.write(3, "train", {"loss": math.nan, "rate": math.inf, "used": 4})
    (line,) = lines_of(tmp_path / "sub")
    assert (line["step"], line["part"], line["loss"], line["rate"], line["used"]) == (3, "train", None, None, 4)
    assert line["seconds"] >= 0


def test_a_line_cut_short_anywhere_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2):
        log.write(step, "train", {"loss": 0.5})
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(len(last)):
        path.write_bytes(whole[: len(whole) - len(last) + cut])
        log.drop_after(2)
        log.write(3, "train", {"loss": 0.25})
        steps = [line["step"] for line in lines_of(tmp_path)]
        assert steps in ([1, 3], [1, 2, 3])


def test_what_came_after_a_step_is_dropped_and_no_more(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.drop_after(3)  # there is none yet
    for step in range(1, 6):
        for part in ("train", "held_out"):
            log.write(step, part, {"loss": 1 / step})
    before = lines_of(tmp_path)
    log.drop_after(3)
    assert lines_of(tmp_path) == [line for line in before if line["step"] <= 3]


def test_losses_that_are_not_finite_name_themselves(tmp_path: Path) -> None:
    toy = Toy()
    toy.losses = lambda indices: {  # type: ignore[method-assign]
        "loss": toy.model.weight.sum(),
        "commitment": toy.model.weight.sum() / 0,
    }
    with pytest.raises(InputError, match="got commitment = nan at step 0; lower --lr"):
        run_training(toy, toy_info(), settings_of(), tmp_path, resume=False)
    assert toy.weight == 0  # the step was not taken
