"""Small files that would become huge are refused by their headers, and no warning of Pillow reaches the terminal."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from pipeline.errors import InputError
from pipeline.generation.keep_mask import mask_from_file
from pipeline.images import folder as folder_module
from pipeline.images.image_set import open_images
from pipeline.images.preprocessing import IMAGE_ERRORS, Preprocessing, read_image, why_unreadable
from pipeline.images.source import Broken

from ..support import ROOT
from .test_image_set import draw, fill, names_of

RGB = Preprocessing(height=4, width=6, channels=3)
LIMIT = 1000  # pixels; Pillow warns above, and refuses above twice that


@pytest.fixture(autouse=True)
def _limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """Pillow's warnings are recorded, where a terminal would show them; there are none."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in shown] == []


def outcomes(path: Path) -> set[str]:
    """Return why a file is broken, when its header is read and when it is prepared; "" where it is not."""
    file = folder_module._File(str(path), path.name, 0, 0)
    both = (folder_module._header(file), folder_module._read(file, RGB))
    return {outcome.reason if isinstance(outcome, Broken) else "" for outcome in both}


# Many pixels


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".bmp", ".webp", ".tga", ".pcx", ".jp2", ".ppm"])
@pytest.mark.parametrize(("size", "pixels"), [((40, 25), ""), ((40, 26), "1,040"), ((60, 40), "2,400")])
def test_the_limit_is_that_of_pillow(suffix: str, size: tuple[int, int], pixels: str, tmp_path: Path) -> None:
    draw(tmp_path / f"a{suffix}", size=size)
    assert outcomes(tmp_path / f"a{suffix}") == {f"{pixels} pixels, more than the limit of 1,000" if pixels else ""}


@pytest.mark.parametrize("size", [(40, 30), (60, 40)])
def test_a_bomb_in_a_folder_is_skipped_and_named(
    size: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{i:02d}.png" for i in range(10)]
    fill(tmp_path / "images", names)
    draw(tmp_path / "images" / "bomb.png", size=size)
    for requested in (None, (4, 6)):
        caplog.clear()
        images = open_images(str(tmp_path / "images"), image_size=requested, channels=3)
        assert (names_of(images), images.broken) == (names, ("bomb.png",))
        (line,) = caplog.messages
        assert line.endswith(f"broken image bomb.png: {size[0] * size[1]:,} pixels, more than the limit of 1,000")


@pytest.mark.parametrize("size", [(40, 30), (60, 40)])
def test_a_bomb_as_a_mask_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    draw(tmp_path / "bomb.png", size=size)
    with pytest.raises(InputError, match=r"bomb.png, got [\d,]+ pixels, more than the limit of 1,000; "):
        mask_from_file(tmp_path / "bomb.png", (4, 6))


# What comes out only when the pixels are decoded


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, width: int = 3, height: int = 2) -> bytes:
    """Return a PNG with `extra` chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width))))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + pixels + png_chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count))


def ico(width: int, height: int) -> bytes:
    """Return an icon that says 3x2 and holds a PNG of another size."""
    inside = png(width=width, height=height)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 3, 2, 0, 0, 1, 24, len(inside), 22) + inside


def gif(width: int, height: int) -> bytes:
    """Return a GIF of 3x2, whose first frame is larger."""
    buffer = io.BytesIO()
    Image.new("P", (3, 2)).save(buffer, "GIF")
    data = buffer.getvalue()
    place = data.index(b",\0\0\0\0\3\0\2\0")
    return data[: place + 5] + struct.pack("<HH", width, height) + data[place + 9 :]


MEGABYTE = 2**20
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zTXt": ("png", lambda: png(png_chunk(b"zTXt", b"a\0\0" + zeros(64 * MEGABYTE)))),
    "iTXt": ("png", lambda: png(png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(64 * MEGABYTE)))),
    "many zTXt": ("png", lambda: png(*[png_chunk(b"zTXt", b"a\0\0" + zeros(MEGABYTE - 1))] * 70)),
    "iCCP": ("png", lambda: png(png_chunk(b"iCCP", b"a\0\0" + zeros(64 * MEGABYTE)))),
    "an icon with a larger PNG": ("ico", lambda: ico(40, 30)),
    "an icon with a huge PNG": ("ico", lambda: ico(60, 40)),
    "a GIF with a larger frame": ("gif", lambda: gif(40, 30)),
    "a GIF with a huge frame": ("gif", lambda: gif(60, 40)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_behind_the_header_is_broken(bomb: str, tmp_path: Path) -> None:
    suffix, make = BOMBS[bomb]
    (tmp_path / f"a.{suffix}").write_bytes(make())
    with pytest.raises(IMAGE_ERRORS) as refused:
        read_image(tmp_path / f"a.{suffix}", RGB)
    assert not isinstance(refused.value, MemoryError)
    assert why_unreadable(refused.value) in outcomes(tmp_path / f"a.{suffix}")


def test_the_files_are_good_without_the_bomb(tmp_path: Path) -> None:
    """So that they are refused for what they are meant to be refused for."""
    good = {
        "a.png": png(png_chunk(b"zTXt", b"a\0\0" + zeros(9)), png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(9))),
        "a.ico": ico(3, 2),
        "a.gif": gif(3, 2),
    }
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
        assert outcomes(tmp_path / name) == {""}


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a program, which may never end, and Pillow has Ghostscript run it."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\n{} loop\n%%EOF\n"
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"
    assert outcomes(tmp_path / "a.png") == {"not an image Pillow can read"}


# Warnings


def test_other_warnings_of_pillow_are_not_shown(tmp_path: Path) -> None:
    """Of a palette with a transparency for each of its colours."""
    image = Image.new("P", (3, 2))
    image.putpalette(bytes(range(9)))
    image.save(tmp_path / "a.png", transparency=b"\0\1\2")
    with Image.open(tmp_path / "a.png") as opened, pytest.warns(UserWarning, match="Transparency"):
        opened.convert("RGB")
    assert outcomes(tmp_path / "a.png") == {""}


def test_many_threads_leave_the_filters_as_they_were(tmp_path: Path) -> None:
    draw(tmp_path / "good.png")
    draw(tmp_path / "bomb.png", size=(40, 30))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: outcomes(tmp_path / ("bomb.png" if i % 2 else "good.png")), range(400)))
    assert found == [{""}, {"1,200 pixels, more than the limit of 1,000"}] * 200
    assert warnings.filters == before
    with pytest.warns(Image.DecompressionBombWarning), Image.open(tmp_path / "bomb.png"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_real_bombs_cost_neither_memory_nor_a_raw_warning(tmp_path: Path) -> None:
    """In a process of its own, with the limit of Pillow as it is: 100 and 3,600 million pixels, in 300 bytes."""
    fill(tmp_path / "images", [f"{i:02d}.png" for i in range(20)])
    for name, side in {"large": 10_000, "huge": 60_000}.items():
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zeros(9999))
            + png_chunk(b"IEND", b"")
        )
        (tmp_path / "images" / f"{name}.png").write_bytes(data)
    code = """
import resource, sys
from pipeline.images.image_set import open_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in (None, (4, 6)):
    images = open_images(sys.argv[1], image_size=size, channels=3)
print(images.broken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "images")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "('huge.png', 'large.png') True\n"
    assert "DecompressionBomb" not in done.stderr
    assert "huge.png: 3,600,000,000 pixels, more than the limit of 89,478,485" in done.stderr
    assert "large.png: 100,000,000 pixels, more than the limit of 89,478,485" in done.stderr
