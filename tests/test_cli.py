"""The command line as a user meets it: what each command writes, what it says, and what it leaves alone."""

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from pipeline import drawing, generate
from pipeline.checkpoint import load_training, read_info
from pipeline.loading import load_tokenizer

from .conftest import CLASS_NAMES, Codegrid, Trained
from .support import HEIGHT, WIDTH, Outcome, brightness_tokenizer, digest_of, save_tokenizer

ROOT = Path(__file__).parents[1]
TOKENIZER = ["train-tokenizer", "--steps", 2, "--num-codes", 16]
PRIOR = ["train-prior", "--steps", 2, "--channels", 4, "--num-layers", 2]


def as_a_program(*arguments: object, cwd: Path) -> Outcome:
    """`python cli.py ...` in a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def all_files(folder: Path) -> dict[str, str]:
    """Every file and its hash; of the logs, which hold times, only that they are there."""
    return {name: "" if name.endswith(".jsonl") else digest for name, digest in digest_of(folder).items()}


# The whole way


def test_the_three_commands_as_a_program_and_again_in_this_process(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh folder, with the default places; the same seed gives the same bytes of every file, in any process."""
    lines: list[list[object]] = [[*TOKENIZER, "--data", image_folder], PRIOR, ["sample", "--n", 5]]
    program, here = tmp_path / "a program", tmp_path / "ici même"
    for folder in (program, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    for line in lines:
        outcome = as_a_program(*line, cwd=program)
        assert (outcome.status, outcome.error_lines) == (0, [])
        outcome = codegrid(*line)
        assert (outcome.status, outcome.error_lines) == (0, [])
    assert all_files(program) == all_files(here)

    top = {path.relative_to(program).as_posix() for path in program.glob("*/*")}
    assert top == {
        *("checkpoints/tokenizer", "checkpoints/prior"),
        *("samples/grid.png", "samples/images", "samples/codes.npy", "samples/sample.json"),
    }
    for stage in ("tokenizer", "prior"):
        held = {path.name for path in (program / "checkpoints" / stage).iterdir()}
        assert {"model.safetensors", "config.json", "training.safetensors", "metrics.jsonl", "pictures"} <= held
    check_samples(program / "samples", program / "checkpoints", 5)


def check_samples(samples: Path, checkpoints: Path, n: int) -> None:
    names = [f"{i:05d}.png" for i in range(n)]
    assert sorted(path.name for path in (samples / "images").iterdir()) == names
    for name in names:
        with Image.open(samples / "images" / name) as image:
            assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB")
    codes = np.load(samples / "codes.npy", allow_pickle=False)
    assert codes.shape == (n, HEIGHT // 4, WIDTH // 4)
    assert codes.dtype == np.int64
    record = json.loads((samples / "sample.json").read_text("utf-8"))
    assert {"labels", "seed", "options", "fingerprints"} <= set(record)
    assert record["labels"] == [i % 3 for i in range(n)]
    assert record["class_names"] == [CLASS_NAMES[i % 3] for i in range(n)]
    assert record["seed"] == 0
    assert record["options"] == {"n": n, "temperature": 1.0, "top_k": None, "top_p": None}
    for stage in ("tokenizer", "prior"):
        weights = digest_of(checkpoints / stage)["model.safetensors"]
        assert record["fingerprints"][stage] == weights


def test_each_command_says_what_comes_next(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = codegrid(*TOKENIZER, "--data", image_folder).out
    assert said.startswith("stage one")
    assert re.search(r"done: 2 steps; mse 0\.\d+, .*\nnext: codegrid train-prior", said)
    said = codegrid(*PRIOR).out
    assert said.startswith("stage two")
    assert re.search(r"done: best at step \d; bits_per_code \d.*\nnext: codegrid sample --n 64", said)
    assert "3 new images: samples" in codegrid("sample", "--n", 3).out


def test_a_run_folder_holds_config_seed_versions_and_metrics(trained: Trained) -> None:
    for stage in ("tokenizer", "prior"):
        folder = getattr(trained, stage)
        content = json.loads((folder / "config.json").read_text("utf-8"))
        assert content["kind"] == stage
        assert content["training"]["seed"] == 0
        assert content["versions"]["torch"]
        assert content["class_names"] == list(CLASS_NAMES)
        assert content["preprocessing"] == {"height": HEIGHT, "width": WIDTH, "channels": 3}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert {line["part"] for line in lines} == {"train", "held_out"}
    prior = json.loads((trained.prior / "config.json").read_text("utf-8"))
    assert prior["tokenizer_fingerprint"] == digest_of(trained.tokenizer)["model.safetensors"]


def test_sampling_options_and_labels_act(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior]
    options = ["--temperature", 0.5, "--top-k", 3, "--top-p", 0.8, "--seed", 11, "--label", "line", "--label", 0]
    assert codegrid("sample", *both, "--n", 4, "--out", tmp_path / "a", *options).status == 0
    record = json.loads((tmp_path / "a" / "sample.json").read_text("utf-8"))
    assert record["labels"] == [1, 0, 1, 0]
    assert record["class_names"] == ["line", "disc", "line", "disc"]
    assert record["seed"] == 11
    assert record["options"] == {"n": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.8}
    codes = {}
    for name, changed in {"seed": ["--seed", 12], "greedy": ["--temperature", 0], "k": ["--top-k", 1]}.items():
        assert codegrid("sample", *both, "--n", 4, "--out", tmp_path / name, *options, *changed).status == 0
        codes[name] = np.load(tmp_path / name / "codes.npy")
    assert not np.array_equal(codes["seed"], np.load(tmp_path / "a" / "codes.npy"))
    np.testing.assert_array_equal(codes["greedy"], codes["k"])
    np.testing.assert_array_equal(codes["k"][0], codes["k"][2])  # nothing random is left


@pytest.mark.parametrize("n", [1, 3])
def test_complete_writes_what_it_says(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """With the default folder; a label and the options of drawing act."""
    monkeypatch.chdir(tmp_path)
    picture = sorted(trained.images.rglob("*.png"))[0]
    command = ["complete", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--image", picture, "--n", n]
    outcome = codegrid(*command, "--keep", "left", "--label", "line", "--candidates", 5, "--seed", 11, "--top-k", 3)
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert f"the picture, what is kept, and {n} completions: {Path('completions', 'grid.png')}" in outcome.out
    names = [f"images/{i:05d}.png" for i in range(n)]
    assert sorted(digest_of(Path("completions"))) == ["codes.npy", "complete.json", "grid.png", *names]
    record = json.loads(Path("completions/complete.json").read_text("utf-8"))
    assert record["class_names"] == ["line"] * n
    assert (record["seed"], record["finished"]) == (11, n)
    assert record["options"] == {
        **{"n": n, "temperature": 1.0, "top_k": 3, "top_p": None},
        **{"image": str(picture), "keep": "left", "candidates": 5},
    }
    original = np.asarray(Image.open(picture))
    for name in names:
        found = np.asarray(Image.open(Path("completions") / name))
        np.testing.assert_array_equal(found[:, : WIDTH // 2], original[:, : WIDTH // 2])
    before = digest_of(Path("completions"))
    assert codegrid(*command, "--keep", "top").status == 1
    assert digest_of(Path("completions")) == before
    assert codegrid(*command, "--keep", "top", "--force").status == 0
    assert digest_of(Path("completions")) != before


def test_evaluate_prints_and_writes_the_numbers(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    path = tmp_path / "new" / "numbers.json"
    command = ["evaluate", "--tokenizer", trained.tokenizer, "--prior", trained.prior]
    outcome = codegrid(*command, "--json", path)
    assert (outcome.status, outcome.error_lines) == (0, [])
    numbers = json.loads(path.read_text("utf-8"))
    keys = {"mse", "psnr", "nmse", "codes_used", "perplexity", "bits_per_code", "bits_per_dim"}
    assert keys <= set(numbers)
    assert numbers["data"] == str(trained.images)
    assert numbers["bits_per_dim"] == pytest.approx(numbers["bits_per_code"] * 6 / (3 * HEIGHT * WIDTH))
    printed = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert set(printed) == set(numbers)
    assert all(float(printed[key]) == pytest.approx(numbers[key], rel=1e-4) for key in keys)
    before = path.read_bytes()
    assert codegrid(*command, "--json", path).status == 1
    assert path.read_bytes() == before
    assert codegrid(*command, "--split", "train", "--json", path, "--force").status == 0
    assert json.loads(path.read_text("utf-8"))["split"] == "train"


def test_reconstruct_and_export_with_nothing_said(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.tokenizer, tmp_path / "checkpoints" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    outcome = codegrid("reconstruct")
    assert outcome.status == 0
    assert "originals above reconstructions: reconstructions.png" in outcome.out
    with Image.open("reconstructions.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size[1] > 2 * HEIGHT
    assert codegrid("export-codes").status == 0
    assert sorted(os.listdir("checkpoints/codes")) == [
        "README.md",
        "codes-00000.npy",
        "labels-00000.npy",
        "manifest.json",
        "names-00000.json",
    ]
    assert codegrid("export-codes", "--out", "c", "--shard-size", 4, "--split", "train").status == 0
    ours = {name: digest for name, digest in digest_of(trained.codes).items() if name != "manifest.json"}
    assert {name: digest_of(Path("c"))[name] for name in ours} == ours


def test_force_replaces_and_nothing_else_does(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """A shorter export over a longer one leaves no shard of the old behind."""
    command = ["export-codes", "--tokenizer", trained.tokenizer, "--out", tmp_path / "codes"]
    assert codegrid(*command, "--shard-size", 2).status == 0
    before = digest_of(tmp_path / "codes")
    assert codegrid(*command, "--shard-size", 8).status == 1
    assert digest_of(tmp_path / "codes") == before
    assert codegrid(*command, "--shard-size", 8, "--force").status == 0
    assert {name for name in digest_of(tmp_path / "codes") if name.startswith("codes")} == {
        "codes-00000.npy",
        "codes-00001.npy",
    }


def test_five_flat_pictures_without_labels(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C5 through the command line; a label is then refused."""
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[:5]):
        shutil.copy(path, tmp_path / "flat" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    assert codegrid(*TOKENIZER, "--data", "flat").status == 0
    assert codegrid(*PRIOR).status == 0
    assert codegrid("sample", "--n", 2).status == 0
    record = json.loads(Path("samples/sample.json").read_text("utf-8"))
    assert (record["labels"], record["class_names"]) == (None, None)
    outcome = codegrid("sample", "--label", "disc", "--out", "more")
    assert outcome.status == 1
    assert re.search(r"expected no label, because .* without them, got '?disc'?;", outcome.error_lines[0])
    assert codegrid("evaluate", "--prior", "checkpoints/prior").status == 0


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--channels", 1, "in_channels", 1),
        ("--num-codes", 9, "num_codes", 9),
        ("--code-dim", 3, "code_dim", 3),
        ("--downsample", 2, "downsample", 2),
        ("--downsample", 8, "downsample", 8),
        ("--codebook-update", "gradient", "codebook_update", "gradient"),
        ("--bottleneck", "vae", "bottleneck", "vae"),
        ("--bottleneck", "ae", "bottleneck", "ae"),
    ],
)
def test_each_option_of_a_tokenizer_acts(
    tmp_path: Path, image_folder: Path, option: str, value: object, field: str, expected: object, codegrid: Codegrid
) -> None:
    """G3: a step with each, and the model it makes reconstructs."""
    command = ["train-tokenizer", "--data", image_folder, "--out", tmp_path / "run", "--steps", 1]
    assert codegrid(*command, option, value, "--image-size", "16x8").status == 0
    info = read_info(tmp_path / "run", "tokenizer")
    assert info.config[field] == expected
    assert (info.preprocessing["height"], info.preprocessing["width"]) == (16, 8)
    picture = tmp_path / "picture.png"
    assert codegrid("reconstruct", "--tokenizer", tmp_path / "run", "--out", picture, "--split", "train").status == 0
    with Image.open(picture) as image:
        assert image.mode == ("L" if expected == 1 else "RGB")


# Bad input: one line, the right status, nothing lost


@pytest.fixture
def place(tmp_path: Path, trained: Trained) -> Path:
    """Things that are wrong in their own ways."""
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
    Image.new("L", (HEIGHT, WIDTH), 0).save(tmp_path / "turned.png")
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
    "images gone since": ("evaluate --tokenizer {tokenizer} --data {place}/nosuch", 1, "which is neither"),
    "an unknown label": ("sample {both} --label nosuch --out {new}", 1, "disc, line, été.* got the label nosuch"),
    "no images": ("sample {both} --n 0 --out {new}", 2, "--n.*0 is not in the range"),
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
    "an unknown device": ("evaluate --tokenizer {tokenizer} --device nosuch", 1, "device"),
    "an unknown command": ("nosuch", 2, "nosuch"),
    "an unknown option": ("sample --nosuch", 2, "nosuch"),
    "an option without its value": ("sample --n", 2, "--n"),
    "a size that is none": ("train-tokenizer --image-size 8by12", 2, "expected N or HxW in pixels"),
    "an unknown bottleneck": ("train-tokenizer --bottleneck nosuch --out {new}", 2, "nosuch.* is not one of"),
    "a negative weight": ("train-tokenizer --bottleneck vae --kl-weight -1 --out {new}", 2, "--kl-weight"),
    "a size of nothing": ("train-tokenizer --image-size 0x12", 2, "expected N or HxW in pixels"),
    "an argument too much": ("sample {both} more", 2, "more"),
    "complete, no picture": (
        "complete {both} --image {place}/nosuch.png --keep top --out {new}",
        1,
        "a picture as --im",
    ),
    "complete, a text": ("complete {both} --image {place}/text/notes.png --keep top --out {new}", 1, "not an image"),
    "complete, no image said": ("complete {both} --keep top --out {new}", 2, "--image"),
    "complete, nothing to keep said": ("complete {both} --image {place}/white.png --out {new}", 2, "--keep"),
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
    "complete, a mask turned": (
        "complete {both} --image {place}/white.png --keep {place}/turned.png --out {new}",
        1,
        f"expected a mask of {HEIGHT}x{WIDTH} pixels, .* got {WIDTH}x{HEIGHT} in .*turned.png",
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
    "complete, no candidates": ("complete {both} --candidates 0 --out {new}", 2, "--candidates"),
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
    # Nothing is lost with --force either, when the command cannot do its work.
    "force, no images": ("train-tokenizer --data {place}/empty --out {tokenizer} --force", 1, "got none"),
    "force, codes cut short": ("train-prior --codes {place}/cut-codes --out {prior} --force", 1, "codes-00001.npy"),
    "force, an unknown label": ("sample {both} --label nosuch --out {codes} --force", 1, "nosuch"),
    "force, images gone": (
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
def test_bad_input_is_told_in_one_line_and_loses_nothing(
    place: Path, trained: Trained, case: str, codegrid: Codegrid
) -> None:
    line, status, pattern = WRONG[case]
    names = {**vars(trained), "place": place, "new": place / "new"}
    names["both"] = "--tokenizer {tokenizer} --prior {prior}"
    # A path may hold spaces: fill in after splitting.
    words = [word.format(**names) for word in line.replace("{both}", names["both"]).split()]
    # The session's run is shared, so a command that loses something must lose a copy.
    for name in ("tokenizer", "codes", "prior"):
        shutil.copytree(getattr(trained, name), place / "mine" / name)
    words = [word.replace(str(trained.tokenizer.parent), str(place / "mine")) for word in words]
    before = digest_of(place)
    outcome = codegrid(*words)
    assert outcome.status == status, outcome
    assert len(outcome.error_lines) == 1, outcome.error_lines
    (told,) = outcome.error_lines
    assert told.startswith("Error: ")
    assert re.search(pattern, told), told
    if status == 1:
        assert re.fullmatch(r"Error: expected .+, got .+; .+", told), told
    assert "Traceback" not in outcome.err
    assert {name: digest_of(place).get(name) for name in before} == before
    assert not (place / "new").exists() or not any((place / "new").iterdir())


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
def test_the_destination_is_looked_at_before_anything_is_loaded(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    """Of all that is wrong it is told first; and a command that is refused for anything else makes no folder."""
    words = [word.format(no=tmp_path / "nosuch", codes=trained.codes) for word in DESTINATIONS[command].split()]
    name = {"reconstruct": "out.png", "decode-codes, array": "out.npy"}.get(command, "out")
    taken = tmp_path / "taken" / name
    (taken.parent if "." in name or words[-1] == "--json" else taken).mkdir(parents=True)
    (taken if not taken.is_dir() else taken / "file").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    for path, told in ((taken, "--force"), (tmp_path / "file" / name, "a folder that can be written at .*Not a dir")):
        outcome = codegrid(*words, path)
        assert outcome.status == 1
        assert re.search(told, outcome.error_lines[0]), outcome
    outcome = codegrid(*words, tmp_path / "deep" / "in" / name)
    assert outcome.status == 1
    assert "nosuch" in outcome.error_lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", DESTINATIONS)
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    words = [word.format(no=tmp_path / "nosuch", codes=trained.codes) for word in DESTINATIONS[command].split()]
    (tmp_path / "closed").mkdir(mode=0o555)
    outcome = codegrid(*words, tmp_path / "closed" / "out.npy")
    assert outcome.status == 1
    assert "got Permission denied" in outcome.error_lines[0]


def test_both_fingerprints_are_told(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """C6"""
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer()).fingerprint
    for command in ("sample", "evaluate"):
        out = ["--out", tmp_path / "out"] if command == "sample" else []
        outcome = codegrid(command, "--tokenizer", tmp_path / "other", "--prior", trained.prior, *out)
        assert outcome.status == 1
        for fingerprint in (other, read_info(trained.tokenizer, "tokenizer").fingerprint):
            assert fingerprint in outcome.error_lines[0]


def test_no_command_shows_the_help_as_it_is(codegrid: Codegrid) -> None:
    outcome = codegrid()
    assert "Usage: codegrid" in outcome.out + outcome.err
    assert "\nCommands:\n" in outcome.out + outcome.err
    assert "Error" not in outcome.err
    assert outcome.status in (0, 2)


def test_the_version_is_told_also_from_a_checkout(codegrid: Codegrid) -> None:
    outcome = codegrid("--version")
    assert outcome.status == 0
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    assert re.search(r"\d+\.\d+", outcome.out)
    if not setup["metadata"]["version"].startswith("attr:"):
        assert setup["metadata"]["version"] in outcome.out


def test_help_of_each_command_names_its_options(codegrid: Codegrid) -> None:
    for name, command in cli.cli.commands.items():
        outcome = codegrid(name, "--help")
        assert outcome.status == 0
        for option in itertools.chain.from_iterable(parameter.opts for parameter in command.params):
            assert option in outcome.out


# The unexpected


def test_an_error_of_ours_is_one_line_and_debug_shows_where(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(generate, "sample_codes", broken)
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


def test_ctrl_c_while_drawing(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "sample_codes", interrupted)
    command = ["sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--out", tmp_path / "out"]
    outcome = codegrid(*command)
    assert outcome.status == 130
    assert outcome.error_lines == [f"stopped: 0 of 64 images are in {tmp_path / 'out'}"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_second_part_keeps_the_first(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draw, parts = tmp_path / "out", generate.sample_codes, itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(parts) == 1:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(generate, "sample_codes", interrupted)
    monkeypatch.setitem(drawing.AT_ONCE, "cpu", 3)
    outcome = codegrid("sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--out", out, "--n", 7)
    assert outcome.status == 130
    assert outcome.error_lines == [f"stopped: 3 of 7 images are in {out}"]
    assert json.loads((out / "sample.json").read_text("utf-8"))["finished"] == 3
    assert np.load(out / "codes.npy").shape == (3, HEIGHT // 4, WIDTH // 4)
    assert {path.name for path in (out / "images").iterdir()} == {"00000.png", "00001.png", "00002.png"}
    assert (out / "grid.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_exits_130_after_saving(tmp_path: Path, image_folder: Path, codegrid: Codegrid) -> None:
    """A real process, a real signal, at a moment nobody chose; then the run goes on."""
    out, steps = tmp_path / "run", 2000
    arguments = [*TOKENIZER, "--data", image_folder, "--out", out, "--steps", steps, "--batch-size", 2]
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
