"""What each command writes and says, through the command line, and that its options act."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from pipeline.errors import printable
from pipeline.generation import chosen_guidance, sample_folder
from pipeline.images.holdout import held_out
from pipeline.images.image_set import open_images
from pipeline.images.png import save_grid
from pipeline.models.checkpoint import read_info
from pipeline.training.split_summary import split_summary

from .conftest import CLASS_NAMES, Codegrid, Trained
from .support import HEIGHT, WIDTH, Outcome, as_a_program, digest_of, fill_with_cells

TOKENIZER = ["train-tokenizer", "--steps", 2, "--num-codes", 16]
PRIOR = ["train-prior", "--steps", 2, "--channels", 4, "--num-layers", 2]


def all_files(folder: Path) -> dict[str, str]:
    """Return every file and its hash, empty for the logs, which hold times."""
    return {name: "" if name.endswith(".jsonl") else digest for name, digest in digest_of(folder).items()}


# Both stages and sampling


def test_the_three_commands_as_a_program_and_in_this_process(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh folder, with the default places; the same seed gives the same bytes of every file, in any process."""
    lines: list[list[object]] = [[*TOKENIZER, "--data", image_folder], PRIOR, ["sample", "--n", 5]]
    program, in_process = tmp_path / "a program", tmp_path / "ici même"
    for folder in (program, in_process):
        folder.mkdir()
    monkeypatch.chdir(in_process)
    monkeypatch.setattr(chosen_guidance, "MOST", 512)  # as in the other process
    for line in lines:
        outcome = as_a_program(*line, cwd=program)
        assert (outcome.status, outcome.error_lines) == (0, [])
        outcome = codegrid(*line)
        assert (outcome.status, outcome.error_lines) == (0, [])
    assert all_files(program) == all_files(in_process)

    top = {path.relative_to(program).as_posix() for path in program.glob("*/*")}
    assert top == {
        *("checkpoints/tokenizer", "checkpoints/prior"),
        *("samples/grid.png", "samples/images", "samples/codes.npy", "samples/sample.json"),
    }
    for stage in ("tokenizer", "prior"):
        names = {path.name for path in (program / "checkpoints" / stage).iterdir()}
        assert {"model.safetensors", "config.json", "training.safetensors", "metrics.jsonl", "pictures"} <= names
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
    assert record["options"] == {
        **{"n": n, "temperature": 1.0, "top_k": None, "top_p": None},
        **{
            "guidance": read_info(checkpoints / "prior", "prior").metrics["guidance"],
            "precision": "fp32",
            "keep_best": 1.0,
        },
    }
    assert record["finished"] == n
    assert record["versions"] == read_info(checkpoints / "prior", "prior").versions
    for stage in ("tokenizer", "prior"):
        weights = digest_of(checkpoints / stage)["model.safetensors"]
        assert record["fingerprints"][stage] == weights


