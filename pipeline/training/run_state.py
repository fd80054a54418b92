"""The state of a run between two steps, as a checkpoint keeps it: everything that the next step depends on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import TrainingState
from ..models.optimizer_state import check_optimizer
from ..models.tensor_file import check_finite, check_outlines, outlines_of
from ..runtime.optimizer import Optimizers
from ..runtime.process_group import ProcessGroup
from ..runtime.schema import from_json, short
from .metrics_log import RunningMeans
from .stage import Stage


@dataclass(frozen=True)
class Interval:
    """What has passed since the last line of the log.

    Raises:
        ValueError: a number is out of its range.
    """

    steps: int  # at least 1
    seconds: float | None  # of the whole run; None if an older version saved it

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.seconds is not None and self.seconds < 0):
            raise ValueError(f"{short(self.steps)} steps and {self.seconds} seconds since the last line of the log")


@dataclass(frozen=True)
class Position:
    """Where in a run its state is.

    Raises:
        ValueError: a number is out of its range.
    """

    step: int
    best: dict[str, float]  # the numbers of the evaluation that is recorded, and its "step"; empty before the first
    interval: Interval | None = None  # right after a line of the log there is none; older versions saved none
    learning_rate_scale: float = 1.0  # below 1 once the run has been rolled back

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"{short(self.step)} as step")
        if self.best and not 0 <= self.best.get("step", -1) <= self.step:
            raise ValueError(f"an evaluation at step {short(self.best.get('step'))} of {short(self.step)}")
        if not 0 < self.learning_rate_scale <= 1:
            raise ValueError(f"{self.learning_rate_scale} as learning_rate_scale")


def collect_state(
    position: Position, stage: Stage, optimizers: Optimizers, means: RunningMeans, group: ProcessGroup
) -> TrainingState:
    """Return the state of a run, the same in every process of the group, each of which calls this.

    There are no random states in it: random numbers are functions of the step (`schedule.StepRandomness`).

    At the end of a run there is no interval: the log has the seconds, and two runs that did the same have the same
    state, byte for byte.
    """
    tensors = {f"model/{name}": tensor for name, tensor in stage.model.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizers.tensors().items()}
    tensors |= {f"stage/{name}": tensor for name, tensor in stage.state().items()}
    tensors |= {f"interval/{name}": total for name, total in means.sums_of_all(group).items()}
    defaults = asdict(Position(position.step, position.best))
    values = {
        name: value for name, value in asdict(position).items() if name in ("step", "best") or value != defaults[name]
    }
    return TrainingState(tensors=tensors, values=values)


def load_state(
    state: TrainingState,
    stage: Stage,
    optimizers: Optimizers,
    means: RunningMeans,
    device: torch.device,
    group: ProcessGroup,
) -> Position:
    """Restore what `collect_state` returned, but for the position, which is returned.

    Raises:
        ValueError: the state is not one of such a run.
    """
    try:
        check_finite(state.tensors)
        position, groups = from_json(Position, state.values), _by_prefix(state.tensors)
        check_outlines(outlines_of(stage.model.state_dict()), outlines_of(groups["model"]))
        check_optimizer(groups.get("optimizer", {}), optimizers)
        sums = _checked_sums(groups.get("interval", {}), position)
        stage.model.load_state_dict(groups["model"])
        stage.load_state(groups.get("stage", {}))
        optimizers.load_tensors(groups.get("optimizer", {}))
    except KeyError as error:
        raise ValueError(f"no {short(error.args[0])}") from error
    steps = 0 if position.interval is None else position.interval.steps
    counted = 1 if group.is_main else 0  # they are counted once
    means.load(steps, {name: counted * total.to(device) for name, total in sums.items()})
    return position


def copy_of(state: TrainingState) -> TrainingState:
    """Return a copy of a state, on the CPU, that further steps do not change."""
    values: dict[str, Any] = {**state.values, "best": dict(state.values["best"])}
    return TrainingState(
        tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}, values=values
    )


def _checked_sums(sums: dict[str, Tensor], position: Position) -> dict[str, Tensor]:
    """Return the sums of the losses since the last line of the log. Raise ValueError unless they are numbers."""
    if any(total.dim() != 0 or not total.is_floating_point() for total in sums.values()):
        raise ValueError("sums of losses that are no numbers")
    if bool(sums) != (position.interval is not None):
        raise ValueError("sums of losses without their number of steps, or that without them")
    return sums


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors grouped by what precedes the first slash of their names: {"a/b": x} -> {"a": {"b": x}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups
