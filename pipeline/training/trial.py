"""Steps that leave no trace: to rehearse one, and to find out which way to compute them is the fastest here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..runtime.console import say
from ..runtime.device import autocast, compile_networks, product_dtype, use_fast_layout
from ..runtime.optimizer import Optimizers
from ..runtime.process_group import ProcessGroup
from ..runtime.progress import Progress
from .fastest import STEPS_MEASURED, Candidate, StepTime, candidates_for, choose, measure
from .recipes import DecoderSettings, PriorSettings, TokenizerSettings
from .schedule import DataOrder, StepRandomness
from .stage import Batch, Stage

Settings = TypeVar("Settings", TokenizerSettings, PriorSettings, DecoderSettings)


@contextmanager
def without_a_trace(stage: Stage) -> Iterator[None]:
    """Undo after `with` what steps did to the model and to the stage, gradients included."""
    model = {name: tensor.detach().clone() for name, tensor in stage.model.state_dict().items()}
    state = {name: tensor.detach().clone() for name, tensor in stage.state().items()}
    try:
        yield
    finally:
        stage.discard_step()
        stage.model.load_state_dict(model)
        stage.load_state(state)
        for parameter in stage.model.parameters():
            parameter.grad = None


def with_fastest_way(stage: Stage, settings: Settings, group: ProcessGroup, *, is_new: bool) -> Settings:
    """Choose how steps are computed, where the settings leave it open, by measuring some, and prepare the model for it.

    Args:
        stage: of a run at its beginning.
        settings: of the run; its number of steps is known.
        group: the processes that share the run, each of which calls this.
        is_new: whether the run is new. A resumed one, which recorded its choice, measures nothing; one of a version
            that recorded none takes the usual way for the device.

    Returns:
        The settings with the choice, for the run to record.
    """
    device = next(stage.model.parameters()).device
    compiled = getattr(settings, "compile", None) if stage.compilable else False
    candidates = candidates_for(device, settings.precision, compiled)
    assert settings.steps is not None
    with Progress(len(candidates) * STEPS_MEASURED, "measuring steps", "step") as bar:
        steps = settings.steps if is_new else 0
        choice = choose(candidates, lambda each: _agreed_time_of(each, stage, settings, group, bar), steps=steps)
    if choice.measured:
        say(f"each step: {choice.in_words}")
    _set_compiled(stage.compilable, choice.compiled)
    use_fast_layout(stage.model, device, choice.precision)
    chosen: dict[str, Any] = {"precision": choice.precision}
    if stage.compilable:
        chosen["compile"] = choice.compiled
    return replace(settings, **chosen)


def _agreed_time_of(
    candidate: Candidate, stage: Stage, settings: Settings, group: ProcessGroup, bar: Progress
) -> StepTime:
    """Return how long the first step of the run takes in this way in the slowest process, so that all choose alike.

    Raises:
        RuntimeError, OSError, ImportError: it cannot be computed so; where that is in another process, a RuntimeError.
    """
    found, failure = StepTime(seconds=0.0), None
    try:
        with group.explaining_loss():
            found = _time_of(candidate, stage, settings, group, bar)
    except (RuntimeError, OSError, ImportError) as error:  # such as those of torch.compile
        failure = error
    seconds, preparation, failed = group.maxima([found.seconds, found.preparation, float(failure is not None)])
    if failed:
        raise failure or RuntimeError("not in another process")
    return StepTime(seconds=seconds, preparation=preparation)


def _time_of(candidate: Candidate, stage: Stage, settings: Settings, group: ProcessGroup, bar: Progress) -> StepTime:
    """Return how long the first step of the run takes in this way."""
    device = next(stage.model.parameters()).device
    order = DataOrder(stage.num_items, settings.batch_size, settings.seed)
    randomness, own = StepRandomness(settings.seed, settings.batch_size), slice(*group.bounds(settings.batch_size))
    indices = order.batch(0)[own]
    data = tuple(tensor.to(device) for tensor in stage.load(indices))
    parts = Batch(indices, randomness.keys(0)[own], data).split(settings.accumulate)
    dtype = product_dtype(device, candidate.precision)
    optimizers = Optimizers(stage.model, settings.optimizer, settings.lr, dtype=dtype)

    def step() -> None:
        randomness.begin(0)
        stage.model.train()
        optimizers.zero_grad()
        with autocast(device, candidate.precision):
            stage.begin_step(parts)
            for part in parts:
                stage.losses(part)["loss"].backward()
        stage.discard_step()
        optimizers.step(0.0)  # which moves nothing
        bar.update()

    with without_a_trace(stage):
        with autocast(device, candidate.precision):
            stage.begin_step(parts)  # in which processes wait for one another; from here on they do not
        _set_compiled(stage.compilable, candidate.compiled)
        return measure(step, device)


def _set_compiled(networks: tuple[nn.Module, ...], compiled: bool) -> None:
    """Compile networks, in place, or undo that."""
    if compiled:
        compile_networks(*networks)
    else:
        for network in networks:
            network._compiled_call_impl = None  # what `nn.Module.compile` sets; there is no way back but this
