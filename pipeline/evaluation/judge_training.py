"""Training a judge: a few minutes on a CPU, the same for every set of images; it can be stopped and continued.

A step depends on its number, the seed and the state before it alone, so that a training which was stopped ends with the
weights of one that was not.

Legend: N images, B in a batch, C channels, H W pixels.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..images.preprocessing import to_float
from ..images.rows import evenly_spaced
from ..models.checkpoint import TrainingState
from ..models.optimizer_state import check_optimizer
from ..models.tensor_file import check_finite, check_outlines, not_finite, outlines_of
from ..runtime.device import autocast, torch_seed
from ..runtime.interrupts import StopSignal
from ..runtime.optimizer import Optimizers
from ..runtime.progress import Progress, with_progress
from .judge_network import Judge, JudgeConfig

BATCH = 128
EPOCHS = 6
FEWEST_IMAGES, MOST_IMAGES = 60_000, 320_000  # that a judge sees in training
PEAK_RATE, RISE = 0.01, 0.2  # the learning rate rises for this share of the steps, and then falls to 0
LARGEST_SHIFT = 1 / 8  # of a side, by which an image is moved at random
MOST_MEASURED = 10_000  # training images, for the mean and the variance of a feature
SAVE_EVERY_SECONDS = 30.0
WEIGHTS = "weights/"  # what the names of the judge's own tensors begin with, in the state

Save = Callable[[TrainingState], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """What a judge is trained on."""

    images: np.ndarray  # uint8 [N,C,H,W]
    labels: np.ndarray  # int64 [N], in [0, num_classes); of no use to an autoencoder
    num_classes: int  # 0 for an autoencoder

    @property
    def config(self) -> JudgeConfig:
        """The configuration of a judge for these images."""
        channels, height, width = self.images.shape[1:]
        return JudgeConfig(channels=channels, height=height, width=width, num_classes=self.num_classes)


def steps_for(count: int) -> int:
    """Return the steps of a training on `count` images: EPOCHS of them, within the bounds above."""
    return -(-min(max(EPOCHS * count, FEWEST_IMAGES), MOST_IMAGES) // BATCH)


def train_judge(
    data: TrainingImages,
    *,
    seed: int,
    device: torch.device,
    description: str,
    steps: int | None = None,
    resume: TrainingState | None = None,
    save: Save | None = None,
) -> Judge:
    """Train a judge on at least one image, with progress on standard error.

    Muon in mixed precision; every image is moved by up to an eighth of its sides, and never mirrored, which would make
    another digit or letter of one.

    Args:
        data: the images.
        seed: of the first weights, the batches and the shifts.
        device: to train on.
        description: what is trained, for the line of progress.
        steps: of the training; None takes those of `steps_for`.
        resume: what `save` was given last, to continue from there; a state of another training is warned of, and the
            training starts anew.
        save: called now and then, and before a signal ends the training, with the state to resume from.

    Returns:
        The judge, in `eval()` mode.

    Raises:
        InputError: the training has led to weights that are NaN or infinite.
        KeyboardInterrupt, SystemExit: Ctrl-C, or another signal to stop.
    """
    steps, judge = steps or steps_for(len(data.images)), _new_judge(data.config, seed, device)
    optimizers = Optimizers(judge, "muon", PEAK_RATE)
    step = saved = _resumed(resume, judge, optimizers, steps)
    saved_at = time.monotonic()
    with Progress(steps, description, "step", batch_size=BATCH) as bar, StopSignal() as stop:
        bar.start_at(step)
        while step < steps:
            images, labels = _batch(data, np.random.default_rng([torch_seed(seed), step]))
            _take_step(judge, optimizers, learning_rate_at(step, steps), images.to(device), labels.to(device))
            step += 1
            bar.update()
            due = stop.requested or time.monotonic() - saved_at > SAVE_EVERY_SECONDS
            if save is not None and due and step < steps:
                save(_state(judge, optimizers, step))
                saved, saved_at = step, time.monotonic()
            if stop.requested:
                stop.exit("stopped" if save is None else f"stopped; the same command continues at step {saved:,}")
    _standardize(judge.eval(), data, device)
    _check_finite(judge)
    return judge


def learning_rate_at(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a triangle that rises to PEAK_RATE and falls to 0."""
    done = (step + 1) / (steps + 1)
    return PEAK_RATE * min(done / RISE, (1 - done) / (1 - RISE))


