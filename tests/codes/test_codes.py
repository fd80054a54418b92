"""Exporting codes: every grid is its own image's, with its label and name, in any shard, and numpy reads it alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.codes.manifest import code_dtype
from pipeline.errors import InputError
from pipeline.images.image_set import open_images
from pipeline.models.loading import load_tokenizer, load_trained_tokenizer
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior

from ..conftest import Trained
from ..support import (
    CELL,
    GRID,
    LEVELS,
    bits_of,
    brightness_tokenizer,
    cells_of,
    digest_of,
    draw_cells,
    fill_with_cells,
    save_tokenizer,
)


@pytest.fixture
def tokenizer(tmp_path: Path, grey_folder: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder)
    return tmp_path / "tokenizer"


# From images to codes


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("shard_size", [1, 4, 1000])
def test_every_row_is_of_its_own_image_with_its_label_and_name(
    tmp_path: Path, tokenizer: Path, grey_folder: Path, split: str, shard_size: int
) -> None:
    """C2 and C4: the codes of each file by an oracle that reads the file itself; the labels from the folder's name."""
    export_codes(tokenizer, tmp_path / "codes", split=split, shard_size=shard_size, device="cpu")
    dataset, images = CodeDataset(tmp_path / "codes"), open_images(str(grey_folder))
    names = list(dataset.names())
    assert names == sorted(names)
    assert names == list((images.train if split == "train" else images.test).names)
    assert dataset.manifest.class_names == sorted(path.name for path in grey_folder.iterdir())
    for name, (codes, label) in zip(names, dataset, strict=True):
        np.testing.assert_array_equal(codes, cells_of(grey_folder / name))
        assert dataset.manifest.class_names[label] == name.partition("/")[0]
    everything = {*images.train.names, *images.test.names}
    assert everything == {path.relative_to(grey_folder).as_posix() for path in grey_folder.rglob("*.png")}
    assert dataset.manifest.split == split


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0)])
def test_one_distinct_corner_lands_in_its_own_corner(tmp_path: Path, corner: tuple[int, int]) -> None:
    """C2: no transposition, no flattening, on a grid that is not square."""
    grid = np.full(GRID, 3)
    grid[corner] = 12
    for name in ("a.png", "b.png"):
        draw_cells(tmp_path / "images" / name, grid)
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), tmp_path / "images")
    export_codes(tmp_path / "tokenizer", tmp_path / "codes", device="cpu")
    codes, label = CodeDataset(tmp_path / "codes")[0]
    np.testing.assert_array_equal(codes, grid)
    assert label == -1


@pytest.mark.parametrize(
    ("num_codes", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32")]
)
def test_the_largest_code_survives(tmp_path: Path, num_codes: int, dtype: str) -> None:
    """C3, from the image to the item: a white cell is code K - 1."""
    white = np.full(GRID, LEVELS - 1)
    white[1, 2] = 0
    for name in ("a.png", "b.png"):
        draw_cells(tmp_path / "images" / name, white)
    model = brightness_tokenizer(num_codes)
    codebook = torch.arange(100.0, 100 + num_codes)[:, None]  # far from any brightness
    codebook[0], codebook[-1] = 0, 1
    model.quantizer.set_codebook(codebook)
    save_tokenizer(tmp_path / "tokenizer", model, tmp_path / "images")
    manifest = export_codes(tmp_path / "tokenizer", tmp_path / "codes", device="cpu")
    stored = np.load(tmp_path / "codes" / "codes-00000.npy", mmap_mode="r")
    assert (manifest.dtype, manifest.num_codes) == (dtype, num_codes)
    assert stored.dtype == np.dtype(dtype) == code_dtype(num_codes)
    codes, _ = CodeDataset(tmp_path / "codes")[0]
    assert codes.dtype == torch.int64
    np.testing.assert_array_equal(codes, np.where(white == 0, 0, num_codes - 1))


def test_five_images_are_enough_for_export_and_training(tmp_path: Path) -> None:
    """C5: export and a step of the prior."""
    images = fill_with_cells(tmp_path / "images", [f"{i}.png" for i in range(5)])
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    manifest = export_codes(tmp_path / "tokenizer", tmp_path / "codes", device="cpu")
    assert manifest.count + export_codes(tmp_path / "tokenizer", tmp_path / "t", split="test", device="cpu").count == 5
    overrides = {"codes": str(tmp_path / "codes"), "steps": 1, "channels": 2, "num_layers": 1, "precision": "fp32"}
    info = train_prior(RunFolder(out=tmp_path / "prior", device="cpu"), overrides, tmp_path / "tokenizer")
    assert info.config["num_classes"] == 0
    assert info.tokenizer_fingerprint == manifest.tokenizer_fingerprint


def test_the_export_is_what_encode_says_in_float32(trained: Trained) -> None:
    """D5: of a real network, and to the bit, so that other batch sizes change nothing."""
    model, images = load_tokenizer(trained.tokenizer), open_images(str(trained.images))
    dataset = CodeDataset(trained.codes)
    at_once = model.encode(images.train.batch(np.arange(len(images.train))))
    alone = torch.cat([model.encode(images.train.batch(np.array([i]))) for i in range(len(images.train))])
    exported = torch.stack([codes for codes, _ in dataset])
    assert torch.equal(exported, at_once)
    assert torch.equal(exported, alone)
    assert len(exported.unique()) > 1


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, trained: Trained) -> None:
    """C1: nothing random, whatever the state of the generators."""
    torch.manual_seed(1)
    export_codes(trained.tokenizer, tmp_path / "a", shard_size=4, device="cpu")
    torch.manual_seed(2)
    export_codes(trained.tokenizer, tmp_path / "b", shard_size=4, device="cpu")
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") == digest_of(trained.codes)


