"""A kill at any moment leaves the old files or the new ones, never a mixture."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CheckpointInfo, TrainingState, load_training, read_info
from pipeline.models.loading import load_tokenizer
from pipeline.runtime import atomic_files
from pipeline.runtime.atomic_files import current, to_json, write_atomic, write_together

from ..support import bits_of, brightness_tokenizer, save_tokenizer
from .kills import Killed, every_kill, killed_at

OLD = {"a.bin": b"old a", "b.bin": b"old b", "c.bin": b"old c"}
NEW = {"a.bin": b"new a!", "b.bin": b"new b!", "c.bin": b"new c!"}
NEXT = {"a.bin": b"next a!!", "b.bin": b"next b!!", "c.bin": b"next c!!"}


def read(folder: Path) -> dict[str, bytes]:
    return {name: current(folder, name).read_bytes() for name in OLD}


def fresh(folder: Path, contents: dict[str, bytes]) -> None:
    for path in folder.glob("*"):
        path.unlink()
    for name, data in contents.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


both = pytest.mark.parametrize("halfway", [False, True], ids=["before", "halfway"])


@both
def test_one_file_is_old_or_new(tmp_path: Path, halfway: bool) -> None:
    path = tmp_path / "sub" / "one.json"
    write_atomic(path, b"old")
    kills = every_kill(
        lambda: write_atomic(path, b"old"),
        lambda: write_atomic(path, b"new, and longer"),
        lambda: _one_of(path.read_bytes(), b"old", b"new, and longer"),
        halfway=halfway,
    )
    assert kills == 2  # write, rename
    assert path.read_bytes() == b"new, and longer"


@both
def test_files_that_belong_together_are_all_old_or_all_new(tmp_path: Path, halfway: bool) -> None:
    seen = []

    def check() -> None:
        seen.append(read(tmp_path))
        _one_of(seen[-1], OLD, NEW)

    kills = every_kill(lambda: fresh(tmp_path, OLD), lambda: write_together(tmp_path, NEW), check, halfway=halfway)
    assert kills == len(NEW) * 2 + 3  # a write and a rename each; write, rename and remove the commit
    assert seen == sorted(seen, key=lambda contents: contents == NEW)  # old up to one moment, new from then on
    assert OLD in seen
    assert NEW in seen
    assert {path.name for path in tmp_path.iterdir()} == set(NEW)  # no temporary file is left


@both
def test_a_kill_while_the_next_writer_completes_what_a_kill_left(tmp_path: Path, halfway: bool) -> None:
    """Two kills: at every touch of the first writer, and at every one of the writer after it."""
    pairs = 0
    for first in range(len(NEW) * 2 + 3):

        def prepare(first: int = first) -> None:
            fresh(tmp_path, OLD)
            with killed_at(first, halfway=halfway), pytest.raises(Killed):
                write_together(tmp_path, NEW)

        prepare()
        before = read(tmp_path)
        pairs += every_kill(
            prepare,
            lambda: write_together(tmp_path, NEXT),
            lambda before=before: _one_of(read(tmp_path), before, NEXT),  # type: ignore[misc]
            halfway=halfway,
        )
        assert read(tmp_path) == NEXT
        assert {path.name for path in tmp_path.iterdir()} == set(NEXT)
    assert pairs > (len(NEW) * 2 + 3) ** 2


@both
def test_a_first_write_is_complete_or_absent(tmp_path: Path, halfway: bool) -> None:
    seen = []

    def check() -> None:
        seen.append([current(tmp_path, name).exists() for name in NEW])

    every_kill(lambda: fresh(tmp_path, {}), lambda: write_together(tmp_path, NEW), check, halfway=halfway)
    assert seen == sorted(seen)  # absent up to one moment, complete from then on
    assert {tuple(found) for found in seen} == {(False,) * 3, (True,) * 3}


def test_a_commit_makes_current_only_what_it_names(tmp_path: Path) -> None:
    """A kill leaves half of c.bin.new without a commit; a later commit of the others must not make it current."""
    fresh(tmp_path, OLD)
    with killed_at(2, halfway=True), pytest.raises(Killed):
        write_together(tmp_path, NEW)
    assert (tmp_path / "c.bin.new").read_bytes() == b"new"  # the half
    two = {name: NEXT[name] for name in ("a.bin", "b.bin")}
    every_touch = len(two) * 2 + 3
    for touch in range(every_touch):
        with killed_at(touch), pytest.raises(Killed):
            write_together(tmp_path, two)
        assert current(tmp_path, "c.bin").read_bytes() == b"old c"


# Checkpoints


def save(folder: Path, seed: int) -> CheckpointInfo:
    """Save a checkpoint whose three files all tell which one it is."""
    torch.manual_seed(seed)
    model = brightness_tokenizer()
    with torch.no_grad():
        model.decoder.layers[0].bias.fill_(seed)
    state = TrainingState(tensors={"random/cpu": torch.full((3,), seed)}, values={"step": seed})
    return save_tokenizer(folder, model, state=state)


def seed_of(folder: Path) -> int:
    """Return which checkpoint a reader sees, by each of its files."""
    info, state = read_info(folder, "tokenizer"), load_training(folder)
    model = load_tokenizer(folder)
    seeds = {int(model.decoder.layers[0].bias[0]), int(state.values["step"]), int(state.tensors["random/cpu"][0])}
    assert len(seeds) == 1
    assert atomic_files.sha256(current(folder, "model.safetensors").read_bytes()) == info.fingerprint
    return seeds.pop()


@both
def test_a_checkpoint_is_old_or_new_at_every_kill(tmp_path: Path, halfway: bool) -> None:
    seen: list[int] = []

    def check() -> None:
        seen.append(seed_of(tmp_path))

    kills = every_kill(lambda: save(tmp_path, 1), lambda: save(tmp_path, 2), check, halfway=halfway)
    assert kills == len(checkpoint_files()) * 2 + 3
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)
    assert seed_of(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == set(checkpoint_files())


def checkpoint_files() -> tuple[str, str, str]:
    return checkpoint.MODEL, checkpoint.CONFIG, checkpoint.TRAINING


def test_a_reader_between_any_two_touches_of_a_writer_sees_a_complete_checkpoint(tmp_path: Path) -> None:
    """No kill: the reader loads just before each rename of the writer."""
    save(tmp_path, 1)
    seen = []
    real = os.replace

    def look_and_rename(source: Path, target: Path) -> None:
        seen.append(seed_of(tmp_path))
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", look_and_rename)
        save(tmp_path, 2)
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_a_reader_that_a_writer_overtakes_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config of the old checkpoint, weights of the new one: the fingerprint tells, and the reader starts over."""
    save(tmp_path, 1)
    real, calls = checkpoint.read_info, []

    def read_then_overtaken(folder: Path, kind: str) -> CheckpointInfo:
        info = real(folder, kind)
        calls.append(info.fingerprint)
        if len(calls) == 1:
            save(tmp_path, 2)
        return info

    monkeypatch.setattr(checkpoint, "read_info", read_then_overtaken)
    model = load_tokenizer(tmp_path)
    assert int(model.decoder.layers[0].bias[0]) == 2
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_reader_whose_file_is_renamed_meanwhile_reads_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has chosen NAME.new; before it opens it, the writer renames it to NAME."""
    save(tmp_path / "other", 2)
    save(tmp_path, 1)
    contents = {file: (tmp_path / "other" / file).read_bytes() for file in checkpoint_files()}
    with killed_at(len(contents) + 2), pytest.raises(Killed):
        write_together(tmp_path, contents)
    assert (tmp_path / f"{name}.new").exists()
    real = current

    def chosen_then_renamed(folder: Path, chosen: str) -> Path:
        path = real(folder, chosen)
        if path.name == f"{name}.new":
            atomic_files._complete(tmp_path)
        return path

    monkeypatch.setattr(atomic_files, "current", chosen_then_renamed)
    assert load_tokenizer(tmp_path).decoder.layers[0].bias[0] == 2


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the data leaves an empty file after a power cut."""
    events: list[tuple[str, int, int]] = []  # what was done, to which file, of how many bytes by then
    real = os.replace

    def record(what: str, status: os.stat_result) -> None:
        events.append((what, status.st_ino, status.st_size))

    def recorded_rename(source: Path, target: Path) -> None:
        record("rename", os.stat(source))
        real(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: record("flush", os.fstat(descriptor)))
    monkeypatch.setattr(os, "replace", recorded_rename)
    write_together(tmp_path, NEW)
    renames = [event for event in events if event[0] == "rename"]
    assert len(renames) == len(NEW) + 1
    for event in renames:
        assert ("flush", *event[1:]) in events[: events.index(event)]


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    for name in checkpoint_files():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert bits_of(load_tokenizer(tmp_path / "a")) == bits_of(load_tokenizer(tmp_path / "b"))


def test_json_is_readable_utf8_and_refuses_what_json_has_no_form_for() -> None:
    assert to_json({"é": [1]}) == '{\n  "é": [\n    1\n  ]\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))


def test_an_unfinished_first_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with killed_at(1), pytest.raises(Killed):
        write_together(folder, dict.fromkeys(checkpoint_files(), b"..."))
    with pytest.raises(InputError, match=r"a folder without config.json"):
        load_tokenizer(folder)


def _one_of(found: object, *allowed: object) -> None:
    assert found in allowed
