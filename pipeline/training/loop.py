"""The training loop of both stages: steps, evaluations, checkpoints, resuming.

A stage (`stage.py`) says what a batch costs and how good the model is; the loop does the rest. Everything a step
depends on is a function of the step number (`schedule.py`) or saved with it (weights, optimizer, random states): a run
that is stopped and resumed ends, on a CPU, with the same bytes as one that never stopped.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.checkpoint import (
    CONFIG,
    CheckpointInfo,
    TrainingState,
    load_training,
    load_weights,
    read_info,
    save_checkpoint,
)
from ..runtime.atomic_files import current
from ..runtime.console import say
from ..runtime.device import autocast
from ..runtime.interrupts import StopSignal
from ..runtime.progress import Progress
from .metrics_log import MetricsLog, RunningMeans
from .optimizer import Optimizers
from .recipes import PriorSettings, TokenizerSettings
from .run_folder import PICTURES
from .schedule import DataOrder, learning_rate_at
from .stage import Evaluation, Stage

SAVE_EVERY_SECONDS = 60.0
LINES_PER_EVALUATION = 20  # of the log, about the training losses


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know about a run."""

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
    def from_settings(
        cls, settings: TokenizerSettings | PriorSettings, device: torch.device, **extra: Any
    ) -> "LoopSettings":
        """Return the loop settings of a stage: what the user chose, and `extra`, which the user does not choose."""
        shared = {name: getattr(settings, name) for name in ("steps", "batch_size", "seed", "precision", "optimizer")}
        return cls(**shared, learning_rate=settings.lr, device=device, **extra)


