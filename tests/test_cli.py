"""The command line as a user meets it: bad input, exit statuses, help, Ctrl-C; what it writes: `test_commands.py`."""

import configparser
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from pipeline.errors import printable
from pipeline.generation import image_pipeline, sample_folder
from pipeline.models.checkpoint import load_training, read_info
from pipeline.models.loading import load_tokenizer

from .conftest import Codegrid, Trained
from .support import HEIGHT, ROOT, WIDTH, as_a_program, brightness_tokenizer, digest_of, fill_with_cells, save_tokenizer

# Bad input: one line, the right status, nothing lost


@pytest.fixture
def place(tmp_path: Path, trained: Trained) -> Path:
    """A folder of things that are wrong, each in its own way."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.png").write_text("not an image")
    (tmp_path / "file").write_text("a regular file")
    shutil.copytree(trained.tokenizer, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(trained.codes, tmp_path / "cut-codes")
    shard = tmp_path / "cut-codes" / "codes-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    save_tokenizer(tmp_path / "other", brightness_tokenizer(), trained.images)
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "white.png")
    Image.new("L", (HEIGHT, WIDTH), 0).save(tmp_path / "rotated.png")
    (tmp_path / "old.png").write_bytes(b"precious")
    (tmp_path / "old.json").write_bytes(b"precious")
    return tmp_path


WRONG: dict[str, tuple[str, int, str]] = {
    "an empty folder": ("train-tokenizer --data {place}/empty --out {new}", 1, "images .* got none"),
    "a text file as png": ("train-tokenizer --data {place}/text --out {new}", 1, "1 broken of 1: notes.png"),
    "no such folder": ("train-tokenizer --data {place}/nosuch --out {new}", 1, "nosuch', which is neither"),
    "a file as folder of images": ("train-tokenizer --data {place}/file --out {new}", 1, "a folder that can be read"),
    "a size that does not divide": (
        "train-tokenizer --data {images} --image-size 9x12 --out {new}",
        1,
        "multiples of 4, got 9x12; use 8x12",
    ),
    "images that no longer exist": ("evaluate --tokenizer {tokenizer} --data {place}/nosuch", 1, "which is neither"),
    "an unknown label": ("sample {both} --label nosuch --out {new}", 1, "disc, line, été.* got the label nosuch"),
    "no samples": ("sample {both} --n 0 --out {new}", 2, "--n.*0 is not in the range"),
    "a negative temperature": ("sample {both} --temperature -1 --out {new}", 2, "--temperature"),
    "a nucleus above 1": ("sample {both} --top-p 1.5 --out {new}", 2, "--top-p"),
    "a prior as tokenizer": (
        "sample --tokenizer {prior} --prior {prior} --out {new}",
        1,
        "expected a tokenizer checkpoint .* got a prior checkpoint",
    ),
    "a tokenizer as prior": (
        "sample --tokenizer {tokenizer} --prior {tokenizer} --out {new}",
        1,
        "expected a prior checkpoint .* got a tokenizer checkpoint",
    ),
    "the prior of another": ("sample --tokenizer {place}/other --prior {prior} --out {new}", 1, "fingerprint .* got"),
    "no tokenizer": ("sample --tokenizer {place}/nosuch --prior {prior} --out {new}", 1, "no such folder; run train-t"),
    "weights cut short": ("sample --tokenizer {place}/cut --prior {prior} --out {new}", 1, "with the fingerprint"),
    "weights cut short, exported": ("export-codes --tokenizer {place}/cut --out {new}", 1, "with the fingerprint"),
    "no codes": ("train-prior --codes {place}/empty --out {new}", 1, "got no manifest.json; make one with export"),
    "codes cut short": ("train-prior --codes {place}/cut-codes --out {new}", 1, "codes-00001.npy"),
    "codes of another": (
        "train-prior --codes {codes} --tokenizer {place}/other --out {new}",
        1,
        "codes in .* made with this tokenizer .fingerprint .* got fingerprint",
    ),
    "out below a file, tokenizer": ("train-tokenizer --data {images} --out {place}/file/x", 1, "can be written"),
    "out below a file, codes": ("export-codes --tokenizer {tokenizer} --out {place}/file/x", 1, "can be written"),
    "out below a file, prior": ("train-prior --codes {codes} --out {place}/file/x", 1, "can be written"),
    "out below a file, samples": ("sample {both} --out {place}/file/x", 1, "can be written"),
    "out below a file, picture": ("reconstruct --tokenizer {tokenizer} --out {place}/file/x.png", 1, "can be written"),
    "out below a file, numbers": ("evaluate --tokenizer {tokenizer} --json {place}/file/x", 1, "can be written"),
    "out is a file, tokenizer": ("train-tokenizer --data {images} --out {place}/file", 1, "can be written"),
    "out is a file, samples": ("sample {both} --out {place}/file", 1, "can be written"),
    "out is a folder, picture": ("reconstruct --tokenizer {tokenizer} --out {place}/empty", 1, "a file as --out"),
    "out exists, tokenizer": (
        "train-tokenizer --data {images} --out {tokenizer}",
        1,
        "use --resume to continue or --f",
    ),
    "out exists, codes": ("export-codes --tokenizer {tokenizer} --out {codes}", 1, "or use --force"),
    "out exists, prior": ("train-prior --codes {codes} --out {prior}", 1, "use --resume to continue or --force"),
    "out exists, samples": ("sample {both} --out {codes}", 1, "or use --force"),
    "out exists, picture": ("reconstruct --tokenizer {tokenizer} --out {place}/old.png", 1, "or use --force"),
    "out exists, numbers": ("evaluate --tokenizer {tokenizer} --json {place}/old.json", 1, "or use --force"),
    "an unknown device": ("evaluate --tokenizer {tokenizer} --device nosuch", 1, "as device, got nosuch"),
    "an unknown command": ("nosuch", 2, "No such command 'nosuch'"),
    "an unknown option": ("sample --nosuch", 2, "No such option.*--nosuch"),
    "an option without its value": ("sample --n", 2, "'--n' requires an argument"),
    "not a size": ("train-tokenizer --image-size 8by12", 2, "expected N or HxW in pixels"),
    "an unknown bottleneck": ("train-tokenizer --bottleneck nosuch --out {new}", 2, "nosuch.* is not one of"),
    "a negative weight": ("train-tokenizer --bottleneck vae --kl-weight -1 --out {new}", 2, "--kl-weight"),
    "a size of nothing": ("train-tokenizer --image-size 0x12", 2, "expected N or HxW in pixels"),
    "one argument too many": ("sample {both} more", 2, "unexpected extra argument .*more"),
    "complete, no picture": (
        "complete {both} --image {place}/nosuch.png --keep top --out {new}",
        1,
        "a picture as --im",
    ),
    "complete, a text": ("complete {both} --image {place}/text/notes.png --keep top --out {new}", 1, "not an image"),
    "complete, no image named": ("complete {both} --keep top --out {new}", 2, "Missing option '--image'"),
    "complete, nothing to keep named": ("complete {both} --image {place}/white.png --out {new}", 2, "option '--keep'"),
    "complete, no such half": (
        "complete {both} --image {place}/white.png --keep middle --out {new}",
        1,
        "expected top, bottom, left, right or a picture, .* --keep middle, got .*No such file",
    ),
    "complete, a text as mask": (
        "complete {both} --image {place}/white.png --keep {place}/text/notes.png --out {new}",
        1,
        "--keep .*notes.png, got",
    ),
    "complete, a mask rotated": (
        "complete {both} --image {place}/white.png --keep {place}/rotated.png --out {new}",
        1,
        f"expected a mask of {HEIGHT}x{WIDTH} pixels, .* got {WIDTH}x{HEIGHT} in .*rotated.png",
    ),
    "complete, all is kept": (
        "complete {both} --image {place}/white.png --keep {place}/white.png --out {new}",
        1,
        "leaves something to draw, got one that keeps all",
    ),
    "complete, an unknown label": (
        "complete {both} --image {place}/white.png --keep top --label nosuch --out {new}",
        1,
        "got the label nosuch",
    ),
    "complete, no candidates": ("complete {both} --candidates 0 --out {new}", 2, "--candidates'.* 0 is not in"),
    "out exists, completions": (
        "complete {both} --image {place}/white.png --keep top --out {codes}",
        1,
        "or use --force",
    ),
    "force, all is kept": (
        "complete {both} --image {place}/white.png --keep {place}/white.png --out {codes} --force",
        1,
        "keeps all",
    ),
    # With --force nothing is lost either if the command cannot do its work.
    "force, no images": ("train-tokenizer --data {place}/empty --out {tokenizer} --force", 1, "got none"),
    "force, codes cut short": ("train-prior --codes {place}/cut-codes --out {prior} --force", 1, "codes-00001.npy"),
    "force, an unknown label": ("sample {both} --label nosuch --out {codes} --force", 1, "nosuch"),
    "force, images that no longer exist": (
        "export-codes --tokenizer {tokenizer} --data {place}/nosuch --out {codes} --force",
        1,
        "neither",
    ),
    "force, no picture": (
        "reconstruct --tokenizer {tokenizer} --data {place}/text --out {place}/old.png --force",
        1,
        "1 broken of 1",
    ),
    "force, codes of another": (
        "train-prior --codes {codes} --tokenizer {place}/other --out {prior} --force",
        1,
        "fingerprint",
    ),
    "force, tokenizer cut short": ("train-prior --tokenizer {place}/cut --out {prior} --force", 1, "with the finger"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_reported_in_one_line_and_loses_nothing(
    place: Path, trained: Trained, case: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # for a writer that might be replacing weights cut short
    line, status, pattern = WRONG[case]
    names = {**vars(trained), "place": place, "new": place / "new"}
    names["both"] = "--tokenizer {tokenizer} --prior {prior}"
    # A path may hold spaces: fill in after splitting.
    words = [word.format(**names) for word in line.replace("{both}", names["both"]).split()]
    # The session's run is shared, so a command that loses something must lose a copy.
    for name in ("tokenizer", "codes", "prior"):
        shutil.copytree(getattr(trained, name), place / "copy" / name)
    words = [word.replace(str(trained.tokenizer.parent), str(place / "copy")) for word in words]
    before, names_before = digest_of(place), set(place.rglob("*"))
    outcome = codegrid(*words)
    assert outcome.status == status, outcome
    assert len(outcome.error_lines) == 1, outcome.error_lines
    (message,) = outcome.error_lines
    assert message.startswith("Error: ")
    assert re.search(pattern, message), message
    # For an option without its value, click does not say which command it belongs to.
    hint = "" if case == "an option without its value" else r" \(see codegrid( [a-z-]+)? --help\)"
    assert re.fullmatch({1: "Error: expected .+, got .+; .+", 2: f"Error: .+{hint}"}[status], message), message
    assert "Traceback" not in outcome.err
    assert digest_of(place) == before
    assert set(place.rglob("*")) == names_before  # no folder either


DESTINATIONS = {
    "sample": "sample --tokenizer {no} --prior {no} --out",
    "complete": "complete --tokenizer {no} --prior {no} --image {no} --keep {no} --out",
    "reconstruct": "reconstruct --tokenizer {no} --data {no} --out",
    "decode-codes": "decode-codes {codes} --tokenizer {no} --out",
    "decode-codes, array": "decode-codes {codes} --tokenizer {no} --out",
    "evaluate": "evaluate --tokenizer {no} --prior {no} --data {no} --json",
    "measure-rate": "measure-rate --tokenizer {no} --prior {no} --data {no} --json",
}


@pytest.mark.parametrize("command", DESTINATIONS)
def test_the_destination_is_checked_before_anything_is_loaded(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    """Of all that is wrong it is reported first; a command that is refused for another reason makes no folder."""
    words = [word.format(no=tmp_path / "nosuch", codes=trained.codes) for word in DESTINATIONS[command].split()]
    name = {"reconstruct": "out.png", "decode-codes, array": "out.npy"}.get(command, "out")
    taken = tmp_path / "taken" / name
    (taken.parent if "." in name or words[-1] == "--json" else taken).mkdir(parents=True)
    (taken / "file" if taken.is_dir() else taken).write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    for path, pattern in (
        (taken, "--force"),
        (tmp_path / "file" / name, "a folder that can be written at .*Not a dir"),
    ):
        outcome = codegrid(*words, path)
        assert outcome.status == 1
        assert re.search(pattern, outcome.error_lines[0]), outcome
    outcome = codegrid(*words, tmp_path / "deep" / "in" / name)
    assert outcome.status == 1
    assert "nosuch" in outcome.error_lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", DESTINATIONS)
def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_loaded(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    words = [word.format(no=tmp_path / "nosuch", codes=trained.codes) for word in DESTINATIONS[command].split()]
    (tmp_path / "closed").mkdir(mode=0o555)
    outcome = codegrid(*words, tmp_path / "closed" / "out.npy")
    assert outcome.status == 1
    assert "got Permission denied" in outcome.error_lines[0]


def test_both_fingerprints_are_in_the_message(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """C6"""
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer(), trained.images).fingerprint
    for command in ("sample", "evaluate"):
        out = ["--out", tmp_path / "out"] if command == "sample" else []
        outcome = codegrid(command, "--tokenizer", tmp_path / "other", "--prior", trained.prior, *out)
        assert outcome.status == 1
        for fingerprint in (other, read_info(trained.tokenizer, "tokenizer").fingerprint):
            assert fingerprint in outcome.error_lines[0]


def test_without_a_command_the_help_is_shown(codegrid: Codegrid) -> None:
    outcome = codegrid()
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: codegrid ")
    assert "\nCommands:\n" in outcome.out
    assert outcome.out == codegrid("--help").out


def test_the_version_is_the_latest_of_the_changelog_installed_or_not(codegrid: Codegrid) -> None:
    """The number is in one place, from which setup.cfg takes it."""
    latest = re.findall(r"^## (\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[0]
    outcome = codegrid("--version")
    assert (outcome.status, outcome.out, outcome.err) == (0, f"codegrid, version {latest}\n", "")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    assert setup["metadata"]["version"] == "attr: pipeline.__version__"
    assert cli.__version__ == latest


def test_help_of_each_command_names_its_options(codegrid: Codegrid) -> None:
    for name, command in cli.cli.commands.items():
        outcome = codegrid(name, "--help")
        assert outcome.status == 0
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert options
        for option in options:
            # On a line of its own: --num-codes does not count as --n.
            assert re.search(rf"^  {option}\b(?!-)", outcome.out, re.MULTILINE), option


# Unexpected errors and Ctrl-C


def test_an_unexpected_error_is_one_line_and_debug_shows_where(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(image_pipeline, "sample_codes", broken)
    command = ["sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--out", tmp_path / "out"]
    outcome = codegrid(*command)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "Error: RuntimeError: first second (--debug shows where)"
    for arguments in ([*command, "--force", "--debug"], ["--debug", *command, "--force"]):
        with pytest.raises(RuntimeError, match="first"):
            cli.main([str(argument) for argument in arguments])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    outcome = as_a_program("evaluate", "--tokenizer", "nosuch", "--debug", cwd=tmp_path)
    assert outcome.status == 1
    assert "Traceback (most recent call last)" in outcome.err
    assert "pipeline.errors.InputError: expected a tokenizer checkpoint in nosuch" in outcome.err


def test_ctrl_c_while_sampling(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_pipeline, "sample_codes", interrupted)
    command = ["sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--out", tmp_path / "out"]
    outcome = codegrid(*command)
    assert outcome.status == 130
    assert outcome.error_lines == [f"stopped: 0 of 64 images are in {tmp_path / 'out'}"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_second_batch_keeps_the_first(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, batches = tmp_path / "out", image_pipeline.sample_codes, itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(batches) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(image_pipeline, "sample_codes", interrupted)
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)
    outcome = codegrid("sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--out", out, "--n", 7)
    assert outcome.status == 130
    assert outcome.error_lines == [f"stopped: 3 of 7 images are in {out}"]
    assert json.loads((out / "sample.json").read_text("utf-8"))["finished"] == 3
    assert np.load(out / "codes.npy").shape == (3, HEIGHT // 4, WIDTH // 4)
    assert {path.name for path in (out / "images").iterdir()} == {"00000.png", "00001.png", "00002.png"}
    assert (out / "grid.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_exits_130_after_saving(tmp_path: Path, image_folder: Path, codegrid: Codegrid) -> None:
    """A real process, a real signal, at an arbitrary moment; then the run resumes."""
    out, steps = tmp_path / "run", 2000
    options = ["--num-codes", 16, "--steps", steps, "--batch-size", 2]
    arguments = ["train-tokenizer", "--data", image_folder, "--out", out, *options]
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, written = process.communicate(timeout=60)
    assert process.returncode == 130, written
    assert "Traceback" not in written
    assert "Error" not in written
    (stopped,) = re.findall(r"stopped at step (\d+) and saved; --resume continues", written)
    assert 0 < int(stopped) < steps
    assert load_training(out).values["step"] == int(stopped)
    assert load_tokenizer(out).config.num_codes == 16
    assert codegrid("train-tokenizer", "--out", out, "--resume", "--steps", int(stopped) + 1).status == 0
    assert load_training(out).values["step"] == int(stopped) + 1


# Every command: the status, and one line


@dataclass(frozen=True)
class Refused:
    """A command, with what it needs, and what is wrong for it."""

    needs: str  # options that would do
    missing: str  # an option whose folder or file is missing
    impossible: tuple[str, ...]  # an option each that has an impossible value; the status is 2
    also: tuple[str, ...] = ()  # the same, known only once something is read; the status is 1


WIDTHS = ("--num-codes 1", "--num-codes 99999999999999999999999", "--code-dim 0", "--hidden-channels 1000000000000")
TRAINING = ("--steps 0", "--batch-size 0", "--batch-size 1000000000000", "--lr 0", "--lr nan", "--lr inf", "--seed -1")
SAMPLING = (
    *("--n 0", "--n 1000000000000", "--n 1.5", "--temperature nan", "--temperature inf", "--top-k 0", "--top-p 0"),
    *("--guidance -1", "--guidance nan", "--guidance inf", "--keep-best 0", "--keep-best 1.5", "--keep-best nan"),
)
COMMANDS = {
    "train-tokenizer": Refused(
        needs="--data {images} --out {new}",
        missing="--data {nosuch}",
        impossible=(
            *TRAINING,
            *WIDTHS,
            "--image-size 1x2x3",
            "--image-size 999999",
            "--num-residual-layers 2147483648",
        ),
        also=("--image-size 9x12", "--hidden-channels 3", "--device tpu"),
    ),
    "train-decoder": Refused(
        needs="--tokenizer {tokenizer} --out {new}",
        missing="--tokenizer {nosuch}",
        impossible=(*TRAINING, "--precision fp64"),
        also=("--device tpu", "--data {nosuch}", "--out {codes}"),
    ),
    "export-codes": Refused(
        needs="--tokenizer {tokenizer} --out {new}",
        missing="--tokenizer {nosuch}",
        impossible=("--split valid", "--shard-size 0", "--batch-size -1", "--to csv"),
        also=("--device cuda:99",),
    ),
    "verify-codes": Refused(needs="{codes}", missing="--data {nosuch}", impossible=()),
    "decode-codes": Refused(
        needs="{codes} --tokenizer {tokenizer} --out {new}",
        missing="--tokenizer {nosuch}",
        impossible=("--start -1", "--n 0", "--n many"),
        also=("--start 1000",),
    ),
    "train-prior": Refused(
        needs="--codes {codes} --tokenizer {tokenizer} --out {new}",
        missing="--codes {nosuch}",
        impossible=(
            *TRAINING,
            "--dropout 1",
            "--dropout nan",
            "--label-dropout 1",
            "--label-dropout -1",
            "--num-layers 2147483648",
            "--channels 1000000000000",
        ),
        also=("--device tpu",),
    ),
    "sample": Refused(
        needs="{both} --out {new}",
        missing="--prior {nosuch}",
        impossible=(*SAMPLING, "--seed -1"),
        also=(
            "--label 99",
            "--device tpu",
            "--guidance 0 --label 0",
            "--guidance 0 --keep-best .5",
            "--keep-best 1e-7",
        ),
    ),
    "complete": Refused(
        needs="{both} --out {new} --image {white} --keep top",
        missing="--image {nosuch}",
        impossible=(*SAMPLING, "--candidates 0", "--candidates 1000000000000"),
        also=("--label 99", "--keep middle", "--guidance 0 --label 0", "--keep-best .5"),
    ),
    "reconstruct": Refused(
        needs="--tokenizer {tokenizer} --out {new}.png",
        missing="--tokenizer {nosuch}",
        impossible=("--n 0", "--split valid"),
        also=("--device tpu",),
    ),
    "evaluate": Refused(
        needs="--tokenizer {tokenizer}",
        missing="--prior {nosuch}",
        impossible=("--split valid",),
        also=("--device tpu", "--data-root {nosuch}"),
    ),
    "measure-rate": Refused(
        needs="--tokenizer {tokenizer}",
        missing="--data {nosuch}",
        impossible=("--n 0", "--split valid"),
        also=("--device tpu",),
    ),
}
REFUSED = [
    (command, option, status)
    for command, refused in COMMANDS.items()
    for status, wrong in (
        (2, ("--nosuch", "extra", "--device", *refused.impossible)),
        (1, (refused.missing, *refused.also)),
    )
    for option in wrong
]


def test_the_table_names_every_command() -> None:
    assert COMMANDS.keys() == cli.cli.commands.keys()


@pytest.mark.parametrize(("command", "option", "status"), REFUSED, ids=[" ".join(map(str, case)) for case in REFUSED])
def test_what_is_wrong_is_one_line_and_the_status_says_whose_fault_it_is(
    place: Path, trained: Trained, command: str, option: str, status: int, codegrid: Codegrid
) -> None:
    """2 for the command line, 1 for what it names; nothing is printed on standard output, nothing written."""
    names = {**vars(trained), "new": place / "new", "nosuch": place / "nosuch", "white": place / "white.png"}
    both = "--tokenizer {tokenizer} --prior {prior}"
    line = f"{command} {COMMANDS[command].needs.replace('{both}', both)} {option}"
    before = sorted(place.rglob("*"))
    outcome = codegrid(*(word.format(**names) for word in line.split()))
    assert (outcome.status, outcome.out) == (status, "")
    (message,) = outcome.err.splitlines()
    assert message.startswith("Error: ")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("verify-codes", "evaluate")])
def test_what_the_table_says_would_do_does(place: Path, trained: Trained, command: str, codegrid: Codegrid) -> None:
    """The oracle of the test above: it is the option that is refused, not the rest."""
    names = {**vars(trained), "new": place / "new", "white": place / "white.png"}
    line = f"{command} {COMMANDS[command].needs.replace('{both}', '--tokenizer {tokenizer} --prior {prior}')}"
    few = {"sample": "--n 1", "complete": "--n 1"}
    words = f"{line} {'--steps 1' if command.startswith('train-') else few.get(command, '')}".split()
    assert codegrid(*(word.format(**names) for word in words)).status == 0


@pytest.mark.parametrize("command", ["train-tokenizer", "train-decoder", "train-prior", "sample", "complete"])
def test_a_seed_of_any_size_will_do(place: Path, trained: Trained, command: str, codegrid: Codegrid) -> None:
    """Of 23 digits, and of as many as Python reads; one that it does not read is refused in one line."""
    names = {**vars(trained), "new": place / "new", "white": place / "white.png"}
    line = f"{command} {COMMANDS[command].needs.replace('{both}', '--tokenizer {tokenizer} --prior {prior}')}"
    words = [word.format(**names) for word in line.split()]
    few = ["--steps", 1] if command.startswith("train-") else ["--n", 1]
    for digits, status in ((23, 0), (4300, 0), (5000, 2 if hasattr(sys, "set_int_max_str_digits") else 0)):
        outcome = codegrid(*words, *few, "--force", "--seed", "9" * digits)
        assert outcome.status == status, outcome.err
        assert len(outcome.error_lines) == (1 if status else 0)


# What is printed: names, encodings, pipes

needs_posix_names = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the system refuses such names")


@needs_posix_names
@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[2Jb\x07", b"two\nlines", "gpj.\u202eevil".encode()])
def test_a_name_in_a_message_is_harmless(tmp_path: Path, name: bytes, codegrid: Codegrid) -> None:
    for line in ("evaluate --tokenizer", "train-tokenizer --out {new} --data", "verify-codes", "sample --label"):
        path = tmp_path / os.fsdecode(name)
        outcome = codegrid(*(word.format(new=tmp_path / "new") for word in line.split()), path)
        assert outcome.status == 1
        assert outcome.err.endswith("\n")
        (message,) = outcome.err.splitlines()
        assert message.isprintable()
        if "label" not in line:
            assert printable(os.fsdecode(name)) in message


@needs_posix_names
def test_class_names_and_files_that_act_on_a_terminal_are_trained_on_and_printed_harmlessly(
    tmp_path: Path, codegrid: Codegrid
) -> None:
    """And a folder for the results whose name is not UTF-8."""
    names = ["\x1b[31mred", "two\nlines", os.fsdecode(b"caf\xe9")]
    images = fill_with_cells(tmp_path / "images", [f"{name}/{i}\x1b.png" for name in names for i in range(9)])
    (images / names[0] / "broken\x1b[2J.png").write_text("not an image")
    tokenizer, prior = tmp_path / os.fsdecode(b"tok\xe9"), tmp_path / "prior\x07"
    lines: list[list[object]] = [
        ["train-tokenizer", "--data", images, "--out", tokenizer, "--steps", 1, "--num-codes", 8],
        ["train-prior", "--tokenizer", tokenizer, "--out", prior, "--steps", 1, "--channels", 2],
        ["sample", "--tokenizer", tokenizer, "--prior", prior, "--n", 1, "--out", tmp_path / "\x1bs"],
        ["sample", "--tokenizer", tokenizer, "--prior", prior, "--n", 1, "--out", tmp_path / "t", "--label", "nosuch"],
        ["evaluate", "--tokenizer", tokenizer, "--prior", prior],
        ["verify-codes", prior / "codes"],
    ]
    for line in lines:
        outcome = codegrid(*line)
        assert outcome.status == (1 if "nosuch" in line else 0), outcome.err
        for printed in (outcome.out + outcome.err).split("\n"):
            assert printed.replace("\r", "").isprintable()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_emoji_breaks_no_terminal(tmp_path: Path, trained: Trained, encoding: str) -> None:
    """Real programs: one that succeeds, and one that fails."""
    out = tmp_path / "cat 🐈"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    program = [sys.executable, str(ROOT / "cli.py")]
    command = [*program, "export-codes", "--tokenizer", str(trained.tokenizer), "--out", str(out)]
    for status in (0, 1):
        ended = subprocess.run([*command, "--split", ["train", "test"][status]], env=environment, capture_output=True)
        shown = str(out).encode(encoding, "backslashreplace")
        assert ended.returncode == status, ended.stderr
        assert shown in (ended.stderr if status else ended.stdout)
        assert b"Traceback" not in ended.stderr


CLOSED_PIPE = {
    "help": "--help",
    "help of a command": "sample --help",
    "no command": "",
    "version": "--version",
    "evaluate": "evaluate --tokenizer {tokenizer} --json {new}",
    "export-codes": "export-codes --tokenizer {tokenizer} --out {new}",
    "verify-codes": "verify-codes {place}/cut-codes",
    "sample": "sample --tokenizer {tokenizer} --prior {prior} --n 1 --out {new}",
    "train-prior": "train-prior --codes {codes} --channels 2 --steps 2 --out {new}",
}


@pytest.mark.skipif(os.name == "nt", reason="closes a pipe")
@pytest.mark.parametrize("case", CLOSED_PIPE)
def test_a_reader_who_has_left_ends_a_command_with_141_and_no_word(place: Path, trained: Trained, case: str) -> None:
    """As `| head -1` does; the pipe is closed before the program starts."""
    names = {**vars(trained), "place": place, "new": place / "new"}
    command = [sys.executable, str(ROOT / "cli.py"), *(word.format(**names) for word in CLOSED_PIPE[case].split())]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(command, cwd=place, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr.strip()) == (141, "")
    assert (place / "new").exists() == ("{new}" in CLOSED_PIPE[case])  # the work is done, or saved


@pytest.mark.skipif(os.name == "nt", reason="closes a pipe")
@pytest.mark.parametrize("closed_from_the_start", [False, True])
def test_standard_error_that_nobody_reads_changes_nothing(
    place: Path, trained: Trained, closed_from_the_start: bool
) -> None:
    program = [sys.executable, str(ROOT / "cli.py")]
    reader, writer = os.pipe()
    os.close(reader)
    close = (lambda: os.close(2)) if closed_from_the_start else None
    try:
        for options, status in (("--tokenizer {tokenizer}", 0), ("--tokenizer {place}/nosuch", 1), ("--nosuch", 2)):
            words = [word.format(**vars(trained), place=place) for word in options.split()]
            command = [*program, "evaluate", *words]
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, preexec_fn=close, text=True)
            assert (ended.returncode, "psnr" in ended.stdout) == (status, status == 0)
    finally:
        os.close(writer)


def test_an_end_of_file_in_a_command_is_an_error_and_no_ctrl_c(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*arguments: Any, **options: Any) -> None:
        raise EOFError("no data left")

    monkeypatch.setattr(image_pipeline, "sample_codes", ended)
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior]
    outcome = codegrid("sample", *both, "--out", tmp_path / "out")
    assert (outcome.status, outcome.error_lines) == (1, ["Error: EOFError: no data left (--debug shows where)"])


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError("Unable to allocate 148. KiB for an array with shape (9,)"), " for a further 148. KiB"),
        (MemoryError(), ""),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 32 bytes."),
            "",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), " for a further 20.00 GiB"),
    ],
)
def test_too_little_memory_is_said_in_words(
    tmp_path: Path, trained: Trained, error: Exception, size: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(image_pipeline, "sample_codes", broken)
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior]
    outcome = codegrid("sample", *both, "--out", tmp_path / "out")
    (line,) = outcome.error_lines
    assert line.startswith(f"Error: expected memory for this, got too little{size}")
    assert line.endswith("; choose smaller sizes or end other programs")
    assert outcome.status == 1


def test_a_shell_can_ask_for_completions() -> None:
    environment = {**os.environ, "_CODEGRID_COMPLETE": "bash_complete", "COMP_WORDS": "codegrid sam", "COMP_CWORD": "1"}
    command = [sys.executable, str(ROOT / "cli.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "plain,sample\n"
