"""Folders of sampled images: what they hold, what an interrupted run keeps, and that a refusal changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.generation import image_pipeline, sample_folder
from pipeline.generation.image_pipeline import ImagePipeline, Sampled
from pipeline.generation.keep_mask import half_mask
from pipeline.generation.sample_folder import SampleOptions, complete_to_folder, sample_in_batches, sample_to_folder
from pipeline.images import png_folder
from pipeline.images.png import GAP, tile
from pipeline.runtime.progress import Progress

from ..support import HEIGHT, WIDTH, digest_of

SIZE = (HEIGHT, WIDTH)
TIMES = round(64 / WIDTH)  # how much a contact sheet is enlarged


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Of the tokenizer's size, in colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# Samples


def test_what_a_folder_of_samples_holds(tmp_path: Path, labelled: ImagePipeline) -> None:
    out = tmp_path / "out"
    sample_to_folder(labelled, SampleOptions(n=5, labels=("ring", "2"), seed=4), out)
    images, codes = labelled.sample(5, labels=("ring", "2"), seed=4)
    stored = np.load(out / "codes.npy", allow_pickle=False)
    assert stored.dtype == np.int64
    np.testing.assert_array_equal(stored, codes)
    assert sorted(path.name for path in (out / "images").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(out / "images" / f"{i:05d}.png")), image[0])
    sheet = np.asarray(Image.open(out / "grid.png"))
    np.testing.assert_array_equal(sheet[::TIMES, ::TIMES], tile(images, 3)[0])


def test_samples_are_replaced_completely_and_only_with_force(tmp_path: Path, labelled: ImagePipeline) -> None:
    out = tmp_path / "out"
    sample_to_folder(labelled, SampleOptions(n=5), out)
    (out / "notes.txt").write_text("of the user")
    before = digest_of(out)
    with pytest.raises(InputError, match="got a folder with files in it; name another folder, or use --force"):
        sample_to_folder(labelled, SampleOptions(n=2), out)
    with pytest.raises(InputError, match="nosuch"):
        sample_to_folder(labelled, SampleOptions(n=2, labels=("nosuch",)), out, force=True)
    with pytest.raises(ValueError, match="top_p"):
        SampleOptions.of(n=2, top_p=7)
    assert digest_of(out) == before
    sample_to_folder(labelled, SampleOptions(n=2), out, force=True)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["00000.png", "00001.png"]
    assert (out / "notes.txt").read_text() == "of the user"


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64])
def test_an_image_is_the_same_in_any_batch(
    tmp_path: Path, labelled: ImagePipeline, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P17: seven are no multiple of a batch; labels are taken in turn over all of them."""
    options = SampleOptions.of(n=7, labels=("ring", "2"), seed=4, temperature=1.2, top_k=9, top_p=0.95)
    sample_to_folder(labelled, options, tmp_path / "default")
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", at_once)
    sample_to_folder(labelled, options, tmp_path / "batches")
    assert digest_of(tmp_path / "batches") == digest_of(tmp_path / "default")
    parameters: dict[str, Any] = {"temperature": 1.2, "top_k": 9, "top_p": 0.95}
    images = labelled.sample(7, labels=("ring", "2"), seed=4, **parameters).images
    for index, image in enumerate(images):
        found = np.asarray(Image.open(tmp_path / "batches" / "images" / f"{index:05d}.png"))
        np.testing.assert_array_equal(found, image[0])
    assert len(digest_of(tmp_path / "batches" / "images")) == 7
    assert json.loads((tmp_path / "batches" / "sample.json").read_text("utf-8"))["finished"] == 7


def test_without_labels_the_classes_are_taken_in_turn_over_all_batches(
    labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of three classes, two at a time."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 2)
    batches = list(sample_in_batches(labelled, SampleOptions(n=5, seed=4), None, Progress(5, "sampling")))
    assert [len(batch.codes) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.codes for batch in batches]), labelled.sample(5, seed=4).codes)