def test_exporting_leaves_the_tokenizer_as_it_is(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E5: in memory and on disk."""
    before, tokenizer = digest_of(trained.tokenizer), load_trained_tokenizer(trained.tokenizer, "cpu")
    bits, loaded = bits_of(tokenizer.model), []
    monkeypatch.setattr(
        "pipeline.codes.export.load_trained_tokenizer",
        lambda folder, device, decoder: loaded.append(folder) or tokenizer,
    )
    export_codes(trained.tokenizer, tmp_path / "codes", device="cpu")
    assert loaded == [trained.tokenizer]  # so the model compared is the one that encoded
    assert bits_of(tokenizer.model) == bits
    assert digest_of(trained.tokenizer) == before


# Reading


def test_numpy_alone_reads_it(trained: Trained) -> None:
    """The one line of the contract, and the hashes of the manifest."""
    manifest = json.loads((trained.codes / "manifest.json").read_text("utf-8"))
    grids, labels = [], []
    for i, shard in enumerate(manifest["shards"]):
        codes = np.load(trained.codes / f"codes-{i:05d}.npy", mmap_mode="r")
        assert isinstance(codes, np.memmap)
        assert codes.shape == (shard["count"], *manifest["grid"])
        assert codes.dtype == manifest["dtype"]
        assert int(codes.max()) < manifest["num_codes"]
        grids.append(codes)
        labels.append(np.load(trained.codes / f"labels-{i:05d}.npy", mmap_mode="r"))
        for name, digest in shard["files"].items():
            assert hashlib.sha256((trained.codes / name).read_bytes()).hexdigest() == digest
    dataset = CodeDataset(trained.codes)
    assert len(dataset) == manifest["count"] == sum(map(len, grids))
    assert [shard["count"] for shard in manifest["shards"]] == [4] * (len(dataset) // 4) + [len(dataset) % 4]
    np.testing.assert_array_equal(np.concatenate(grids), np.stack([codes for codes, _ in dataset]))
    np.testing.assert_array_equal(np.concatenate(labels), [label for _, label in dataset])
    np.testing.assert_array_equal(np.concatenate(labels), dataset.labels)


# What is refused


def test_codes_of_another_tokenizer(tmp_path: Path, tokenizer: Path, grey_folder: Path) -> None:
    """C6: with both fingerprints, and before anything is written or cleared."""
    codes = export_codes(tokenizer, tmp_path / "codes", device="cpu")
    other = save_tokenizer(tmp_path / "other", brightness_tokenizer(17), grey_folder)
    overrides = {"codes": str(tmp_path / "codes"), "tokenizer": str(tmp_path / "other"), "steps": 1, "channels": 2}
    with pytest.raises(InputError) as error:
        train_prior(RunFolder(out=tmp_path / "prior", device="cpu"), overrides, tmp_path / "none")
    assert codes.tokenizer_fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    assert digest_of(tmp_path / "prior") == {}


def test_resuming_with_codes_that_another_tokenizer_made_since(tmp_path: Path, grey_folder: Path) -> None:
    """C6 for --resume: the codes' folder and the tokenizer's hold other things than when the run was started."""
    tokenizer, codes, prior = (tmp_path / name for name in ("tokenizer", "codes", "prior"))
    overrides = {"codes": str(codes), "tokenizer": str(tokenizer), "channels": 2, "num_layers": 1, "precision": "fp32"}
    fingerprints = []
    for flipped in (False, True):
        model = brightness_tokenizer()
        if flipped:
            model.quantizer.set_codebook(model.quantizer.codebook.flip(0))
        fingerprints.append(save_tokenizer(tokenizer, model, grey_folder).fingerprint)
        export_codes(tokenizer, codes, device="cpu", force=True)
        if not flipped:
            train_prior(RunFolder(out=prior, device="cpu"), {**overrides, "steps": 1}, tokenizer)
    with pytest.raises(InputError) as error:
        train_prior(RunFolder(out=prior, device="cpu", resume=True), {**overrides, "steps": 2}, tokenizer)
    assert all(fingerprint in str(error.value) for fingerprint in fingerprints)


def test_images_of_another_size_are_brought_to_the_tokenizers(tmp_path: Path, tokenizer: Path) -> None:
    """The grid is the tokenizer's, whatever the size of the images."""
    for i in range(4):
        draw_cells(tmp_path / "large" / f"{i}.png", np.full((GRID[0] * 3, GRID[1] * 3), 2 + i))
    manifest = export_codes(tokenizer, tmp_path / "codes", data=str(tmp_path / "large"), device="cpu")
    assert manifest.grid == GRID
    for name, (codes, _) in zip(CodeDataset(tmp_path / "codes").names(), CodeDataset(tmp_path / "codes"), strict=True):
        assert codes.unique().tolist() == [2 + int(name[0])]
    assert manifest.image == {"height": GRID[0] * CELL, "width": GRID[1] * CELL, "channels": 1}
