"""Reading code data sets: every row from its shard, mapped and not read, of one folder or several; and damaged ones."""

import logging
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.codes import hashes
from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.codes.manifest import CodeManifest, ShardEntry, code_dtype, read_manifest, shard_files, write_manifest
from pipeline.codes.shard import write_shard
from pipeline.errors import InputError
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior

from ..conftest import Codegrid, Trained
from ..support import GRID, LEVELS, brightness_tokenizer, digest_of, save_tokenizer

SMALL_PRIOR = {"steps": 1, "channels": 2, "num_layers": 1, "precision": "fp32"}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def manifest_of(shards: list[ShardEntry], **fields: Any) -> CodeManifest:
    chosen = {
        "count": sum(shard.count for shard in shards),
        "num_codes": LEVELS,
        "grid": GRID,
        "class_names": [],
        "split": "train",
        "source": "nowhere",
        "image": {"height": 8, "width": 12, "channels": 1},
        "tokenizer_fingerprint": "0" * 64,
        **fields,
    }
    return CodeManifest(shards=shards, dtype=code_dtype(chosen["num_codes"]).name, **chosen)


def write_data(folder: Path, shards: Sequence[np.ndarray], labels: Sequence[int] | None = None, **fields: Any) -> Path:
    """Write a data set of these grids; the name of row i is "i", its label too unless `labels` are passed."""
    ends = np.cumsum([0, *map(len, shards)])
    all_labels = np.arange(ends[-1]) if labels is None else np.array(labels)
    entries = []
    for i, codes in enumerate(shards):
        rows = range(ends[i], ends[i + 1])
        entries.append(write_shard(folder, i, codes, all_labels[rows], [str(row) for row in rows], start=rows.start))
    write_manifest(folder, manifest_of(entries, grid=shards[0].shape[1:], **fields))
    return folder


def random_shards(*counts: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, LEVELS, (count, *GRID)).astype(np.uint8) for count in counts]


def write_zeros(folder: Path, counts: Sequence[int], grid: tuple[int, int], num_codes: int) -> Path:
    """Write a data set of sparse files, which take no room on the disk; without names and right hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, count in enumerate(counts):
        files = shard_files(i)
        np.lib.format.open_memmap(folder / files[0], "w+", code_dtype(num_codes), (count, *grid))
        np.lib.format.open_memmap(folder / files[1], "w+", np.int64, (count,))
        entries.append(ShardEntry(sum(counts[:i]), count, dict.fromkeys(files, "")))
    write_manifest(folder, manifest_of(entries, grid=grid, num_codes=num_codes))
    return folder


def kilobytes(name: str) -> int:
    """Return the memory of this process that is in use: "RssAnon", its own, or "RssFile", pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# Rows


@pytest.mark.parametrize("counts", [(1,), (3, 1, 4), (2, 2, 2)])
def test_items_batches_and_the_arrays_agree(tmp_path: Path, counts: tuple[int, ...]) -> None:
    shards = random_shards(*counts)
    dataset, expected = CodeDataset(write_data(tmp_path, shards)), np.concatenate(shards)
    assert len(dataset) == len(expected) == dataset.manifest.count
    for i in range(-len(expected), len(expected)):
        codes, label = dataset[i]
        assert codes.dtype == torch.int64
        assert isinstance(label, int)
        np.testing.assert_array_equal(codes, expected[i])
        assert label == i % len(expected)
    codes, labels = dataset.batch(np.arange(len(expected)))
    assert codes.dtype == labels.dtype == torch.int64
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(labels, dataset.labels)
    assert list(dataset.names()) == [str(i) for i in range(len(expected))]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_is_its_rows_one_after_the_other(tmp_path: Path, seed: int) -> None:
    """By a loop over the rows, for random shards and all manners of indices."""
    random = np.random.default_rng(seed)
    shards = random_shards(*random.integers(1, 6, random.integers(1, 8)), seed=seed)
    dataset, rows = CodeDataset(write_data(tmp_path, shards)), np.concatenate(shards)
    count = len(rows)
    subset = random.integers(-count, count, 30)
    for indices in (subset, subset[:1], np.sort(subset), np.sort(subset)[::-1], np.repeat(subset[:3], 4), subset[:0]):
        expected = [rows[index] for index in indices]
        codes, labels = dataset.batch(indices)
        assert codes.shape == (len(indices), *GRID)
        np.testing.assert_array_equal(codes, np.reshape(expected, codes.shape))
        assert labels.tolist() == [index % count for index in indices]
        items = dataset.__getitems__(indices.tolist())
        assert [label for _, label in items] == labels.tolist()
        assert all(torch.equal(item, row) for (item, _), row in zip(items, codes, strict=True))


