"""`ImagePipeline`: labels, seeds and shapes of samples; reconstructions; and the sheets of `images/png.py`."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.decode import decode_codes
from pipeline.codes.export import export_codes
from pipeline.errors import InputError
from pipeline.evaluation.reconstruction_picture import reconstruct_to_file
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.generation.keep_mask import known_codes
from pipeline.images.image_set import open_images
from pipeline.images.png import GAP, above_and_below, enlarge, tile
from pipeline.images.preprocessing import to_float, to_uint8
from pipeline.models.inference import BLOCK
from prior import sample_codes
from tokenizer import VQVAE, Baseline

from ..conftest import Trained
from ..support import CELL, GRID, HEIGHT, LEVELS, WIDTH, brightness_baseline, brightness_tokenizer, save_tokenizer


@pytest.mark.parametrize("n", [1, 2, 7])
def test_shapes_dtypes_and_that_the_images_are_the_codes_decoded(unlabelled: ImagePipeline, n: int) -> None:
    images, codes = unlabelled.sample(n, seed=0)
    assert (images.dtype, codes.dtype) == (torch.uint8, torch.int64)
    assert (images.shape, codes.shape) == ((n, 1, HEIGHT, WIDTH), (n, *GRID))
    assert unlabelled.grid == GRID
    assert set(codes.unique().tolist()) <= set(range(LEVELS))
    expected = (codes * 17).repeat_interleave(CELL, dim=1).repeat_interleave(CELL, dim=2)[:, None]
    assert torch.equal(images.long(), expected)


def test_a_sample_does_not_depend_on_how_many_are_sampled_with_it(labelled: ImagePipeline) -> None:
    most = labelled.sample(9, labels=["ring"], seed=3)
    for n in (1, 2, 8):
        fewer = labelled.sample(n, labels=["ring"], seed=3)
        assert torch.equal(fewer.codes, most.codes[:n])
        assert torch.equal(fewer.images, most.images[:n])
    assert len(most.codes.flatten(1).unique(dim=0)) == 9  # and they differ


def test_the_seed_alone_decides(labelled: ImagePipeline) -> None:
    torch.manual_seed(1)
    first, state = labelled.sample(3, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(labelled.sample(3, seed=5).codes, first.codes)
    assert not torch.equal(labelled.sample(3, seed=6).codes, first.codes)
    assert not torch.equal(labelled.sample(3).codes, labelled.sample(3).codes)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is not used


def test_the_codes_are_those_of_sample_codes(labelled: ImagePipeline) -> None:
    parameters: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    labels = torch.tensor([1, 2, 1, 2])
    expected = sample_codes(
        labelled.prior, 4, GRID, labels=labels, generator=torch.Generator().manual_seed(8), **parameters
    )
    assert torch.equal(labelled.sample(4, labels=[1, 2], seed=8, **parameters).codes, expected)
    assert not torch.equal(labelled.sample(4, labels=[1, 2], seed=8).codes, expected)


def test_every_finished_row_is_reported(unlabelled: ImagePipeline) -> None:
    rows: list[int] = []
    unlabelled.sample(1, seed=0, on_row=rows.append)
    assert rows == list(range(1, GRID[0] + 1))


# Labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, [0, 1, 2, 0, 1]),  # all classes in turn
        ("ring", [1] * 5),
        (1, [1] * 5),
        (["ring"], [1] * 5),
        (["1"], [1] * 5),  # no class of that name, so it is an index
        (["2"], [0] * 5),  # the name of class 0
        ([2], [2] * 5),  # the index
        (["0"], [2] * 5),
        ([0], [0] * 5),
        (["0", 0], [2, 0, 2, 0, 2]),
        (("ring", "2", 2), [1, 0, 2, 1, 0]),  # mixed, in turn
        (["2"] * 7, [0] * 5),  # more than n
        (torch.tensor([2, 0]), [2, 0, 2, 0, 2]),
        (np.array([2, 0]), [2, 0, 2, 0, 2]),
    ],
)
def test_labels_by_name_and_by_index(labelled: ImagePipeline, labels: Any, expected: list[int]) -> None:
    found = labelled.labels_for(5, labels)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_the_label_reaches_the_prior(labelled: ImagePipeline) -> None:
    by_name, by_index = labelled.sample(6, labels="2", seed=0), labelled.sample(6, labels=0, seed=0)
    assert torch.equal(by_name.codes, by_index.codes)
    assert not torch.equal(labelled.sample(6, labels=2, seed=0).codes, by_index.codes)
    in_turn = labelled.sample(6, seed=0).codes
    assert torch.equal(in_turn[::3], by_index.codes[::3])


@pytest.mark.parametrize("label", ["nosuch", "3", 3, -1, "-1", "", "1.5", "Ring"])
def test_an_unknown_label_lists_the_known_ones(labelled: ImagePipeline, label: str | int) -> None:
    with pytest.raises(InputError) as error:
        labelled.sample(2, labels=["ring", label])
    message = "expected a class name (2, ring, 0) or an index from 0 to 2, got the label {}; choose one of them"
    assert str(error.value) == message.format(label)


def test_an_empty_list_of_labels_is_refused(labelled: ImagePipeline) -> None:
    with pytest.raises(InputError, match="expected at least one label, got none; "):
        labelled.sample(2, labels=[])


@pytest.mark.parametrize("labels", ["ring", 0, [1], ["0", 1], torch.tensor([0])])
def test_a_label_for_a_prior_without_classes(unlabelled: ImagePipeline, labels: Any) -> None:
    with pytest.raises(InputError, match="expected no label, because this prior was trained without them"):
        unlabelled.sample(2, labels=labels)
    assert unlabelled.labels_for(2, None) is None
    assert unlabelled.class_names == []


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_options_out_of_range(unlabelled: ImagePipeline, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        unlabelled.sample(1, **wrong)
    with pytest.raises(ValueError, match="at least 1"):
        unlabelled.sample(0)


# Which checkpoints belong together


def test_a_prior_of_another_tokenizer(tmp_path: Path, labelled: ImagePipeline) -> None:
    """C6: with both fingerprints."""
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer(17)).fingerprint
    with pytest.raises(InputError) as error:
        ImagePipeline.from_pretrained(tmp_path / "other", tmp_path / "prior", device="cpu")
    assert other in str(error.value)
    assert labelled.tokenizer_info.fingerprint in str(error.value)
    assert other != labelled.tokenizer_info.fingerprint


def test_the_two_folders_swapped(tmp_path: Path, labelled: ImagePipeline) -> None:
    with pytest.raises(InputError, match=r"expected a tokenizer checkpoint in .*, got a prior checkpoint"):
        ImagePipeline.from_pretrained(tmp_path / "prior", tmp_path / "tokenizer", device="cpu")


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "cpu:x"])
def test_a_missing_device(tmp_path: Path, labelled: ImagePipeline, device: str) -> None:
    with pytest.raises(InputError, match="device"):
        ImagePipeline.from_pretrained(tmp_path / "tokenizer", tmp_path / "prior", device=device)


# Reconstruction


def test_reconstruct_is_decode_of_encode(trained: Trained) -> None:
    pipeline = ImagePipeline.from_pretrained(trained.tokenizer, trained.prior, device="cpu")
    torch.manual_seed(0)
    images = torch.randint(256, (5, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    floats = images.float() / 255
    expected = to_uint8(pipeline.tokenizer.decode(pipeline.tokenizer.encode(floats)))
    assert torch.equal(pipeline.reconstruct(images), expected)
    assert torch.equal(pipeline.reconstruct(floats), expected)
    assert expected.shape == images.shape
    assert torch.equal(torch.cat([pipeline.reconstruct(image[None]) for image in images]), expected)


def test_what_the_tokenizer_knows_exactly_comes_back_exactly(unlabelled: ImagePipeline) -> None:
    images, codes = unlabelled.sample(3, seed=0)
    assert torch.equal(unlabelled.reconstruct(images), images)
    assert torch.equal(unlabelled.decode(codes), images)


def test_many_are_decoded_in_parts(unlabelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """P17: the last block is padded, and not even one image is another for it; none are none."""
    codes, decode, sizes = torch.randint(LEVELS, (7, *GRID)), VQVAE.decode, []
    images = unlabelled.decode(codes)
    monkeypatch.setattr("pipeline.models.inference.BLOCK", 3)
    monkeypatch.setattr(VQVAE, "decode", lambda model, batch: sizes.append(len(batch)) or decode(model, batch))
    assert torch.equal(unlabelled.decode(codes), images)
    assert sizes == [3, 3, 3]
    assert unlabelled.decode(codes[:0]).shape == (0, 1, HEIGHT, WIDTH)
    assert torch.equal(unlabelled.reconstruct(images), images)


def test_no_more_than_a_block_of_images_is_in_floats(
    unlabelled: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats of all images would be four times the memory of the images."""
    images, sizes = torch.zeros(BLOCK + 6, 1, HEIGHT, WIDTH, dtype=torch.uint8), list[int]()
    monkeypatch.setattr("pipeline.models.inference.to_float", lambda part: sizes.append(len(part)) or to_float(part))
    assert torch.equal(unlabelled.reconstruct(images), images)
    assert sorted(sizes) == [6, BLOCK]


