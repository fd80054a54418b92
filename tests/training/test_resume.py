"""--resume and --force: what they may change, what they refuse, and that they lose nothing."""

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cli
from pipeline.codes.dataset import CodeDataset
from pipeline.images.holdout import held_out
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import TrainingState, load_training, read_info, read_run, save_checkpoint
from pipeline.models.loading import load_prior
from pipeline.training import loop
from pipeline.training.loop import run_training
from pipeline.training.prior_stage import PriorStage
from pipeline.training.recipes import PriorSettings
from pipeline.training.run_folder import RunFolder
from pipeline.training.settings import resolve
from pipeline.training.stage import Stage
from pipeline.training.tokenizer_stage import TokenizerStage
from pipeline.training.train_prior import train_prior
from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, TokenizerConfig

from ..conftest import Codegrid, Trained
from ..support import brightness_tokenizer, digest_of, load_weights, save_tokenizer
from .training_runs import (
    Killed,
    Toy,
    during,
    evaluations_of,
    kill,
    lines_of,
    no_step_twice,
    run_again,
    settings_of,
    stop_at,
    toy_info,
)

# What --resume may change, and what it refuses


@pytest.mark.parametrize(
    "changed",
    [
        ["--lr", 0.5],
        ["--seed", 1],
        ["--batch-size", 5],
        ["--num-codes", 8],
        ["--code-dim", 3],
        ["--downsample", 2],
        ["--image-size", "8x8"],
        ["--channels", 1],
        ["--codebook-update", "gradient"],
        ["--bottleneck", "vae"],
        ["--kl-weight", 0.5],
        ["--data", "glyphs"],
        ["--optimizer", "adam"],
    ],
)
def test_a_tokenizer_resumes_as_it_was_started_or_not_at_all(
    trained: Trained, changed: Sequence[object], codegrid: Codegrid
) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-tokenizer", "--out", trained.tokenizer, "--steps", 9, "--resume", *changed)
    name = str(changed[0]).removeprefix("--")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.match(
        rf"Error: expected --resume with {name} .*, as the run was started, got .*; omit the option",
        outcome.error_lines[0],
    )
    assert digest_of(trained.tokenizer) == before


@pytest.mark.parametrize(
    "changed",
    [
        ["--lr", 0.5],
        ["--channels", 5],
        ["--num-layers", 3],
        ["--dropout", 0.2],
        ["--codes", "elsewhere"],
        ["--optimizer", "adam"],
    ],
)
def test_a_prior_resumes_as_it_was_started_or_not_at_all(
    trained: Trained, changed: Sequence[object], codegrid: Codegrid
) -> None:
    before = digest_of(trained.prior)
    outcome = codegrid("train-prior", "--out", trained.prior, "--steps", 9, "--resume", *changed)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert f"expected --resume with {str(changed[0]).removeprefix('--')} " in outcome.error_lines[0]
    assert digest_of(trained.prior) == before


