"""The helpers of the other tests: what they change, and what they see."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from .mutations import DAMAGES, DEEP, json_bytes, mutated_bytes, mutated_json, watched

CONTENT = {"count": 3, "grid": [2, 5], "files": {"a.npy": "0f"}}


@pytest.mark.parametrize(
    "piece", [b'"/etc/passwd"', b"2147483648", b"NaN", b"1e999", b"[" * DEEP, b'"grid": [2, 5, ', b'"../x": ']
)
def test_each_kind_of_change_occurs(piece: bytes) -> None:
    found = find(mutated_json(CONTENT), lambda data: piece in data, settings=settings(max_examples=5_000))
    assert piece in found


@given(data=st.data())
@settings(max_examples=30)
def test_the_valid_content_stays_as_it_is(data: st.DataObject) -> None:
    before = json.dumps(CONTENT)
    data.draw(mutated_json(CONTENT))
    assert json.dumps(CONTENT) == before


@given(data=mutated_bytes(b"abcdef"))
@settings(max_examples=30)
def test_bytes(data: bytes) -> None:
    assert isinstance(data, bytes)
    assert len(data) < 10**6


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_changes_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    DAMAGES[damage](path, np.random.default_rng(0))
    assert not path.is_file() or path.read_bytes() != b"content"


def test_opened_files_and_memory_are_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with watched() as seen:
        (tmp_path / "file").read_bytes()
        np.zeros(10**6, np.uint8)
    (tmp_path / "file").read_bytes()
    assert seen.opened == {tmp_path / "file"}
    assert 10**6 <= seen.peak < 2 * 10**6


def test_raw_texts_are_put_in() -> None:
    assert json_bytes({"a": ["<infinity>"]}) == b'{"a": [1e999]}'
