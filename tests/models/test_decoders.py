"""The sharp decoder in the folder of a tokenizer: when it draws, when it is refused, and that it changes no code."""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import ImagePipeline, load_tokenizer
from pipeline.codes.export import export_codes
from pipeline.errors import InputError
from pipeline.images.image_set import open_images
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CONFIG, MODEL, PREVIOUS, CheckpointInfo, TrainingState, read_info
from pipeline.models.decoders import find_sharp_decoder, has_sharp_decoder
from pipeline.models.inference import encode_images
from pipeline.models.loading import config_of_run, load_pair, load_trained_autoencoder, load_trained_tokenizer
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_tokenizer import train_tokenizer
from tokenizer import TokenizerConfig
from tokenizer.networks import Decoder

from ..conftest import CLASS_NAMES, Trained
from ..decoders import (
    LIFT,
    add_sharp_decoder,
    lifted_decoder,
    save_decoder,
    wide_config,
    wide_decoder,
    with_random_decoder,
)
from ..mutations import DAMAGES, watched
from ..support import (
    GRID,
    LEVELS,
    bits_of,
    brightness_baseline,
    brightness_tokenizer,
    digest_of,
    save_prior,
    save_tokenizer,
    tiny_prior,
)
from .forgery import change, write_model

CODES = torch.arange(4 * 6).reshape(1, *GRID) % LEVELS


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path: Path, grey_folder: Path) -> Path:
    """A tokenizer without a sharp decoder."""
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(), grey_folder, CLASS_NAMES)
    return tmp_path / "tokenizer"


@pytest.fixture
def sharp(folder: Path) -> Path:
    """The same with one, which is LIFT grey values brighter."""
    add_sharp_decoder(folder)
    return folder


def levels(lift: int) -> torch.Tensor:
    """The oracle: the brightness of each of CODES, lifted by grey values, as it is shown."""
    return (CODES * 17 + lift).clamp(max=255)


def drawn(model: Any) -> torch.Tensor:
    """What a tokenizer draws of CODES: the grey value of the first pixel of each cell."""
    return (model.decode(CODES)[:, 0, ::2, ::2] * 255).round().long()


# Which decoder


@pytest.mark.parametrize(("choice", "lift"), [("auto", LIFT), ("sharp", LIFT), ("plain", 0)])
def test_the_chosen_decoder_draws(sharp: Path, choice: Any, lift: int) -> None:
    trained = load_trained_tokenizer(sharp, "cpu", decoder=choice)
    assert torch.equal(drawn(trained.model), levels(lift))
    assert torch.equal(drawn(load_tokenizer(sharp, decoder=choice)), levels(lift))
    assert trained.decoder == ("sharp" if lift else "plain")
    assert trained.info == read_info(sharp, "tokenizer")
    if lift:
        assert trained.decoder_info == read_info(sharp / "decoder", "decoder")
        assert trained.decoder_info is not None
        weights = (sharp / "decoder" / MODEL).read_bytes()
        assert trained.decoder_info.fingerprint == hashlib.sha256(weights).hexdigest()
        assert trained.decoder_folder == sharp / "decoder"
    else:
        assert trained.decoder_info is None
        assert trained.decoder_folder == sharp


def test_auto_is_the_sharp_one_and_the_plain_one_where_there_is_none(folder: Path) -> None:
    assert torch.equal(drawn(load_tokenizer(folder)), levels(0))
    add_sharp_decoder(folder)
    assert torch.equal(drawn(load_tokenizer(folder)), levels(LIFT))


def test_a_decoder_of_the_tokenizers_own_widths(folder: Path) -> None:
    info = read_info(folder, "tokenizer")
    save_decoder(folder / "decoder", lifted_decoder(), info, brightness_tokenizer().config)
    assert torch.equal(drawn(load_tokenizer(folder)), levels(LIFT))


def test_a_decoder_of_very_many_codes_need_not_be_as_large(folder: Path) -> None:
    """The number of codes is in its config, and in none of its weights."""
    info = read_info(folder, "tokenizer")
    save_decoder(folder / "decoder", wide_decoder(), info, replace(wide_config(), num_codes=2**24))
    assert torch.equal(drawn(load_tokenizer(folder)), levels(LIFT))


def test_the_plain_one_is_beside_the_sharp_one_without_a_second_encoder(sharp: Path) -> None:
    trained = load_trained_tokenizer(sharp, "cpu")
    plain = trained.with_plain_decoder()
    assert (plain.decoder, plain.decoder_info, plain.decoder_folder) == ("plain", None, sharp)
    assert torch.equal(drawn(plain.model), levels(0))
    assert torch.equal(drawn(trained.model), levels(LIFT))
    assert plain.model.encoder is trained.model.encoder
    assert plain.model.quantizer is trained.model.quantizer
    assert bits_of(plain.model) == bits_of(load_tokenizer(sharp, decoder="plain"))
    assert plain.plain_model is None
    assert plain.with_plain_decoder().model is plain.model
    assert plain.grid == trained.grid == GRID


