"""Sampling that fails: full disks, two runs at once, a decoder of NaN, and records that no run wrote."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.codes.decode import decode_codes
from pipeline.errors import InputError
from pipeline.evaluation.reconstruction_picture import reconstruct_to_file
from pipeline.generation import sample_folder
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.generation.sample_folder import SampleOptions, complete_to_folder, sample_to_folder
from pipeline.generation.sample_record import COMPLETION, SAMPLE, check_sample_folder, earlier_samples
from pipeline.images import png_folder
from pipeline.images.png import save_png
from pipeline.runtime.folder_lock import LOCK
from tokenizer import VQVAE

from ..conftest import Codegrid, Trained
from ..disks import disk_of, failing_writes, full_disk_line
from ..support import HEIGHT, WIDTH, digest_of

N = 7
Run = Callable[[Path], object]


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tokenizer's size, in colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(params=["sample", "complete"])
def run(
    request: pytest.FixtureRequest, colour: ImagePipeline, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Run]:
    """Both commands, with their records; three images are sampled at a time."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)
    options = SampleOptions(n=N, seed=4)
    return {
        "sample": (SAMPLE, lambda out: sample_to_folder(colour, options, out, force=True)),
        "complete": (
            COMPLETION,
            lambda out: complete_to_folder(colour, picture, "top", options, out, candidates=1, force=True),
        ),
    }[request.param]


def check(out: Path, record: str) -> int:
    """Assert that the folder holds the images and codes that its record counts, or no file; return how many."""
    if not out.exists():
        return 0
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    if not found:
        return 0
    finished = json.loads((out / record).read_bytes())["finished"]
    assert found - {"grid.png"} == {record, "codes.npy", *(f"images/{index:05d}.png" for index in range(finished))}
    assert len(np.load(out / "codes.npy", allow_pickle=False)) == finished > 0
    for path in out.rglob("*.png"):
        Image.open(path).load()
    return int(finished)


# Full disks


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("count", [1, 10**6], ids=["once", "from then on"])
def test_a_write_that_fails_leaves_what_the_record_says(
    tmp_path: Path, run: tuple[str, Run], count: int, old: bool
) -> None:
    """Each write; of an older run, which --force replaces, nothing is mixed with it."""
    (record, act), out, kept = run, tmp_path / "deep" / "out", []
    for first in itertools.count():
        if old:
            act(out)
        with failing_writes(first, count) as writes:
            refused = full_disk_line(lambda: act(out))
        assert refused == (first < len(writes))
        if not refused:
            break
        kept.append(check(out, record))
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
    # the record, the reserved space, the images, the codes, the record, the contact sheet
    assert len(kept) == 1 + 1 + N + 3
    finished = [0, 0, 0, 3, 3, 3, 6] if record == SAMPLE and count == 1 else [0] * N
    assert kept == [0, 0, *finished, 0, 0, N]
    assert check(out, record) == N
    assert (out / "grid.png").exists()
    assert not (out / LOCK).exists()


