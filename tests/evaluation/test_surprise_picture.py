"""The picture of an evaluation: what it shows, and where."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation import surprise_picture
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.heat_map import BAR_HEIGHT, COLOUR_SHARE, VIRIDIS, colours, heat_map, legend, tick_values
from pipeline.evaluation.surprise_picture import Section, rows_to_show
from pipeline.images import captions
from pipeline.images.captions import GAP, TEXT, below, beside, text_line, text_width, with_margin
from pipeline.images.image_set import open_images
from pipeline.images.rows import evenly_spaced
from tokenizer.config import Bottleneck

from ..support import (
    GRID,
    LEVELS,
    brightness_baseline,
    brightness_tokenizer,
    fill_with_cells,
    save_prior,
    save_tokenizer,
    tiny_prior,
)

# Colours


def test_a_cell_has_the_colour_of_its_value_in_exactly_its_pixels() -> None:
    """On an image of 4x9 pixels in a grid of 2x3 cells, against one pixel at a time."""
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 9), dtype=np.uint8)
    values = np.array([[0, 1, 2], [4, 8, 16.0]])
    found = heat_map(image, values, 16)
    assert (found.dtype, found.shape) == (np.uint8, (3, 4, 9))
    for y, x in np.ndindex(4, 9):
        at = values[y // 2, x // 3] / 2  # of the 8 steps from the first colour to the last
        low = min(int(at), 7)
        colour = VIRIDIS[low] + (at - low) * (VIRIDIS[low + 1] - VIRIDIS[low])
        red, green, blue = (int(value) for value in image[:, y, x])
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        expected = COLOUR_SHARE * colour + (1 - COLOUR_SHARE) * grey
        np.testing.assert_allclose(found[:, y, x], expected, atol=0.51)


def test_rows_of_cells_go_down_also_where_cells_would_fit_the_other_way() -> None:
    """2 rows of 3 cells on 6x6 pixels: the last cell of the first row is at the right, not below."""
    found = heat_map(np.zeros((1, 6, 6), dtype=np.uint8), np.array([[0, 0, 5], [0, 0, 0.0]]), 5)
    marked = (found != found[:, -1:, :1]).any(axis=0)
    assert np.argwhere(marked).tolist() == [[y, x] for y in range(3) for x in (4, 5)]


def test_an_image_of_one_channel_is_its_own_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 6), dtype=np.uint8)
    values = np.array([[1.0, 3.0]])
    np.testing.assert_allclose(
        heat_map(image, values, 3).astype(int), heat_map(np.repeat(image, 3, axis=0), values, 3).astype(int), atol=1
    )


def test_more_is_lighter() -> None:
    """In the luminance of sRGB, from 0 to the last colour; beyond the ends the colours stay."""
    brightness = (colours(np.linspace(0, 9, 200)[None], 9)[0] / 255) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > 0).all()
    outside = colours(np.array([[-1.0, 0.0, 9.0, 100.0]]), 9)[0]
    np.testing.assert_array_equal(outside, [VIRIDIS[0], VIRIDIS[0], VIRIDIS[-1], VIRIDIS[-1]])


@pytest.mark.parametrize("values", [np.zeros((3, 3)), np.zeros((2, 4)), np.full((2, 3), np.nan)])
def test_what_is_no_heat_map(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected (cells that make up 4x9 pixels, got \dx\d|finite values, got NaN)"):
        heat_map(np.zeros((1, 4, 9), dtype=np.uint8), values, 1)


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (14.5, [0, 2, 4, 6, 8, 10, 12, 14]),
        (9.0, [0, 2, 4, 6, 8]),
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (40.0, [0, 10, 20, 30, 40]),
        (0.35, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
    ],
)
def test_ticks_are_round_numbers(top: float, expected: list[float]) -> None:
    assert tick_values(top) == expected


def test_ticks_reach_from_zero_nearly_to_the_top() -> None:
    for top in np.geomspace(1e-3, 1e6, 500).tolist():
        ticks = tick_values(top)
        assert ticks[0] == 0
        assert 4 <= len(ticks) <= 8
        assert top - (ticks[1] - ticks[0]) < ticks[-1] <= top * (1 + 1e-9)


def test_the_legend_has_the_colours_from_left_to_right_and_marks_guessing_where_it_is() -> None:
    """Each colour over white above, over black below."""
    picture = np.asarray(legend("bits", 12.0, 300, mark=3.0, mark_name="guessing"))
    title, scale = text_line("bits").height, text_line("guessing").height + 5
    bar = picture[title + scale : title + scale + BAR_HEIGHT, :300].astype(int)
    expected = colours(np.linspace(0, 12, 300)[None], 12)[0] * COLOUR_SHARE
    np.testing.assert_allclose(bar[0], expected + (1 - COLOUR_SHARE) * 255, atol=0.51)
    np.testing.assert_allclose(bar[-1], expected, atol=0.51)
    marked = picture[title + scale - 1]  # the row right above the bar
    assert np.flatnonzero((marked < 255).any(axis=1)).tolist() == [75]
    ticked = picture[title + scale + BAR_HEIGHT]
    assert np.flatnonzero((ticked < 255).any(axis=1)).tolist() == [round(value / 12 * 299) for value in range(0, 13, 2)]


# Words


def test_a_line_is_as_high_as_any_other_and_has_ink() -> None:
    lines = [text_line(words) for words in ("image", "gpqy", "", "x" * 50)]
    assert len({line.height for line in lines}) == 1
    assert [bool((np.asarray(line) < 255).any()) for line in lines] == [True, True, False, True]
    for line in lines:  # nothing is cut off at an edge
        pixels = np.asarray(line)
        assert (pixels[0] == 255).all()
        assert (pixels[-1] == 255).all()
    assert lines[0].width == text_width("image") + 1


def test_long_text_is_cut_with_dots() -> None:
    short, long = text_line("reconstruction", 60), text_line("reconstruction")
    assert short.width == 60 < long.width
    longest = next(n for n in range(20, 0, -1) if text_width("reconstruction"[:n] + "...") <= 60)
    np.testing.assert_array_equal(
        np.asarray(short)[:, :50], np.asarray(text_line("reconstruction"[:longest] + "...", 60))[:, :50]
    )
    assert text_line("x", 1).width == 1


@pytest.mark.parametrize(
    ("words", "same"),
    [("été", "ete"), ("線", "?"), ("a\nb\x1b", "a\\nb\\x1b"), ("caf\udce9", "caf\\xe9"), ("ﬁ", "fi")],
)
def test_words_that_the_font_lacks(words: str, same: str) -> None:
    np.testing.assert_array_equal(np.asarray(text_line(words)), np.asarray(text_line(same)))
    assert text_width(words) == text_width(same)


def test_pictures_below_and_beside_each_other() -> None:
    red, blue = Image.new("RGB", (2, 3), (255, 0, 0)), Image.new("RGB", (4, 1), (0, 0, 255))
    column, row = np.asarray(below([red, blue], 5)), np.asarray(beside([red, blue], 1))
    assert column.shape == (9, 4, 3)
    assert row.shape == (3, 7, 3)
    assert (column[:3, :2] == (255, 0, 0)).all()
    assert (column[8] == (0, 0, 255)).all()
    assert (column[3:8] == 255).all()
    assert (row[0, 3:] == (0, 0, 255)).all()
    assert (row[1:, 2:] == 255).all()
    assert np.asarray(with_margin(red, 2)).shape == (7, 6, 3)
    assert (np.asarray(with_margin(red, 2))[2:5, 2:4] == (255, 0, 0)).all()


# Which images


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 50])
def test_which_images_are_shown(count: int) -> None:
    errors = np.random.default_rng(count).permutation(count).astype(float)
    (title, spaced), *ranked = rows_to_show(errors)
    assert title.startswith(f"{min(16, count)} image")
    assert len(spaced) == len(set(spaced.tolist())) == min(16, count)
    assert (spaced[0], spaced[-1]) == (0, count - 1)
    assert max(np.diff(spaced), default=1) - min(np.diff(spaced), default=1) <= 1
    assert [title.split(":")[0] for title, _ in ranked] == ["best", "median", "worst"]
    best, median, worst = (errors[rows].tolist() for _, rows in ranked)
    size = max(1, min(8, count // 3))
    assert best == list(range(size))
    assert worst == list(range(count - 1, count - 1 - size, -1))
    assert len(median) == size
    assert abs(np.mean(median) - (count - 1) / 2) <= 0.5
    if count >= 3:
        assert len({*best, *median, *worst}) == 3 * size


def test_equal_errors_are_in_the_order_of_the_rows() -> None:
    assert [rows.tolist() for _, rows in rows_to_show(np.zeros(6))][1:] == [[0, 1], [2, 3], [5, 4]]


# The picture


def section_of(count: int, shape: tuple[int, int, int], grid: tuple[int, int] | None) -> Section:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *shape), dtype=np.uint8)
    bits = None if grid is None else random.random((count, *grid)).astype(np.float32) * 12
    return Section(title="some", images=images, reconstructions=255 - images, errors=random.random(count), bits=bits)


def is_in(part: np.ndarray, sheet: np.ndarray) -> bool:
    """Return whether an image [h,w,3] occurs in another, somewhere."""
    corners = np.argwhere((sheet[: -len(part) + 1, : -part.shape[1] + 1] == part[0, 0]).all(axis=2))
    return any((sheet[y : y + len(part), x : x + part.shape[1]] == part).all() for y, x in corners)


@pytest.mark.parametrize(
    ("shape", "grid", "times"),
    [((1, 1, 1), (1, 1), 96), ((3, 8, 12), (4, 6), 8), ((1, 28, 28), (7, 7), 3), ((3, 90, 120), (3, 4), 1)],
)
def test_every_image_is_there_enlarged_by_a_whole_factor(
    shape: tuple[int, int, int], grid: tuple[int, int], times: int
) -> None:
    """With its reconstruction and its heat map, on the scale from 0 to the most that a code costs."""
    section = section_of(3, shape, grid)
    assert section.bits is not None
    sheet = np.asarray(surprise_picture.surprise_picture("title", [section], 1.0))
    top = float(section.bits.max())
    assert top > 1
    for image, again, bits in zip(section.images, section.reconstructions, section.bits, strict=True):
        for each in (image, again, heat_map(image, bits, top)):
            rgb = np.broadcast_to(each, (3, *shape[1:])).transpose(1, 2, 0)
            assert is_in(rgb.repeat(times, axis=0).repeat(times, axis=1), sheet)


def test_the_scale_reaches_to_guessing_where_no_code_costs_more() -> None:
    section = section_of(1, (1, 8, 12), (4, 6))
    assert section.bits is not None
    sheet = np.asarray(surprise_picture.surprise_picture("title", [section], 20.0))
    expected = heat_map(section.images[0], section.bits[0], 20.0).transpose(1, 2, 0)
    assert is_in(expected.repeat(8, axis=0).repeat(8, axis=1), sheet)


@pytest.mark.parametrize(
    "shape", [(1, 300, 300), (3, 300, 2), (1, 1, 300), (3, 2, 1000), (1, 700, 500)], ids=lambda shape: str(shape)
)
def test_large_and_thin_images_have_readable_captions(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caption is cut; a row of them is no wider than the picture may be."""
    written = []

    def line(words: str, width: int | None = None, *, size: int = TEXT) -> Image.Image:
        written.append((words, width, text_width(words, size=size)))
        return captions.text_line(words, width, size=size)

    monkeypatch.setattr(surprise_picture, "text_line", line)
    section = section_of(16, shape, (1, 1))
    sheet = surprise_picture.surprise_picture("title", [section], 4.0)
    assert sheet.width < 1500
    assert all(width is None or needed <= width for _, width, needed in written)
    assert section.bits is not None
    for bits, error in zip(section.bits, section.errors, strict=True):
        assert {f"{bits.mean():.2f} bits", f"nmse {error:#.3g}"} <= {words for words, _, _ in written}
    assert {"title", "some", "image", "reconstruction", "bits per code"} <= {words for words, _, _ in written}