def test_indices_of_a_small_type(tmp_path: Path) -> None:
    """A data set may be longer than the numbers of the type go."""
    dataset = CodeDataset(write_data(tmp_path, random_shards(150, 150)))
    for dtype in (np.uint8, np.int8, np.int32):
        indices = np.array([3, 127, 0], dtype=dtype)
        assert dataset.batch(indices)[1].tolist() == [3, 127, 0]
        assert dataset[indices[1]][1] == 127


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    dataset = CodeDataset(write_data(tmp_path, random_shards(3, 2)))
    for index in (5, -6, 100):
        with pytest.raises(IndexError, match="from -5 to 4"):
            dataset[index]
        with pytest.raises(IndexError, match="from -5 to 4"):
            dataset.batch(np.array([0, index]))


def test_what_is_read_is_a_copy_and_the_arrays_are_read_only(tmp_path: Path) -> None:
    dataset = CodeDataset(write_data(tmp_path, random_shards(2)))
    files, first = digest_of(tmp_path), dataset[0][0].clone()
    dataset[0][0].fill_(9)
    dataset.batch(np.array([0]))[0].fill_(9)
    for shard in dataset.shards():
        for array in (shard.codes, shard.labels):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 9
    assert torch.equal(dataset[0][0], first)
    assert digest_of(tmp_path) == files


@pytest.mark.parametrize("num_codes", [256, 257, 65_536, 65_537])
def test_the_largest_code_of_every_type_survives(tmp_path: Path, num_codes: int) -> None:
    """C3, also through a batch over two folders."""
    grids = np.array([[[0, num_codes - 1, 1]], [[num_codes - 1, 0, num_codes - 2]]]).astype(code_dtype(num_codes))
    for name in ("a", "b"):
        write_data(tmp_path / name, [grids], num_codes=num_codes)
    dataset = CodeDataset([tmp_path / "a", tmp_path / "b"])
    expected = grids.astype(np.int64)[[1, 0, 0]]
    np.testing.assert_array_equal(dataset.batch(np.array([3, 0, 2]))[0], expected)
    np.testing.assert_array_equal(dataset[3][0], expected[0])


