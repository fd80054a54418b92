"""Files of strangers: read if they are small and regular, and otherwise refused without being opened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.untrusted_files import parse_json, read_regular

from ..support import ROOT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(value=VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 (whatever is wrong with it)
            parse_json(data)
    else:
        assert parse_json(data) == expected


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "", "{", "[1,]", "NaN", "-Infinity"])
def test_what_is_no_json_of_ours(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text.encode())


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes, more than the 4 that are possible"):
        read_regular(tmp_path / "a", 4)


def test_what_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nosuch", 10)
    with pytest.raises(ValueError, match="a folder"):
        read_regular(tmp_path, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_named_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no regular file"):
            read_regular(path, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="few users make links")
def test_a_link_is_followed_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 10) == b"1"
    with pytest.raises(ValueError, match="no regular file"):
        read_regular(tmp_path / "link", 10, follow_links=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of memory")
def test_a_file_of_2_gb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that has not 1 GB."""
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**31)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from pathlib import Path; from pipeline.runtime.untrusted_files import read_regular\n"
        "try: read_regular(Path(sys.argv[1]), 2**24)\n"
        "except ValueError: sys.exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "large.json")], cwd=ROOT)
    assert ended.returncode == 7
