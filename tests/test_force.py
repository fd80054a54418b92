"""--force replaces what an earlier run wrote; foreign files survive every command, byte for byte.

Their names are like those that a run writes: with one digit less or more, with other digits, in another case, or one
that an earlier run with more images could have written and did not.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from .conftest import Codegrid, Trained
from .support import digest_of

ARABIC_1 = "\u0660\u0660\u0660\u0660\u0661"  # 00001, as `int` reads it
ALIKE = (
    *("2024-trip.png", "20240101.png", "1.png", "0001.png", "000001.png", "0x1.png", "-0001.png", "+0001.png"),
    *("00001 (copy).png", "00001.PNG", "00001.png~", "00001.png.bak", "00001.jpg", f"{ARABIC_1}.png", "0000\uff11.png"),
    "00099.png",
)
TOP = ("commit.json", "notes.new", ".writable", "grid (1).png", "sample.json.bak", "metrics.jsonl.1", "decode.json~")
NUM_IMAGES = 3  # images of a run


def names_alike(folder: str) -> list[str]:
    """Return names that no run writes; those like images are in `folder`, where a command writes its images."""
    return [*TOP, *(os.path.join(folder, name) for name in ALIKE), "elsewhere/00001.png", "elsewhere/commit.json"]


def add_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Write foreign files, each with content of its own, and return them by name."""
    files = {name: f"mine: {name}".encode() for name in names}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def names_below(folder: Path) -> set[str]:
    return set(digest_of(folder))


def written(folder: str, others: Sequence[str], count: int = NUM_IMAGES) -> set[str]:
    """Return the names that a command writes: `count` images in `folder`, and `others`."""
    return {*others, *(os.path.join(folder, f"{index:05d}.png") for index in range(count))}


@pytest.fixture
def commands(tmp_path: Path, trained: Trained, image_folder: Path) -> dict[str, list[object]]:
    """Each command that writes a folder, without --n."""
    both: list[object] = ["--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu"]
    picture = next(path for path in sorted(image_folder.rglob("*.png")))
    return {
        "sample": ["sample", *both],
        "complete": ["complete", *both, "--image", picture, "--keep", "top", "--candidates", 1],
        "decode-codes": ["decode-codes", trained.codes, "--tokenizer", trained.tokenizer, "--device", "cpu"],
    }


