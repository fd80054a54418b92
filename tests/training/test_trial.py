"""Steps that leave no trace, the choice of the fastest way to take them, and what a run says its time went to."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.checkpoint import read_info
from pipeline.runtime.optimizer import Optimizers
from pipeline.runtime.process_group import ALONE, ProcessGroup
from pipeline.training import fastest, loop, trial
from pipeline.training.fastest import Candidate, StepTime
from pipeline.training.loop import run_training
from pipeline.training.recipes import DecoderSettings, PriorSettings, TokenizerSettings
from pipeline.training.schedule import StepRandomness
from pipeline.training.stage import Stage
from pipeline.training.time_use import TimeUse
from pipeline.training.trial import with_fastest_way, without_a_trace

from ..conftest import Codegrid, Trained
from ..process_threads import run_in_threads
from .test_accumulation import MakeStage, images, make_stage
from .training_runs import Toy, batch_of, run_again, settings_of, toy_info

__all__ = ["images", "make_stage"]  # fixtures

ITEMS = [0, 5, 3, 2]
EVERY = ["tokenizer", "gradient", "vae", "prior", "decoder"]

# Without a trace


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def state_of(stage: Stage) -> dict[str, Any]:
    """Every bit that a step could change."""
    return {
        "model": bits(stage.model.state_dict()),
        "buffers": bits(dict(stage.model.named_buffers())),
        "stage": bits(stage.state()),
        "to use": bits(stage.weights_to_use()),
        "gradients": [parameter.grad for parameter in stage.model.parameters()],
    }


def take_a_step(stage: Stage, *, finishes: bool = True) -> None:
    optimizers = Optimizers(stage.model, "muon", 0.01)
    stage.model.train()
    batch = batch_of(stage, ITEMS)
    stage.begin_step([batch])
    stage.losses(batch)["loss"].backward()
    if finishes:
        stage.finish_step()
    optimizers.step(0.01)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("finishes", [True, False])
def test_steps_leave_no_bit_changed(make_stage: MakeStage, kind: str, steps_before: int, finishes: bool) -> None:
    """Also in the codebook that has not started, the moving average of a decoder, and what discriminators iterate."""
    stage = make_stage(kind)
    for _ in range(steps_before):
        take_a_step(stage)
    stage.model.zero_grad()
    before = state_of(stage)
    assert before["gradients"] == [None] * len(before["gradients"])
    with without_a_trace(stage):
        for _ in range(2):
            take_a_step(stage, finishes=finishes)
        within = state_of(stage)
        assert within["model"] != before["model"]
        assert kind not in ("tokenizer", "decoder") or within["stage"] != before["stage"]
    assert state_of(stage) == before


@pytest.mark.parametrize("kind", EVERY)
def test_the_step_after_them_is_the_one_without_them(make_stage: MakeStage, kind: str) -> None:
    """A vector that the trial left for the codebook to learn, or a count, would show here."""
    found = []
    for tried in (False, True):
        stage = make_stage(kind)
        if tried:
            with without_a_trace(stage):
                take_a_step(stage, finishes=False)
        for step in range(2):
            stage.model.zero_grad()
            StepRandomness(0, 4).begin(step)
            take_a_step(stage)
        found.append({**state_of(stage), "gradients": None, "status": stage.status()})
    assert found[0] == found[1]


def test_an_error_within_leaves_no_trace_either(make_stage: MakeStage) -> None:
    stage = make_stage("tokenizer")
    before = state_of(stage)

    def fail() -> None:
        take_a_step(stage, finishes=False)
        raise KeyError

    with pytest.raises(KeyError), without_a_trace(stage):
        fail()
    assert state_of(stage) == before
    stage.finish_step()
    assert state_of(stage) == before


def test_the_stage_is_told_that_the_steps_are_not_taken() -> None:
    stage, told = Toy(), list[float]()
    stage.discard_step = lambda: told.append(stage.weight)  # type: ignore[method-assign]
    with without_a_trace(stage):
        nn.init.ones_(stage.model.weight)
        assert told == []
    assert told == [1.0]
    assert stage.weight == 0


# The fastest way


@dataclass
class Measuring:
    """In place of `measure`: returns these times in turn, and records how steps were computed then."""

    times: list[float]
    takes: bool = False  # whether to take the step, too
    preparation: float = 60.0
    seen: list[bool] = field(default_factory=list)  # whether each was compiled
    stage: Stage | None = None

    def __call__(self, step: Callable[[], object], device: torch.device) -> StepTime:
        assert self.stage is not None
        self.seen.append(compiled(self.stage))
        seconds = self.times[len(self.seen) - 1]
        if self.takes:
            step()
        return StepTime(seconds=seconds, preparation=self.preparation if self.seen[-1] else 0.0)


def compiled(stage: Stage) -> bool:
    """Whether the networks of a stage are compiled: all, or none."""
    (found,) = {network._compiled_call_impl is not None for network in stage.compilable} or {False}
    return found


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    """Times that a test sets, on a machine with fast bf16, where compiling is instant."""
    fake = Measuring([])
    monkeypatch.setattr(trial, "measure", fake)
    monkeypatch.setattr(fastest, "has_fast_bf16", lambda device: True)

    def pretend(self: nn.Module) -> None:
        self._compiled_call_impl = self._call_impl

    monkeypatch.setattr(nn.Module, "compile", pretend)
    return fake


@pytest.mark.parametrize(
    ("times", "precision", "compiles", "words"),
    [
        ([0.10, 0.05, 0.03], "bf16", True, r"precision bf16 \(0.050 s .*\), compiled \(0.030 s a step, after 60 s\)"),
        ([0.10, 0.05, 0.06], "bf16", False, r"precision bf16 \(0.050 s .*\), not compiled \(0.060 s a step, "),
        ([0.10, 0.20, 0.05], "fp32", True, r"precision fp32 \(0.100 s .*\), compiled \(0.050 s a step, after 60 s\)"),
        ([0.10, 0.20, 0.30], "fp32", False, r"precision fp32 \(0.100 s .*\), not compiled \(0.300 s a step, "),
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_what_is_measured_to_be_fastest_is_taken_and_recorded(
    make_stage: MakeStage,
    measuring: Measuring,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    times: list[float],
    precision: str,
    compiles: bool,
    words: str,
) -> None:
    """What was compiled to be measured, and is not chosen, is not compiled any more."""
    measuring.stage, measuring.times = make_stage(kind), times
    settings_class: Any = TokenizerSettings if kind == "tokenizer" else PriorSettings
    given = settings_class(steps=50_000, batch_size=4)
    before = state_of(measuring.stage)
    found = with_fastest_way(measuring.stage, given, ALONE, is_new=True)
    assert measuring.seen == [False, False, True]
    assert (found.precision, found.compile) == (precision, compiles)
    assert compiled(measuring.stage) == compiles
    assert re.fullmatch(f"each step: {words}.*\n", capsys.readouterr().out)
    assert state_of(measuring.stage) == before
    changed = {name for name, value in vars(found).items() if value != getattr(given, name)}
    assert changed == {"precision", "compile"}
    again = with_fastest_way(measuring.stage, found, ALONE, is_new=False)  # a resumed run, which has them recorded
    assert again == found
    assert len(measuring.seen) == 3
    assert compiled(measuring.stage) == compiles
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", EVERY)
def test_the_steps_that_are_measured_are_real_ones_and_leave_no_trace(
    make_stage: MakeStage, measuring: Measuring, kind: str
) -> None:
    stage = make_stage(kind)
    measuring.stage, measuring.times, measuring.takes = stage, [0.3, 0.2, 0.1], True
    before, sizes = state_of(stage), list[int]()
    real = stage.losses

    def losses(batch: Any) -> dict[str, Tensor]:
        sizes.append(len(batch))
        return real(batch)

    stage.losses = losses  # type: ignore[method-assign]
    classes: dict[str, Any] = {"prior": PriorSettings, "decoder": DecoderSettings}
    settings = classes.get(kind, TokenizerSettings)(steps=50_000, batch_size=7, accumulate=2)
    found = with_fastest_way(stage, settings, ALONE, is_new=True)
    assert sizes == [3, 4] * (2 if kind == "decoder" else 3)
    assert found.precision == "bf16"
    assert hasattr(found, "compile") == (kind != "decoder")
    stage.losses = real  # type: ignore[method-assign]
    assert state_of(stage) == before


def test_a_short_run_measures_nothing_and_says_nothing(
    make_stage: MakeStage, measuring: Measuring, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring.stage = make_stage("prior")
    found = with_fastest_way(
        measuring.stage, PriorSettings(steps=fastest.WORTH_MEASURING - 1, batch_size=4), ALONE, is_new=True
    )
    assert (found.precision, found.compile) == ("bf16", False)
    assert measuring.seen == []
    assert capsys.readouterr().out == ""


def test_a_user_who_asks_for_one_way_gets_it(make_stage: MakeStage, measuring: Measuring) -> None:
    measuring.stage = make_stage("prior")
    given = PriorSettings(steps=50_000, batch_size=4, precision="fp32", compile=True)
    assert with_fastest_way(measuring.stage, given, ALONE, is_new=True) == given
    assert compiled(measuring.stage)
    assert measuring.seen == []


@pytest.mark.parametrize("fails", [False, True])
def test_processes_that_measure_other_times_choose_alike(
    make_stage: MakeStage, measuring: Measuring, fails: bool
) -> None:
    """By the times of the slowest, or one would try what the other does not, and wait for it; so if one cannot."""
    stages = [make_stage("prior") for _ in range(2)]
    times = [iter([0.02, 0.01, 0.001]), iter([0.20, 0.10, 0.05])]  # alone, the first would not try to compile

    def time_of(candidate: Candidate, stage: Stage, settings: Any, group: ProcessGroup, bar: Any) -> StepTime:
        if candidate.compiled and fails and group.rank == 1:
            raise RuntimeError("no compiler")
        return StepTime(seconds=next(times[group.rank]))

    def work(group: ProcessGroup) -> tuple[str, bool | None, bool]:
        given = PriorSettings(steps=50_000, batch_size=4)
        found = with_fastest_way(stages[group.rank], given, group, is_new=True)
        return found.precision, found.compile, compiled(stages[group.rank])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_time_of", time_of)
        outcomes = run_in_threads(2, work)
    assert outcomes == [("bf16", not fails, not fails)] * 2


def test_the_choice_is_recorded_and_a_resumed_run_continues_with_it(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a day with other times, too."""
    monkeypatch.setattr(fastest, "WORTH_MEASURING", 2)
    monkeypatch.setattr(fastest, "has_fast_bf16", lambda device: True)
    times: Iterator[float] = iter([])
    monkeypatch.setattr(trial, "measure", lambda step, device: StepTime(seconds=next(times)))
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 1, "--out", tmp_path / "run"]
    for precision, measured in (("bf16", [0.2, 0.1]), ("fp32", [0.1, 0.2])):
        times = iter(measured)
        outcome = codegrid(*command, "--steps", 2, "--force")
        assert (outcome.status, outcome.error_lines) == (0, [])
        assert f"each step: precision {precision} (0.100 s a step" in outcome.out
        recorded = read_info(tmp_path / "run", "prior").training
        assert (recorded["precision"], recorded["compile"]) == (precision, False)
        times = iter([])
        outcome = codegrid(*command, "--steps", 3, "--resume")
        assert (outcome.status, outcome.error_lines) == (0, [])
        assert "each step" not in outcome.out
        resumed = read_info(tmp_path / "run", "prior").training
        assert resumed == {**recorded, "steps": 3}


