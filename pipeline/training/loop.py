"""The training loop of both stages and of a sharp decoder: steps, evaluations, checkpoints, resuming.

A stage (`stage.py`) says what a batch costs and how good the model is; the loop does the rest. Everything a step
depends on is a function of the step number (`schedule.py`) or saved with it (weights, optimizer): a run that is stopped
and resumed ends, on a CPU, with the same bytes as one that never stopped. Several processes may share a run
(`shared_steps.py`): they compute what one does, but for rounding.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..models.checkpoint import CheckpointInfo, SavedRun, TrainingState, read_run, save_checkpoint
from ..models.tensor_file import check_finite, check_outlines, outlines_of
from ..runtime.console import OutputClosed, output_closed, say
from ..runtime.device import product_dtype
from ..runtime.interrupts import StopSignal
from ..runtime.optimizer import Optimizers
from ..runtime.process_group import ALONE, OtherProcessError, ProcessGroup
from ..runtime.progress import Progress
from .cost import CostEstimate
from .divergence import DivergedError
from .loop_settings import LoopSettings
from .metrics_log import MetricsLog, RunningMeans
from .run_folder import PICTURES, note_save
from .run_state import Interval, Position, collect_state, copy_of, load_state
from .schedule import learning_rate_at
from .shared_steps import SharedSteps, Wishes
from .stage import Evaluation, Stage
from .step_gradients import StepGradients
from .time_use import TimeUse

SAVE_EVERY_SECONDS = 60.0
LINES_PER_EVALUATION = 20  # of the log, about the training losses
SHORTEST_EXPLAINED = 60.0  # seconds of a run, from which on it says what its time was used for
MUCH_WAITING = 0.03  # share of the time, from which on it is shown
LOWER_RATE = 0.5  # factor of the learning rate after a loss that is not finite

_log = logging.getLogger(__name__)


def run_training(
    stage: Stage,
    info: CheckpointInfo,
    settings: LoopSettings,
    folder: Path,
    *,
    resume: SavedRun | None = None,
    group: ProcessGroup = ALONE,
) -> CheckpointInfo:
    """Train until `settings.steps` and return the info of the final checkpoint; `folder` can be resumed at any time.

    A loss that is not finite takes the run back to the last good state, once, with a lower learning rate.

    Args:
        stage: the model and its items.
        info: the config of the checkpoint, but for results.
        settings: of the run.
        folder: of the run; nobody else may write into it meanwhile.
        resume: what was saved in the folder; None to start from the beginning.
        group: the processes that share the run, each of which calls this with a stage of its own; the main process
            alone writes.

    Raises:
        InputError: a loss or the state to save is not finite for the second time, or a checkpoint cannot be written;
            the last good checkpoint stays.
        OtherProcessError: in place of an InputError, where it is raised in the main process.
        KeyboardInterrupt: Ctrl-C, after saving.
        SystemExit: SIGTERM, SIGHUP, or nobody reads standard output any more, after saving.
    """
    with StopSignal() as stop:
        trainer = _Trainer(stage, info, settings, folder, group, stop)
        with trainer.shared.gradients_of(stage), trainer.bar:  # which ends its line before an error is printed
            trainer.start(resume)
            with trainer.gradients.loading_from(trainer.step):
                while trainer.step < settings.steps:
                    try:
                        trainer.advance()
                        trainer.stop_if_wished()
                    except DivergedError as error:
                        if trainer.shared.wishes().signal:
                            raise error if group.is_main else OtherProcessError from None
                        trainer.roll_back(error)
                trainer.say_time_use()
    return trainer.info


class _Trainer:
    """Holds the state of one run, which changes from step to step, and saves and restores it."""

    def __init__(
        self,
        stage: Stage,
        info: CheckpointInfo,
        settings: LoopSettings,
        folder: Path,
        group: ProcessGroup,
        stop: StopSignal,
    ) -> None:
        self.stage, self.info, self.settings, self.folder = stage, info, settings, folder
        self.group, self.stop = group, stop
        self.shared = SharedSteps(group, self._wishes)
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.learning_rate_scale = 1.0
        self.gradients = StepGradients(stage, settings, self.shared)
        self.divergence = self.gradients.divergence
        dtype = product_dtype(settings.device, settings.precision)
        self.optimizers = Optimizers(stage.model, settings.optimizer, settings.learning_rate, dtype=dtype)
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.means = RunningMeans()
        item = "grid" if info.kind == "prior" else "image"
        self.bar = Progress(settings.steps, unit="step", batch_size=settings.batch_size, item=item)
        self.cost = CostEstimate(settings.steps)
        self.saved_at = time.monotonic()
        self.beginning: TrainingState | None = None  # to return to until the folder holds a save of this run
        self.best_at_beginning: Mapping[str, Tensor] | None = None  # the weights of the evaluation that it records
        self.time_use = TimeUse()
        self.warned: set[str] = set()

    def start(self, saved: SavedRun | None) -> None:
        """Begin at step 0, or where the run was saved."""
        if saved is None:
            self._begin()
        else:
            self.group.run_on_all(lambda: self.restore(saved))
            self._note_saved()
        if self.step >= self.settings.steps:
            self._nothing_to_do(saved)

    def stop_if_wished(self) -> None:
        """Save and end the program if the user, the system or a reader who left wishes it, in any process."""
        wishes = self.shared.wishes()
        if wishes.signal:
            self.save()
            self.stop.received = wishes.signal
            self.stop.exit(f"stopped at step {self.step:,} and saved; --resume continues")
        if wishes.output_closed:
            self.save()
            raise OutputClosed

    def say_time_use(self) -> None:
        """Say what the time of this run, or since it was resumed, was used for."""
        self.time_use.add("waiting", self.gradients.waited)
        if self.time_use.seconds > SHORTEST_EXPLAINED:
            say(self.time_use.line())

    def _nothing_to_do(self, saved: SavedRun | None) -> None:
        """Say that all steps are done already; in place of a damaged save, save again."""
        assert saved is not None
        say(f"{self.step:,} steps of this run are done already, --steps {self.settings.steps:,} adds none")
        self.info = saved.info
        if saved.is_previous:
            self.save()

    def _begin(self) -> None:
        """Begin at step 0."""
        if self.settings.evaluate_first:
            with self.time_use.of("evaluating"):
                self._evaluate()
        self.beginning = copy_of(self._state())
        self.best_at_beginning = self.best_weights

    def advance(self) -> None:
        """Take one step of the optimizer, and do what is due after it."""
        peak, steps, decays = self.settings.learning_rate, self.settings.steps, self.settings.decays
        rate = self.learning_rate_scale * learning_rate_at(self.step, peak=peak, steps=steps, decays=decays)
        losses = self._step(rate)
        estimate = self.cost.after_step(self.step)
        if estimate is not None:
            say(estimate)
        if self._due(LINES_PER_EVALUATION * self.settings.evaluations):
            self._report(losses, rate)
        if self._due(self.settings.evaluations):
            with self.time_use.of("evaluating"):
                self._evaluate()
        if self.step == steps or self.shared.wishes().save:
            self.shared.check(lambda: self.divergence.check(losses, self.step))
            with self.time_use.of("saving"):
                self.save()

    def _step(self, rate: float) -> dict[str, Tensor]:
        """Take one step of the optimizer at this learning rate, count it, and return its losses.

        Raises:
            DivergedError: a loss is not finite in some process, and the device is one where it costs nothing to know,
                or the model says so itself: no step is taken.
        """
        self.optimizers.zero_grad()
        losses = self.gradients.compute(self.step)
        with self.group.explaining_loss():
            self.stage.finish_step()
        self.optimizers.step(rate)
        self.step += 1
        self.bar.update()
        self.means.add(losses)
        return losses

    def _wishes(self) -> Wishes:
        """Return what is wanted in this process; the main one says when to save."""
        is_time = self.group.is_main and time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS
        return Wishes(signal=self.stop.received, output_closed=output_closed(), save=is_time)

    def save(self) -> None:
        """Write the checkpoint: the weights to use, and all that a resumed run needs.

        The save that it replaces is kept if it is of this run and intact; else the one before that stays.

        Raises:
            DivergedError: some of it is not finite; nothing is written.
            OtherProcessError: in place of an InputError, where it is raised in the main process.
            InputError: it cannot be written; the last checkpoint stays.
        """
        self.shared.check_equal(self.stage, self.step)
        state = self._state()
        self.divergence.check_state(state.tensors, self.step)
        weights, step = self.stage.weights_to_use(), self.step
        if self.best_weights is not None:
            weights, step = self.best_weights, int(self.best["step"])
            self.divergence.check_state({f"best weights/{k}": tensor for k, tensor in weights.items()}, self.step)
        self.info = replace(self.info, step=step, metrics=self.best)
        self.info = self.group.run_on_main(lambda: self._write(weights, state))
        self._note_saved()
        self.saved_at = time.monotonic()

    def _write(self, weights: Mapping[str, Tensor], state: TrainingState) -> CheckpointInfo:
        """Write the checkpoint, and return its info."""
        is_first = self.beginning is not None
        info = save_checkpoint(self.folder, self.info, weights, state, keep_previous=not is_first)
        if is_first:
            note_save(self.folder)
        return info

    def restore(self, saved: SavedRun) -> None:
        """Restore what `save` wrote. Raise InputError if it does not fit the run."""
        try:
            check_finite(saved.weights)
            self._load_state(saved.training, saved.weights)
        except ValueError as error:
            raise InputError(
                expected=f"the training state of this run in {self.folder}",
                got=f"another ({error})",
                do="restore the folder from a copy, or train again with --force",
            ) from None

    def roll_back(self, error: DivergedError) -> None:
        """Return to the last good state with a lower learning rate. Raise `error` if that has been done before."""
        if self.learning_rate_scale < 1:
            raise error if self.group.is_main else OtherProcessError from None
        if self.beginning is None:
            saved = self.group.run_on_main(lambda: read_run(self.folder, self.info.kind))
            self.group.run_on_all(lambda: self.restore(saved))
        else:
            self._load_state(self.beginning, self.best_at_beginning or {})
        self.gradients.seek(self.step)
        self.learning_rate_scale = LOWER_RATE
        self.divergence.forget()
        say(f"{error.got}: back to step {self.step:,}, this once, with {LOWER_RATE:g} times the learning rate")

    def _load_state(self, state: TrainingState, best_weights: Mapping[str, Tensor]) -> None:
        """Continue from a state; `best_weights` are those of the recorded evaluation, where they are kept."""
        position = load_state(state, self.stage, self.optimizers, self.means, self.settings.device, self.group)
        self.step, self.best = position.step, dict(position.best)
        self.best_weights = None
        if self.settings.keep_best and self.best:
            check_outlines(outlines_of(self.stage.weights_to_use()), outlines_of(best_weights))
            self.best_weights = dict(best_weights)
        self.learning_rate_scale = position.learning_rate_scale
        if self.group.is_main:
            with self._unharmed_by("the log"):
                self.log.resume(self.step, None if position.interval is None else position.interval.seconds)
        self.bar.start_at(self.step)

    def _state(self) -> TrainingState:
        """Return the state that a resumed run continues from."""
        interval = Interval(self.means.count, self.log.seconds) if self.means.count else None
        position = Position(self.step, self.best, interval, self.learning_rate_scale)
        return collect_state(position, self.stage, self.optimizers, self.means, self.group)

    def _note_saved(self) -> None:
        """Note that the folder holds a save of this run: the last, or the one before it."""
        self.beginning = None
        self.divergence.kept = f"the last good state is kept in {self.folder}"

    def _evaluate(self) -> None:
        """Evaluate the model, log the numbers, write a preview, and record the evaluation if it is to be kept.

        Raises:
            DivergedError: a number is not finite.
        """
        self.stage.model.eval()
        forked = [self.settings.device] if self.settings.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(forked):  # evaluating must not change what is learned
            try:
                evaluation = self.stage.evaluate()
            except FloatingPointError as error:
                raise self.divergence.caught(error, self.step - 1) from error
            self._write_log("held_out", evaluation.numbers)
            self.divergence.check(evaluation.numbers, self.step)
            if self.group.is_main:
                self._preview(evaluation)
        if not self.settings.keep_best or not self.best or evaluation.is_better_than(self.best):
            self._record(evaluation)
        summary = [f"  {evaluation.summary}"] if evaluation.summary else []
        say(f"step {self.step:,}: {_in_words(evaluation.numbers)}", *summary)

    def _preview(self, evaluation: Evaluation) -> None:
        """Write a picture of what the model can do, if that is possible."""
        with self._unharmed_by("the pictures"):
            self.stage.preview(self.folder / PICTURES / f"step-{self.step:07d}.png", evaluation)

    def _record(self, evaluation: Evaluation) -> None:
        """Record this evaluation for the checkpoint and, where the best weights are kept, the present weights."""
        self.best = {"step": self.step, **evaluation.numbers}
        if self.settings.keep_best:
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.stage.weights_to_use().items()}

    def _report(self, losses: Mapping[str, Tensor], rate: float) -> None:
        """Log the mean losses since the last line; show them in the progress bar. Raise DivergedError unless finite."""
        self.shared.check(lambda: self.divergence.check(losses, self.step))
        numbers, waiting = self.means.take(self.group) | self.stage.status(), self._waiting_share()
        self._write_log("train", numbers | {"learning_rate": rate, "waiting_share": waiting})
        shown = _shown(numbers)
        self.bar.set_numbers(f"{shown}, waits for data {waiting:.0%} of the time" if waiting > MUCH_WAITING else shown)

    def _waiting_share(self) -> float:
        """Return the share of the time that steps have waited for their batches, in [0,1]."""
        return min(1.0, self.gradients.waited / max(self.time_use.seconds, 1e-9))

    def _write_log(self, split: str, numbers: Mapping[str, float]) -> None:
        """Append a line to the log, if that is possible; the main process does."""
        if self.group.is_main:
            with self._unharmed_by("the log"):
                self.log.write(self.step, split, numbers)

    @contextmanager
    def _unharmed_by(self, what: str) -> Iterator[None]:
        """Warn, once, if `what` cannot be made or written: no training ends for that."""
        try:
            yield
        except (InputError, OSError, ValueError) as error:  # a ValueError: a sample has no finite logits
            if what not in self.warned:
                _log.warning("Warning: %s cannot be written, and training continues without (%s)", what, error)
            self.warned.add(what)

    def _due(self, times: int) -> bool:
        """Return whether something that happens `times` times in the run, evenly and at its end, is due now."""
        steps = self.settings.steps
        return self.step * times // steps > (self.step - 1) * times // steps


def _shown(numbers: Mapping[str, float]) -> str:
    """Return the numbers to show while training, the most important first, for a narrow terminal cuts the last.

    These are the loss, in bits where evaluations have it in bits, and the codes in use.
    """
    others = dict(numbers)
    if "bits_per_code" in others:
        del others["loss"]
    codes = others.pop("codes_in_use", None)
    first, *rest = [_in_words({name: value}) for name, value in others.items()]
    return ", ".join([first, *([] if codes is None else [f"{codes:.0f} codes in use"]), *rest])


def _in_words(numbers: Mapping[str, float]) -> str:
    """Return numbers with their names in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