# Other processes


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_a_loader_of_torch_gives_the_same_rows_from_other_processes(tmp_path: Path, method: str | None) -> None:
    """In any order, over two folders."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("not safe there")
    for seed, name in enumerate(("a", "b")):
        write_data(tmp_path / name, random_shards(3, 4, seed=seed))
    dataset = CodeDataset([tmp_path / "a", tmp_path / "b"])
    order = np.random.default_rng(0).permutation(14).tolist()
    workers = {} if method is None else {"num_workers": 2, "multiprocessing_context": method}
    batches = list(DataLoader(dataset, batch_size=4, sampler=order, **workers))
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 2]
    codes, labels = dataset.batch(np.array(order))
    assert torch.equal(torch.cat([codes for codes, _ in batches]), codes)
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)


def test_a_copy_travels_without_the_arrays(tmp_path: Path) -> None:
    dataset = CodeDataset(write_zeros(tmp_path, [20_000, 20_000], GRID, LEVELS), verify=False)
    content = pickle.dumps(dataset)
    assert len(content) < 10_000
    copy = pickle.loads(content)
    assert len(copy) == len(dataset)
    assert torch.equal(copy[-1][0], dataset[-1][0])
    if sys.platform == "linux":
        assert Path("/proc/self/maps").read_text().count(str(tmp_path / "codes-00001.npy")) == 2


@linux_only
def test_an_epoch_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """The 48 MiB of the data set are pages of the files, which the system may drop and all processes share."""
    dataset = CodeDataset(write_zeros(tmp_path, [16_384] * 12, (16, 16), LEVELS), verify=False)
    order = np.random.default_rng(0).permutation(len(dataset)).reshape(-1, 512)
    dataset.batch(order[0])
    own, mapped = kilobytes("RssAnon"), kilobytes("RssFile")
    for indices in order:
        dataset.batch(indices)
    for index in order[0]:
        _ = dataset[index]
    assert kilobytes("RssAnon") - own < 12_000
    assert kilobytes("RssFile") - mapped > 12_000  # so the measure sees what was read


@linux_only
def test_opening_ten_million_grids_reads_none_of_them(tmp_path: Path) -> None:
    own, mapped = kilobytes("RssAnon"), kilobytes("RssFile")
    dataset = CodeDataset(write_zeros(tmp_path, [2_500_000] * 4, (8, 8), 1024), verify=False)
    assert kilobytes("RssAnon") - own < 12_000
    assert kilobytes("RssFile") - mapped < 12_000
    assert len(dataset) == 10_000_000
    assert not dataset[-1][0].any()


@linux_only
def test_no_file_stays_open(tmp_path: Path) -> None:
    write_zeros(tmp_path, [1] * 300, GRID, LEVELS)
    before = len(os.listdir("/proc/self/fd"))
    dataset = CodeDataset(tmp_path, verify=False)
    dataset.batch(np.arange(300))
    assert len(os.listdir("/proc/self/fd")) == before


# Several folders


def test_the_rows_of_several_folders_follow_each_other(tmp_path: Path) -> None:
    shards = {"a": random_shards(3, 2, seed=1), "b": random_shards(4, seed=2), "c": random_shards(1, 1, seed=3)}
    for name, split in zip(shards, ("train", "test", "train"), strict=True):
        write_data(
            tmp_path / name, shards[name], split=split, statistics={"perplexity": 2.0}, made_with={"torch": name}
        )
    separate = [CodeDataset(tmp_path / name) for name in shards]
    joined = CodeDataset([tmp_path / name for name in shards])
    assert len(joined) == joined.manifest.count == joined.manifest.total == 11
    assert joined.manifest.split == "train+test"
    assert joined.manifest.statistics == joined.manifest.made_with == {}
    rows = np.concatenate([shard for name in shards for shard in shards[name]])
    labels = np.concatenate([dataset.labels for dataset in separate])
    for i in range(-11, 11):
        np.testing.assert_array_equal(joined[i][0], rows[i])
        assert joined[i][1] == labels[i]
    np.testing.assert_array_equal(joined.batch(np.arange(11))[0], rows)
    np.testing.assert_array_equal(joined.labels, labels)
    assert list(joined.names()) == [name for dataset in separate for name in dataset.names()]
    np.testing.assert_array_equal(np.concatenate([shard.codes for shard in joined.shards()]), rows)


def test_one_folder_in_a_list_is_that_folder_and_one_twice_is_twice_its_rows(tmp_path: Path) -> None:
    alone, listed = CodeDataset(write_data(tmp_path, random_shards(3, 2), flips=True)), CodeDataset([str(tmp_path)])
    assert listed.manifest == alone.manifest
    assert torch.equal(listed.batch(np.arange(5))[0], alone.batch(np.arange(5))[0])
    twice = CodeDataset([tmp_path, tmp_path])
    assert torch.equal(twice.batch(np.arange(10))[0], alone.batch(np.arange(10) % 5)[0])


def test_no_folder_at_all() -> None:
    with pytest.raises(InputError, match="expected at least one folder of codes, got none"):
        CodeDataset([])


@pytest.mark.parametrize(
    ("field", "first", "other"),
    [
        ("tokenizer_fingerprint", "a" * 64, "b" * 64),
        ("num_codes", 16, 17),
        ("class_names", ["cat", "dog"], ["dog", "cat"]),
        ("image", {"height": 8, "width": 12, "channels": 1}, {"height": 8, "width": 12, "channels": 3}),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path: Path, field: str, first: Any, other: Any) -> None:
    for name, value in (("a", first), ("same", first), ("b", other)):
        write_data(tmp_path / name, random_shards(2), **{field: value})
    check_refused(tmp_path, f"the same {field.replace('_', ' ')}", first, other)


def test_folders_of_other_grids(tmp_path: Path) -> None:
    for name, grid in (("a", (4, 6)), ("same", (4, 6)), ("b", (6, 4))):
        write_data(tmp_path / name, [np.zeros((2, *grid), dtype=np.uint8)])
    check_refused(tmp_path, "the same grid", (4, 6), (6, 4))


def check_refused(folder: Path, expected: str, *values: Any) -> None:
    with pytest.raises(InputError) as error:
        CodeDataset([folder / "a", folder / "same", folder / "b"])
    line = str(error.value)
    assert "\n" not in line
    assert expected in line
    assert all(str(value) in line for value in (folder / "a", folder / "b", *values))


# Unfinished


def test_the_rows_that_an_unfinished_data_set_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also with a shard missing in the middle; the warning names the folder, once, and no finished one."""
    shards = random_shards(4, 4, 4)
    write_data(tmp_path / "complete", shards)
    manifest = read_manifest(write_data(tmp_path / "unfinished", shards))
    write_manifest(
        tmp_path / "unfinished", manifest_of([manifest.shards[0], manifest.shards[2]], total=12, shard_size=4, count=8)
    )
    with caplog.at_level(logging.WARNING):
        CodeDataset(tmp_path / "complete")
        assert caplog.messages == []
        dataset = CodeDataset([tmp_path / "complete", tmp_path / "unfinished"])
        pickle.loads(pickle.dumps(dataset))
    (message,) = caplog.messages
    assert f"{tmp_path / 'unfinished'} holds 8 of 12 grids" in message
    assert dataset.labels.tolist() == [*range(12), 0, 1, 2, 3, 8, 9, 10, 11]
    np.testing.assert_array_equal(dataset.batch(np.arange(12, 20))[0], np.concatenate([shards[0], shards[2]]))
    assert not dataset.manifest.complete


