"""A run whose files are damaged resumes from the save before, or is refused: nothing damaged is ever saved anew."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import InputError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CONFIG, MODEL, PREVIOUS, TRAINING, load_training, read_run
from pipeline.training import loop
from pipeline.training.loop import run_training
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior
from pipeline.training.train_tokenizer import train_tokenizer

from ..conftest import Codegrid, Trained
from ..mutations import DAMAGES, IRREGULAR
from ..support import digest_of
from .training_runs import Killed, Toy, during, kill, lines_of, run_again, same_run, settings_of, toy_info

FILES = (MODEL, CONFIG, TRAINING)
STEPS = 4  # of the run; killed in the last, so that the save before the last is of step 2, the last of step 3


@dataclass(frozen=True)
class Case:
    """A run that was killed, the one that was not, and how to resume it."""

    killed: Path
    complete: Path
    resume: Callable[[Path], object]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module", params=["tokenizer", "prior"])
def case(request: pytest.FixtureRequest, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    small = {"steps": STEPS, "batch_size": 4, "precision": "fp32"}

    def run(out: Path, *, resume: bool = False) -> object:
        place = RunFolder(out=out, device="cpu", resume=resume)
        if request.param == "tokenizer":
            sizes = {"hidden_channels": 4, "residual_channels": 2, "num_residual_layers": 1, "num_codes": 8}
            return train_tokenizer(place, {} if resume else {"data": str(trained.images), **sizes, **small})
        sizes = {"channels": 4, "num_layers": 1, "dropout": 0.5}
        named = {"codes": str(trained.codes), "tokenizer": str(trained.tokenizer)}
        return train_prior(place, {} if resume else {**named, **sizes, **small}, trained.tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
        run(folder / "complete")
        during(patch, STEPS, kill)
        with pytest.raises(Killed):
            run(folder / "killed")
    assert [load_training(folder / "killed" / place).values["step"] for place in (PREVIOUS, ".")] == [2, 3]
    return Case(folder / "killed", folder / "complete", lambda out: run(out, resume=True))


def copy_of(case: Case, folder: Path) -> Path:
    return Path(shutil.copytree(case.killed, folder / "run"))


def saves_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digest_of(folder).items() if Path(name).name in FILES}


def is_noticed(run: Path) -> bool:
    """Return whether the damage of one bit can be noticed: not in the key of the checksum, for the rest is intact."""
    try:
        return "checksum" in json.loads((run / CONFIG).read_bytes())
    except ValueError:
        return True


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def damaged(path: Path, damage: str, seed: int) -> None:
    (DAMAGES | {name: lambda path, random, act=act: act(path) for name, act in IRREGULAR.items()})[damage](
        path, np.random.default_rng(seed)
    )


# Every kind of damage, to every file


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [*DAMAGES, *IRREGULAR])
def test_the_save_before_the_last_is_used_with_one_warning(
    case: Case, name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends with the very bytes of one that was never disturbed; what no file can replace is named."""
    run = copy_of(case, tmp_path)
    damaged(run / name, damage, seed=0)
    before = saves_of(run)
    if damage in IRREGULAR or (run / name).is_dir():
        with pytest.raises(
            InputError, match=rf"expected a file or nothing at .*{name}, got a (folder|named pipe|link)"
        ):
            case.resume(run)
        assert saves_of(run) == before
        return
    case.resume(run)
    (warning,) = warnings_in(caplog)
    assert name in warning
    assert str(run / PREVIOUS) in warning
    same_run(run, case.complete)
    assert {path: digest for path, digest in saves_of(run).items() if path.startswith(PREVIOUS)} == {
        path: digest for path, digest in before.items() if path.startswith(PREVIOUS)
    }  # which the damaged save has not replaced


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_save_before_the_last_changes_nothing(
    case: Case, name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(case, tmp_path)
    last = saves_of(case.killed)
    damaged(run / PREVIOUS / name, damage, seed=1)
    before = saves_of(run)
    if (run / PREVIOUS / name).is_dir():
        with pytest.raises(InputError, match=rf"expected a file or nothing at .*{name}, got a folder"):
            case.resume(run)
        assert saves_of(run) == before
        return
    case.resume(run)
    assert not warnings_in(caplog)
    same_run(run, case.complete)
    found = saves_of(run)
    assert all(found[f"{PREVIOUS}/{file}"] == last[file] for file in FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_both_is_refused_and_changes_nothing(case: Case, name: str, damage: str, tmp_path: Path) -> None:
    run = copy_of(case, tmp_path)
    damaged(run / name, damage, seed=2)
    damaged(run / PREVIOUS / name, "one bit", seed=3)
    before = digest_of(run)
    with pytest.raises(InputError) as error:
        case.resume(run)
    assert str(run / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert digest_of(run) == before


@pytest.mark.parametrize(("name", "other"), [(a, b) for a in FILES for b in FILES])
def test_another_file_in_the_place_of_one_is_noticed(
    case: Case, name: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That of the save before, a valid one, among them."""
    run = copy_of(case, tmp_path)
    source = run / PREVIOUS / name if other == name else run / other
    (run / name).write_bytes(source.read_bytes())
    if source.read_bytes() == (case.killed / name).read_bytes():  # the best evaluation was that of the save before
        return
    case.resume(run)
    assert len(warnings_in(caplog)) == 1
    same_run(run, case.complete)


@pytest.mark.parametrize("number", range(24))
def test_any_bit(case: Case, number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bit anywhere in the three files: the end is the same; and the warning comes unless nothing was changed."""
    run = copy_of(case, tmp_path)
    name = FILES[number % 3]
    damaged(run / name, "one bit", seed=100 + number)
    noticed = is_noticed(run)
    case.resume(run)
    same_run(run, case.complete)
    assert len(warnings_in(caplog)) == noticed


# Many places, with a toy


def toy_run(folder: Path) -> Path:
    """A toy run that keeps its best weights, killed in step 4; saved after 3, and before that after 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
        torch.manual_seed(0)
        toy = Toy()
        toy.at_step = lambda step: kill() if step == 4 else None
        with pytest.raises(Killed):
            run_training(toy, toy_info(), TOY_SETTINGS, folder)
    return folder


TOY_SETTINGS = settings_of(steps=4, keep_best=True)


def test_a_bit_at_every_place_of_a_small_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 300 places."""
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 1)
    killed = toy_run(tmp_path / "killed")
    torch.manual_seed(0)
    run_training(Toy(), toy_info(), TOY_SETTINGS, tmp_path / "complete")
    expected = saves_of(tmp_path / "complete")
    places = 0
    for name in FILES:
        data = (killed / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 100)):
            run = Path(shutil.copytree(killed, tmp_path / "run", dirs_exist_ok=True))
            (run / name).write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            noticed = is_noticed(run)
            caplog.clear()
            run_again(Toy(), TOY_SETTINGS, run)
            places += 1
            found = saves_of(run)
            assert {file: found[file] for file in FILES} == {file: expected[file] for file in FILES}
            assert len(warnings_in(caplog)) == noticed
    assert places >= 250


def test_a_state_of_an_older_version_has_no_hash_and_is_taken_as_it_is(tmp_path: Path) -> None:
    """It resumes; and damage that no hash tells of changes the end, so the tests above can fail."""
    killed = toy_run(tmp_path / "killed")
    torch.manual_seed(0)
    run_training(Toy(), toy_info(), TOY_SETTINGS, tmp_path / "complete")
    content = json.loads((killed / CONFIG).read_bytes())
    del content["checksum"], content["training_sha256"]
    (killed / CONFIG).write_text(json.dumps(content))
    for weight, same in ((None, True), (0.5, False)):
        run = Path(shutil.copytree(killed, tmp_path / f"run-{weight}"))
        if weight is not None:
            state = load_training(run)
            tensors = state.tensors | {"model/weight": torch.full((1, 1), weight)}
            save_file(tensors, run / TRAINING, metadata={"values": json.dumps(state.values)})
        run_again(Toy(), TOY_SETTINGS, run)
        assert (saves_of(run)[TRAINING] == saves_of(tmp_path / "complete")[TRAINING]) == same


def test_a_save_that_is_damaged_while_the_run_is_on_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and the good save before it stays; the damaged one is replaced."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    kept: list[dict[str, str]] = []

    def at_step(step: int) -> None:
        if step == 3:
            kept.append(saves_of(tmp_path / PREVIOUS))
            damaged(tmp_path / MODEL, "one bit", seed=0)
        if step == 4:
            kept.append(saves_of(tmp_path / PREVIOUS))

    toy = Toy()
    toy.at_step = at_step
    run_training(toy, toy_info(), settings_of(steps=4), tmp_path)
    assert kept[0] == kept[1] != {}
    assert read_run(tmp_path, "prior").training.values["step"] == 4
    assert read_run(tmp_path / PREVIOUS, "prior").training.values["step"] == 3


def test_a_run_is_taken_back_to_the_save_before_the_last_if_the_last_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A NaN in step 4, while the save of step 3 is spoiled: back to step 2, whose files stay as they are."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    toy = Toy()
    kept: list[dict[str, str]] = []
    real = toy.losses

    def losses(indices: np.ndarray) -> dict[str, object]:
        found = real(indices)
        if len(toy.seen) == 4:
            damaged(tmp_path / TRAINING, "one bit", seed=0)
            kept.append(saves_of(tmp_path / PREVIOUS))
            return {"loss": found["loss"] * math.nan}
        if len(toy.seen) == 6:  # step 4 again; step 3 was saved anew
            kept.append(saves_of(tmp_path / PREVIOUS))
        return dict(found)

    toy.losses = losses  # type: ignore[assignment, method-assign]
    run_training(toy, toy_info(), settings_of(steps=6), tmp_path)
    assert len(warnings_in(caplog)) == 1
    assert kept[0] == kept[1]
    assert [line["step"] for line in lines_of(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    assert read_run(tmp_path, "prior").training.values["learning_rate_scale"] == 0.5


# --steps below what is done


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("spoiled", [False, True])
def test_steps_below_what_is_done_say_so(
    tmp_path: Path, trained: Trained, steps: int, spoiled: bool, codegrid: Codegrid, caplog: pytest.LogCaptureFixture
) -> None:
    """Status 0, also if the last save is damaged: the save before is then the last one, complete."""
    for stage in ("tokenizer", "prior"):
        run = Path(shutil.copytree(getattr(trained, stage), tmp_path / stage))
        shutil.copytree(run, run / PREVIOUS, ignore=lambda folder, names: {*names} - {*FILES})
        expected = saves_of(run / PREVIOUS)
        if spoiled:
            damaged(run / MODEL, "one bit", seed=5)
        outcome = codegrid(f"train-{stage}", "--out", run, "--steps", steps, "--resume")
        assert outcome.status == 0
        assert f"3 steps of this run are done already, --steps {steps} adds none" in outcome.out
        assert saves_of(run) == expected | {f"{PREVIOUS}/{name}": digest for name, digest in expected.items()}
    assert len(warnings_in(caplog)) == 2 * spoiled
