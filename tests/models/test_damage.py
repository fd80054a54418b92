"""Loading a damaged checkpoint: it is refused in a line that names the file, or the save before it is loaded."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import ImagePipeline, load_prior, load_tokenizer
from pipeline.errors import InputError
from pipeline.evaluation.evaluate import evaluate
from pipeline.models import checkpoint
from pipeline.models.checkpoint import (
    CONFIG,
    MODEL,
    PREVIOUS,
    TRAINING,
    CheckpointInfo,
    TrainingState,
    read_run,
    save_checkpoint,
)

from ..mutations import DAMAGES, IRREGULAR
from ..support import bits_of, brightness_tokenizer, digest_of, save_prior, save_tokenizer, tiny_prior


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


@dataclass(frozen=True)
class Pair:
    """A tokenizer and a prior, each saved twice; the tokenizer's weights are the same, the prior's are not."""

    tokenizer: Path
    prior: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Pair:
    pair = Pair(*(tmp_path_factory.mktemp("saved") / name for name in ("tokenizer", "prior")))
    info = save_tokenizer(pair.tokenizer, brightness_tokenizer(), grey_folder)
    save_twice(pair.tokenizer, info, brightness_tokenizer(), brightness_tokenizer())
    save_twice(pair.prior, save_prior(pair.prior, tiny_prior(), info.fingerprint), tiny_prior(), tiny_prior(seed=1))
    return pair


def save_twice(folder: Path, info: CheckpointInfo, before: nn.Module, last: nn.Module) -> None:
    state = TrainingState(tensors={"a": torch.zeros(2)}, values={})
    save_checkpoint(folder, info, before.state_dict(), state)
    save_checkpoint(folder, info, last.state_dict(), state, keep_previous=True)
    assert {path.name for path in (folder / PREVIOUS).iterdir()} == {MODEL, CONFIG, TRAINING}


@pytest.fixture
def pair(saved: Pair, tmp_path: Path) -> Pair:
    return Pair(*(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (saved.tokenizer, saved.prior)))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def flips(path: Path, count: int) -> Iterator[int]:
    """Flip one bit at `count` places of a file in turn, each time in the undamaged file; yield the place."""
    data = path.read_bytes()
    for place in range(0, len(data), -(-len(data) // count)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        yield place
    path.write_bytes(data)


def spoil(path: Path, damage: str) -> None:
    if damage in DAMAGES:
        DAMAGES[damage](path, np.random.default_rng(0))
    else:
        IRREGULAR[damage](path)


def refused(load: Callable[[], object], path: Path) -> None:
    with pytest.raises(InputError) as error:
        load()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
@pytest.mark.parametrize("name", [MODEL, CONFIG])
def test_one_bit_anywhere_is_refused_without_a_save_before(
    pair: Pair, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 90 places of each file. A checksum whose key is spoiled protects nothing, and nothing else is spoiled."""
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 1)
    folder, load = getattr(pair, kind), {"tokenizer": load_tokenizer, "prior": load_prior}[kind]
    shutil.rmtree(folder / PREVIOUS)
    expected, loaded = bits_of(load(folder)), []
    for place in flips(folder / name, 90):
        if name == CONFIG and b'"checksum"' not in (folder / name).read_bytes():
            try:
                loaded.append(place)
                assert bits_of(load(folder)) == expected
            except InputError:
                pass
            continue
        refused(lambda: load(folder), folder / name)
    assert len(loaded) <= 3
    assert bits_of(load(folder)) == expected


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
@pytest.mark.parametrize("name", [MODEL, CONFIG])
@pytest.mark.parametrize("damage", [*DAMAGES, *IRREGULAR])
def test_damage_is_refused_without_a_save_before_and_else_that_is_loaded(
    pair: Pair, kind: str, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, load = getattr(pair, kind), {"tokenizer": load_tokenizer, "prior": load_prior}[kind]
    before = bits_of(load(folder / PREVIOUS))
    spoil(folder / name, damage)
    assert bits_of(load(folder)) == before
    (warning,) = warnings_in(caplog)
    assert str(folder / name) in warning
    assert f"using the one before it, {folder / PREVIOUS}" in warning
    (folder / PREVIOUS / name).unlink()
    refused(lambda: load(folder), folder / name)


@pytest.mark.parametrize("damage", [*DAMAGES, *IRREGULAR])
def test_the_state_to_resume_from_does_not_matter_to_a_reader(pair: Pair, damage: str) -> None:
    spoil(pair.prior / TRAINING, damage)
    load_prior(pair.prior)


def test_a_file_of_the_save_before_in_the_place_of_the_last_is_noticed(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    before = bits_of(load_prior(pair.prior / PREVIOUS))
    shutil.copy(pair.prior / PREVIOUS / MODEL, pair.prior / MODEL)
    assert bits_of(load_prior(pair.prior)) == before
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_pipeline_and_evaluate_measure_the_save_before(
    pair: Pair, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their numbers are those of the save before, read alone; and nothing in the folders changes."""
    expected = evaluate(pair.tokenizer, pair.prior / PREVIOUS, split="train", device="cpu")
    other = evaluate(pair.tokenizer, pair.prior, split="train", device="cpu")
    assert expected.likelihood != other.likelihood
    spoil(pair.prior / MODEL, damage)
    before = digest_of(pair.prior)
    assert evaluate(pair.tokenizer, pair.prior, split="train", device="cpu") == expected
    pipeline = ImagePipeline.from_pretrained(pair.tokenizer, pair.prior, device="cpu")
    assert bits_of(pipeline.prior) == bits_of(load_prior(pair.prior / PREVIOUS))
    assert len(warnings_in(caplog)) == 2
    shutil.rmtree(pair.prior / PREVIOUS)
    refused(lambda: ImagePipeline.from_pretrained(pair.tokenizer, pair.prior, device="cpu"), pair.prior / MODEL)
    refused(lambda: evaluate(pair.tokenizer, pair.prior, device="cpu"), pair.prior / MODEL)
    assert {name: digest for name, digest in before.items() if PREVIOUS not in name} == digest_of(pair.prior)


def test_a_reader_at_any_moment_of_a_save_sees_one_of_the_two_without_a_warning(
    pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader loads before and after each rename, while the files that are replaced are kept."""
    real, seen = os.replace, []
    info = checkpoint.read_info(pair.prior, "prior")
    models = [bits_of(load_prior(pair.prior)), bits_of(tiny_prior(seed=2))]

    def look_and_rename(source: Path, target: Path) -> None:
        seen.append(models.index(bits_of(load_prior(pair.prior))))
        real(source, target)
        seen.append(models.index(bits_of(load_prior(pair.prior))))

    monkeypatch.setattr(os, "replace", look_and_rename)
    state = checkpoint.load_training(pair.prior)
    save_checkpoint(pair.prior, info, tiny_prior(seed=2).state_dict(), state, keep_previous=True)
    assert seen == sorted(seen)
    assert len(seen) == 2 * (1 + 3 * 2)  # the commit; three files, each moved away and replaced
    assert not warnings_in(caplog)


def test_weights_that_are_not_finite_are_refused_though_their_fingerprint_fits(pair: Pair) -> None:
    prior = tiny_prior()
    with torch.no_grad():
        next(prior.parameters()).view(-1)[0] = torch.nan
    save_prior(pair.prior, prior, checkpoint.read_info(pair.tokenizer, "tokenizer").fingerprint)
    refused(lambda: load_prior(pair.prior), pair.prior / MODEL)


@pytest.mark.parametrize("name", [CONFIG, MODEL, TRAINING])
def test_a_file_that_may_not_be_read_is_not_damaged(
    pair: Pair, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a run would resume from the save before, and replace the last, for want of a permission."""

    def read_current(folder: Path, wanted: str, read: Callable[[Path], bytes]) -> bytes:
        if folder == pair.prior and wanted == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / wanted))
        return read(folder / wanted)

    monkeypatch.setattr(checkpoint, "read_current", read_current)
    with pytest.raises(InputError, match=rf"read .*{name}, got Permission denied; change its permissions"):
        read_run(pair.prior, "prior")
    assert not warnings_in(caplog)


def test_damaged_weights_are_read_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read again only while the config changes too, as it does where a training run replaces both."""
    read: list[Path] = []

    def read_tensor_file(path: Path, check: Any) -> bytes:
        read.append(path)
        return real(path, check)

    real = checkpoint.read_tensor_file
    monkeypatch.setattr(checkpoint, "read_tensor_file", read_tensor_file)
    path = pair.prior / MODEL
    DAMAGES["one bit"](path, np.random.default_rng(0))
    load_prior(pair.prior)
    assert read == [path, pair.prior / PREVIOUS / MODEL]
