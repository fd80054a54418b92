"""`--decoder` on every command that decodes: whose pictures are written, what the records say, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.models.checkpoint import read_info
from pipeline.models.decoders import INVENTS_DETAIL

from .conftest import CLASS_NAMES, Codegrid
from .decoders import LIFT, add_sharp_decoder
from .support import brightness_tokenizer, digest_of, save_prior, save_tokenizer, tiny_prior

COMMANDS = ("sample", "complete", "reconstruct", "decode-codes", "evaluate", "measure-rate")
DRAWING = COMMANDS[:4]


class Models:
    """A tokenizer without and with a sharp decoder, and the prior and the codes of both."""

    def __init__(self, folder: Path, images: Path, codegrid: Codegrid) -> None:
        self.folder, self.images, self.codegrid = folder, images, codegrid
        self.picture = sorted(images.rglob("*.png"))[0]
        for name in ("plain", "both"):
            info = save_tokenizer(folder / name, brightness_tokenizer(), images, CLASS_NAMES)
        save_prior(folder / "prior", tiny_prior(num_classes=3), info.fingerprint, CLASS_NAMES)
        add_sharp_decoder(folder / "both")
        outcome = codegrid("export-codes", "--tokenizer", folder / "plain", "--out", folder / "codes")
        assert outcome.status == 0, outcome.err

    def arguments(self, command: str, tokenizer: str, out: Path) -> list[object]:
        both = ["--tokenizer", self.folder / tokenizer, "--device", "cpu"]
        prior = ["--prior", self.folder / "prior"]
        return {
            "sample": ["sample", *both, *prior, "--n", 3, "--out", out],
            "complete": [
                *("complete", *both, *prior, "--n", 2, "--candidates", 4, "--out", out),
                *("--image", self.picture, "--keep", "top"),
            ],
            "reconstruct": ["reconstruct", *both, "--n", 2, "--out", out.with_suffix(".png")],
            "decode-codes": ["decode-codes", self.folder / "codes", *both, "--out", out],
            "evaluate": ["evaluate", *both, "--json", out.with_suffix(".json")],
            "measure-rate": ["measure-rate", *both, "--n", 4, "--json", out.with_suffix(".json")],
        }[command]


@pytest.fixture
def models(tmp_path: Path, grey_folder: Path, codegrid: Codegrid) -> Models:
    return Models(tmp_path, grey_folder, codegrid)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def lifted(values: np.ndarray) -> np.ndarray:
    return (values + LIFT).clip(max=255)


@pytest.mark.parametrize("command", COMMANDS)
def test_plain_is_what_it_was_and_auto_is_what_the_command_is_for(models: Models, command: str) -> None:
    """Without a sharp decoder, auto and plain write the same bytes; with one, plain still does."""
    written = {}
    for tokenizer, choice in (("plain", "auto"), ("plain", "plain"), ("both", "plain"), ("both", "sharp")):
        folder = models.folder / f"{tokenizer} {choice}"
        outcome = models.codegrid(*models.arguments(command, tokenizer, folder / "x"), "--decoder", choice)
        assert outcome.status == 0, outcome.err
        written[tokenizer, choice] = digest_of(folder)
        assert outcome.error_lines == (
            [f"note: {INVENTS_DETAIL}"] if command == "reconstruct" and choice == "sharp" else []
        )
    assert written["plain", "auto"] == written["plain", "plain"] == written["both", "plain"]
    assert written["plain", "auto"] != written["both", "sharp"]
    outcome = models.codegrid(*models.arguments(command, "both", models.folder / "auto" / "x"))
    assert outcome.status == 0, outcome.err
    assert (digest_of(models.folder / "auto") == written["both", "sharp"]) == (command in DRAWING)


@pytest.mark.parametrize("command", COMMANDS)
def test_sharp_without_one_is_refused_before_anything_is_written(models: Models, command: str) -> None:
    before = digest_of(models.folder)
    outcome = models.codegrid(*models.arguments(command, "plain", models.folder / "out" / "x"), "--decoder", "sharp")
    place = models.folder / "plain" / "decoder"
    line = f"expected a sharp decoder in {place}, got none; run train-decoder, or omit --decoder sharp"
    assert (outcome.status, outcome.out, outcome.error_lines) == (1, "", [f"Error: {line}"])
    assert digest_of(models.folder) == before
    outcome = models.codegrid(*models.arguments(command, "plain", models.folder / "out" / "x"), "--decoder", "blurred")
    assert outcome.status == 2


@pytest.mark.parametrize("command", ["sample", "complete"])
def test_samples_have_the_same_codes_and_the_record_says_who_drew_them(models: Models, command: str) -> None:
    decoder = read_info(models.folder / "both" / "decoder", "decoder").fingerprint
    for choice, fingerprint in (("plain", None), ("sharp", decoder)):
        outcome = models.codegrid(
            *models.arguments(command, "both", models.folder / f"by {choice}"), "--decoder", choice
        )
        assert outcome.status == 0, outcome.err
        record = json.loads((models.folder / f"by {choice}" / f"{command}.json").read_text("utf-8"))
        assert record["fingerprints"] == {
            "tokenizer": read_info(models.folder / "both", "tokenizer").fingerprint,
            "decoder": fingerprint,
            "prior": read_info(models.folder / "prior", "prior").fingerprint,
        }
        assert "decoder" not in record["options"]
    plain, sharp = models.folder / "by plain", models.folder / "by sharp"
    assert (plain / "codes.npy").read_bytes() == (sharp / "codes.npy").read_bytes()
    rows = slice(4, None) if command == "complete" else slice(None)  # the kept half has the pixels of the picture
    for name in ("00000.png", "00001.png"):
        before, after = pixels(plain / "images" / name), pixels(sharp / "images" / name)
        assert np.array_equal(lifted(before[rows]), after[rows])
        assert np.array_equal(before[: rows.start], after[: rows.start]) or command == "sample"


def test_decoded_codes_and_their_record(models: Models) -> None:
    decoder = read_info(models.folder / "both" / "decoder", "decoder").fingerprint
    for name in ("plain", "both"):
        assert models.codegrid(*models.arguments("decode-codes", name, models.folder / f"out {name}")).status == 0
    records = [json.loads((models.folder / f"out {name}" / "decode.json").read_text()) for name in ("plain", "both")]
    assert [record["decoder_fingerprint"] for record in records] == [None, decoder]
    assert records[0] | {"decoder_fingerprint": decoder} == records[1]
    for path in sorted((models.folder / "out plain").glob("*.png")):
        assert np.array_equal(lifted(pixels(path)), pixels(models.folder / "out both" / path.name))


@pytest.mark.parametrize("command", ["sample", "complete", "decode-codes"])
def test_a_record_of_an_older_version_is_that_of_an_earlier_run(models: Models, command: str) -> None:
    """It names no decoder; with --force its images are replaced, and a file of the user's stays."""
    out = models.folder / "out"
    assert models.codegrid(*models.arguments(command, "plain", out)).status == 0
    path = out / ("decode.json" if command == "decode-codes" else f"{command}.json")
    record = json.loads(path.read_text())
    del (record if command == "decode-codes" else record["fingerprints"])[
        "decoder_fingerprint" if command == "decode-codes" else "decoder"
    ]
    path.write_text(json.dumps(record))
    (out / "mine.txt").write_text("mine")
    arguments = models.arguments(command, "both", out)
    assert models.codegrid(*arguments).status == 1
    outcome = models.codegrid(*arguments, "--force")
    assert outcome.status == 0, outcome.err
    assert (out / "mine.txt").read_text() == "mine"
    assert '"decoder' in path.read_text()