def test_without_bits_there_is_no_legend_and_no_third_row() -> None:
    with_bits, without = section_of(2, (1, 28, 28), (7, 7)), section_of(2, (1, 28, 28), None)
    heights = [
        surprise_picture.surprise_picture("t", [each], guessing).height
        for each, guessing in ((with_bits, 7.0), (without, None))
    ]
    assert heights[0] > heights[1] + 28 * 3 + BAR_HEIGHT
    assert surprise_picture.surprise_picture("t", [without], 7.0).height == heights[1]


def test_codes_that_cost_nothing_have_a_scale() -> None:
    """As of a tokenizer with a single code, where guessing costs nothing either."""
    section = replace(section_of(1, (1, 8, 12), (4, 6)), bits=np.zeros((1, 4, 6)))
    sheet = np.asarray(surprise_picture.surprise_picture("title", [section], 0.0))
    expected = heat_map(section.images[0], np.zeros((4, 6)), 1.0).transpose(1, 2, 0)
    assert is_in(expected.repeat(8, axis=0).repeat(8, axis=1), sheet)


def test_errors_that_are_not_finite_are_refused() -> None:
    section = section_of(2, (1, 4, 4), None)
    section.errors[1] = np.inf
    with pytest.raises(ValueError, match="expected finite errors, got NaN or infinity"):
        surprise_picture.surprise_picture("t", [section])