def test_a_data_set_just_begun_has_no_rows(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of([], total=12))
    dataset = CodeDataset(tmp_path)
    assert (len(dataset), len(dataset.labels), list(dataset.names())) == (0, 0, [])
    assert dataset.batch(np.arange(0))[0].shape == (0, *GRID)
    with pytest.raises(IndexError, match=r"expected an index .*, got 0"):
        dataset[0]


# Training on them


def train_on(folder: Path, out: Path) -> Any:
    return train_prior(RunFolder(out=out, device="cpu"), {"codes": str(folder), **SMALL_PRIOR}, out.parent / "none")


@pytest.mark.parametrize("total", [0, 12])
def test_a_prior_is_not_trained_on_codes_that_are_missing(tmp_path: Path, total: int) -> None:
    expected = {0: "at least one grid in .*, got none; export", 12: "all 12 grids in .*, got 0; run the export-codes"}
    (tmp_path / "codes").mkdir()
    write_manifest(tmp_path / "codes", manifest_of([], total=total))
    with pytest.raises(InputError, match=expected[total]):
        train_on(tmp_path / "codes", tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


def test_a_label_beyond_the_classes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_data(tmp_path / "codes", random_shards(2, 2), labels=[0, 1, 2, 0], class_names=["cat", "dog"])
    with pytest.raises(InputError, match=r"labels below 2, .*, got 2; .*verify-codes"):
        train_on(tmp_path / "codes", tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


def test_a_prior_learns_from_several_folders_and_resumes_with_them(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    for split in ("train", "test"):
        export_codes(trained.tokenizer, tmp_path / split, split=split, device="cpu")
    both = ["--codes", tmp_path / "train", "--codes", tmp_path / "test"]
    command = ["train-prior", "--out", tmp_path / "prior", "--tokenizer", trained.tokenizer, "--device", "cpu"]
    small = ["--channels", 2, "--num-layers", 1, "--precision", "fp32"]
    outcome = codegrid(*command, *both, *small, "--steps", 1)
    assert outcome.status == 0, outcome.err
    total = len(CodeDataset([tmp_path / "train", tmp_path / "test"]))
    assert f"\n{total} grids = " in outcome.out
    assert codegrid(*command, *both, "--steps", 2, "--resume").status == 0
    outcome = codegrid(*command, *both[:2], "--steps", 3, "--resume")
    assert outcome.status == 1
    assert "as the run was started" in outcome.err


@pytest.mark.parametrize(
    ("labels", "classes"), [([0], 2), ([1, 1], 2), ([1, 1, 1], 2), ([0, -1, 1], 0), ([-1, -1, -1], 0)]
)
def test_the_fewest_rows_with_labels_and_without(tmp_path: Path, labels: list[int], classes: int) -> None:
    """Labels count only if every row has one."""
    write_data(tmp_path / "codes", random_shards(len(labels)), labels=labels, class_names=["cat", "dog"])
    info = train_on(tmp_path / "codes", tmp_path / "prior")
    assert info.step == 1
    assert info.config["num_classes"] == classes == len(info.class_names)


@pytest.fixture
def killed(tmp_path: Path, grey_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of train-prior without --codes, killed while it exported the third shard."""
    monkeypatch.setattr("pipeline.training.train_prior.export_codes", partial(export_codes, shard_size=4))
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder)

    def dying(folder: Path, index: int, *rest: Any, **options: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return write_shard(folder, index, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.codes.writer.write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            train_on_own_images(tmp_path)
    assert not read_manifest(tmp_path / "prior" / "codes").complete
    return tmp_path


def train_on_own_images(folder: Path, **options: bool) -> None:
    train_prior(RunFolder(out=folder / "prior", device="cpu", **options), SMALL_PRIOR, folder / "tokenizer")


def test_resume_finishes_an_export_of_its_own(killed: Path) -> None:
    first = killed / "prior" / "codes" / "codes-00000.npy"
    before = first.stat().st_mtime_ns
    train_on_own_images(killed, resume=True)
    assert first.stat().st_mtime_ns == before
    export_codes(killed / "tokenizer", killed / "undisturbed", shard_size=4, device="cpu")
    assert digest_of(killed / "prior" / "codes") == digest_of(killed / "undisturbed")


def test_the_same_command_continues_a_run_that_was_stopped_in_its_export(killed: Path) -> None:
    """Nothing else is in its folder, and so nothing of anybody is replaced; with anything else it is refused."""
    first = killed / "prior" / "codes" / "codes-00000.npy"
    before = first.stat().st_mtime_ns
    (killed / "prior" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        train_on_own_images(killed)
    (killed / "prior" / "notes.txt").unlink()
    train_on_own_images(killed)
    assert first.stat().st_mtime_ns == before
    assert read_manifest(killed / "prior" / "codes").complete


def test_force_replaces_a_damaged_manifest_in_a_run(killed: Path) -> None:
    (killed / "prior" / "codes" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="expected the manifest"):
        train_on_own_images(killed, resume=True)
    train_on_own_images(killed, force=True)
    assert read_manifest(killed / "prior" / "codes").complete


def test_force_starts_an_unfinished_export_anew(killed: Path) -> None:
    """As --resume advises when it cannot resume it, because another version began it."""
    codes = killed / "prior" / "codes"
    manifest = read_manifest(codes)
    write_manifest(codes, replace(manifest, made_with={**manifest.made_with, "torch": "0.1"}))
    with pytest.raises(InputError, match="use --force"):
        train_on_own_images(killed, resume=True)
    train_on_own_images(killed, force=True)
    assert read_manifest(codes).complete


# Damage


@pytest.mark.parametrize(("num_codes", "wrong"), [(16, 16), (16, 255), (257, 300), (65_537, 65_537), (65_537, -1)])
def test_a_code_out_of_range_is_reported_when_it_is_read(tmp_path: Path, num_codes: int, wrong: int) -> None:
    grids = np.full((5, *GRID), num_codes - 1, dtype=code_dtype(num_codes))
    grids[3, 1, 2] = wrong
    dataset = CodeDataset(write_data(tmp_path, [grids[:2], grids[2:]], num_codes=num_codes))
    assert dataset.batch(np.array([0, 1, 2, 4]))[0].min() == num_codes - 1
    line = f"expected codes from 0 to {num_codes - 1} in {tmp_path}, got {wrong}; .*verify-codes"
    with pytest.raises(InputError, match=line):
        dataset[3]
    with pytest.raises(InputError, match=line):
        dataset.batch(np.array([4, 3]))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed, as they are."""
    names: list[str] = []
    real = hashes.sha256_of
    monkeypatch.setattr(hashes, "sha256_of", lambda path: names.append(path.name) or real(path))
    return names


ARRAYS = [f"{stem}-{index:05d}.npy" for index in range(3) for stem in ("codes", "labels")]


def change_the_last_byte(path: Path) -> None:
    """So that header, size and range are right."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["codes-00001.npy", "labels-00001.npy"])
def test_another_byte_is_named_before_a_row_of_its_shard_is_used(tmp_path: Path, name: str) -> None:
    shards = random_shards(3, 2, 4)
    change_the_last_byte(write_data(tmp_path, shards) / name)
    dataset = CodeDataset(tmp_path)
    np.testing.assert_array_equal(dataset.batch(np.array([0, 2, 5, 8]))[0], np.concatenate(shards)[[0, 2, 5, 8]])
    line = rf"expected .*{name} as its manifest says, got a file that has other bytes .*verify-codes, and export"
    for _ in range(2):
        for use in (
            lambda: dataset[3],
            lambda: dataset.batch(np.array([0, 4])),
            lambda: dataset.__getitems__([4]),
            lambda: list(dataset.shards()),
            dataset.check_files,
        ):
            with pytest.raises(InputError, match=line):
                use()
    if name.startswith("labels"):
        with pytest.raises(InputError, match=line):
            _ = dataset.labels
    else:
        assert dataset.labels.tolist() == [*range(9)]


def test_nothing_is_compared_if_it_is_not_wanted(tmp_path: Path, hashed: list[str]) -> None:
    shards = random_shards(3)
    change_the_last_byte(write_data(tmp_path, shards) / "codes-00000.npy")
    dataset = CodeDataset(tmp_path, verify=False)
    dataset.check_files()
    shards[0][2, -1, -1] ^= 1
    np.testing.assert_array_equal(dataset.batch(np.arange(3))[0], shards[0])
    assert hashed == []


def test_each_file_is_read_once_and_only_when_it_is_needed(tmp_path: Path, hashed: list[str]) -> None:
    dataset = CodeDataset(write_data(tmp_path, random_shards(3, 2, 4)))
    assert hashed == []
    _ = dataset.batch(np.array([3, 4])), dataset[3], dataset[4]
    assert hashed == ARRAYS[2:4]
    dataset.check_files()
    assert hashed == [*ARRAYS[2:4], *ARRAYS[:2], *ARRAYS[4:]]
    dataset.check_files()
    _ = dataset.batch(np.arange(9)), dataset.labels, list(dataset.shards())
    assert len(hashed) == 6


def test_a_folder_that_is_named_twice_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    write_data(tmp_path, random_shards(3, 2, 4))
    CodeDataset([tmp_path, tmp_path]).check_files()
    assert hashed == ARRAYS


def test_copies_of_a_checked_data_set_do_not_check_again(tmp_path: Path, hashed: list[str]) -> None:
    dataset = CodeDataset(write_data(tmp_path, random_shards(3, 2, 4)))
    unchecked = pickle.loads(pickle.dumps(dataset))
    dataset.check_files()
    hashed.clear()
    pickle.loads(pickle.dumps(dataset)).batch(np.arange(9))
    assert hashed == []
    unchecked.batch(np.arange(9))
    assert hashed == ARRAYS


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_report_damage_unless_it_was_checked_before_they_started(tmp_path: Path, method: str) -> None:
    if method == "fork" and sys.platform != "linux":
        pytest.skip("not safe there")
    dataset = CodeDataset(write_data(tmp_path, random_shards(3)))
    loaders = {"num_workers": 1, "multiprocessing_context": method}
    checked = pickle.loads(pickle.dumps(dataset))
    checked.check_files()
    change_the_last_byte(tmp_path / "codes-00000.npy")
    assert len(list(DataLoader(checked, **loaders))) == 3
    with pytest.raises(RuntimeError, match=r"Caught InputError [\s\S]*codes-00000.npy as its manifest says"):
        next(iter(DataLoader(dataset, **loaders)))


@pytest.mark.parametrize("name", ["codes-00001.npy", "labels-00000.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "longer", "text", "another shape", "pickled"])
def test_a_missing_or_corrupt_shard(tmp_path: Path, name: str, damage: str) -> None:
    path = write_data(tmp_path, random_shards(3, 2)) / name
    if damage == "missing":
        path.unlink()
    elif damage == "another shape":
        np.save(path, np.zeros((3, 6, 4), dtype=np.uint8))
    elif damage == "pickled":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        intact = path.read_bytes()
        content = {"empty": b"", "cut short": intact[:-1], "longer": intact + b"0", "text": b"no array"}[damage]
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*; export the codes again") as error:
        CodeDataset(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels", [np.zeros(3, np.int32), np.zeros(3, np.float64), np.zeros(2, np.int64), np.zeros((3, 1), np.int64)]
)
def test_labels_of_another_type_or_number(tmp_path: Path, labels: np.ndarray) -> None:
    write_data(tmp_path, random_shards(3))
    np.save(tmp_path / "labels-00000.npy", labels)
    with pytest.raises(InputError, match=r"expected int64 of the shape \[3\] in .*labels-00000.npy, got"):
        CodeDataset(tmp_path)


def test_codes_column_by_column(tmp_path: Path) -> None:
    """Which the header tells; the bytes in rows would be other grids."""
    write_data(tmp_path, random_shards(3))
    np.save(tmp_path / "codes-00000.npy", np.asfortranarray(random_shards(3)[0]))
    with pytest.raises(InputError, match=r"expected uint8 .* got uint8 \[3, 4, 6\] by columns"):
        CodeDataset(tmp_path)


@pytest.mark.parametrize("byte", [b"{", b"(", b"\n", b"\0", b"0", b"\xff"])
def test_a_byte_of_a_header_is_another(tmp_path: Path, byte: bytes) -> None:
    """Either the file is refused in one line, or it says the same; also if its hash is not compared."""
    shards = random_shards(3)
    path = write_data(tmp_path, shards) / "codes-00000.npy"
    intact, refusals = path.read_bytes(), []
    for position in range(len(intact) - shards[0].nbytes):
        path.write_bytes(intact[:position] + byte + intact[position + 1 :])
        try:
            dataset = CodeDataset(tmp_path, verify=False)
        except InputError as error:
            refusals.append(str(error))
        else:
            np.testing.assert_array_equal(dataset.batch(np.arange(3))[0], shards[0])
    assert len(refusals) > 40
    assert all("codes-00000.npy" in line and "\n" not in line for line in refusals)


@pytest.mark.parametrize(
    "content", [b"", b"[", b"null", b'{"a": 1, "b": 2}', b'["a", 2]', b'"ab"', b'["a"]', b"[\xff]"]
)
def test_names_that_are_not_two_names(tmp_path: Path, content: bytes) -> None:
    (write_data(tmp_path, random_shards(2)) / "names-00000.json").write_bytes(content)
    with pytest.raises(InputError, match=r"names-00000.json, got .*; export the codes again"):
        list(CodeDataset(tmp_path).names())


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    names = ["\udce9/\udcff.png", "été/日本 1.png", 'a"b\\c\n.png']
    entry = write_shard(tmp_path, 0, random_shards(3)[0], np.arange(3), names)
    write_manifest(tmp_path, manifest_of([entry]))
    assert list(CodeDataset(tmp_path).names()) == names


@linux_only
def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    """torch cannot name it; the rows, the copies and the check are those of any other."""
    folder, shards = tmp_path / "\udce9", random_shards(2, 3)
    write_data(folder, shards)
    dataset = CodeDataset(folder)
    dataset.check_files()
    for same in (dataset, pickle.loads(pickle.dumps(dataset))):
        np.testing.assert_array_equal(same.batch(np.arange(5))[0], np.concatenate(shards))
        with pytest.raises(ValueError, match="read-only"):
            next(same.shards()).codes[0] = 9
    assert list(dataset.names()) == [*"01234"]


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nosuch"):
        with pytest.raises(InputError, match=r"expected a code data set in .*, got no manifest.json; make one with"):
            CodeDataset(folder)
