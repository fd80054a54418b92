"""Whole runs of several processes against one process, with threads as processes.

In place of DistributedDataParallel the stage takes the mean of the gradients itself; tests/training/test_torchrun.py
has the real one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.models.checkpoint import load_training, read_run
from pipeline.runtime.process_group import ALONE, OtherProcessError, ProcessGroup
from pipeline.training import loop
from pipeline.training.divergence import DivergedError
from pipeline.training.loop import run_training
from pipeline.training.metrics_log import RunningMeans
from pipeline.training.prior_stage import PriorStage
from pipeline.training.schedule import DataOrder
from pipeline.training.shared_steps import SharedSteps, Wishes
from pipeline.training.stage import Batch, Stage

from ..process_threads import run_in_threads
from ..support import load_weights
from .test_shared_steps import prior_stage
from .training_runs import lines_of, settings_of, toy_info

SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 7, "learning_rate": 0.02, "evaluations": 2}


class Averaging(PriorStage):
    """A prior in training whose gradients are averaged over processes once all are computed."""

    def __init__(self, group: ProcessGroup) -> None:
        made = prior_stage(group)
        super().__init__(made.model, made.grids, np.arange(20) >= 16, group=group)
        self.seen: list[list[int]] = []
        # Here, because until Python 3.12 a cached property has one lock for all threads.
        self.simple_bits = group.run_on_main(self._count_simple_bits)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(batch.indices.tolist())
        return super().losses(batch)

    def finish_step(self) -> None:
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad = (self.group.sums(parameter.grad) / self.group.count).to(parameter.dtype)


@pytest.fixture(autouse=True)
def _nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def plain(self: SharedSteps, stage: Stage) -> Iterator[None]:
        yield

    monkeypatch.setattr(SharedSteps, "gradients_of", plain)
    monkeypatch.setattr(loop, "LINES_PER_EVALUATION", 1)


def run(folder: Path, count: int, *, resume: bool = False, **changes: Any) -> list[Any]:
    """Train in `folder`; return the stage of each process, or what it raised."""

    def work(group: ProcessGroup) -> Averaging:
        stage = Averaging(group)
        saved = read_run(folder, "prior") if resume else None
        run_training(stage, toy_info(), settings_of(**(SETTINGS | changes)), folder, resume=saved, group=group)
        return stage

    return run_in_threads(count, work) if count > 1 else [work(ALONE)]


def stop_in(patch: pytest.MonkeyPatch, rank: int, step: int) -> None:
    """Let Ctrl-C reach one process within a step, counted from 1; alone, it asks after the step."""
    real = loop._Trainer._wishes

    def wishes(self: loop._Trainer) -> Wishes:
        now = self.step if self.group.count == 1 else self.step + 1
        return Wishes(signal=2) if (self.group.rank, now) == (rank, step) else real(self)

    patch.setattr(loop._Trainer, "_wishes", wishes)


def differs_by(one: Path, other: Path) -> float:
    """The largest difference of any weight, or of the state that the next step depends on."""
    worst = 0.0
    for read in (load_weights, lambda folder: load_training(folder).tensors):
        first: dict[str, Tensor] = read(one)
        second: dict[str, Tensor] = read(other)
        assert first.keys() == second.keys()
        worst = max([worst, *(float((first[name] - second[name]).abs().max()) for name in first)])
    return worst


def same_log(one: Path, other: Path) -> None:
    pairs = list(zip(lines_of(one), lines_of(other), strict=True))
    assert len(pairs) == 2 + 2
    for first, second in pairs:
        assert first.keys() == second.keys()
        assert first["part"] == second["part"]
        for name in first.keys() - {"part", "seconds"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4), name


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """The run of one process."""
    run(tmp_path / "alone", 1)
    return tmp_path / "alone"


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (3, 1), (3, 2)])
def test_several_processes_train_what_one_trains(tmp_path: Path, alone: Path, count: int, accumulate: int) -> None:
    """Seven items on two or three: weights, optimizer, log, evaluations and result; each item is learned from once."""
    stages = run(tmp_path / "shared", count, accumulate=accumulate)
    assert differs_by(alone, tmp_path / "shared") < 1e-5
    start = prior_stage().model.state_dict()
    assert max(float((x - start[name]).abs().max()) for name, x in load_weights(alone).items()) > 1e-3
    same_log(alone, tmp_path / "shared")
    for stage in stages[1:]:
        assert all(torch.equal(x, stages[0].model.state_dict()[name]) for name, x in stage.model.state_dict().items())
    for step in range(6):
        own = slice((step + 1) * accumulate, (step + 2) * accumulate)  # after the rehearsal of the first
        seen = [index for stage in stages for part in stage.seen[own] for index in part]
        assert seen == DataOrder(16, 7, 0).batch(step).tolist()


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_a_run_is_resumed_by_another_number_of_processes(tmp_path: Path, alone: Path, first: int, then: int) -> None:
    """Stopped within an interval of the log, by a signal that reached the last process alone."""
    folder = tmp_path / "resumed"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, first - 1, 4)
        if first == 1:
            with pytest.raises(KeyboardInterrupt):
                run(folder, 1)
        else:
            assert [type(outcome) for outcome in run(folder, first)] == [KeyboardInterrupt] * first
    values = load_training(folder).values
    assert (values["step"], values["interval"]["steps"]) == (4, 1)
    stages = run(folder, then, resume=True)
    assert differs_by(alone, folder) < 1e-5
    same_log(alone, folder)
    rehearsed = 1 if then > 1 else 0
    for step in range(4, 6):
        seen = [index for stage in stages for index in stage.seen[rehearsed + step - 4]]
        assert seen == DataOrder(16, 7, 0).batch(step).tolist()


def test_sums_of_losses_that_are_in_another_order_in_each_process_are_added_by_name() -> None:
    """As after a resume, for a file has its names in no order; the means come in the order of the losses."""

    def work(group: ProcessGroup) -> list[list[tuple[str, float]]]:
        means, names = RunningMeans(), ["loss", "bits"] if group.rank else ["bits", "loss"]
        saved = {"loss": torch.tensor(1.0), "bits": torch.tensor(20.0)}
        means.load(1, {name: saved[name] * (1 if group.is_main else 0) for name in names})
        found = [sorted((name, total.item()) for name, total in means.sums_of_all(group).items())]
        means.add({"loss": torch.tensor(2.0), "bits": torch.tensor(30.0)})
        return [*found, list(means.take(group).items())]

    assert run_in_threads(2, work) == [[[("bits", 20.0), ("loss", 1.0)], [("loss", 2.5), ("bits", 40.0)]]] * 2


def test_a_resumed_run_of_two_is_the_one_that_never_stopped(tmp_path: Path) -> None:
    """Bit for bit, for the order of the sums is the same."""
    run(tmp_path / "whole", 2)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 0, 4)
        run(tmp_path / "resumed", 2)
    run(tmp_path / "resumed", 2, resume=True)
    for name in ("model.safetensors", "training.safetensors"):
        same = (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
        assert same, name


def poison(patch: pytest.MonkeyPatch, rank: int, *calls: int) -> None:
    """Make the loss of one process NaN in these calls, counted from 1."""
    real = Averaging.losses

    def losses(self: Averaging, batch: Batch) -> dict[str, Tensor]:
        found = real(self, batch)
        bad = self.group.rank == rank and len(self.seen) in calls
        return {**found, "loss": found["loss"] * math.nan} if bad else found

    patch.setattr(Averaging, "losses", losses)


@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_in_one_process_takes_all_back_once(tmp_path: Path, bad: int) -> None:
    """In step 3, to the same state; two of them rehearse the first step."""
    for name, count, rank in (("alone", 1, 0), ("shared", 2, bad)):
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, rank, 2 + count)
            run(tmp_path / name, count)
        assert load_training(tmp_path / name).values["learning_rate_scale"] == loop.LOWER_RATE
    assert differs_by(tmp_path / "alone", tmp_path / "shared") < 1e-5
    same_log(tmp_path / "alone", tmp_path / "shared")


@pytest.mark.parametrize("bad", [0, 1])
def test_the_second_time_ends_all_and_the_main_process_says_why(tmp_path: Path, bad: int) -> None:
    """In step 4 of the second try; the other ends without a word, and nothing is saved."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, bad, 4, 8)
        first, second = run(tmp_path, 2)
    assert isinstance(first, DivergedError)
    assert "got loss = nan at step 4, in the batch of " in str(first)
    assert isinstance(second, OtherProcessError)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_went_apart_are_never_saved(tmp_path: Path) -> None:
    """As with another version of torch on one machine."""
    real = Averaging.finish_step

    def finish_step(self: Averaging) -> None:
        real(self)
        if self.group.rank == 1:
            next(self.model.parameters()).data[0, 0] += 1e-3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Averaging, "finish_step", finish_step)
        first, second = run(tmp_path, 2)
    assert "expected the same weights and codebook after 6 steps in every process" in str(first)
    assert isinstance(second, OtherProcessError)
    assert not (tmp_path / "model.safetensors").exists()
