"""The state of a run between two steps, as a checkpoint keeps it: everything that the next step depends on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import TrainingState
from ..runtime.schema import from_json
from .metrics_log import RunningMeans
from .optimizer import Optimizers
from .stage import Stage


@dataclass(frozen=True)
class Interval:
    """What has passed since the last line of the log."""

    steps: int
    seconds: float | None  # of the whole run; None if an older version saved it


@dataclass(frozen=True)
class Position:
    """Where in a run its state is."""

    step: int
    best: dict[str, float]  # the numbers of the evaluation that is recorded
    interval: Interval | None = None  # right after a line of the log there is none; older versions saved none
    learning_rate_scale: float = 1.0  # below 1 once the run has been rolled back


def collect_state(
    position: Position, stage: Stage, optimizers: Optimizers, means: RunningMeans, device: torch.device
) -> TrainingState:
    """Return the state of a run.

    At the end of a run there is no interval: the log has the seconds, and two runs that did the same have the same
    state, byte for byte.
    """
    tensors = {f"model/{name}": tensor for name, tensor in stage.model.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizers.tensors().items()}
    tensors |= {f"stage/{name}": tensor for name, tensor in stage.state().items()}
    tensors |= {f"interval/{name}": total for name, total in means.sums.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    defaults = asdict(Position(position.step, position.best))
    values = {
        name: value for name, value in asdict(position).items() if name in ("step", "best") or value != defaults[name]
    }
    return TrainingState(tensors=tensors, values=values)


def load_state(
    state: TrainingState, stage: Stage, optimizers: Optimizers, means: RunningMeans, device: torch.device
) -> Position:
    """Restore what `collect_state` returned, but for the position, which is returned.

    Raises:
        ValueError: the state is not one of such a run.
    """
    try:
        position, groups = from_json(Position, state.values), _by_prefix(state.tensors)
        stage.model.load_state_dict(groups["model"])
        stage.load_state(groups.get("stage", {}))
        optimizers.load_tensors(groups.get("optimizer", {}))
        torch.set_rng_state(groups["random"]["cpu"])
        if device.type == "cuda" and "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    sums = {name: tensor.to(device) for name, tensor in groups.get("interval", {}).items()}
    means.load(0 if position.interval is None else position.interval.steps, sums)
    return position


def copy_of(state: TrainingState) -> TrainingState:
    """Return a copy of a state, on the CPU, that further steps do not change."""
    values: dict[str, Any] = {**state.values, "best": dict(state.values["best"])}
    return TrainingState(
        tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}, values=values
    )


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors grouped by what precedes the first slash of their names: {"a/b": x} -> {"a": {"b": x}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("/")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups
