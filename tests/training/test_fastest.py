"""Which way to take a step is chosen, from times that the tests make up."""

from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.training import fastest
from pipeline.training.fastest import Candidate, StepTime, candidates_for, choose, measure

CPU = torch.device("cpu")
FP32, BF16 = Candidate(precision="fp32"), Candidate(precision="bf16")
FP32_COMPILED, BF16_COMPILED = (Candidate(precision=name, compiled=True) for name in ("fp32", "bf16"))
ALL = [FP32, BF16, FP32_COMPILED, BF16_COMPILED]
LONG = 100_000  # steps; of 0.1 s, 10,000 s


class Times:
    """Times by candidate; records what was timed."""

    def __init__(self, times: dict[Candidate, StepTime | Exception]) -> None:
        self.times, self.timed = times, list[Candidate]()

    def __call__(self, candidate: Candidate) -> StepTime:
        self.timed.append(candidate)
        found = self.times[candidate]
        if isinstance(found, Exception):
            raise found
        return found


def seconds(fp32: float, bf16: float) -> dict[Candidate, StepTime | Exception]:
    return {FP32: StepTime(seconds=fp32), BF16: StepTime(seconds=bf16)}


@pytest.mark.parametrize(("bf16", "expected"), [(0.0951, "fp32"), (0.0949, "bf16"), (0.2, "fp32")])
def test_bf16_has_to_be_clearly_faster(bf16: float, expected: str) -> None:
    choice = choose([FP32, BF16], Times(seconds(0.1, bf16)), steps=LONG)
    assert (choice.precision, choice.compiled) == (expected, False)
    other = "fp32 0.100" if expected == "bf16" else f"bf16 {bf16:.3f}"
    own = bf16 if expected == "bf16" else 0.1
    assert choice.in_words == f"precision {expected} ({own:.3f} s a step; {other} s), not compiled"


@pytest.mark.parametrize("compiled", [0.02, 0.0899, 0.0901, 0.2])
@pytest.mark.parametrize("preparation", [0.0, 30.0])
def test_compilation_has_to_earn_its_time_back(compiled: float, preparation: float) -> None:
    """20,000 steps of 0.0915 s save 30 s if compiled steps take less than 0.0900 s."""
    times = seconds(0.1, 0.0915) | {BF16_COMPILED: StepTime(seconds=compiled, preparation=preparation)}
    choice = choose(ALL, Times(times), steps=20_000)
    assert choice.precision == "bf16"
    assert choice.compiled == (compiled < (0.0915 if preparation == 0 else 0.09))
    verb = "compiled" if choice.compiled else "not compiled"
    assert choice.in_words.endswith(f", {verb} ({compiled:.3f} s a step, after {preparation:.0f} s)")


def test_only_the_better_precision_is_compiled() -> None:
    times = Times(seconds(0.1, 0.2) | {FP32_COMPILED: StepTime(seconds=0.05)})
    choice = choose(ALL, times, steps=LONG)
    assert (choice.precision, choice.compiled) == ("fp32", True)
    assert times.timed == [FP32, BF16, FP32_COMPILED]


@pytest.mark.parametrize(("steps", "tried"), [(14_999, False), (15_000, True)])
def test_compilation_is_tried_in_a_run_of_1500_seconds(steps: int, tried: bool) -> None:
    times = Times({FP32: StepTime(seconds=0.1), FP32_COMPILED: StepTime(seconds=0.05)})
    choice = choose([FP32, FP32_COMPILED], times, steps=steps)
    assert choice.compiled == tried
    assert times.timed == [FP32, FP32_COMPILED][: 1 + tried]
    assert tried or choice.in_words == "precision fp32 (0.100 s a step), not compiled (too short a run)"