@pytest.mark.parametrize("place", ["absent", "empty", "not saved yet"])
def test_a_sharp_one_that_is_not_there(folder: Path, place: str) -> None:
    """As before train-decoder has saved for the first time, and after a kill before that."""
    if place != "absent":
        (folder / "decoder").mkdir()
    if place == "not saved yet":
        for name in ("metrics.jsonl", "model.safetensors.new", "config.json.new"):
            (folder / "decoder" / name).write_text("{")
    assert load_trained_tokenizer(folder, "cpu").decoder == "plain"
    assert not has_sharp_decoder(folder)
    with pytest.raises(InputError) as error:
        load_tokenizer(folder, decoder="sharp")
    line = f"expected a sharp decoder in {folder / 'decoder'}, got none; run train-decoder, or omit --decoder sharp"
    assert str(error.value) == line


def test_the_first_save_counts_from_its_commit_on(sharp: Path) -> None:
    """A kill between the commit and the first rename leaves files of other names alone."""
    decoder = sharp / "decoder"
    for name in (MODEL, CONFIG):
        (decoder / name).rename(decoder / f"{name}.new")
    assert not has_sharp_decoder(sharp)
    (decoder / "commit.json").write_text(json.dumps([MODEL, CONFIG]))
    assert has_sharp_decoder(sharp)
    assert torch.equal(drawn(load_tokenizer(sharp)), levels(LIFT))


def test_a_link_to_a_folder_is_followed_and_one_to_nothing_refused(sharp: Path) -> None:
    (sharp / "decoder").rename(sharp.parent / "elsewhere")
    (sharp / "decoder").symlink_to(sharp.parent / "elsewhere")
    assert torch.equal(drawn(load_tokenizer(sharp)), levels(LIFT))
    (sharp.parent / "elsewhere").rename(sharp.parent / "away")
    for choice in ("auto", "sharp"):
        with pytest.raises(InputError, match=r"decoder, got a link that leads nowhere; move it away, or use --decoder"):
            load_tokenizer(sharp, decoder=choice)  # type: ignore[arg-type]
    assert not has_sharp_decoder(sharp)
    assert torch.equal(drawn(load_tokenizer(sharp, decoder="plain")), levels(0))


def test_a_file_of_that_name_is_refused_unless_the_plain_one_is_meant(folder: Path) -> None:
    (folder / "decoder").write_text("mine")
    with pytest.raises(InputError, match=r"wrote as .*decoder, got no folder; move it away, or use --decoder plain"):
        load_tokenizer(folder)
    assert not has_sharp_decoder(folder)
    assert torch.equal(drawn(load_tokenizer(folder, decoder="plain")), levels(0))


