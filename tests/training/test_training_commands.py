"""What the training commands refuse, when they refuse it, and what they can do without."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from pipeline.models.checkpoint import load_training, read_info
from pipeline.runtime.device import manual_seed
from pipeline.training import train_prior, train_tokenizer

from ..conftest import Codegrid, Trained
from ..support import digest_of

PRIOR = ["--channels", 2, "--num-layers", 1, "--steps", 1]


def change_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def replace_the_config_by_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "format version 1": change_config(format_version=1),
    "a prior": change_config(kind="prior"),
    "config of another network": change_config(config={"hidden_channels": 8, "residual_channels": 5}),
    "config not JSON": lambda folder: (folder / "config.json").write_bytes(b"\xff{"),
    "config a folder": replace_the_config_by_a_folder,
    "weights cut short": cut_weights,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.fixture
def default_tokenizer(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tokenizer that made the codes, in the default place."""
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/tokenizer")
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((trained.tokenizer / name).read_bytes())
    return folder


# A default tokenizer that is not needed


@pytest.mark.parametrize("damage", DAMAGES)
def test_codes_need_no_default_tokenizer(
    trained: Trained, default_tokenizer: Path, damage: str, codegrid: Codegrid
) -> None:
    DAMAGES[damage](default_tokenizer)
    outcome = codegrid("train-prior", "--codes", trained.codes, *PRIOR)
    assert (outcome.status, outcome.error_lines) == (0, [])
    notes = [line for line in outcome.out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"{default_tokenizer}" in notes[0]
    assert notes[0].endswith("; training continues without pictures")
    assert not Path("checkpoints/prior/pictures").exists()
    assert codegrid("train-prior", "--codes", trained.codes, *PRIOR, "--steps", 2, "--resume").status == 0


@pytest.mark.parametrize("codes_named", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tokenizer_that_is_named_or_needed_must_be_usable(
    trained: Trained, default_tokenizer: Path, damage: str, codes_named: bool, codegrid: Codegrid
) -> None:
    DAMAGES[damage](default_tokenizer)
    options = ["--codes", trained.codes, "--tokenizer", default_tokenizer] if codes_named else []
    outcome = codegrid("train-prior", *options, *PRIOR)
    assert outcome.status == 1
    assert len(outcome.error_lines) == 1
    assert "note: " not in outcome.out
    assert not Path("checkpoints/prior").exists()


def test_a_default_tokenizer_that_made_the_codes_decodes_previews(
    trained: Trained, default_tokenizer: Path, codegrid: Codegrid
) -> None:
    """The oracle of the two tests above: without damage there is a picture and no note."""
    outcome = codegrid("train-prior", "--codes", trained.codes, *PRIOR)
    assert outcome.status == 0
    assert "note: " not in outcome.out
    assert [path.name for path in Path("checkpoints/prior/pictures").iterdir()] == ["step-0000001.png"]


# The destination: checked first, cleared last


def never(*arguments: object, **options: object) -> NoReturn:
    raise AssertionError("long work before the destination was checked")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening images or codes, loading a tokenizer and exporting raise an AssertionError."""
    monkeypatch.setattr(train_tokenizer, "open_images", never)
    for name in ("CodeDataset", "export_codes", "load_trained_tokenizer"):
        monkeypatch.setattr(train_prior, name, never)


TRAINING_COMMANDS = {
    "tokenizer": ["train-tokenizer"],
    "prior": ["train-prior", "--tokenizer", "{tokenizer}"],
    "prior of codes": ["train-prior", "--codes", "{codes}"],
}


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_a_folder_with_files_is_refused_before_any_work(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid, no_long_work: None
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    arguments = [word.format(**vars(trained)) for word in TRAINING_COMMANDS[command]]
    outcome = codegrid(*arguments, "--out", tmp_path)
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert line.startswith(f"Error: expected an empty or new folder as --out {tmp_path}, got a folder with files in it")
    assert digest_of(tmp_path).keys() == {"mine.txt"}


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid, no_long_work: None
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [word.format(**vars(trained)) for word in TRAINING_COMMANDS[command]]
    outcome = codegrid(*arguments, "--out", tmp_path / "file" / "run")
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert line.startswith(f"Error: expected a folder that can be written at {tmp_path / 'file' / 'run'}")


REFUSED_LATER = {
    "no such images": ["train-tokenizer", "--data", "{nosuch}"],
    "an odd width": ["train-tokenizer", "--hidden-channels", "3"],
    "no such codes": ["train-prior", "--codes", "{nosuch}"],
    "no such tokenizer": ["train-prior", "--tokenizer", "{nosuch}"],
}


@pytest.mark.parametrize("case", REFUSED_LATER)
def test_what_is_refused_later_leaves_no_folder_behind(tmp_path: Path, case: str, codegrid: Codegrid) -> None:
    arguments = [word.format(nosuch=tmp_path / "nosuch") for word in REFUSED_LATER[case]]
    assert codegrid(*arguments, "--out", tmp_path / "new" / "run").status == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", REFUSED_LATER)
def test_what_is_refused_later_clears_nothing(tmp_path: Path, case: str, codegrid: Codegrid) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("an older run")
    arguments = [word.format(nosuch=tmp_path / "nosuch") for word in REFUSED_LATER[case]]
    assert codegrid(*arguments, "--out", tmp_path / "run", "--force").status == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "an older run"
    assert digest_of(tmp_path).keys() == {"run/metrics.jsonl"}


@pytest.mark.parametrize("option", [["--hidden-channels", 3], ["--hidden-channels", 5, "--bottleneck", "vae"]])
def test_settings_that_no_network_has_are_refused_before_any_work(
    tmp_path: Path, option: list[object], codegrid: Codegrid, no_long_work: None
) -> None:
    outcome = codegrid("train-tokenizer", *option, "--out", tmp_path / "run")
    assert outcome.status == 1
    assert outcome.error_lines[0].startswith(f"Error: TokenizerConfig.{str(option[0])[2:].replace('-', '_')}: expected")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_written_is_not_resumed(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, no_long_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder that has become read-only, which permissions alone do not bring about for every user."""

    def temporary_file(**where: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    shutil.copytree(trained.tokenizer, tmp_path / "run")
    before = digest_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runtime.filesystem.TemporaryFile", temporary_file)
        outcome = codegrid("train-tokenizer", "--out", tmp_path / "run", "--resume", "--steps", 9)
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert line.startswith(f"Error: expected a folder that can be written at {tmp_path / 'run'}, got Permission denied")
    assert digest_of(tmp_path) == before


# Seeds of any size


def random_numbers() -> list[float]:
    values: list[float] = torch.rand(4).tolist()
    return values


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
def test_small_seeds_are_those_of_torch(seed: int) -> None:
    torch.manual_seed(seed)
    expected = random_numbers()
    manual_seed(seed)
    assert random_numbers() == expected


def test_seeds_that_differ_draw_different_numbers() -> None:
    """Above bit 32 too, which torch's CPU generator ignores, and above bit 64, where it raises."""
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 + 2**63, 5 + 2**64, 5 + 2**65, 5 + 10**40]
    found = set()
    for seed in seeds:
        manual_seed(seed)
        found.add(tuple(random_numbers()))
    assert len(found) == len(seeds)
    torch.manual_seed(5)
    assert tuple(random_numbers()) in found


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_training_takes_a_seed_of_any_size(tmp_path: Path, trained: Trained, stage: str, codegrid: Codegrid) -> None:
    command = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--num-codes", 16, "--hidden-channels", 4],
        "prior": ["train-prior", "--codes", trained.codes, "--tokenizer", trained.tokenizer, "--channels", 2],
    }[stage]
    digests = set()
    for number, seed in enumerate((3, 3 + 2**32, 3 + 2**64)):
        out = tmp_path / str(number)
        assert codegrid(*command, "--out", out, "--steps", 1, "--seed", seed).status == 0
        assert read_info(out, stage).training["seed"] == seed
        digests.add((out / "model.safetensors").read_bytes())
    assert len(digests) == 3
    assert codegrid(*command, "--out", out, "--steps", 2, "--seed", seed, "--resume").status == 0
    assert load_training(out).values["step"] == 2