def test_on_a_disk_of_any_size_the_finished_batches_are_kept(
    tmp_path: Path, colour: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete with their codes and the contact sheet, whose space is reserved before the first image."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 1)
    out, kept = tmp_path / "out", set()
    sample_to_folder(colour, SampleOptions(n=3), out)
    everything = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for size in range(everything // 4, 2 * everything, everything // 30):
        shutil.rmtree(out, ignore_errors=True)
        with disk_of(tmp_path, size):
            refused = full_disk_line(lambda: sample_to_folder(colour, SampleOptions(n=3), out))
        kept.add(check(out, SAMPLE))
        assert (out / "grid.png").exists() == (check(out, SAMPLE) > 0)
        assert refused == (check(out, SAMPLE) < 3)
    assert kept == {0, 1, 2, 3}


def test_a_full_disk_through_the_command_line(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu"]
    with failing_writes(4):
        outcome = codegrid("sample", *both, "--n", 3, "--out", tmp_path / "out")
    assert outcome.status == 1
    (line,) = outcome.error_lines
    assert re.fullmatch(r"Error: expected .*00002\.png.*, got No space left on device.*; free .*", line)
    assert list(tmp_path.iterdir()) == []
    for command in (["evaluate", "--json", tmp_path / "a.json"], ["reconstruct", "--out", tmp_path / "a.png"]):
        with failing_writes(0):
            outcome = codegrid(*command, "--tokenizer", trained.tokenizer, "--device", "cpu")
        assert outcome.status == 1
        assert re.fullmatch(r"Error: expected .*a\.(json|png).*, got No space.*", outcome.error_lines[-1])
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes_meanwhile(
    tmp_path: Path, run: tuple[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images do not go on in another folder of that name."""
    act, calls = run[1], []

    def vanishing(image: Tensor, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "out")
        save_png(image, path)

    monkeypatch.setattr(png_folder, "save_png", vanishing)
    with pytest.raises(InputError, match="got a folder that was removed or whose disk is gone"):
        act(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Two runs at once


def test_of_two_runs_with_force_the_second_is_refused(
    tmp_path: Path, run: tuple[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And told the first, which is not disturbed."""
    (_, act), out, decode, refusals = run, tmp_path / "out", ImagePipeline.decode, []
    act(tmp_path / "alone")

    def meanwhile(self: ImagePipeline, codes: Tensor) -> Tensor:
        if not refusals:
            refusals.append("")
            with pytest.raises(InputError) as refused:
                act(out)
            refusals.append(str(refused.value))
        return decode(self, codes)

    monkeypatch.setattr(ImagePipeline, "decode", meanwhile)
    act(out)
    assert digest_of(out) == digest_of(tmp_path / "alone")
    what = "(sampling run|completion)"
    pattern = rf"expected {out} for this {what} alone, got another {what} that writes into it, process {os.getpid()} on"
    assert re.match(pattern, refusals[1])


def test_a_run_that_another_has_finished_meanwhile_is_not_replaced(tmp_path: Path, labelled: ImagePipeline) -> None:
    """Without --force; the second was checked before the first had written anything."""
    check_sample_folder(tmp_path / "out", SAMPLE, 3, force=False)
    sample_to_folder(labelled, SampleOptions(n=2), tmp_path / "out")
    before = digest_of(tmp_path / "out")
    with pytest.raises(InputError, match="got a folder with files in it"):
        sample_to_folder(labelled, SampleOptions(n=3), tmp_path / "out")
    assert digest_of(tmp_path / "out") == before


def test_the_lock_of_a_killed_run_is_no_content_and_does_not_stay(tmp_path: Path, run: tuple[str, Run]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).write_text("{")
    run[1](tmp_path / "out")
    assert check(tmp_path / "out", run[0]) == N


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_decoder_of_nan_is_refused_and_no_image_written(
    tmp_path: Path,
    trained: Trained,
    run: tuple[str, Run],
    colour: ImagePipeline,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
) -> None:
    """In every command that decodes, even if it is a single pixel."""
    decode = VQVAE.decode

    def broken(model: VQVAE, codes: Tensor) -> Tensor:
        images = decode(model, codes).clone()
        images[0, 1, 2, 3] = value
        return images

    monkeypatch.setattr(VQVAE, "decode", broken)
    line = (
        f"expected finite pixels from the decoder in {trained.tokenizer}, got NaN or infinity; "
        "restore the folder from a copy, or train it again"
    )
    acts: list[Callable[[], object]] = [
        lambda: run[1](tmp_path / "out"),
        lambda: decode_codes(trained.codes, trained.tokenizer, tmp_path / "out", device="cpu"),
        lambda: decode_codes(trained.codes, trained.tokenizer, tmp_path / "out.png", device="cpu"),
        lambda: decode_codes(trained.codes, trained.tokenizer, tmp_path / "out.npy", device="cpu"),
        lambda: reconstruct_to_file(trained.tokenizer, tmp_path / "out.png", split="train", device="cpu"),
        lambda: colour.reconstruct(torch.zeros(1, 3, HEIGHT, WIDTH)),
    ]
    for act in acts:
        with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
            act()
        assert list(tmp_path.iterdir()) == []


# Records of a stranger

RECORD = {"seed": 0, "fingerprints": {}, "finished": 3, "options": {"n": 3}}


@pytest.mark.parametrize("name", [SAMPLE, COMPLETION])
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 3),
        ({"finished": 0}, 3),
        ({"finished": 2}, 2),
        ({"seed": 10**40}, 3),
        *(({"options": {"n": n}}, None) for n in (10**12, 10**400, -5, "3", 3.0, True, None, [3], {}, 2)),
        *(({"finished": finished}, None) for finished in (10**12, -5, "3", 3.0, True, None, [3], {})),
        *(({"options": options}, None) for options in (None, 3, "n", ["n"], {})),
    ],
)
def test_a_record_of_absurd_numbers_is_none(
    tmp_path: Path, name: str, changes: dict[str, Any], count: int | None
) -> None:
    (tmp_path / name).write_text(json.dumps(RECORD | changes))
    assert [len(files.indices) for files in earlier_samples(tmp_path)] == ([] if count is None else [count])


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
@pytest.mark.parametrize("name", [SAMPLE, COMPLETION, "decode.json"])
@pytest.mark.parametrize("kind", ["brackets", "2 GB", "pipe", "folder", "bytes"])
def test_a_record_that_is_none_is_refused_as_any_file_in_the_way(
    tmp_path: Path, trained: Trained, codegrid: Codegrid, name: str, kind: str
) -> None:
    """It costs no time and no memory, and is not replaced, with --force either."""
    path = tmp_path / "out" / name
    path.parent.mkdir()
    {
        "brackets": lambda: path.write_text("[" * 100_000),
        "2 GB": lambda: (path.touch(), os.truncate(path, 2**31)),
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "bytes": lambda: path.write_bytes(b"\xff\x00{"),
    }[kind]()
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior]
    picture = sorted(trained.images.rglob("*.png"))[0]
    command = {
        SAMPLE: ["sample", *both],
        COMPLETION: ["complete", *both, "--image", picture, "--keep", "top"],
        "decode.json": ["decode-codes", trained.codes, "--tokenizer", trained.tokenizer],
    }[name]
    outcome = codegrid(*command, "--n", 2, "--out", tmp_path / "out", "--force", "--device", "cpu")
    assert outcome.status == 1
    line = f"nothing in --out {tmp_path / 'out'} that this would replace and no earlier run of it wrote"
    assert outcome.error_lines == [f"Error: expected {line}, got {name}; move it away or name another folder"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