def run_training(
    stage: Stage, info: CheckpointInfo, settings: LoopSettings, folder: Path, *, resume: bool
) -> CheckpointInfo:
    """Train until `settings.steps` and return the info of the final checkpoint; `folder` can be resumed at any time.

    Raises:
        InputError: a loss or the state to save is not finite; the checkpoint of the last good state stays.
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


class _Trainer:
    """Holds the state of one run, which changes from step to step, and saves and restores it."""

    def __init__(self, stage: Stage, info: CheckpointInfo, settings: LoopSettings, folder: Path) -> None:
        self.stage, self.info, self.settings, self.folder = stage, info, settings, folder
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.order = DataOrder(stage.num_items, settings.batch_size, settings.seed)
        self.optimizers = Optimizers(stage.model, settings.optimizer, settings.learning_rate)
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.means = RunningMeans()
        item = "image" if info.kind == "tokenizer" else "grid"
        self.bar = Progress(settings.steps, unit="step", batch_size=settings.batch_size, item=item)
        self.saved_at = time.monotonic()

    def advance(self) -> None:
        """Take one step of the optimizer, and do what is due after it."""
        rate = learning_rate_at(self.step, peak=self.settings.learning_rate, steps=self.settings.steps)
        self.stage.model.train()
        with autocast(self.settings.device, self.settings.precision):
            losses = self.stage.losses(self.order.batch(self.step))
        self.optimizers.zero_grad()
        losses["loss"].backward()
        if self.settings.device.type == "cpu":  # elsewhere it would cost a sync in each step
            self._check_finite(losses)
        self.optimizers.step(rate)
        self.step += 1
        self.bar.update()
        self.means.add(losses)
        if self._due(LINES_PER_EVALUATION * self.settings.evaluations):
            self._report(losses, rate)
        if self._due(self.settings.evaluations):
            self._evaluate()
        if self.step == self.settings.steps or time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS:
            self._check_finite(losses)
            self.save()

    def finish(self) -> CheckpointInfo:
        """Return the info of the checkpoint in the folder."""
        return self.info if self.info.fingerprint else read_info(self.folder, self.info.kind)

    def save(self) -> None:
        """Write the checkpoint: the weights to use, and all that a resumed run needs.

        Raises:
            InputError: some of it is not finite; nothing is written.
        """
        state = self._state()
        self._check_finite_state(state.tensors)
        weights, step = self.stage.model.state_dict(), self.step
        if self.best_weights is not None:
            weights, step = self.best_weights, int(self.best["step"])
            self._check_finite_state({f"best weights/{name}": tensor for name, tensor in weights.items()})
        info = replace(self.info, step=step, metrics=self.best)
        self.info = save_checkpoint(self.folder, info, weights, state)
        self.saved_at = time.monotonic()

    def restore(self, state: TrainingState) -> None:
        """Restore what `save` wrote; a state of an older version has no "interval"."""
        self.step = int(state.values["step"])
        self.best = dict(state.values["best"])
        groups = _by_prefix(state.tensors)
        self.stage.model.load_state_dict(groups["model"])
        self.stage.load_state(groups.get("stage", {}))
        if self.settings.keep_best and self.best:
            self.best_weights = load_weights(self.folder)  # saved together with the state
        self.optimizers.load_tensors(groups.get("optimizer", {}))
        torch.set_rng_state(groups["random"]["cpu"])
        if self.settings.device.type == "cuda" and "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"])
        interval = state.values.get("interval", {"steps": 0, "seconds": None})
        sums = {name: tensor.to(self.settings.device) for name, tensor in groups.get("interval", {}).items()}
        self.means.load(interval["steps"], sums)
        self.log.resume(self.step, interval["seconds"])
        self.bar.start_at(self.step)

    def _state(self) -> TrainingState:
        """Return the training state; its "interval" is what has passed since the last line of the log.

        Right after a line, as at the end of a run, there is no interval: the log has the seconds, and two runs that did
        the same have the same state, byte for byte.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.stage.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizers.tensors().items()}
        tensors |= {f"stage/{name}": tensor for name, tensor in self.stage.state().items()}
        tensors |= {f"interval/{name}": total for name, total in self.means.sums.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.settings.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        values: dict[str, Any] = {"step": self.step, "best": self.best}
        if self.means.count:
            values["interval"] = {"steps": self.means.count, "seconds": self.log.seconds}
        return TrainingState(tensors=tensors, values=values)

    def _evaluate(self) -> None:
        """Evaluate the model, write a preview, log the numbers, and raise InputError unless they are finite."""
        self.stage.model.eval()
        forked = [self.settings.device] if self.settings.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(forked):  # evaluating must not change what is learned
            evaluation = self.stage.evaluate()
            self.stage.preview(self.folder / PICTURES / f"step-{self.step:07d}.png", evaluation)
        self.log.write(self.step, "held_out", evaluation.numbers)
        self._check_finite({name: torch.tensor(value) for name, value in evaluation.numbers.items()})
        if not self.settings.keep_best or not self.best or evaluation.is_better_than(self.best):
            self._record(evaluation)
        summary = [f"  {evaluation.summary}"] if evaluation.summary else []
        say(f"step {self.step:,}: {_in_words(evaluation.numbers)}", *summary)

    def _record(self, evaluation: Evaluation) -> None:
        """Record this evaluation for the checkpoint and, where the best weights are kept, the present weights."""
        self.best = {"step": self.step, **evaluation.numbers}
        if self.settings.keep_best:
            self.best_weights = {k: v.detach().clone() for k, v in self.stage.model.state_dict().items()}

    def _report(self, losses: Mapping[str, Tensor], rate: float) -> None:
        """Log the mean losses since the last line; show them in the progress bar. Raise InputError unless finite."""
        self._check_finite(losses)
        numbers = self.means.take() | self.stage.status()
        self.bar.set_numbers(_in_words(numbers))
        self.log.write(self.step, "train", numbers | {"learning_rate": rate})

    def _check_finite(self, losses: Mapping[str, Tensor]) -> None:
        """Raise InputError if a loss is NaN or infinite; a CPU-GPU sync for each."""
        for name, loss in losses.items():
            if not bool(torch.isfinite(loss)):
                raise self._diverged("finite losses", f"{name} = {loss.item()}")

    def _check_finite_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise InputError if a tensor holds NaN or infinity; a CPU-GPU sync for each.

        A scalar may be infinite: so the quantizer marks the count of updates of a codebook that was set by hand.
        """
        for name, tensor in tensors.items():
            wrong = tensor.isnan() if tensor.dim() == 0 else ~tensor.isfinite()
            if bool(wrong.any()):
                raise self._diverged("a finite state to save", f"{name} with {int(wrong.sum()):,} values that are not")

    def _diverged(self, expected: str, got: str) -> InputError:
        """Return the error that ends the run; it says which state is kept."""
        kept = f"the last good state is kept in {self.folder}" if current(self.folder, CONFIG).exists() else ""
        return InputError(
            expected=expected,
            got=f"{got} at step {self.step:,}",
            do=f"lower --lr (now {self.settings.learning_rate:g}); {kept or 'nothing was saved yet'}",
        )

    def _due(self, times: int) -> bool:
        """Return whether something that happens `times` times in the run, evenly and at its end, is due now."""
        steps = self.settings.steps
        return self.step * times // steps > (self.step - 1) * times // steps


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors grouped by what precedes the first slash of their names: {"a/b": x} -> {"a": {"b": x}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups


def _in_words(numbers: Mapping[str, float]) -> str:
    """Return numbers with their names in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