# Of an evaluation


def shown_by(monkeypatch: pytest.MonkeyPatch, *folders: Path, **options: str) -> list[Section]:
    """Return the sections that the picture of an evaluation is made of."""
    made: list[Section] = []
    real = surprise_picture.surprise_picture

    def keep(title: str, sections: list[Section], guessing: float | None = None) -> Image.Image:
        made.extend(sections)
        return real(title, sections, guessing)

    monkeypatch.setattr("pipeline.evaluation.evaluation_picture.surprise_picture", keep)
    found = evaluate(*folders, with_picture=True, device="cpu", **options)
    assert found.picture is not None
    assert found.picture.mode == "RGB"
    return made


def test_the_bits_over_an_image_are_those_of_its_codes(
    tmp_path: Path, grey_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched by class name, though the prior has them in another order; errors are those of the images shown."""
    names = ["disc", "line", "été"]
    tokenizer = brightness_tokenizer(data_variance=0.5)
    tokenizer.quantizer.set_codebook(torch.linspace(0.1, 1, LEVELS)[:, None])  # no perfect reconstruction
    info = save_tokenizer(tmp_path / "tokenizer", tokenizer, grey_folder, names)
    prior = tiny_prior(num_classes=3)
    save_prior(tmp_path / "prior", prior, info.fingerprint, names[::-1])
    spaced, *ranked = shown_by(monkeypatch, tmp_path / "tokenizer", tmp_path / "prior", split="train")
    split = open_images(str(grey_folder)).train
    rows = evenly_spaced(len(split), 16)
    np.testing.assert_array_equal(spaced.images, split.images[rows])
    assert spaced.bits is not None
    assert [section.bits for section in ranked] == [None] * 3
    for index, row in enumerate(rows):
        image = split.batch(np.array([row]))
        codes, label = tokenizer.encode(image), torch.tensor([2 - split.labels[row]])
        with torch.no_grad():
            shares = prior(codes, label)[0].log_softmax(dim=0) / -np.log(2)
        expected = [float(shares[codes[0, y, x], y, x]) for y, x in np.ndindex(GRID)]
        assert spaced.bits[index].ravel().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for section in (spaced, *ranked):
        for image, again, error in zip(section.images, section.reconstructions, section.errors, strict=True):
            floats = torch.from_numpy(image)[None].float() / 255
            exact = tokenizer.decode(tokenizer.encode(floats))
            assert error == pytest.approx(float((exact - floats).square().mean()) / 0.5, rel=1e-4)
            np.testing.assert_array_equal(again, (exact[0] * 255).round().byte().numpy())
    best, median, worst = (section.errors for section in ranked)
    assert list(best) == sorted(best)
    assert list(worst) == sorted(worst, reverse=True)
    assert best.max() <= median.min() <= median.max() <= worst.min()
    assert best.max() < worst.min()


@pytest.mark.parametrize("bottleneck", ["vae", "ae"])
def test_a_baseline_without_codes_has_a_picture(
    tmp_path: Path, grey_folder: Path, bottleneck: Bottleneck, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path / "baseline", brightness_baseline(bottleneck), grey_folder)
    sections = shown_by(monkeypatch, tmp_path / "baseline")
    assert [section.bits for section in sections] == [None] * 4


def test_one_image_in_the_split_and_no_picture_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = fill_with_cells(tmp_path / "one", ["1.png"])
    info = save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), images)
    save_prior(tmp_path / "prior", tiny_prior(), info.fingerprint)
    folders = tmp_path / "tokenizer", tmp_path / "prior"
    sections = shown_by(monkeypatch, *folders, split="train")
    assert [len(section.images) for section in sections] == [1] * 4
    assert sections[0].title == "1 image"
    assert evaluate(*folders, split="train", device="cpu").picture is None


def test_a_row_of_the_picture_is_as_wide_as_it_may_be() -> None:
    """8 small images side by side, fewer of larger ones."""
    widths = {
        side: surprise_picture.surprise_picture("t", [section_of(16, (1, side, side), None)]).width
        for side in (32, 150, 300)
    }
    labels = text_width("bits per code") + text_width("reconstruction")
    for side, (tile, columns) in {32: (96, 8), 150: (150, 8), 300: (300, 4)}.items():
        images = columns * (tile + GAP)
        assert images < widths[side] < images + labels
