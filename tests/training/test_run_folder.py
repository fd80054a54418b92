"""The folder of a training run: what is in the way is refused before any work, and only its own files are removed."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.runtime.folder_lock import LOCK
from pipeline.training.run_folder import CHECKPOINT, RunFolder, check_run_folder, prepare_run_folder, saved_run

from ..conftest import Codegrid, Trained
from ..support import digest_of

PLACES = [
    *("model.safetensors", "config.json", "training.safetensors", "metrics.jsonl", "commit.json"),
    *("previous/model.safetensors", "previous/config.json", "previous/training.safetensors"),
]
FOLDERS = ["pictures", "previous"]
MAKE: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a link that leads nowhere": lambda path: path.symlink_to("nosuch"),
    "a link to a file": lambda path: path.symlink_to("mine.txt"),
    "a named pipe": lambda path: os.mkfifo(path),
    "a link to a device": lambda path: path.symlink_to(os.devnull),
    "a file": lambda path: path.write_bytes(b"mine"),
    "a link to a folder": lambda path: path.symlink_to("mine"),
}
IN_A_FILES_PLACE = [kind for kind in MAKE if kind not in ("a file", "a link to a folder")]
IN_A_FOLDERS_PLACE = [kind for kind in MAKE if kind not in ("a folder", "a link to a folder")]
OPTIONS: list[dict[str, bool]] = [{}, {"force": True}, {"resume": True}]

links = pytest.mark.skipif(os.name == "nt", reason="few users make links, and there are no named pipes")


@pytest.fixture
def out(tmp_path: Path, trained: Trained) -> Path:
    """A run folder, and foreign files in it."""
    shutil.copytree(trained.prior, tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_bytes(b"mine")
    (tmp_path / "run" / "mine").mkdir()
    (tmp_path / "run" / "previous").mkdir()
    (tmp_path / "run" / "previous" / "mine.txt").write_bytes(b"mine")
    return tmp_path / "run"


def put(path: Path, kind: str) -> None:
    """Make something of this kind at `path`, whatever is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    MAKE[kind](path)


@links
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ending", ["", ".new"])
@pytest.mark.parametrize("kind", IN_A_FILES_PLACE)
@pytest.mark.parametrize("name", PLACES)
def test_something_else_in_the_place_of_a_file(
    out: Path, name: str, kind: str, ending: str, options: dict[str, bool]
) -> None:
    """It is reported by the first look at the folder, before anything is read, and also by the later check."""
    path = out / f"{name}{ending}"
    put(path, kind)
    before = digest_of(out)
    run = RunFolder(out=out, **options)
    line = re.escape(f"expected a file or nothing at {path}, got {kind}; move it away or name another folder")
    with pytest.raises(InputError, match=f"^{line}$"):
        saved_run(run, "prior")
    with pytest.raises(InputError, match=f"^{line}$"):
        check_run_folder(run, None)
    assert digest_of(out) == before


@links
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", IN_A_FOLDERS_PLACE)
@pytest.mark.parametrize("name", FOLDERS)
def test_something_else_in_the_place_of_a_folder(out: Path, name: str, kind: str, options: dict[str, bool]) -> None:
    put(out / name, kind)
    line = re.escape(f"expected a folder or nothing at {out / name}, got {kind}; move it away or name another folder")
    with pytest.raises(InputError, match=f"^{line}$"):
        check_run_folder(RunFolder(out=out, **options), None)


@links
def test_pictures_may_be_on_another_disk_and_the_save_before_the_last_may_not(out: Path) -> None:
    run = RunFolder(out=out, force=True)
    put(out / "pictures", "a link to a folder")
    check_run_folder(run, None)
    put(out / "previous", "a link to a folder")
    with pytest.raises(InputError, match=r"expected a folder or nothing at .*previous, got a link to a folder"):
        check_run_folder(run, None)


