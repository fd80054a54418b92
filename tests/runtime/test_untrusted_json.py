"""JSON of a stranger: read if it is small and JSON, and otherwise refused without reading it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.untrusted_json import MOST_DIGITS, read_untrusted_json

from ..support import ROOT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
)


@given(value=VALUES)
def test_what_json_writes_is_read(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_text(json.dumps(value), "utf-8")
    assert read_untrusted_json(path, 10**6) == value


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(data)
    try:
        expected = json.loads(data)
    except ValueError as error:
        with pytest.raises(type(error)):
            read_untrusted_json(path, 10**6)
    else:
        assert repr(read_untrusted_json(path, 10**6)) == repr(expected)  # NaN is not equal to itself


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "9" * (MOST_DIGITS + 1), "", "{", "[1,]"], ids=lambda text: text[:6]
)
def test_what_is_no_json_of_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError):  # noqa: PT011 (whatever is wrong with it)
        read_untrusted_json(tmp_path / "a.json", 10**6)


def test_the_largest_seed_is_read(tmp_path: Path) -> None:
    seed = 10**MOST_DIGITS - 1
    (tmp_path / "a.json").write_text(str(seed))
    assert read_untrusted_json(tmp_path / "a.json", MOST_DIGITS) == seed
    with pytest.raises(ValueError, match="at most 4,299 bytes"):
        read_untrusted_json(tmp_path / "a.json", MOST_DIGITS - 1)


def test_what_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nosuch", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory|Permission"):
            read_untrusted_json(path, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_named_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="expected a file of at most 10 bytes"):
            read_untrusted_json(path, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="few users make links")
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("file")
    assert read_untrusted_json(tmp_path / "file", 10) == 1
    with pytest.raises(OSError, match="symbolic links"):
        read_untrusted_json(tmp_path / "link", 10)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of memory")
def test_a_file_of_2_gb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that has not 1 GB."""
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**31)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from pathlib import Path; from pipeline.runtime.untrusted_json import read_untrusted_json\n"
        "try: read_untrusted_json(Path(sys.argv[1]), 2**24)\n"
        "except ValueError: sys.exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "large.json")], cwd=ROOT)
    assert ended.returncode == 7
