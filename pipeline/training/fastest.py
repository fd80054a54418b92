"""The fastest way to take a step on this machine, chosen by a short measurement: fp32 or bf16, compiled or not.

The first way on the list is the plain one, and no other is taken unless it was measured to be faster. Compilation also
has to earn its own time back within the run, so it is not even tried in a short one. What is chosen is a function of
the times: a run records it, and continues with it when it is resumed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime.device import has_fast_bf16, synchronize

WORTH_MEASURING = 1_000  # steps; a shorter run takes the usual way for its device
CLEARLY_FASTER = 0.95  # of the time of a step: bf16 costs digits, so it has to be worth something
WORTH_COMPILING = 1_500.0  # seconds; a try takes about 2 % of such a run, and has saved 3 to 10 % on a CPU
BURN_IN, REPEATS = 2, 4  # steps
STEPS_MEASURED = BURN_IN + REPEATS  # of each candidate


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to take a step."""

    precision: str  # "fp32" or "bf16"
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """How long steps take."""

    seconds: float  # of a step
    preparation: float = 0.0  # seconds that the first steps took in addition: those of compilation


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way that was chosen."""

    precision: str  # "fp32" or "bf16"
    compiled: bool
    in_words: str  # one line
    measured: bool = True  # or taken without measuring


TimeSteps = Callable[[Candidate], StepTime]


def candidates_for(device: torch.device, precision: str = "auto", compiled: bool | None = None) -> list[Candidate]:
    """Return the ways that the user leaves open, the plain one first.

    Args:
        device: to train on.
        precision: "fp32", "bf16", or "auto": bf16 is a candidate where the device has it.
        compiled: whether to compile; None leaves it open.
    """
    in_bf16 = ["bf16"] if has_fast_bf16(device) else []
    precisions = ["fp32", *in_bf16] if precision == "auto" else [precision]
    return [
        Candidate(precision=each, compiled=compile_it)
        for compile_it in ([False, True] if compiled is None else [compiled])
        for each in precisions
    ]


def choose(candidates: Sequence[Candidate], time_steps: TimeSteps, *, steps: int) -> Choice:
    """Return the fastest of the candidates for a run of this many steps.

    A run below WORTH_MEASURING takes the last candidate that is not compiled, unmeasured: it gives the same bytes
    whatever the times are on that day. So does a list of one.

    Args:
        candidates: as `candidates_for` returns them.
        time_steps: takes some steps in one of these ways and returns how long they take; see `measure`.
        steps: that are left in the run.

    Raises:
        ValueError: there are no candidates.
        RuntimeError, OSError, ImportError: `time_steps` raised it for a candidate that is not compiled, or that is the
            first of all.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one, got none")
    alike = [each for each in candidates if each.compiled == candidates[0].compiled]
    if len(candidates) == 1 or steps < WORTH_MEASURING:
        chosen = _chosen(alike[-1], f"precision {alike[-1].precision}", _compiled_in_words(alike[-1]))
        return replace(chosen, measured=False)
    times = {each: time_steps(each).seconds for each in alike}
    best = alike[0]
    for each in alike[1:]:
        if times[each] <= CLEARLY_FASTER * times[best]:
            best = each
    precision, compiled = _precision_in_words(best, times), Candidate(precision=best.precision, compiled=True)
    if best == compiled or compiled not in candidates:
        return _chosen(best, precision, _compiled_in_words(best))
    worthwhile, words = _try(compiled, times[best], time_steps, steps)
    return _chosen(compiled if worthwhile else best, precision, words)


def measure(
    step: Callable[[], object], device: torch.device, *, clock: Callable[[], float] = time.perf_counter
) -> StepTime:
    """Take BURN_IN steps and REPEATS more, and return how long the shortest of these took.

    Args:
        step: takes a training step, of a copy of the model: the weights that the run begins with must not change, nor
            the state of the random number generators.
        device: what the steps run on.
        clock: returns the time in seconds.
    """
    times = []
    for _ in range(STEPS_MEASURED):
        synchronize(device)
        start = clock()
        step()
        synchronize(device)
        times.append(clock() - start)
    shortest = min(times[BURN_IN:])
    return StepTime(seconds=shortest, preparation=sum(times[:BURN_IN]) - BURN_IN * shortest)


def _try(compiled: Candidate, seconds: float, time_steps: TimeSteps, steps: int) -> tuple[bool, str]:
    """Return whether to compile, and why, given the seconds of a step that is not compiled."""
    if steps * seconds < WORTH_COMPILING:
        return False, "not compiled (too short a run)"
    try:
        found = time_steps(compiled)
    except (RuntimeError, OSError, ImportError) as error:  # no compiler, or none that works with this Python or disk
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return False, f"not compiled (torch.compile cannot work here: {reason})"
    if (seconds - found.seconds) * steps > found.preparation:
        return True, f"compiled ({found.seconds:.3f} s a step, after {found.preparation:.0f} s)"
    return False, f"not compiled ({found.seconds:.3f} s a step, after {found.preparation:.0f} s)"


def _chosen(candidate: Candidate, *words: str) -> Choice:
    return Choice(precision=candidate.precision, compiled=candidate.compiled, in_words=", ".join(words))


def _compiled_in_words(candidate: Candidate) -> str:
    return "compiled" if candidate.compiled else "not compiled"


def _precision_in_words(best: Candidate, times: Mapping[Candidate, float]) -> str:
    """Return the precision with what a step takes in it, and in the others."""
    others = "".join(f"; {each.precision} {seconds:.3f} s" for each, seconds in times.items() if each != best)
    return f"precision {best.precision} ({times[best]:.3f} s a step{others})"