@pytest.mark.parametrize(
    "error", [RuntimeError("no C++ compiler\nlong story"), OSError("no C++ compiler"), ImportError()]
)
def test_where_nothing_can_be_compiled(error: Exception) -> None:
    choice = choose([FP32, FP32_COMPILED], Times({FP32: StepTime(seconds=0.1), FP32_COMPILED: error}), steps=LONG)
    assert (choice.precision, choice.compiled) == ("fp32", False)
    reason = "no C++ compiler" if str(error) else "ImportError"
    assert choice.in_words.endswith(f", not compiled (torch.compile cannot work here: {reason})")


def test_an_error_of_a_step_that_is_not_compiled_is_not_caught() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        choose(ALL, Times({FP32: RuntimeError("out of memory")}), steps=LONG)
    times = Times({FP32: StepTime(seconds=0.1), FP32_COMPILED: ValueError("of the model")})
    with pytest.raises(ValueError, match="of the model"):
        choose([FP32, FP32_COMPILED], times, steps=LONG)


@pytest.mark.parametrize(("candidates", "expected"), [(ALL, BF16), ([FP32, FP32_COMPILED], FP32), ([FP32, BF16], BF16)])
def test_a_short_run_is_the_same_whatever_the_times_are(candidates: list[Candidate], expected: Candidate) -> None:
    times = Times({})
    choice = choose(candidates, times, steps=fastest.WORTH_MEASURING - 1)
    assert Candidate(precision=choice.precision, compiled=choice.compiled) == expected
    assert choice.in_words == f"precision {expected.precision}, not compiled"
    assert times.timed == []


@pytest.mark.parametrize("candidate", ALL)
def test_a_list_of_one_is_not_measured(candidate: Candidate) -> None:
    choice = choose([candidate], Times({}), steps=LONG)
    assert (choice.precision, choice.compiled) == (candidate.precision, candidate.compiled)
    assert choice.in_words == f"precision {candidate.precision}, {'' if candidate.compiled else 'not '}compiled"


def test_a_user_who_wants_to_compile_leaves_the_precision_open() -> None:
    times = {FP32_COMPILED: StepTime(seconds=0.1, preparation=1e9), BF16_COMPILED: StepTime(seconds=0.05)}
    choice = choose([FP32_COMPILED, BF16_COMPILED], Times(times), steps=LONG)
    assert (choice.precision, choice.compiled) == ("bf16", True)


def test_no_candidates() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        choose([], Times({}), steps=1)


@pytest.mark.parametrize("fast", [False, True])
def test_which_ways_are_open(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "has_fast_bf16", lambda device: fast)
    assert candidates_for(CPU) == (ALL if fast else [FP32, FP32_COMPILED])
    assert candidates_for(CPU, compiled=False) == ([FP32, BF16] if fast else [FP32])
    assert candidates_for(CPU, compiled=True) == ([FP32_COMPILED, BF16_COMPILED] if fast else [FP32_COMPILED])
    assert candidates_for(CPU, "bf16") == [BF16, BF16_COMPILED]
    assert candidates_for(CPU, "fp32", compiled=False) == [FP32]


def clock_of(step: Callable[[], float]) -> tuple[Callable[[], float], Callable[[], None]]:
    """Return a clock, and a function that turns it by what `step` returns."""
    now = [5.0]

    def turn() -> None:
        now[0] += step()

    return lambda: now[0], turn


def test_measuring_steps() -> None:
    """The shortest of those after the burn-in counts; what the burn-in takes in addition is preparation."""
    lengths: Iterator[float] = iter([9.0, 0.5, 2.0, 1.5, 4.0, 3.0])
    clock, step = clock_of(lambda: next(lengths))
    assert measure(step, CPU, clock=clock) == StepTime(seconds=1.5, preparation=9.5 - 3.0)
    assert list(lengths) == []


def test_what_measures_a_real_step() -> None:
    weight = torch.zeros((), requires_grad=True)
    found = measure(lambda: weight.square().backward(), CPU)
    assert 0 < found.seconds < 1