# What the time went to


class Slow(Toy):
    """A toy whose clock stands still but for what it says it takes: loading 3 s, a step 1 s, an evaluation 4 s."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock
        self.at_step = lambda step: self.pass_by(1)

    def pass_by(self, seconds: float) -> None:
        self.clock[0] += seconds

    def load(self, indices: Any) -> tuple[Tensor, ...]:
        self.pass_by(3)
        return super().load(indices)

    def evaluate(self) -> Any:
        self.pass_by(4)
        return super().evaluate()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "TimeUse", lambda: TimeUse(lambda: now[0]))
    return now


def raw_lines(folder: Path, part: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["part"] == part]


@pytest.mark.parametrize("shortest", [60.0, 27.0, 28.0])
def test_a_long_run_says_at_its_end_what_its_time_went_to(
    tmp_path: Path,
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shortest: float,
) -> None:
    """Five steps of 4 s and two evaluations of 4 s: of 28 s, 15 are waiting and 8 evaluating."""
    monkeypatch.setattr(loop, "SHORTEST_EXPLAINED", shortest)
    run_training(Slow(clock), toy_info(), settings_of(steps=5, evaluations=2), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]
    expected = "time: 17.8 % training, 53.6 % waiting for data, 28.6 % evaluating and pictures, 0.0 % saving"
    assert lines == ([expected] if shortest < 28 else [])


def test_the_log_has_the_share_of_the_time_that_steps_waited(tmp_path: Path, clock: list[float]) -> None:
    """Of the run so far; the lines of evaluations do not."""
    run_training(Slow(clock), toy_info(), settings_of(steps=4, evaluations=1), tmp_path)
    found = [line["waiting_share"] for line in raw_lines(tmp_path, "train")]
    assert found == pytest.approx([0.75] * 4)
    assert all("waiting_share" not in line for line in raw_lines(tmp_path, "held_out"))


def test_waiting_is_counted_anew_in_a_resumed_run(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SHORTEST_EXPLAINED", 0.0)
    run_training(Slow(clock), toy_info(), settings_of(steps=2, evaluations=1), tmp_path)
    capsys.readouterr()
    clock[0] += 1000
    run_again(Slow(clock), settings_of(steps=3, evaluations=1), tmp_path)
    assert raw_lines(tmp_path, "train")[-1]["waiting_share"] == pytest.approx(0.75)
    assert "time: 12.5 % training, 37.5 % waiting for data, 50.0 % evaluating" in capsys.readouterr().out


def test_a_run_that_waits_shows_it_beside_its_losses(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("pipeline.runtime.progress.Progress.set_numbers", lambda self, text: shown.append(text))
    run_training(Slow(clock), toy_info(), settings_of(steps=1), tmp_path / "slow")
    quick = Toy()
    quick.at_step = lambda step: clock.__setitem__(0, clock[0] + 5)
    run_training(quick, toy_info(), settings_of(steps=1), tmp_path / "quick")
    assert len(shown) == 2
    assert shown[0].endswith(", waits for data 75% of the time")
    assert "waits" not in shown[1]