def test_reconstruct_shows_the_lifted_images_below_the_originals(models: Models) -> None:
    """The cells of a sheet have a margin of 2 pixels; in each column the second picture is the first, brighter."""
    found = {}
    for choice in ("plain", "sharp"):
        out = models.folder / choice
        assert models.codegrid(*models.arguments("reconstruct", "both", out), "--decoder", choice).status == 0
        found[choice] = pixels(out.with_suffix(".png"))
    changed = np.flatnonzero((found["plain"] != found["sharp"]).any(axis=1))
    assert changed.min() > found["plain"].shape[0] // 2 - 2
    inside = found["plain"] != found["sharp"]
    assert np.array_equal(lifted(found["plain"])[inside], found["sharp"][inside])


@pytest.mark.parametrize(("choice", "decoder"), [("auto", "plain"), ("plain", "plain"), ("sharp", "sharp")])
def test_measure_rate_says_whose_psnr_it_is(models: Models, choice: str, decoder: str) -> None:
    out = models.folder / choice
    outcome = models.codegrid(*models.arguments("measure-rate", "both", out), "--decoder", choice)
    assert outcome.status == 0, outcome.err
    content = json.loads(out.with_suffix(".json").read_text())
    for numbers in content["splits"].values():
        assert numbers["decoder"] == decoder
        assert (numbers["psnr"] > 60) == (decoder == "plain")
    assert outcome.out.count(f" dB ({decoder} decoder), JPEG ") == 2
    notes = [line for line in outcome.out.splitlines() if "invents" in line]
    assert len(notes) == (0 if choice == "plain" else 1)
    assert [note.removeprefix("note: ") for note in notes] == [
        remark for remark in content["remarks"] if "invents" in remark
    ]
    if choice == "auto":
        assert "the PSNR is that of the plain decoder; --decoder sharp takes the sharp one" in notes[0]


def test_measure_rate_says_nothing_where_there_is_one_decoder(models: Models) -> None:
    outcome = models.codegrid(*models.arguments("measure-rate", "plain", models.folder / "out"))
    assert outcome.status == 0
    assert "sharp" not in outcome.out + outcome.err


def test_a_broken_decoder_stops_no_command_that_is_told_to_leave_it(models: Models) -> None:
    (models.folder / "both" / "decoder" / "model.safetensors").write_bytes(b"")
    for command in COMMANDS:
        arguments = models.arguments(command, "both", models.folder / f"out {command}" / "x")
        assert models.codegrid(*arguments, "--decoder", "plain").status == 0
        outcome = models.codegrid(*arguments, "--decoder", "sharp", "--force")
        assert outcome.status == 1
        assert outcome.error_lines[0].endswith("or use --decoder plain")
        assert "\n" not in outcome.error_lines[0]