def _new_judge(config: JudgeConfig, seed: int, device: torch.device) -> Judge:
    """Return a judge with random weights, without a change to torch's own random numbers."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch_seed(seed))
        return Judge(config).to(device)


def _check_finite(judge: Judge) -> None:
    """Raise InputError if the training has led to NaN or infinity."""
    wrong = not_finite(judge.state_dict())
    if wrong is not None:
        raise InputError(
            expected="finite weights of a judge after its training", got=wrong, do="use another --judge or --device"
        )


def _take_step(judge: Judge, optimizers: Optimizers, rate: float, images: Tensor, labels: Tensor) -> None:
    """Change the judge by the gradient of the loss on a batch, at this learning rate."""
    judge.train()
    with autocast(images.device, "auto"):
        loss = judge.loss(images, labels)
    optimizers.zero_grad()
    loss.backward()
    optimizers.step(rate)


@torch.no_grad()
def _standardize(judge: Judge, data: TrainingImages, device: torch.device) -> None:
    """Give each feature mean 0 and variance 1 over the training images, or MOST_MEASURED of them.

    The batch norm kept moving averages of what single batches had; it computes with what it is given here.
    """
    rows = evenly_spaced(len(data.images), MOST_MEASURED)
    linear, norm = judge.to_features
    values = []
    batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    for batch in with_progress(batches, len(rows), "measuring the judge's features", size=len):
        images = to_float(torch.from_numpy(np.asarray(data.images[batch]))).to(device)
        values.append(linear(judge.pooled(images)).cpu().double())
    features = torch.cat(values)
    norm.get_buffer("running_mean").copy_(features.mean(dim=0))
    norm.get_buffer("running_var").copy_(features.var(dim=0, correction=0))


def _batch(data: TrainingImages, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return images [B,C,H,W] in [0,1], each moved at random, and their labels [B]."""
    rows = random.integers(len(data.images), size=BATCH)
    height, width = data.images.shape[2:]
    down, right = (random.integers(-limit, limit + 1, BATCH) for limit in (_limit(height), _limit(width)))
    ys, xs = _mirrored(down, height), _mirrored(right, width)
    every = np.arange(BATCH)[:, None, None, None], np.arange(data.images.shape[1])[:, None, None]
    moved = np.asarray(data.images[rows])[every[0], every[1], ys[:, None, :, None], xs[:, None, None, :]]
    return to_float(torch.from_numpy(moved)), torch.from_numpy(data.labels[rows])


def _limit(side: int) -> int:
    return int(side * LARGEST_SHIFT)


def _mirrored(shifts: np.ndarray, side: int) -> np.ndarray:
    """Return which of `side` pixels come where after shifts [B]: [B,side]; beyond an edge they are mirrored."""
    positions = np.abs(np.arange(side) + shifts[:, None])
    return np.minimum(positions, 2 * (side - 1) - positions)


def _state(judge: Judge, optimizers: Optimizers, step: int) -> TrainingState:
    """Return what a training continues from after `step` steps, at least one."""
    return TrainingState(tensors={**_weights(judge), **optimizers.tensors()}, values={"step": step})


def _resumed(state: TrainingState | None, judge: Judge, optimizers: Optimizers, steps: int) -> int:
    """Restore what `_state` returned, if it is of such a training, and return the step to go on with."""
    if state is None:
        return 0
    try:
        return _load(state, judge, optimizers, steps)
    except ValueError as error:
        _log.warning("Warning: the training of the judge starts anew, as its saved state is of no use: %s", error)
        return 0


def _load(state: TrainingState, judge: Judge, optimizers: Optimizers, steps: int) -> int:
    """Restore what `_state` returned, and return its step. Raise ValueError if it is of another training."""
    check_finite(state.tensors)
    weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith(WEIGHTS)}
    others = {name: tensor for name, tensor in state.tensors.items() if name not in weights}
    check_outlines(outlines_of(_weights(judge)), outlines_of(weights))
    check_optimizer(others, optimizers)
    step = state.values.get("step")
    if type(step) is not int or not 1 <= step < steps:
        raise ValueError(f"a training state without a step, but {step!r}")
    judge.load_state_dict({name.removeprefix(WEIGHTS): tensor for name, tensor in weights.items()})
    optimizers.load_tensors(others)
    return step


def _weights(judge: Judge) -> dict[str, Tensor]:
    return {f"{WEIGHTS}{name}": tensor for name, tensor in judge.state_dict().items()}
