"""Which images are held out, against the definition, name by name (`test_image_set.py` has it for folders)."""

import hashlib
import unicodedata

import numpy as np
import pytest

from pipeline.images.holdout import MOST_HELD_OUT, by_hash, split_rows


@pytest.mark.parametrize("salt", ["validation", "test"])
def test_a_name_is_chosen_when_its_hash_is_low(salt: str) -> None:
    """Names in any script, that are no Unicode, in two normal forms, with the separators of two systems."""
    patterns = ("class/{}.png", "cl\\a/{}", "été {}", "e\u0301te\u0301 {}", "日本/{}", "\udce9{}", "{}\0")
    names = [pattern.format(i) for i in range(200) for pattern in patterns]
    expected = []
    for name in names:
        text = f"{salt}/" + unicodedata.normalize("NFC", name.replace("\\", "/"))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        expected.append(int(digest[:16], 16) / 2**64 < 0.3)
    np.testing.assert_array_equal(by_hash(iter(names), 0.3, salt), expected)


@pytest.mark.parametrize("mask", [[0, 0, 1, 0, 1], [0], [0, 1], [0] * 7 + [1] * (MOST_HELD_OUT + 3)])
def test_rows_to_train_on_and_rows_held_out(mask: list[int]) -> None:
    train, held_out_rows = split_rows(np.array(mask, dtype=bool))
    expected = [row for row, out in enumerate(mask) if not out]
    assert train.tolist() == expected
    chosen = [row for row, out in enumerate(mask) if out]
    if len(chosen) > MOST_HELD_OUT:  # 4,099 of which 3 are left out, in steps of a little more than 1
        chosen = [chosen[i * (len(chosen) - 1) // (MOST_HELD_OUT - 1)] for i in range(MOST_HELD_OUT)]
    assert held_out_rows.tolist() == (chosen or expected)


def test_of_the_rows_held_out_some_are_evaluated_evenly_spaced() -> None:
    mask = np.arange(40) % 4 == 0
    for most, expected in (
        (1, [0]),
        (3, [0, 16, 36]),
        (9, [0, 4, 8, 12, 16, 20, 24, 28, 36]),
        (11, list(range(0, 40, 4))),
    ):
        train, rows = split_rows(mask, most)
        assert rows.tolist() == expected
        assert train.tolist() == np.flatnonzero(~mask).tolist()