def test_each_command_says_what_comes_next(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed, out = codegrid(*TOKENIZER, "--data", image_folder).out, Path("checkpoints/tokenizer")
    assert printed.startswith(f"stage one: a tokenizer for {image_folder}, into {out}\n")
    assert re.search(r"\ndone: 2 steps; mse 0\.\d+, .*\n", printed)
    assert printed.endswith(f"\nin {out}: model.safetensors, metrics.jsonl, pictures\nnext: codegrid train-prior\n")
    printed = codegrid(*PRIOR).out
    codes = Path("checkpoints/prior/codes")
    assert f"\nstage two: a prior over the codes in {codes}, into {codes.parent}\n" in printed
    assert re.search(r"\ndone: 2 steps(, the best of them 1)?; bits_per_code \d.*\n", printed)
    assert printed.endswith(
        f"\nin {codes.parent}: model.safetensors, metrics.jsonl, pictures, codes\nnext: codegrid sample --n 64\n"
    )
    assert "3 new images: samples" in codegrid("sample", "--n", 3).out


def next_command(outcome: Outcome) -> list[str]:
    """Return the words of the command that a training run names as the next, as a shell would take them."""
    program, *words = shlex.split(outcome.out.splitlines()[-1].removeprefix("next: "))
    assert (outcome.status, program) == (0, "codegrid")
    return words


@pytest.mark.skipif(shutil.which("bash") is None, reason="asks bash")
@pytest.mark.parametrize(
    "word", ["plain", "two words", "it's", "back\\slash", "\x1b[2J\\", "a\nb'c", "caf\udce9", "x\u202ey"]
)
def test_a_shell_reads_a_quoted_word_as_it_is(word: str) -> None:
    """Also one with characters that are not printed raw."""
    quoted = cli.shell_quoted(word)
    assert printable(quoted) == quoted
    shell = ["bash", "-c", f"printf %s {quoted}"]
    printed = subprocess.run(shell, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=True).stdout
    assert os.fsdecode(printed) == word


@pytest.mark.skipif(os.name == "nt", reason="reads the quotes of a POSIX shell")
def test_the_next_command_is_of_the_folders_of_this_run_and_works_as_it_is_printed(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders whose names a shell would divide or expand."""
    monkeypatch.chdir(tmp_path)
    tokenizer, prior = "runs/my tok; $HOME", "runs/it's *"
    words = next_command(codegrid(*TOKENIZER, "--data", image_folder, "--out", tokenizer))
    assert words == ["train-prior", "--tokenizer", tokenizer]
    words = next_command(codegrid(*words, *PRIOR[1:], "--out", prior))
    assert words == ["sample", "--n", "64", "--tokenizer", tokenizer, "--prior", prior]
    assert codegrid(*words).status == 0
    words = next_command(codegrid("train-prior", "--resume", "--out", prior))
    assert words == ["sample", "--n", "64", "--tokenizer", tokenizer, "--prior", prior]


# How the images are divided


def numbers_of(line: str) -> list[int]:
    """Return the numbers of a line such as "1,000 images = 898 to learn from + 102 held out": total, then parts."""
    return [int(number.replace(",", "")) for number in re.findall(r"(?:^|[=+] )([\d,]+)", line)]


def test_the_line_about_the_split_adds_up(
    tmp_path: Path, image_folder: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 pictures and one that is broken, counted once more from what was prepared and exported."""
    monkeypatch.chdir(tmp_path)
    fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(70)])
    (tmp_path / "images" / "broken.png").write_text("not an image")
    outcome = codegrid(*TOKENIZER, "--data", "images")
    images = open_images("images")
    held = int(held_out(images.train.names).sum())
    train, test = len(images.train), len(images.test)
    line = outcome.out.splitlines()[1]
    assert line == f"71 images = {train - held} to learn from + {held} held out + {test} test + 1 broken, skipped"
    total, *parts = numbers_of(line)
    assert total == sum(parts) == 71
    (warning,) = outcome.error_lines
    assert warning.startswith("Warning: skipped the broken image broken.png")
    lines = codegrid(*PRIOR).out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{train} grids = ")]
    assert line == f"{train} grids = {train - held} to learn from + {held} held out; 2x3 codes each, no classes"


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"to_learn": 861, "held_out": 37, "test": 102}, "1,000 images = 861 to learn from + 37 held out + 102 test"),
        ({"to_learn": 1, "test": 0}, "1 image = 1 to learn from and to check on + 0 held out + 0 test"),
        (
            {"to_learn": 95_000, "held_out": 5_000, "measured": 4096},
            "100,000 images = 95,000 to learn from + 5,000 held out (4,096 of them to check on)",
        ),
        (
            {"to_learn": 8, "held_out": 1, "test": 0, "broken": 1},
            "10 images = 8 to learn from + 1 held out + 0 test + 1 broken, skipped",
        ),
    ],
)
def test_split_summary(counts: dict[str, int], line: str) -> None:
    assert split_summary("image", **{"held_out": 0, "measured": counts.get("held_out", 0), **counts}) == line
    total, *parts = numbers_of(line)
    assert total == sum(parts)


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_what_is_refused_announces_nothing(tmp_path: Path, stage: str, codegrid: Codegrid) -> None:
    option = {"tokenizer": "--data", "prior": "--codes"}[stage]
    outcome = codegrid(f"train-{stage}", option, tmp_path / "nosuch", "--out", tmp_path / "out")
    assert (outcome.status, outcome.out) == (1, "")


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
    options += ["--guidance", 3, "--keep-best", 0.5, "--precision", "bf16"]
    assert codegrid("sample", *both, "--n", 4, "--out", tmp_path / "a", *options).status == 0
    record = json.loads((tmp_path / "a" / "sample.json").read_text("utf-8"))
    assert record["labels"] == [1, 0, 1, 0]
    assert record["class_names"] == ["line", "disc", "line", "disc"]
    assert record["seed"] == 11
    assert record["options"] == {
        **{"n": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.8},
        **{"guidance": 3.0, "precision": "bf16", "keep_best": 0.5},
    }
    codes = {}
    for name, changed in {"seed": ["--seed", 12], "greedy": ["--temperature", 0], "k": ["--top-k", 1]}.items():
        assert codegrid("sample", *both, "--n", 4, "--out", tmp_path / name, *options, *changed).status == 0
        codes[name] = np.load(tmp_path / name / "codes.npy")
    assert not np.array_equal(codes["seed"], np.load(tmp_path / "a" / "codes.npy"))
    np.testing.assert_array_equal(codes["greedy"], codes["k"])
    np.testing.assert_array_equal(codes["k"][0], codes["k"][2])  # nothing random is left


