"""The training loop of both stages: order of the data, learning rate, progress, evaluation, checkpoints, resuming.

A stage says what a batch costs and how good the model is; the loop does the rest. Everything a step depends on is a
function of the step number (order of the data, learning rate) or saved with it (weights, optimizer, random states):
a run that is stopped and resumed ends, on a CPU, with the same bytes as one that never stopped.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import CONFIG, CheckpointInfo, TrainingState, load_training, load_weights, read_info, save_checkpoint
from .device import autocast
from .errors import InputError
from .files import current
from .interrupt import StopSignal
from .metrics_log import MetricsLog
from .optimizer import Optimizers

SAVE_EVERY_SECONDS = 60.0
WARMUP_STEPS = 100


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    num_items: int  # training items; a batch is drawn from range(num_items)
    score: str  # key of `evaluate()` that is best when lowest
    remark: str  # what the last evaluation means, in words; empty for nothing

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The scalar losses of a batch of items; "loss" is the one that is minimised."""

    def status(self) -> dict[str, float]:
        """Numbers about the steps since the last call, for the progress bar."""

    def evaluate(self) -> dict[str, float]:
        """Numbers on held-out items."""

    def draw(self, path: Path) -> None:
        """A picture of what the model can do by now."""

    def state(self) -> dict[str, Tensor]:
        """What its numbers need to go on after a resume, beside the model."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put that back."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    steps: int  # in all, those before a resume included
    batch_size: int
    learning_rate: float  # after the warm-up
    seed: int
    device: torch.device
    precision: str  # "auto", "fp32" or "bf16"
    optimizer: str = "muon"  # or "adam"
    evaluations: int = 8  # over the whole run, the last at its end
    keep_best: bool = False  # model.safetensors holds the weights of the best evaluation, not the last weights

    @classmethod
    def chosen(cls, settings: Any, device: torch.device, **more: Any) -> "LoopSettings":
        """From the settings of a stage (`TokenizerSettings`, `PriorSettings`), and what the user does not choose."""
        shared = {name: getattr(settings, name) for name in ("steps", "batch_size", "seed", "precision", "optimizer")}
        return cls(**shared, learning_rate=settings.lr, device=device, **more)


def run_training(
    stage: Stage, info: CheckpointInfo, settings: LoopSettings, folder: Path, *, resume: bool
) -> CheckpointInfo:
    """Train until `settings.steps`, keeping `folder` resumable all along; returns the info of the final checkpoint.

    Raises:
        InputError: a loss is not finite; the checkpoint of the last good state stays.
        KeyboardInterrupt: Ctrl-C, after saving.
        SystemExit: SIGTERM, after saving.
    """
    trainer = _Trainer(stage, info, settings, folder)
    with trainer.bar, StopSignal() as stop:  # closing the bar ends its line, so that an error has one of its own
        if resume:
            trainer.restore(load_training(folder))
        while trainer.step < settings.steps:
            trainer.advance()
            if stop.requested:
                trainer.save()
                stop.exit(f"stopped at step {trainer.step:,} and saved; --resume continues")
    return trainer.finish()


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Linear warm-up over WARMUP_STEPS, then half a cosine down to 0 at the last step."""
    if step < WARMUP_STEPS:
        return settings.learning_rate * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, settings.steps - WARMUP_STEPS)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class DataOrder:
    """Which items make up the batch of a step: every epoch a new permutation, one after the other without a seam."""

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Indices [batch_size] of this step."""
        position, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(position, self.num_items)
            part = self._of(epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return np.concatenate(parts)

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        return self._permutation


class _Trainer:
    """One run: the state that changes from step to step."""

    def __init__(self, stage: Stage, info: CheckpointInfo, settings: LoopSettings, folder: Path) -> None:
        self.stage, self.info, self.settings, self.folder = stage, info, settings, folder
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.order = DataOrder(stage.num_items, settings.batch_size, settings.seed)
        self.optimizers = Optimizers(stage.model, settings.optimizer, settings.learning_rate)
        self.log = MetricsLog(folder / "metrics.jsonl")
        interval = 1.0 if sys.stderr.isatty() else 15.0  # a log file needs no moving bar
        self.bar = tqdm(total=settings.steps, unit="step", dynamic_ncols=True, mininterval=interval, smoothing=0.05)
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self.saved_at = time.monotonic()

    def advance(self) -> None:
        """One step of the optimizer, and what is due after it."""
        rate = learning_rate_at(self.step, self.settings)
        self.stage.model.train()
        with autocast(self.settings.device, self.settings.precision):
            losses = self.stage.losses(self.order.batch(self.step))
        self.optimizers.zero_grad()
        losses["loss"].backward()
        if self.settings.device.type == "cpu":
            self._check_finite(losses)
        self.optimizers.step(rate)
        self.step += 1
        self.bar.update()
        self._add(losses)
        if self._due(20 * self.settings.evaluations):
            self._report(losses, rate)
        if self._due(self.settings.evaluations):
            self._evaluate()
        if self.step == self.settings.steps or time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS:
            self._check_finite(losses)
            self.save()

    def finish(self) -> CheckpointInfo:
        return self.info if self.info.fingerprint else read_info(self.folder, self.info.kind)

    def save(self) -> None:
        """Write the checkpoint: the weights to use, and all that a resumed run needs."""
        weights = self.best_weights if self.best_weights is not None else self.stage.model.state_dict()
        state = self._state()
        step = int(self.best["step"]) if self.best_weights is not None else self.step
        info = replace(self.info, step=step, metrics=self.best)
        self.info = save_checkpoint(self.folder, info, weights, state)
        self.saved_at = time.monotonic()

    def restore(self, state: TrainingState) -> None:
        """Put everything back to where `save` found it."""
        self.step = int(state.values["step"])
        self.best = dict(state.values["best"])
        parts = _unflatten(state.tensors)
        self.stage.model.load_state_dict(parts["model"])
        self.stage.load_state(parts.get("stage", {}))
        if self.settings.keep_best and self.best:
            self.best_weights = load_weights(self.folder)  # saved together with the state
        self.optimizers.load_tensors(parts.get("optimizer", {}))
        torch.set_rng_state(parts["random"]["cpu"])
        if self.settings.device.type == "cuda" and "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"])
        self.log.drop_after(self.step)
        self.bar.update(self.step)
        self.bar.unpause()

    def _state(self) -> TrainingState:
        tensors = {f"model/{name}": tensor for name, tensor in self.stage.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizers.tensors().items()}
        tensors |= {f"stage/{name}": tensor for name, tensor in self.stage.state().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.settings.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        return TrainingState(tensors=tensors, values={"step": self.step, "best": self.best})

    def _evaluate(self) -> None:
        self.stage.model.eval()
        forked = [self.settings.device] if self.settings.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(forked):  # evaluating must not change what is learned
            numbers = self.stage.evaluate()
            self.stage.draw(self.folder / "pictures" / f"step-{self.step:07d}.png")
        self.log.write(self.step, "held_out", numbers)
        self._check_finite({name: torch.tensor(value) for name, value in numbers.items()})
        score = self.stage.score
        if not self.settings.keep_best or not self.best or numbers[score] < self.best[score]:
            self.best = {"step": self.step, **numbers}
            if self.settings.keep_best:
                self.best_weights = {k: v.detach().clone() for k, v in self.stage.model.state_dict().items()}
        remark = f"\n  {self.stage.remark}" if self.stage.remark else ""
        self.bar.write(f"step {self.step:,}: {_words(numbers)}{remark}")

    def _report(self, losses: Mapping[str, Tensor], rate: float) -> None:
        self._check_finite(losses)
        means = {name: float(total) / self.summed for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        numbers = means | self.stage.status()
        self.bar.set_postfix_str(_words(numbers), refresh=False)
        self.log.write(self.step, "train", numbers | {"learning_rate": rate})

    def _add(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(loss)) + loss.detach()
        self.summed += 1

    def _check_finite(self, losses: Mapping[str, Tensor]) -> None:
        wrong = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        if wrong:
            kept = f"the last good state is kept in {self.folder}" if current(self.folder, CONFIG).exists() else ""
            raise InputError(
                expected="finite losses",
                got=f"{wrong[0]} = {losses[wrong[0]].item()} at step {self.step:,}",
                do=f"lower --lr (now {self.settings.learning_rate:g}); {kept or 'nothing was saved yet'}",
            )

    def _due(self, times: int) -> bool:
        """Whether this step is one of `times` even shares of the run, or its end."""
        steps = self.settings.steps
        return self.step * times // steps > (self.step - 1) * times // steps


def _unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}, one level."""
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition("/")
        parts.setdefault(head, {})[rest] = tensor
    return parts


def _words(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