def test_a_folder_that_may_not_be_read(sharp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(InputError, match=r"to read .*decoder, got Permission denied; change its permissions"):
        find_sharp_decoder(sharp)


def test_the_plain_choice_opens_nothing_in_the_decoders_folder(sharp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor lists it: it may be on a disk that is gone."""
    listed = list[Path]()
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or [])
    with watched() as seen:
        load_tokenizer(sharp, decoder="plain")
    assert seen.opened
    assert not [path for path in seen.opened if "decoder" in path.parts]
    assert listed == []


def test_another_word_is_a_wrong_argument(folder: Path) -> None:
    with pytest.raises(ValueError, match="decoder: expected 'auto', 'plain' or 'sharp', got 'blurred'"):
        load_tokenizer(folder, decoder="blurred")  # type: ignore[arg-type]


@pytest.mark.parametrize("bottleneck", ["vae", "ae"])
def test_a_baseline_has_its_plain_decoder_alone(tmp_path: Path, bottleneck: Any) -> None:
    """What has that name beside it is not looked at, unless it is asked for."""
    out = tmp_path / "baseline"
    info = save_tokenizer(out, brightness_baseline(bottleneck))
    save_decoder(out / "decoder", wide_decoder(), info)
    trained = load_trained_autoencoder(out, "cpu")
    assert (trained.decoder, trained.with_plain_decoder().model) == ("plain", trained.model)
    assert bits_of(trained.model) == bits_of(brightness_baseline(bottleneck))
    with pytest.raises(InputError, match=f"a tokenizer with codes in .*, got one with --bottleneck {bottleneck}"):
        load_trained_autoencoder(out, "cpu", decoder="sharp")


# What is refused


def refused(folder: Path) -> str:
    """Return the line with which both choices that want the sharp decoder are refused; the plain one is loaded."""
    lines = set()
    for choice in ("auto", "sharp"):
        with pytest.raises(InputError) as error:
            load_tokenizer(folder, decoder=choice)  # type: ignore[arg-type]
        lines.add(str(error.value))
    assert torch.equal(drawn(load_tokenizer(folder, decoder="plain")), levels(0))
    (line,) = lines
    assert "\n" not in line
    assert "--decoder plain" in line
    return line


def test_a_decoder_of_another_tokenizer_is_refused_with_both_fingerprints(sharp: Path) -> None:
    """As after train-tokenizer has gone on in the folder."""
    before = read_info(sharp, "tokenizer").fingerprint
    model = brightness_tokenizer()
    with torch.no_grad():
        model.decoder.layers[0].weight[1] += 1  # unused: only the fingerprint changes
    after = save_tokenizer(sharp, model).fingerprint
    line = f"a decoder in {sharp / 'decoder'} made with this tokenizer (fingerprint {after}), got fingerprint {before}"
    assert refused(sharp) == f"expected {line}; run train-decoder again, or use --decoder plain"


OTHERS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "code_dim": ({"code_dim": 3}, {}, "codes of 3 dimensions and 2 pixels a side, for images of 8x12x1"),
    "downsample": ({"downsample": 4}, {}, "codes of 1 dimensions and 4 pixels a side, for images of 8x12x1"),
    "channels": (
        {"in_channels": 3},
        {"channels": 3},
        "for images of 8x12x3",
    ),
    "height": ({}, {"height": 10}, "for images of 10x12x1"),
    "width": ({}, {"width": 8}, "for images of 8x8x1"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_for_other_codes_or_images_is_refused(folder: Path, name: str) -> None:
    """Though it names the fingerprint of this tokenizer, and is a decoder."""
    fields, form, said = OTHERS[name]
    config, info = replace(wide_config(), **fields), read_info(folder, "tokenizer")
    save_decoder(folder / "decoder", Decoder(config), replace(info, preprocessing=info.preprocessing | form), config)
    line = refused(folder)
    assert "as the tokenizer has, got one of codes of" in line
    assert said in line.partition(", got ")[2]
    assert "codes of 1 dimensions and 2 pixels a side, for images of 8x12x1" in line.partition(", got ")[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_though_their_fingerprint_fits(folder: Path, value: float) -> None:
    decoder = wide_decoder()
    with torch.no_grad():
        decoder.layers[0].weight[1, 0, 0, 2] = value  # of a channel that nothing reads
    save_decoder(folder / "decoder", decoder, read_info(folder, "tokenizer"))
    line = refused(folder)
    assert f"the weights of a decoder in {folder / 'decoder' / MODEL}, got numbers that are not finite" in line
    assert "run train-decoder again, or use --decoder plain" in line


@pytest.mark.parametrize("name", ["hidden_channels", "residual_channels", "num_residual_layers", "code_dim"])
def test_a_config_of_sizes_beyond_the_weights_costs_no_memory(sharp: Path, name: str) -> None:
    change(sharp / "decoder", **{f"config__{name}": 2**31})
    with watched() as seen:
        line = refused(sharp)
    assert seen.peak < 2**26
    assert str(sharp / "decoder") in line


def test_a_prior_or_a_tokenizer_in_that_place_is_refused(folder: Path) -> None:
    info = save_tokenizer(folder / "decoder", brightness_tokenizer())
    assert f"a decoder checkpoint in {folder / 'decoder'}, got a tokenizer checkpoint" in refused(folder)
    shutil.rmtree(folder / "decoder")
    save_prior(folder / "decoder", tiny_prior(), info.fingerprint)
    assert "a decoder checkpoint" in refused(folder)


# Damage


@pytest.mark.parametrize("name", [MODEL, CONFIG])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_decoder_falls_back_to_the_save_before(
    folder: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    info, state = read_info(folder, "tokenizer"), TrainingState(tensors={"a": torch.zeros(2)}, values={})
    decoder = folder / "decoder"
    first = save_decoder(decoder, wide_decoder(17), info, state=state)
    save_decoder(decoder, wide_decoder(51), info, state=state, keep_previous=True)
    assert torch.equal(drawn(load_tokenizer(folder)), levels(51))
    assert not caplog.records
    DAMAGES[damage](decoder / name, np.random.default_rng(0))
    trained = load_trained_tokenizer(folder, "cpu")
    assert torch.equal(drawn(trained.model), levels(17))
    assert trained.decoder_info is not None
    assert trained.decoder_info.fingerprint == first.fingerprint
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert f"using the one before it, {decoder / PREVIOUS}" in warning
    shutil.rmtree(decoder / PREVIOUS)
    line = refused(folder)
    assert str(decoder) in line
    assert "train-decoder with --force to start anew, or use --decoder plain" in line


def test_a_missing_config_beside_weights_is_damage_and_not_a_missing_decoder(sharp: Path) -> None:
    (sharp / "decoder" / CONFIG).unlink()
    assert "no such file" in refused(sharp)


# Codes of images never change


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_codes_of_a_thousand_images_are_bit_identical(
    tmp_path: Path, image_folder: Path, channels: int, downsample: int
) -> None:
    """By a tokenizer that was trained for two steps; images of 16 x 32, the last block of them not full."""
    overrides: dict[str, Any] = {"data": str(image_folder), "image_size": (16, 32), "channels": channels}
    overrides |= {"downsample": downsample, "steps": 2, "precision": "fp32", "num_codes": 32, "code_dim": 3}
    overrides |= {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1}
    train_tokenizer(RunFolder(out=tmp_path / "plain", device="cpu"), overrides)
    with_random_decoder(tmp_path / "plain", tmp_path / "both")
    images = torch.rand(1000, channels, 16, 32, generator=torch.Generator().manual_seed(1))
    before = load_tokenizer(tmp_path / "plain")
    models = [before, *(load_tokenizer(tmp_path / "both", decoder=choice) for choice in ("auto", "sharp", "plain"))]
    codes = [torch.cat(list(encode_images(model, lambda a, b: images[a:b], len(images)))) for model in models]
    assert codes[0].shape == (len(images), 16 // downsample, 32 // downsample)
    assert codes[0].unique().numel() > 4
    assert all(torch.equal(each, codes[0]) for each in codes[1:])
    pictures = [model.decode(codes[0][:4]) for model in models]
    assert torch.equal(pictures[3], pictures[0])
    assert torch.equal(pictures[1], pictures[2])
    assert not torch.equal(pictures[1], pictures[0])


def test_an_old_prior_samples_the_same_codes_and_the_pictures_differ(trained: Trained, tmp_path: Path) -> None:
    """And exported codes are the same bytes; the prior's checkpoint is from before there was a decoder."""
    before = digest_of(trained.tokenizer)
    info = with_random_decoder(trained.tokenizer, tmp_path / "tokenizer")
    old = ImagePipeline.from_pretrained(trained.tokenizer, trained.prior, "cpu")
    new = ImagePipeline.from_pretrained(tmp_path / "tokenizer", trained.prior, "cpu")
    plain = ImagePipeline.from_pretrained(tmp_path / "tokenizer", trained.prior, "cpu", decoder="plain")
    (images, codes), (sharper, same), (again, _) = (each.sample(5, seed=3) for each in (old, new, plain))
    assert torch.equal(codes, same)
    assert torch.equal(images, again)
    assert not torch.equal(images, sharper)
    assert (old.decoder_info, plain.decoder_info) == (None, None)
    assert new.decoder_info == info
    tokenizer, prior = load_pair(tmp_path / "tokenizer", trained.prior, "cpu")
    assert prior.info.tokenizer_fingerprint == tokenizer.info.fingerprint != info.fingerprint
    export_codes(tmp_path / "tokenizer", tmp_path / "codes", shard_size=4, device="cpu")
    assert digest_of(tmp_path / "codes") == digest_of(trained.codes)
    assert {
        name: digest for name, digest in digest_of(tmp_path / "tokenizer").items() if "decoder" not in name
    } == before


def test_exporting_needs_no_decoder(sharp: Path, tmp_path: Path) -> None:
    """A damaged one does not stop it."""
    write_model(sharp / "decoder", b"")
    assert export_codes(sharp, tmp_path / "codes", device="cpu").count == len(open_images_of(sharp))


def open_images_of(folder: Path) -> Any:
    info: CheckpointInfo = read_info(folder, "tokenizer")
    return open_images(info.training["data"]).train


def test_the_words_of_the_files(sharp: Path) -> None:
    """config.json of a decoder, as the format says."""
    content = json.loads((sharp / "decoder" / CONFIG).read_text("utf-8"))
    assert content["kind"] == "decoder"
    assert content["tokenizer_fingerprint"] == read_info(sharp, "tokenizer").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", content["fingerprint"])
    assert TokenizerConfig(**content["config"]) == wide_config()


def test_a_run_of_a_decoder_can_be_resumed(folder: Path) -> None:
    """Its config is checked as that of a tokenizer is: against the shapes of its weights."""
    state = TrainingState(tensors={"a": torch.zeros(2)}, values={"step": 3})
    save_decoder(folder / "decoder", wide_decoder(), read_info(folder, "tokenizer"), state=state)
    saved = checkpoint.read_run(folder / "decoder", "decoder")
    assert config_of_run(saved, folder / "decoder", TokenizerConfig, Decoder) == wide_config()
    other = replace(saved, info=replace(saved.info, config=saved.info.config | {"hidden_channels": 6}))
    with pytest.raises(InputError, match="run train-decoder again"):
        config_of_run(other, folder / "decoder", TokenizerConfig, Decoder)