def test_repeating_the_same_options_is_no_conflict(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is usually resumed by the same line with --resume; its paths are as relative as before."""
    monkeypatch.chdir(trained.images.parent)
    out, size = tmp_path / "run", ["--image-size", "8x12", "--channels", 3, "--num-codes", 16, "--lr", 2e-3]
    command = ["train-tokenizer", "--data", f"./{trained.images.name}", "--out", out, *size]
    assert codegrid(*command, "--steps", 1).status == 0
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert (outcome.status, outcome.error_lines) == (0, [])


@pytest.mark.parametrize("form", ["{}/", "./{}", "{}"])
def test_a_path_written_in_another_form_is_no_conflict(
    tmp_path: Path, trained: Trained, form: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell completes a folder's name with a slash."""
    monkeypatch.chdir(trained.tokenizer.parent)
    paths = ["--codes", form.format("codes"), "--tokenizer", form.format("tokenizer")]
    command = ["train-prior", *paths, "--out", tmp_path / "run", "--channels", 2, "--num-layers", 1]
    assert codegrid(*command, "--steps", 1).status == 0
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert (outcome.status, outcome.error_lines) == (0, [])


def test_a_setting_that_an_older_checkpoint_lacks_acts_when_it_is_given(trained: Trained) -> None:
    """An option acts or is refused; it is never ignored silently."""
    training = read_info(trained.prior, "prior").training
    older = {name: value for name, value in training.items() if name != "dropout"}
    assert resolve(PriorSettings, {"dropout": 0.5, "steps": None}, older).dropout == 0.5
    assert resolve(PriorSettings, {"dropout": None}, older).dropout == PriorSettings().dropout
    assert resolve(PriorSettings, {}, older).channels == training["channels"] != PriorSettings().channels


def test_a_tokenizer_that_has_moved_is_named_by_its_new_path(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """Its fingerprint shows that it is the same one."""
    shutil.copytree(trained.prior, tmp_path / "prior")
    shutil.copytree(trained.tokenizer, tmp_path / "moved")
    command = ["train-prior", "--out", tmp_path / "prior", "--resume", "--steps", 4]
    assert codegrid(*command, "--tokenizer", tmp_path / "moved").status == 0
    assert load_training(tmp_path / "prior").values["step"] == 4


def test_a_prior_without_pictures_can_be_resumed(tmp_path: Path, trained: Trained) -> None:
    """The default tokenizer exists, but made other codes: training continues without pictures, also when resumed."""
    other = tmp_path / "checkpoints" / "tokenizer"
    save_tokenizer(other, brightness_tokenizer())
    overrides = {"codes": str(trained.codes), "channels": 2, "num_layers": 1, "precision": "fp32"}
    train_prior(RunFolder(out=tmp_path / "prior", device="cpu"), {**overrides, "steps": 1}, other)
    train_prior(RunFolder(out=tmp_path / "prior", device="cpu", resume=True), {**overrides, "steps": 2}, other)
    assert load_training(tmp_path / "prior").values["step"] == 2


@pytest.mark.parametrize(("stage", "compiled"), [("tokenizer", ["Encoder", "Decoder"]), ("prior", ["GatedPixelCNN"])])
def test_compile_compiles_the_networks_of_a_new_run_and_of_a_resumed_one(
    tmp_path: Path,
    trained: Trained,
    stage: str,
    compiled: list[str],
    codegrid: Codegrid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """test_precision tests what compilation does to the numbers; here its calls are only recorded."""
    seen: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    commands = {"tokenizer": ["--data", trained.images], "prior": ["--codes", trained.codes, "--channels", 2]}
    command = [f"train-{stage}", *commands[stage], "--out", tmp_path / "run"]
    assert codegrid(*command, "--steps", 1).status == 0
    assert seen == []
    assert codegrid(*command, "--steps", 2, "--resume", "--compile").status == 0
    assert seen == compiled
    assert codegrid(*command, "--steps", 1, "--force", "--compile").status == 0
    assert seen == [*compiled, *compiled]


# What --resume finds in the folder


def test_resuming_a_finished_run_changes_nothing_and_prints_its_numbers(trained: Trained, codegrid: Codegrid) -> None:
    kept = ("model.safetensors", "config.json", "training.safetensors", "metrics.jsonl")
    for stage in ("tokenizer", "prior"):
        folder = getattr(trained, stage)
        before, info = digest_of(folder), read_info(folder, stage)
        outcome = codegrid(f"train-{stage}", "--out", folder, "--resume")
        assert outcome.status == 0
        assert {name: digest_of(folder)[name] for name in kept} == {name: before[name] for name in kept}
        assert re.search(rf"^done: .*\b{info.step}\b.*; \w+ \d", outcome.out, re.MULTILINE)


def test_resume_in_a_new_folder_starts_anew(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    assert codegrid(*command, "--out", tmp_path / "a", "--resume").status == 0
    assert codegrid(*command, "--out", tmp_path / "b").status == 0
    same_run_without_pictures = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert same_run_without_pictures[0] == same_run_without_pictures[1]


def test_resume_after_a_kill_before_the_first_save_starts_anew(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 2]
    with monkeypatch.context() as patch:
        during(patch, 2, kill)
        with pytest.raises(Killed):
            cli.main([*map(str, command), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "config.json").exists()
    assert codegrid(*command, "--out", tmp_path / "run").status == 1
    assert codegrid(*command, "--out", tmp_path / "run", "--resume").status == 0
    no_step_twice(tmp_path / "run", 2)


def test_resume_with_the_other_kind_or_a_broken_state_loses_nothing(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-prior", "--codes", trained.codes, "--out", trained.tokenizer, "--resume")
    assert outcome.status == 1
    assert "got a tokenizer checkpoint" in outcome.error_lines[0]
    assert digest_of(trained.tokenizer) == before
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--out", tmp_path / "run"]
    assert codegrid(*command, "--steps", 1).status == 0
    state = tmp_path / "run" / "training.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    before = digest_of(tmp_path / "run")
    outcome = codegrid(*command, "--steps", 2, "--resume")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.search(r"expected the training state .*, got a file that cannot be read", outcome.error_lines[0])
    assert digest_of(tmp_path / "run") == before


@pytest.mark.parametrize(("name", "status"), [("pictures/holiday.jpg", 0), ("model.safetensors", 1)])
def test_resume_never_removes_what_no_run_wrote(
    tmp_path: Path, trained: Trained, name: str, status: int, codegrid: Codegrid
) -> None:
    """Only --force may replace existing files, and a folder that holds only foreign pictures or weights is no run."""
    foreign = tmp_path / "run" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"...")
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    outcome = codegrid(*command, "--out", tmp_path / "run", "--resume")
    assert outcome.status == status, outcome
    assert foreign.exists(), outcome
    assert foreign.read_bytes() == b"..."


def test_resume_and_force_together_are_refused(trained: Trained, codegrid: Codegrid) -> None:
    before = digest_of(trained.tokenizer)
    outcome = codegrid("train-tokenizer", "--out", trained.tokenizer, "--resume", "--force")
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert re.match("Error: .*--resume.*--force", outcome.error_lines[0])
    assert digest_of(trained.tokenizer) == before


def test_force_leaves_what_no_run_wrote(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained.prior, out)
    foreign = [out / "pictures" / "holiday.jpg", out / "notes.txt"]
    for path in foreign:
        path.write_bytes(b"...")
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 1, "--steps", 1]
    assert codegrid(*command, "--out", out, "--force").status == 0
    assert all(path.read_bytes() == b"..." for path in foreign)
    assert evaluations_of(out)[-1]["step"] == 1  # the old log is gone
    assert load_prior(out).config.channels == 2


# The log of a run that was stopped within an interval of the log


@pytest.fixture(params=["tokenizer", "prior"])
def stage_of(request: pytest.FixtureRequest, trained: Trained) -> Callable[[], Stage]:
    """A function that makes the same small stage each time."""

    def make() -> Stage:
        torch.manual_seed(0)
        if request.param == "prior":
            codes = CodeDataset(trained.codes)
            model = GatedPixelCNN(PriorConfig(num_codes=codes.manifest.num_codes, channels=2, num_layers=1))
            return PriorStage(model, codes, held_out(codes.names()))
        config = TokenizerConfig(hidden_channels=4, residual_channels=2, num_codes=16, code_dim=2, data_variance=0.1)
        return TokenizerStage(VQVAE(config), open_images(str(trained.images)).train)

    return make


def with_ctrl_c_in(stage: Stage, step: int) -> Stage:
    """Return `stage`, with Ctrl-C in the middle of this step, counted from 1."""
    real, calls = stage.losses, []

    def losses(indices: np.ndarray) -> dict[str, Tensor]:
        calls.append(indices)
        stop_at(step)(len(calls))
        return real(indices)

    stage.losses = losses  # type: ignore[method-assign]
    return stage


def train_lines(folder: Path) -> list[dict[str, object]]:
    return [{**line, "seconds": 0} for line in lines_of(folder, "train")]


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (1, 2), (1, 2, 3)])
def test_a_run_stopped_within_an_interval_of_the_log_logs_the_same_lines(
    tmp_path: Path, stage_of: Callable[[], Stage], stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps with a line after 2 and 4: means of losses, codes in use, codes revived; and no seconds are lost."""
    monkeypatch.setattr(loop, "LINES_PER_EVALUATION", 2)
    settings = settings_of(steps=4, evaluations=1, learning_rate=1e-2)
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    run_training(stage_of(), toy_info(), settings, uninterrupted)
    for before, stop in zip((0, *stops), stops, strict=False):
        saved = read_run(resumed, "prior") if before else None
        stage = with_ctrl_c_in(stage_of(), stop - before)
        with pytest.raises(KeyboardInterrupt):
            run_training(stage, toy_info(), settings, resumed, resume=saved)
    run_again(stage_of(), settings, resumed)
    assert [line["step"] for line in train_lines(uninterrupted)] == [2, 4]
    assert train_lines(resumed) == train_lines(uninterrupted)
    for name in ("model.safetensors", "training.safetensors", "config.json"):
        same = (uninterrupted / name).read_bytes() == (resumed / name).read_bytes()
        assert same, name
    seconds = [line["seconds"] for line in lines_of(resumed)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("stopped", [3, 4])
def test_the_seconds_of_a_resumed_run_count_those_before_it(
    tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock set by hand a step takes 10 seconds; the time between the two runs does not count.

    The run is stopped within an interval of the log and at the end of one.
    """
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop, "LINES_PER_EVALUATION", 4)
    settings = settings_of(steps=8, evaluations=1)
    for resume in (False, True):
        toy = Toy()

        def at_step(step: int, resume: bool = resume) -> None:
            clock[0] += 10
            stop_at(stopped if not resume else 0)(step)

        toy.at_step = at_step
        if resume:
            run_again(toy, settings, tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                run_training(toy, toy_info(), settings, tmp_path)
        clock[0] += 500
    assert [(line["step"], line["seconds"]) for line in lines_of(tmp_path, "train")] == [
        (2, 20),
        (4, 40),
        (6, 60),
        (8, 80),
    ]


def test_a_state_saved_before_intervals_were_kept_still_resumes(
    tmp_path: Path, stage_of: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions wrote it: no sums, no uses of codes, no seconds. The clock continues from the log."""
    monkeypatch.setattr(loop, "LINES_PER_EVALUATION", 2)
    settings = settings_of(steps=4, evaluations=1)
    with pytest.raises(KeyboardInterrupt):
        run_training(with_ctrl_c_in(stage_of(), 3), toy_info(), settings, tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 70.5', log.read_text("utf-8")), "utf-8")
    state = load_training(tmp_path)
    newer = [name for name in state.tensors if name.startswith("interval/") or name == "stage/recent"]
    assert "interval/loss" in newer
    older = {name: tensor for name, tensor in state.tensors.items() if name not in newer}
    values = {name: value for name, value in state.values.items() if name != "interval"}
    info, weights = read_info(tmp_path, "prior"), load_weights(tmp_path)
    save_checkpoint(tmp_path, info, weights, TrainingState(tensors=older, values=values))
    run_again(stage_of(), settings, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if line["part"] == "train"] == [2, 4]
    assert lines[-1]["seconds"] >= 70.5
    assert load_training(tmp_path).values["step"] == 4