FOLDERS = {
    "sample": ("images", ["grid.png", "codes.npy", "sample.json"]),
    "complete": ("images", ["grid.png", "codes.npy", "complete.json"]),
    "decode-codes": ("", ["decode.json"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_names_like_those_of_images_are_kept(
    tmp_path: Path, commands: dict[str, list[object]], name: str, codegrid: Codegrid
) -> None:
    """A run with fewer images than the last leaves none of the old ones behind, and all foreign files."""
    out, (folder, others) = tmp_path / "out", FOLDERS[name]
    command = [*commands[name], "--out", out]
    assert codegrid(*command, "--n", NUM_IMAGES).status == 0
    assert names_below(out) == written(folder, others)
    foreign = add_files(out, names_alike(folder))
    (out / folder / "00007.png").mkdir()
    before = digest_of(out)
    assert codegrid(*command, "--n", NUM_IMAGES).status == 1
    assert digest_of(out) == before
    for count in (2, 1, 4):
        outcome = codegrid(*command, "--n", count, "--force")
        assert outcome.status == 0, outcome
        assert names_below(out) == written(folder, others, count) | set(foreign)
        assert {known: (out / known).read_bytes() for known in foreign} == foreign
        assert (out / folder / "00007.png").is_dir()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("number", [0, NUM_IMAGES - 1])
def test_a_foreign_file_with_the_name_of_an_image_is_not_replaced(
    tmp_path: Path, commands: dict[str, list[object]], name: str, number: int, codegrid: Codegrid
) -> None:
    """Such as a data set named as --out by accident: one line, and not even --force replaces any of it."""
    out, (folder, _) = tmp_path / "out", FOLDERS[name]
    file = os.path.join(folder, f"{number:05d}.png")
    add_files(out, [file, os.path.join(folder, "00099.png")])
    before = digest_of(out)
    outcome = codegrid(*commands[name], "--out", out, "--n", NUM_IMAGES, "--force")
    line = f"nothing in --out {out} that this would replace and no earlier run of it wrote"
    assert outcome.error_lines == [f"Error: expected {line}, got {file}; move it away or name another folder"]
    assert outcome.status == 1
    assert digest_of(out) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_other_foreign_files_with_the_name_of_a_result_are_not_replaced(
    tmp_path: Path, commands: dict[str, list[object]], name: str, codegrid: Codegrid
) -> None:
    """A picture, an array or a JSON file that no record names; also a record that no run wrote."""
    for number, other in enumerate(FOLDERS[name][1]):
        out = tmp_path / str(number)
        add_files(out, [other])
        for content in (b"mine", b"[]", b'{"n": 3, "start": 0}', b'{"options": {"n": 9}}'):
            (out / other).write_bytes(content)
            outcome = codegrid(*commands[name], "--out", out, "--n", NUM_IMAGES, "--force")
            assert outcome.status == 1
            assert f"got {other}; move it away" in outcome.error_lines[0]
            assert digest_of(out).keys() == {other}
            assert (out / other).read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_in_the_place_of_an_image_is_not_followed(
    tmp_path: Path, commands: dict[str, list[object]], name: str, codegrid: Codegrid
) -> None:
    """It stays where fewer images are written, and is refused where it would be replaced."""
    out, (folder, others) = tmp_path / "out", FOLDERS[name]
    command = [*commands[name], "--out", out, "--force"]
    assert codegrid(*command, "--n", NUM_IMAGES).status == 0
    foreign = tmp_path / "mine.png"
    foreign.write_bytes(b"mine")
    link = out / folder / "00002.png"
    link.unlink()
    link.symlink_to(foreign)
    before = digest_of(out)
    outcome = codegrid(*command, "--n", NUM_IMAGES)
    assert (outcome.status, digest_of(out)) == (1, before)
    assert codegrid(*command, "--n", 1).status == 0
    assert link.is_symlink()
    assert foreign.read_bytes() == b"mine"
    assert names_below(out) == written(folder, others, 1) | {os.path.join(folder, "00002.png")}


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("there", [False, True], ids=["link to nothing", "link to a file"])
def test_nothing_is_written_through_a_link(
    tmp_path: Path, commands: dict[str, list[object]], name: str, there: bool, codegrid: Codegrid
) -> None:
    """The record is first written under a name that alone does not make a folder one with files in it."""
    out, target = tmp_path / "out", tmp_path / "of the user"
    out.mkdir()
    if there:
        target.write_bytes(b"mine")
    (out / ".codegrid.new").symlink_to(target)
    before = digest_of(tmp_path)
    outcome = codegrid(*commands[name], "--out", out, "--n", 2)
    assert outcome.status == 1
    assert ".codegrid.new, got a link" in outcome.error_lines[0]
    assert digest_of(tmp_path) == before
    assert target.exists() == there


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
@pytest.mark.parametrize("kind", ["link", "file", "dangling link"])
@pytest.mark.parametrize("name", ["sample", "complete"])
def test_images_that_is_no_folder_of_its_own_is_refused(
    tmp_path: Path, commands: dict[str, list[object]], name: str, kind: str, codegrid: Codegrid
) -> None:
    """Though the record says that a run wrote the images: behind a link they may be foreign."""
    out = tmp_path / "out"
    command = [*commands[name], "--out", out, "--n", 2, "--force"]
    assert codegrid(*command).status == 0
    (out / "images").rename(tmp_path / "moved")
    if kind == "file":
        (out / "images").write_bytes(b"mine")
    else:
        (out / "images").symlink_to(tmp_path / ("moved" if kind == "link" else "nosuch"))
    before = digest_of(tmp_path)
    outcome = codegrid(*command)
    assert outcome.status == 1
    assert "got images; move it away" in outcome.error_lines[0]
    assert digest_of(tmp_path) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_the_place_of_an_image_is_refused(
    tmp_path: Path, commands: dict[str, list[object]], name: str, codegrid: Codegrid
) -> None:
    out, (folder, _) = tmp_path / "out", FOLDERS[name]
    command = [*commands[name], "--out", out, "--n", NUM_IMAGES, "--force"]
    assert codegrid(*command).status == 0
    (out / folder / "00001.png").unlink()
    add_files(out / folder / "00001.png", ["00000.png"])
    before = digest_of(out)
    outcome = codegrid(*command)
    assert (outcome.status, digest_of(out)) == (1, before)
    assert "00001.png; move it away" in outcome.error_lines[0]


def test_samples_and_completions_replace_each_other(
    tmp_path: Path, commands: dict[str, list[object]], codegrid: Codegrid
) -> None:
    out = tmp_path / "out"
    assert codegrid(*commands["sample"], "--out", out, "--n", 4).status == 0
    foreign = add_files(out, names_alike("images"))
    for name, count in (("complete", 1), ("sample", 3), ("complete", 2)):
        assert codegrid(*commands[name], "--out", out, "--n", count, "--force").status == 0
        assert names_below(out) == written("images", FOLDERS[name][1], count) | set(foreign)


def test_a_run_that_was_killed_is_replaced_completely(
    tmp_path: Path, commands: dict[str, list[object]], codegrid: Codegrid
) -> None:
    """Its record says that no image is finished; all that it was going to write is removed, and nothing else."""
    for name, (folder, others) in FOLDERS.items():
        out = tmp_path / name
        assert codegrid(*commands[name], "--out", out, "--n", NUM_IMAGES).status == 0
        record = out / others[-1]
        record.write_text(json.dumps({**json.loads(record.read_text("utf-8")), "finished": 0}))
        shutil.copy(out / folder / "00001.png", out / folder / "00002.png.new")
        foreign = add_files(out, names_alike(folder))
        assert codegrid(*commands[name], "--out", out, "--n", 1, "--force").status == 0
        assert names_below(out) == written(folder, others, 1) | set(foreign)


class Killed(BaseException):
    """What `kill -9` looks like from inside."""


@pytest.mark.parametrize("name", FOLDERS)
def test_whenever_a_run_is_killed_force_replaces_what_it_left(
    tmp_path: Path, commands: dict[str, list[object]], name: str, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run into a folder, killed at each of its renames; all that it left is replaced."""
    rename, kills = os.replace, 0
    while True:
        out, renames = tmp_path / f"killed at {kills}", []

        def killed(source: Path, target: Path, renames: list[Path] = renames, last: int = kills) -> None:
            renames.append(target)
            if len(renames) > last:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr("pipeline.images.png_folder.remove_run", lambda *arguments: None)  # a kill cleans up nothing
            try:
                codegrid(*commands[name], "--out", out, "--n", 2)
            except Killed:
                kills += 1
            else:
                break
        assert codegrid(*commands[name], "--out", out, "--n", 1, "--force").status == 0
        assert names_below(out) == written(*FOLDERS[name], 1)
    assert kills >= 4  # the record, two images, the record again


def test_decoded_rows_of_another_start_are_replaced(
    tmp_path: Path, commands: dict[str, list[object]], codegrid: Codegrid
) -> None:
    """The record names the first row, so that rows 5 to 7 are replaced by rows 1 and 2."""
    command = [*commands["decode-codes"], "--out", tmp_path / "out", "--force"]
    assert codegrid(*command, "--start", 5, "--n", 3).status == 0
    foreign = add_files(tmp_path / "out", ["00004.png", "00008.png"])
    assert codegrid(*command, "--start", 1, "--n", 2).status == 0
    assert names_below(tmp_path / "out") == {"decode.json", "00001.png", "00002.png", *foreign}


# Training and exports


LOGS_ALIKE = [
    *("pictures/step-1.png", "pictures/step-holiday.png", "pictures/step-0000001 (copy).png", "pictures/notes.new"),
    *("pictures/step-0000001-mine.png", "pictures/step-00000001.png", "pictures/step-0000001.png.bak", "x.new"),
    *(f"pictures/step-00{ARABIC_1}.png", "metrics.jsonl.bak", "metrics-old.jsonl", "elsewhere/step-0000001.png"),
    *("elsewhere/metrics.jsonl", "pictures/metrics.jsonl", "step-0000001.png", "images/00000.png", "grid.png"),
    *("codes/codes-mine.npy", "codes/codes-00000-copy.npy", "codes/labels-1.npy", "codes/notes.new"),
]


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_training_leaves_names_like_those_of_its_logs(
    tmp_path: Path, trained: Trained, stage: str, codegrid: Codegrid
) -> None:
    """The previews of an older and longer run are removed."""
    out = tmp_path / "run"
    shutil.copytree(getattr(trained, stage), out)
    previews = add_files(out, ["pictures/step-0000099.png", "pictures/step-12345678.png"])
    if stage == "tokenizer":
        previews |= add_files(out, ["pictures/step-0000099-codebook.png"])
    foreign = add_files(out, LOGS_ALIKE)
    (out / "pictures" / "step-0000098.png").mkdir()
    small: dict[str, list[object]] = {
        "tokenizer": ["train-tokenizer", "--data", trained.images, "--hidden-channels", 4, "--num-codes", 4],
        "prior": ["train-prior", "--tokenizer", trained.tokenizer, "--channels", 2, "--num-layers", 1],
    }
    outcome = codegrid(*small[stage], "--out", out, "--steps", 1, "--force", "--device", "cpu")
    assert outcome.status == 0, outcome
    assert {name: (out / name).read_bytes() for name in foreign} == foreign
    assert not any((out / name).exists() for name in previews)
    assert (out / "pictures" / "step-0000098.png").is_dir()
    assert (out / "pictures" / "step-0000001.png").is_file()


@pytest.mark.parametrize("content", ['["notes.txt"]', '{"sha": "0123"}', "[1]", "mine", "[[]]"])
@pytest.mark.parametrize("option", ["--force", "--resume"])
def test_training_refuses_a_foreign_commit_file(
    tmp_path: Path, trained: Trained, content: str, option: str, codegrid: Codegrid
) -> None:
    """It has the name of the file by which a checkpoint is replaced atomically, and would be replaced, too."""
    out = tmp_path / "run"
    shutil.copytree(trained.prior, out)
    (out / "commit.json").write_text(content)
    before = digest_of(out)
    outcome = codegrid("train-prior", "--codes", trained.codes, "--out", out, "--steps", 9, option)
    (line,) = outcome.error_lines
    assert outcome.status == 1
    assert re.match(
        rf"Error: expected no commit\.json in (--out )?{re.escape(str(out))} .*, got another; move it away", line
    )
    assert digest_of(out) == before


def test_training_resumes_where_a_kill_left_half_a_checkpoint(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """The commit file of a checkpoint is no reason to refuse; the files that it names stay until the next save."""
    for option in ("--force", "--resume"):
        out = tmp_path / option
        shutil.copytree(trained.prior, out)
        (out / "model.safetensors").rename(out / "model.safetensors.new")
        (out / "commit.json").write_text('["config.json", "model.safetensors", "training.safetensors"]')
        outcome = codegrid("train-prior", "--codes", trained.codes, "--out", out, "--steps", 4, option)
        assert outcome.status == 0, outcome
        assert not (out / "commit.json").exists()
        assert not (out / "model.safetensors.new").exists()


def test_an_export_leaves_names_like_those_of_its_shards(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    out = tmp_path / "codes"
    shutil.copytree(trained.codes, out)
    names = ["codes-0.npy", "codes-00000 (copy).npy", "labels-1.npy", "names-old.json", "shard-1.json", "codes-.npy"]
    foreign = add_files(out, [*names, "commit.json", "notes.new", "00000.png", "elsewhere/codes-00000.npy"])
    assert codegrid("export-codes", "--tokenizer", trained.tokenizer, "--out", out, "--force").status == 0
    assert {name: (out / name).read_bytes() for name in foreign} == foreign
    assert names_below(out) == {
        *("manifest.json", "README.md", "codes-00000.npy", "labels-00000.npy", "names-00000.json", *foreign),
    }


# Odd destinations


ODD = {
    "sample": (
        "sample --tokenizer {no} --prior {no} --out",
        "x.jpg",
        "a folder as --out, got {path}, which looks like",
    ),
    "complete": (
        "complete --tokenizer {no} --prior {no} --image {no} --keep {no} --out",
        "x.npz",
        "a folder as --out, got {path}, which looks like a file; name a folder, such as {stem}",
    ),
    "export-codes": (
        "export-codes --tokenizer {tokenizer} --data {no} --out",
        "x.parquet",
        "a folder as --out, got {path}, which looks like a file",
    ),
    "reconstruct": (
        "reconstruct --tokenizer {no} --data {no} --out",
        "x.jpg",
        "a name that ends in .png as --out, got {path}; name {stem}.png",
    ),
    "evaluate": (
        "evaluate --tokenizer {no} --data {no} --json",
        "x.png",
        "a name that ends in .json as --json, got {path}; name {stem}.json",
    ),
    "measure-rate": (
        "measure-rate --tokenizer {no} --data {no} --json",
        "x.npy",
        "a name that ends in .json as --json, got {path}; name {stem}.json",
    ),
}


@pytest.mark.parametrize("command", ODD)
def test_a_name_of_another_kind_is_refused_before_anything_is_loaded(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    line, name, expected = ODD[command]
    words = [word.format(no=tmp_path / "nosuch", tokenizer=trained.tokenizer) for word in line.split()]
    for options in ([], ["--force"]):
        outcome = codegrid(*words, tmp_path / name, *options)
        assert outcome.status == 1
        (message,) = outcome.error_lines
        assert message.startswith(f"Error: expected {expected.format(path=tmp_path / name, stem=tmp_path / 'x')}")
        assert list(tmp_path.iterdir()) == []


FILE_COMMANDS = {
    "reconstruct": ("reconstruct --tokenizer {no} --data {no} --out", "a.png"),
    "decode-codes, picture": ("decode-codes {codes} --tokenizer {no} --out", "a.png"),
    "decode-codes, array": ("decode-codes {codes} --tokenizer {no} --out", "a.npy"),
    "evaluate": ("evaluate --tokenizer {no} --data {no} --json", "a.json"),
    "evaluate, picture": ("evaluate --tokenizer {no} --data {no} --picture", "a.png"),
    "measure-rate": ("measure-rate --tokenizer {no} --data {no} --json", "a"),
}


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_what_is_in_the_way_of_a_file_is_kept(
    tmp_path: Path, trained: Trained, command: str, codegrid: Codegrid
) -> None:
    """The temporary file that the user may have, a named pipe, and a link that leads nowhere; also with --force."""
    line, name = FILE_COMMANDS[command]
    words = [word.format(no=tmp_path / "nosuch", codes=trained.codes) for word in line.split()]
    (tmp_path / "pipe").mkdir()
    (tmp_path / "link").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    (tmp_path / "link" / name).symlink_to("nosuch")
    add_files(tmp_path, [f"temporary/{name}.new"])
    before = sorted(tmp_path.rglob("*"))
    for folder, got in (
        ("pipe", "a named pipe"),
        ("link", "a link that leads nowhere"),
        ("temporary", "a file that may"),
    ):
        for options in ([], ["--force"]):
            outcome = codegrid(*words, tmp_path / folder / name, *options)
            assert outcome.status == 1
            (message,) = outcome.error_lines
            assert f"got {got}" in message
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "temporary" / f"{name}.new").read_bytes() == f"mine: temporary/{name}.new".encode()
