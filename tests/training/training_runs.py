"""What the tests of training share: a toy stage, ways to stop a run, and the comparison of two runs."""

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.models.checkpoint import CheckpointInfo, load_training, read_run
from pipeline.training.loop import run_training
from pipeline.training.loop_settings import LoopSettings
from pipeline.training.prior_stage import PriorStage
from pipeline.training.stage import Batch, Evaluation, Stage
from pipeline.training.tokenizer_stage import TokenizerStage

from ..support import digest_of


def settings_of(**changes: Any) -> LoopSettings:
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 2, "learning_rate": 0.1, "seed": 0, "precision": "fp32"}
    return LoopSettings(**{**defaults, **changes}, device=torch.device("cpu"))


def batch_of(stage: Stage, indices: Sequence[int] | np.ndarray, keys: Sequence[int] | None = None) -> Batch:
    """Return a batch of these items, on the CPU; their keys are 0, 1, .. by default."""
    rows = np.asarray(indices, dtype=np.int64)
    return Batch(rows, torch.tensor(range(len(rows)) if keys is None else keys), stage.load(rows))


def losses_of(stage: Stage, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Return the losses of a stage of these items, as in a step of which they are the batch."""
    batch = batch_of(stage, indices)
    stage.begin_step([batch])
    losses = stage.losses(batch)
    stage.finish_step()
    return losses


class Toy:
    """A stage with one weight, which the loss pushes up by Adam's step; its score is a function of the weight."""

    def __init__(self, score_of: Callable[[float], float] = lambda weight: weight, num_items: int = 5) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.network: nn.Module = self.model
        self.compilable: tuple[nn.Module, ...] = ()
        self.num_items, self.score_of = num_items, score_of
        self.seen: list[list[int]] = []
        self.weights: list[float] = []  # before each step
        self.at_step: Callable[[int], None] = lambda step: None

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    def weights_to_use(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        return (torch.from_numpy(indices),)

    def begin_step(self, batches: Sequence[Batch]) -> None:
        pass

    def finish_step(self) -> None:
        pass

    def discard_step(self) -> None:
        pass

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        assert self.model.training
        assert batch.data[0].tolist() == batch.indices.tolist()
        self.seen.append(batch.indices.tolist())
        self.weights.append(self.weight)
        self.at_step(len(self.seen))
        return {"loss": -self.model.weight.sum()}

    def names(self, indices: np.ndarray) -> list[str]:
        return [f"{index}.png" for index in indices]

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> Evaluation:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.evaluation = Evaluation(numbers={"score": self.score_of(self.weight)}, score_name="score")
        return self.evaluation

    def preview(self, path: Path, evaluation: Evaluation) -> None:
        assert re.fullmatch(r"step-\d{7}\.png", path.name)
        assert evaluation is self.evaluation

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert state == {}


def toy_info() -> CheckpointInfo:
    return CheckpointInfo(kind="prior", config={}, step=0, class_names=[], preprocessing={}, training={})


def run_again(stage: Stage, settings: LoopSettings, folder: Path) -> CheckpointInfo:
    """Resume the run that was saved in `folder`."""
    return run_training(stage, toy_info(), settings, folder, resume=read_run(folder, "prior"))


def stop_at(step: int) -> Callable[[int], None]:
    return lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None


def lines_of(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of the log of a run, by default of all splits, without `waiting_share`, which is a time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(0 <= line.pop("waiting_share", 0) <= 1 for line in lines)
    return [line for line in lines if split in (None, line["part"])]


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in lines_of(folder, "held_out")]


def same_run(one: Path, other: Path) -> None:
    """Assert that two run folders hold the same weights, training state and evaluations.

    On a bool: where CI is set, pytest would diff megabytes to explain a difference.
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


def no_step_twice(folder: Path, steps: int) -> None:
    for split in ("train", "held_out"):
        assert [line["step"] for line in lines_of(folder, split)] == list(range(1, steps + 1))


def during(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Make either stage call `act` within a step, counted from 1; losses that `act` returns replace the real ones."""
    calls = []
    for stage in (TokenizerStage, PriorStage):

        def losses(self: Any, batch: Batch, real: Any = stage.losses) -> dict[str, Tensor]:
            calls.append(batch)
            found: dict[str, Tensor] = real(self, batch)
            changed = act() if len(calls) == step else None
            return changed if isinstance(changed, dict) else found

        patch.setattr(stage, "losses", losses)


class Killed(BaseException):
    """What `kill -9` looks like from inside."""


def kill() -> None:
    raise Killed