def test_the_picture_of_many_samples_shows_the_first_of_them(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_folder, "MOST_IN_GRID", 3)
    out = tmp_path / "out"
    command = ["sample", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--n", 5, "--out", out]
    assert codegrid(*command).status == 0
    images = [np.array(Image.open(path)).transpose(2, 0, 1) for path in sorted((out / "images").iterdir())]
    assert len(images) == 5
    save_grid(torch.from_numpy(np.stack(images[:3])), tmp_path / "expected.png")
    assert (out / "grid.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize("n", [1, 3])
def test_complete_writes_what_it_says(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """With the default folder; a label and the sampling options act."""
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
        **{"guidance": read_info(trained.prior, "prior").metrics["guidance"], "precision": "fp32", "keep_best": 1.0},
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
    lines, _, table = outcome.out.partition("what a code costs, in bits:\n")
    printed = dict(line.split(maxsplit=1) for line in lines.splitlines())
    assert set(printed) | {name for name in numbers if name.startswith("bits_")} == set(numbers)
    in_words = [float(line.split()[0]) for line in table.splitlines()]
    names = ("uniform", "histogram", "histogram_given_label", "above_and_left", "per_code")
    assert in_words == pytest.approx([numbers[f"bits_{name}"] for name in names], abs=5e-4)
    assert all(float(printed[key]) == pytest.approx(numbers[key], rel=1e-4) for key in keys)
    before = path.read_bytes()
    assert codegrid(*command, "--json", path).status == 1
    assert path.read_bytes() == before
    assert codegrid(*command, "--split", "train", "--json", path, "--force").status == 0
    assert json.loads(path.read_text("utf-8"))["split"] == "train"


def test_evaluate_writes_a_picture(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """With a prior and without; it is replaced with --force alone, and is checked before anything is loaded."""
    path, command = tmp_path / "new" / "picture.png", ["evaluate", "--tokenizer", trained.tokenizer]
    outcome = codegrid(*command, "--prior", trained.prior, "--picture", path, "--json", tmp_path / "a.json")
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert outcome.out.endswith(f"\n       picture  {path}\n")
    with Image.open(path) as picture:
        with_bits = picture.size
    before = path.read_bytes()
    refused = codegrid("evaluate", "--tokenizer", tmp_path / "nosuch", "--picture", path)
    assert refused.error_lines == [
        f"Error: expected a new file as --picture {path}, got an existing one; name another, or use --force"
    ]
    assert path.read_bytes() == before
    assert codegrid(*command, "--picture", path, "--force").status == 0
    with Image.open(path) as picture:
        assert picture.size[1] < with_bits[1]


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.png.txt"])
def test_the_picture_of_an_evaluation_is_a_png(tmp_path: Path, codegrid: Codegrid, name: str) -> None:
    outcome = codegrid("evaluate", "--tokenizer", tmp_path / "nosuch", "--picture", tmp_path / name, "--force")
    (line,) = outcome.error_lines
    assert outcome.status == 1
    assert line.startswith(f"Error: expected a name that ends in .png as --picture, got {tmp_path / name}; name ")
    assert list(tmp_path.iterdir()) == []


def test_reconstruct_and_export_without_options(
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
    expected = {name: digest for name, digest in digest_of(trained.codes).items() if name != "manifest.json"}
    assert {name: digest_of(Path("c"))[name] for name in expected} == expected


def test_force_replaces_and_nothing_else_does(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """A shorter export over a longer one leaves none of its shards behind."""
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
        ("--hidden-channels", 6, "hidden_channels", 6),
        ("--num-residual-layers", 0, "num_residual_layers", 0),
        ("--residual-channels", 3, "residual_channels", 3),
        ("--commitment-weight", 0.5, "commitment_weight", 0.5),
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


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [("--channels", 3, "channels"), ("--num-layers", 1, "num_layers"), ("--dropout", 0.25, "dropout")],
)
def test_each_option_of_a_prior_acts(
    tmp_path: Path, trained: Trained, option: str, value: object, field: str, codegrid: Codegrid
) -> None:
    small = ["--channels", 2, "--num-layers", 2, "--steps", 1]
    assert codegrid("train-prior", "--codes", trained.codes, "--out", tmp_path, *small, option, value).status == 0
    assert read_info(tmp_path, "prior").config[field] == value


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", 3),
        ("--batch-size", 2),
        ("--lr", 0.01),
        ("--optimizer", "adam"),
        ("--precision", "bf16"),
        ("--steps", 3),
    ],
)
def test_each_option_of_training_acts(
    tmp_path: Path, trained: Trained, stage: str, option: str, value: object, codegrid: Codegrid
) -> None:
    """It is recorded, and gives other weights than without it."""
    own = {
        "tokenizer": ["--data", trained.images, "--hidden-channels", 32],
        "prior": ["--codes", trained.codes, "--channels", 16],
    }[stage]
    command = [f"train-{stage}", *own, "--precision", "fp32", "--steps", 2]
    for name, options in (("without", []), ("with", [option, value])):
        assert codegrid(*command, *options, "--out", tmp_path / name).status == 0
    assert read_info(tmp_path / "with", stage).training[option.removeprefix("--").replace("-", "_")] == value
    without, acted = (read_info(tmp_path / name, stage).fingerprint for name in ("without", "with"))
    assert acted != without