@pytest.fixture
def _networks_that_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As convolutions do in the last bit, and here so that everybody sees it."""
    encode, decode = VQVAE.encode, VQVAE.decode
    monkeypatch.setattr(VQVAE, "encode", lambda model, images: (encode(model, images) + len(images)) % LEVELS)
    monkeypatch.setattr(VQVAE, "decode", lambda model, codes: (decode(model, codes) + len(codes) / 255) % 1)


@pytest.mark.usefixtures("_networks_that_depend_on_the_batch")
@pytest.mark.parametrize("n", [1, 3, 70])
def test_a_sample_is_decoded_alone_as_among_many(colour: ImagePipeline, n: int) -> None:
    codes = torch.randint(LEVELS, (n, *colour.grid), generator=torch.Generator().manual_seed(n))
    images = colour.decode(codes)
    assert torch.equal(images, torch.cat([colour.decode(codes[i : i + 1]) for i in range(n)]))


@pytest.mark.usefixtures("_networks_that_depend_on_the_batch")
def test_samples_and_completions_see_what_the_commands_for_codes_write(
    tmp_path: Path, trained: Trained, colour: ImagePipeline
) -> None:
    """`decode` gives the bytes of decode-codes; a completion that keeps all sees the codes of export-codes."""
    export_codes(trained.tokenizer, tmp_path / "codes", device="cpu")
    decode_codes(tmp_path / "codes", trained.tokenizer, tmp_path / "decoded.npy", device="cpu")
    count = len(CodeDataset(tmp_path / "codes"))
    codes = CodeDataset(tmp_path / "codes").batch(np.arange(count))[0]
    decoded = np.load(tmp_path / "decoded.npy", allow_pickle=False)
    np.testing.assert_array_equal(colour.decode(codes).numpy(), decoded)
    images = open_images(str(trained.images)).train.batch(np.arange(count))
    for start in (0, count - 1):
        keep = torch.ones(count - start, HEIGHT, WIDTH, dtype=torch.bool)
        assert torch.equal(known_codes(colour.tokenizer, images[start:], keep), codes[start:])
        np.testing.assert_array_equal(colour.decode(codes[start:]).numpy(), decoded[start:])


@pytest.mark.parametrize(
    "model", [brightness_tokenizer(), brightness_baseline("vae"), brightness_baseline("ae")], ids=["vq", "vae", "ae"]
)
def test_the_picture_of_reconstructions(tmp_path: Path, grey_folder: Path, model: VQVAE | Baseline) -> None:
    """Originals above reconstructions: of a perfect model, every second row repeats the one above."""
    save_tokenizer(tmp_path / "tokenizer", model, grey_folder)
    path = reconstruct_to_file(tmp_path / "tokenizer", tmp_path / "r.png", split="train", n=10, device="cpu")
    times = round(64 / WIDTH)
    picture = np.asarray(Image.open(path))[::times, ::times]
    rows = [picture[top : top + HEIGHT] for top in range(GAP, picture.shape[0], HEIGHT + GAP)]
    assert len(rows) == 4  # ten images in rows of eight, twice
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])
    assert not np.array_equal(rows[0], rows[2])


def test_a_note_says_that_there_are_fewer_images_than_requested(
    tmp_path: Path, grey_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder)
    reconstruct_to_file(tmp_path / "tokenizer", tmp_path / "r.png", n=100, device="cpu")
    assert "images, fewer than --n 100" in capsys.readouterr().err


# Contact sheets


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (6, 3), (7, 2)])
def test_a_contact_sheet_pixel_by_pixel(count: int, columns: int) -> None:
    images = torch.randint(200, (count, 3, 2, 5), dtype=torch.uint8)
    sheet = tile(images, columns)
    rows = -(-count // columns)
    assert sheet.shape == (3, rows * (2 + GAP) + GAP, columns * (5 + GAP) + GAP)
    expected = np.full(sheet.shape, 255)
    for i, y, x in itertools.product(range(count), range(2), range(5)):
        expected[:, GAP + (i // columns) * (2 + GAP) + y, GAP + (i % columns) * (5 + GAP) + x] = images[i, :, y, x]
    np.testing.assert_array_equal(sheet, expected)


def test_enlarging_repeats_pixels() -> None:
    sheet = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(enlarge(sheet, 32)[0], np.kron(sheet[0], np.ones((2, 2))))
    assert torch.equal(enlarge(sheet, 500), sheet)


def test_originals_are_above_in_every_row_also_the_last_short_one() -> None:
    originals = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    mixed = above_and_below(originals, originals + 10, columns=3).flatten().tolist()
    assert mixed == [0, 1, 2, 10, 11, 12, 3, 4, 255, 13, 14, 255]
