"""The header of a safetensors file: what it says is checked against the file, and what is read is what was written."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.models.tensor_file import (
    MOST_TENSORS,
    Outline,
    check_outlines,
    outlines_of,
    parse_metadata,
    parse_outlines,
    parse_tensors,
    read_tensor_file,
)

from .forgery import join_file

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
    "half": torch.tensor([0.5], dtype=torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    safetensors.torch.save_file(TENSORS, tmp_path / "file", metadata={"é": "ü"})
    return tmp_path / "file"


def test_what_is_written_is_read(path: Path) -> None:
    data = read_tensor_file(path)
    assert data == path.read_bytes()
    assert parse_outlines(data) == outlines_of(TENSORS)
    assert parse_metadata(data) == {"é": "ü"}
    found = parse_tensors(data)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_the_check_comes_before_the_numbers_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Outline]] = []

    def check(outlines: object) -> None:
        seen.append(dict(outlines))  # type: ignore[call-overload]
        raise ValueError("not these")

    monkeypatch.setattr("pipeline.models.tensor_file.memory", lambda: pytest.fail("the numbers are next"))
    with pytest.raises(ValueError, match="not these"):
        read_tensor_file(path, check)
    assert seen == [outlines_of(TENSORS)]


def test_a_file_larger_than_the_memory_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    monkeypatch.setattr("pipeline.models.tensor_file.memory", lambda: size)
    read_tensor_file(path)
    monkeypatch.setattr("pipeline.models.tensor_file.memory", lambda: size - 1)
    with pytest.raises(MemoryError, match="more than this machine has memory"):
        read_tensor_file(path)


@pytest.mark.parametrize("count", [MOST_TENSORS, MOST_TENSORS + 1])
def test_the_number_of_tensors_is_limited(count: int) -> None:
    header = {f"{i}": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    if count <= MOST_TENSORS:
        assert len(parse_outlines(join_file(header, b""))) == count
    else:
        with pytest.raises(ValueError, match="4,097 tensors, more than 4,096"):
            parse_outlines(join_file(header, b""))


@pytest.mark.parametrize("length", range(0, 400, 7))
def test_a_file_cut_short_anywhere_is_refused(path: Path, length: int) -> None:
    data = path.read_bytes()
    assert len(data) > 400
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"bytes, (too few|where its header needs)|no safetensors file"):
        read_tensor_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.zeros(3, 2)}, r"float32 \[3, 2\] in place of float32 \[2, 3\] as matrix"),
        ({"scalar": torch.tensor(3.0)}, r"float32 \[\] in place of int64 \[\] as scalar"),
        ({"more": torch.tensor(3.0)}, "the unknown more"),
    ],
)
def test_differences_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    check_outlines(outlines_of(TENSORS), outlines_of(TENSORS))
    with pytest.raises(ValueError, match=message):
        check_outlines(outlines_of(TENSORS), outlines_of(TENSORS | change))
    with pytest.raises(ValueError, match="no matrix"):
        check_outlines(outlines_of(TENSORS), outlines_of({}))


@pytest.mark.parametrize("shape", [[10**4000] * 3, [2**63], [1] * 9, [-1], [2, -3]])
def test_a_shape_of_no_tensor_is_refused_before_its_numbers_are_counted(shape: list[int]) -> None:
    """To multiply the sides that a header of four megabytes can hold takes minutes."""
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    with pytest.raises(ValueError, match=r"^the shape "):
        parse_outlines(join_file(header, b""))