def interrupt_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in the middle of a batch, counted from 0."""
    sample, calls = ImagePipeline.sample, []

    def interrupted(self: ImagePipeline, n: int, **options: Any) -> Sampled:
        calls.append(n)
        if len(calls) > number:
            raise KeyboardInterrupt
        return sample(self, n, **options)

    monkeypatch.setattr(ImagePipeline, "sample", interrupted)


@pytest.mark.parametrize(("stopped_in", "finished"), [(1, 3), (2, 6)])
def test_ctrl_c_keeps_the_finished_batches(
    tmp_path: Path,
    labelled: ImagePipeline,
    stopped_in: int,
    finished: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder is as if no more had been requested, but for the record, which says how many are finished."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)
    sample_to_folder(labelled, SampleOptions(n=finished, seed=4), tmp_path / "fewer")
    interrupt_batch(monkeypatch, stopped_in)
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(labelled, SampleOptions(n=8, seed=4), tmp_path / "out")
    fewer, out = digest_of(tmp_path / "fewer"), digest_of(tmp_path / "out")
    assert fewer.pop("sample.json") != out.pop("sample.json")
    assert out == fewer
    assert len(out) == finished + 2
    record = json.loads((tmp_path / "out" / "sample.json").read_text("utf-8"))
    assert record["finished"] == finished
    assert record["options"]["n"] == 8
    assert record["labels"] == [i % 3 for i in range(finished)]
    assert f"stopped: {finished} of 8 images are in {tmp_path / 'out'}" in capsys.readouterr().err


def test_ctrl_c_in_the_first_batch_writes_nothing(
    tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_batch(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(labelled, SampleOptions(n=8), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_ctrl_c_while_a_batch_is_written_leaves_no_image_without_its_codes(
    tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)
    write, written = png_folder.save_png, []

    def interrupted(image: torch.Tensor, path: Path) -> None:
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(image, path)

    monkeypatch.setattr(png_folder, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(labelled, SampleOptions(n=8), tmp_path / "out")
    images = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    finished = json.loads((tmp_path / "out" / "sample.json").read_text("utf-8"))["finished"]
    assert len(np.load(tmp_path / "out" / "codes.npy")) == finished
    assert images == [f"{i:05d}.png" for i in range(finished)]


def interrupt_writing(monkeypatch: pytest.MonkeyPatch, number: int) -> list[dict[str, Any]]:
    """Ctrl-C in the middle of writing an image, counted from 0. Return the record at the start of each image."""
    write, records = png_folder.save_png, []

    def interrupted(image: torch.Tensor, path: Path) -> None:
        records.append(json.loads(next((path.parents[1]).glob("*.json")).read_text("utf-8")))
        write(image, path)
        if len(records) > number:
            path.with_name(f"{path.name}.new").write_bytes(b"...")
            raise KeyboardInterrupt

    monkeypatch.setattr(png_folder, "save_png", interrupted)
    return records


@pytest.mark.parametrize("folder", ["new", "old", "deep/in/new"])
@pytest.mark.parametrize("number", [0, 2])
def test_ctrl_c_while_the_first_batch_is_written_leaves_nothing_new(
    tmp_path: Path, colour: ImagePipeline, picture: Path, folder: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image without codes, no record, and no new folder. Until then the record counts no finished image."""
    (tmp_path / "old").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with monkeypatch.context() as patch:
            records = interrupt_writing(patch, number)
            with pytest.raises(KeyboardInterrupt):
                sample_to_folder(colour, SampleOptions(n=4), tmp_path / folder)
            with pytest.raises(KeyboardInterrupt):
                complete_to_folder(colour, picture, "top", SampleOptions(n=4), tmp_path / folder, candidates=1)
        assert [(record["finished"], record["options"]["n"]) for record in records] == [(0, 4)] * (number + 2)
        assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_before_anything_is_sampled_leaves_the_old_images(
    tmp_path: Path, colour: ImagePipeline, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are removed once the new ones are ready; and no empty folder is created."""

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    sample_to_folder(colour, SampleOptions(n=2), tmp_path / "old")
    before = digest_of(tmp_path)
    monkeypatch.setattr(image_pipeline, "sample_codes", interrupted)
    monkeypatch.setattr(image_pipeline, "complete_codes", interrupted)
    for out in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            sample_to_folder(colour, SampleOptions(n=3), tmp_path / out, force=True)
        with pytest.raises(KeyboardInterrupt):
            complete_to_folder(colour, picture, "top", SampleOptions(n=3), tmp_path / out, force=True)
    assert digest_of(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_an_error_in_a_later_batch_keeps_the_batches_before_it(
    tmp_path: Path, labelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 3)
    sample = ImagePipeline.sample

    def broken(self: ImagePipeline, n: int, *, first: int, **options: Any) -> Sampled:
        if first:
            raise RuntimeError("out of memory")
        return sample(self, n, first=first, **options)

    monkeypatch.setattr(ImagePipeline, "sample", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_to_folder(labelled, SampleOptions(n=8), tmp_path / "out")
    assert len(np.load(tmp_path / "out" / "codes.npy")) == 3


def test_no_images_are_refused(tmp_path: Path, labelled: ImagePipeline) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample_to_folder(labelled, SampleOptions(n=0), tmp_path / "out")


# Completions


def pixels_of(path: Path) -> torch.Tensor:
    """The pixels [C,H',W'] of a file."""
    return torch.from_numpy(np.atleast_3d(np.array(Image.open(path)))).permute(2, 0, 1)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("keep", ["top", "right"])
def test_what_a_folder_of_completions_holds(
    tmp_path: Path, colour: ImagePipeline, picture: Path, keep: str, n: int
) -> None:
    out = tmp_path / "out"
    options = SampleOptions.of(n=n, seed=4, top_k=5, guidance=1)
    assert complete_to_folder(colour, picture, keep, options, out, candidates=6) == out / "grid.png"
    original, mask = pixels_of(picture), half_mask(keep, SIZE)
    images, codes = colour.complete(original.repeat(n, 1, 1, 1), mask, candidates=6, seed=4, top_k=5)
    names = [f"images/{i:05d}.png" for i in range(n)]
    assert sorted(digest_of(out)) == sorted([*names, "codes.npy", "complete.json", "grid.png"])
    np.testing.assert_array_equal(np.load(out / "codes.npy", allow_pickle=False), codes)
    for name, image in zip(names, images, strict=True):
        assert torch.equal(pixels_of(out / name), image)
        assert torch.equal(image[:, mask], original[:, mask])
    sheet = pixels_of(out / "grid.png")[:, ::TIMES, ::TIMES]
    assert sheet.shape[1:] == (HEIGHT + 2 * GAP, (n + 2) * (WIDTH + GAP) + GAP)
    shown = [sheet[:, GAP : GAP + HEIGHT, left : left + WIDTH] for left in range(GAP, sheet.shape[2], WIDTH + GAP)]
    assert torch.equal(shown[0], original)
    assert torch.equal(shown[1][:, mask], original[:, mask])
    for channel in shown[1]:
        assert len(channel[~mask].unique()) == 1  # the hidden pixels have one colour
    assert torch.equal(torch.stack(shown[2:]), images)
    record = json.loads((out / "complete.json").read_text("utf-8"))
    assert (record["labels"], record["class_names"], record["seed"], record["finished"]) == (None, None, 4, n)
    assert record["options"] == {
        **{
            "n": n,
            "temperature": 1.0,
            "top_k": 5,
            "top_p": None,
            "guidance": 1.0,
            "precision": "fp32",
            "keep_best": 1.0,
        },
        **{"image": str(picture), "keep": keep, "candidates": 6},
    }
    assert record["fingerprints"]["prior"] == colour.prior_info.fingerprint


def test_a_grey_picture_is_completed(tmp_path: Path, labelled: ImagePipeline, picture: Path) -> None:
    """In colour or not, of another size: preprocessed as the training images were. Labels are taken in turn."""
    grey = np.array(Image.open(picture).convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.kron(grey, np.ones((3, 3), dtype=np.uint8))).save(tmp_path / "large.png")
    for name in ("grey.png", "large.png", "picture.png"):
        out = tmp_path / f"of {name.removesuffix('.png')}"
        options = SampleOptions(n=3, labels=("ring", "0"))
        complete_to_folder(labelled, tmp_path / name, "left", options, out, candidates=2)
        record = json.loads((out / "complete.json").read_text("utf-8"))
        assert (record["labels"], record["class_names"]) == ([1, 2, 1], ["ring", "0", "ring"])
        assert pixels_of(out / "images" / "00002.png").shape == (1, *SIZE)
    shown = pixels_of(tmp_path / "of grey" / "images" / "00000.png")[0]
    assert torch.equal(shown[:, : WIDTH // 2], torch.from_numpy(grey)[:, : WIDTH // 2])


def test_the_white_pixels_of_a_mask_file_are_kept(tmp_path: Path, colour: ImagePipeline, picture: Path) -> None:
    mask = np.random.default_rng(1).random(SIZE) < 0.7
    Image.fromarray(mask).save(tmp_path / "mask.png")
    complete_to_folder(colour, picture, str(tmp_path / "mask.png"), SampleOptions(n=2), tmp_path / "out", candidates=2)
    kept, original = torch.from_numpy(mask), pixels_of(picture)
    for i in range(2):
        image = pixels_of(tmp_path / "out" / "images" / f"0000{i}.png")
        assert torch.equal(image[:, kept], original[:, kept])
        assert not torch.equal(image, original)


BAD: dict[str, dict[str, Any]] = {
    "no picture": {"image": "nosuch.png"},
    "a text": {"image": "text.png"},
    "no mask": {"keep": "nosuch.png"},
    "a mask of another size": {"keep": "small.png"},
    "all is kept": {"keep": "white.png"},
    "an unknown label": {"labels": ("nosuch",)},
    "a temperature below 0": {"temperature": -1.0},
    "none": {"n": 0},
    "no candidates": {"candidates": 0},
}


REFUSAL: dict[str, tuple[type[Exception], str]] = {
    "no picture": (InputError, r"expected a picture as --image .*nosuch\.png, got .*No such file"),
    "a text": (InputError, r"expected a picture as --image .*text\.png, got not an image"),
    "no mask": (InputError, r"expected top, .* as --keep .*nosuch\.png, got .*No such file"),
    "a mask of another size": (InputError, rf"expected a mask of {HEIGHT}x{WIDTH} pixels, .* got {HEIGHT - 1}x{WIDTH}"),
    "all is kept": (InputError, "expected a mask that leaves something to draw, got one that keeps all"),
    "an unknown label": (InputError, "got the label nosuch"),
    "a temperature below 0": (ValueError, r"temperature: expected 0 or more, got -1\.0"),
    "none": (ValueError, "expected at least 1 image, got 0"),
    "no candidates": (ValueError, "candidates: expected at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("force", [False, True])
def test_a_refused_completion_writes_and_removes_nothing(
    tmp_path: Path, colour: ImagePipeline, picture: Path, case: str, force: bool
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (WIDTH, HEIGHT - 1), 0).save(tmp_path / "small.png")
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "white.png")
    out = tmp_path / "out"
    if force:
        complete_to_folder(colour, picture, "top", SampleOptions(n=2), out)
    before = digest_of(tmp_path)
    options = {"image": "picture.png", "keep": "top", "candidates": 4, "n": 2, **BAD[case]}
    image, keep, candidates = tmp_path / options.pop("image"), options.pop("keep"), options.pop("candidates")
    keep = keep if keep == "top" else str(tmp_path / keep)
    refusal, message = REFUSAL[case]
    with pytest.raises(refusal, match=message):
        complete_to_folder(colour, image, keep, SampleOptions.of(**options), out, candidates=candidates, force=force)
    assert digest_of(tmp_path) == before
    assert out.exists() == force


def test_completions_are_replaced_completely_and_only_with_force(
    tmp_path: Path, colour: ImagePipeline, picture: Path
) -> None:
    out = tmp_path / "out"
    sample_to_folder(colour, SampleOptions(n=5), out)
    before = digest_of(out)
    with pytest.raises(InputError, match="or use --force"):
        complete_to_folder(colour, picture, "top", SampleOptions(n=2), out)
    assert digest_of(out) == before
    complete_to_folder(colour, picture, "top", SampleOptions(n=2), out, force=True)
    names = ["codes.npy", "complete.json", "grid.png", "images/00000.png", "images/00001.png"]
    assert sorted(digest_of(out)) == names
    sample_to_folder(colour, SampleOptions(n=1), out, force=True)
    assert sorted(digest_of(out)) == ["codes.npy", "grid.png", "images/00000.png", "sample.json"]