@links
@pytest.mark.parametrize("option", ["--force", "--resume"])
@pytest.mark.parametrize("kind", IN_A_FILES_PLACE)
def test_the_command_refuses_in_one_line_before_any_work(
    out: Path, trained: Trained, codegrid: Codegrid, kind: str, option: str
) -> None:
    for name in ("config.json", "commit.json", "metrics.jsonl.new"):
        kept = out.parent / name
        shutil.copytree(out, kept, symlinks=True)
        put(kept / name, kind)
        outcome = codegrid("train-prior", "--codes", trained.codes, "--out", kept, "--steps", 9, option)
        assert outcome.status == 1
        assert outcome.out == ""
        line = f"expected a file or nothing at {kept / name}, got {kind}; move it away or name another folder"
        assert outcome.error_lines == [f"Error: {line}"]


@pytest.mark.parametrize("name", ["run.png", "x.jpg", "model.safetensors", "v1.json"])
@pytest.mark.parametrize("command", ["train-tokenizer", "train-prior"])
def test_a_name_like_that_of_a_file(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, command: str, name: str
) -> None:
    options = ["--codes", trained.codes] if command == "train-prior" else ["--data", trained.images]
    outcome = codegrid(command, *options, "--out", tmp_path / name, "--steps", 1)
    assert outcome.status == 1
    assert f"expected a folder as --out, got {tmp_path / name}, which looks like a file" in outcome.error_lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_run_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{}")
    run = RunFolder(out=tmp_path)
    check_run_folder(run, saved_run(run, "prior"))


@pytest.mark.parametrize(
    "content", ["", "[", "[" * 2000, '["notes.txt"]', "[1]", "{}", "\xff", "[" + "1," * 3000 + "1]"]
)
def test_rubbish_in_the_commit_file(out: Path, content: str) -> None:
    (out / "commit.json").write_text(content, "latin-1")
    for options in OPTIONS:
        with pytest.raises(InputError, match=r"expected no commit\.json in .* got another; move it away"):
            saved_run(RunFolder(out=out, **options), "prior")


def test_a_commit_file_of_2_gb_is_not_read(out: Path) -> None:
    (out / "commit.json").touch()
    os.truncate(out / "commit.json", 2**31)
    with pytest.raises(InputError, match=r"expected no commit\.json"):
        saved_run(RunFolder(out=out), "prior")


# What a new run removes


ALIKE = ["config.json.bak", "model.safetensors.1", "Config.json", "metrics.jsonl", "commit.json", "a.png", "model (1)"]


@links
def test_a_new_run_removes_the_save_before_the_last_and_nothing_else(out: Path) -> None:
    """Only regular files of exactly these names; a resumed run removes nothing."""
    for name in (*CHECKPOINT, *ALIKE):
        (out / "previous" / name).write_bytes(b"mine")
    before = digest_of(out)
    run = RunFolder(out=out, resume=True)
    prepare_run_folder(run, saved_run(run, "prior"))
    assert digest_of(out) == before
    run = RunFolder(out=out, force=True)
    prepare_run_folder(run, saved_run(run, "prior"))
    gone = {f"previous/{name}" for name in CHECKPOINT} | {"metrics.jsonl"}
    gone |= {name for name in before if name.startswith("pictures/")}
    assert digest_of(out) == {name: digest for name, digest in before.items() if name not in gone}
    assert (out / "previous").is_dir()


@links
@pytest.mark.parametrize("kind", ["a folder", "a link to a file"])
def test_what_is_no_regular_file_is_not_removed(out: Path, kind: str) -> None:
    put(out / "previous" / "config.json", kind)
    prepare_run_folder(RunFolder(out=out, force=True), None)
    assert os.path.lexists(out / "previous" / "config.json")


@links
def test_behind_a_link_nothing_is_removed(out: Path) -> None:
    shutil.rmtree(out / "previous")
    (out / "mine" / "config.json").write_bytes(b"mine")
    (out / "previous").symlink_to("mine")
    prepare_run_folder(RunFolder(out=out, force=True), None)
    assert (out / "mine" / "config.json").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a folder that can be written at"):
        prepare_run_folder(RunFolder(out=tmp_path / "file" / "run"), None)
