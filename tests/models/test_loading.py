"""A trained model is one object: config, weights and fingerprint of the same save, also while training saves."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline import ImagePipeline, load_prior, load_tokenizer
from pipeline.codes.decode import decode_codes
from pipeline.codes.export import export_codes
from pipeline.compression.rate import measure_rate
from pipeline.errors import InputError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.reconstruction_picture import reconstruct_to_file
from pipeline.models import checkpoint
from pipeline.models.loading import load_pair

from ..conftest import CLASS_NAMES
from ..support import brightness_tokenizer, fill_with_cells, save_prior, save_tokenizer, tiny_prior

OLD, NEW = 16, 17  # numbers of codes, so that a config of one with the weights of the other cannot even be built
Result = TypeVar("Result")
READS = range(1, 7)  # of config and weights, each of both checkpoints; more than any function needs


def fingerprint_of(model: nn.Module) -> str:
    """The oracle: the SHA-256 of the weights in memory, as safetensors writes them."""
    return hashlib.sha256(safetensors.torch.save(dict(model.state_dict()))).hexdigest()


def after_read(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Call `act` right after the read of a checkpoint's file with this number, counted from 1."""
    real, reads = checkpoint.read_current, []

    def read_current(folder: Path, name: str, read: Callable[[Path], bytes]) -> bytes:
        data = real(folder, name, read)
        if name in (checkpoint.CONFIG, checkpoint.MODEL):
            reads.append(name)
            if len(reads) == number:
                act()
        return data

    patch.setattr(checkpoint, "read_current", read_current)


def attempt(act: Callable[[], Result]) -> Result | InputError:
    """Return what `act` returns, or the error for the user that it raises."""
    try:
        return act()
    except InputError as error:
        return error


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


class Pair:
    """A tokenizer and a prior over its codes, in two folders, and the models with which another run replaces them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer, self.prior = folder, folder / "tokenizer", folder / "prior"
        self.images = {codes: fill_with_cells(folder / f"images-{codes}", _names(codes), codes) for codes in (OLD, NEW)}

    def save_tokenizer(self, num_codes: int) -> str:
        model = brightness_tokenizer(num_codes)
        return save_tokenizer(self.tokenizer, model, self.images[num_codes], CLASS_NAMES).fingerprint

    def save_prior(self, num_codes: int) -> str:
        tokenizer = fingerprint_of(brightness_tokenizer(num_codes))
        return save_prior(self.prior, tiny_prior(num_codes, num_classes=3), tokenizer, CLASS_NAMES).fingerprint

    def save(self, num_codes: int) -> None:
        self.save_tokenizer(num_codes)
        self.save_prior(num_codes)


def _names(num_codes: int) -> list[str]:
    return [f"{name}/{num_codes}-{i}.png" for name in CLASS_NAMES for i in range(5)]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    made = Pair(tmp_path)
    made.save(OLD)
    return made


# Which device


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_every_loader_takes_the_name_of_a_device(pair: Pair, device: Any) -> None:
    """Compared with what the pipeline takes, whose default is auto."""
    pipeline = ImagePipeline.from_pretrained(pair.tokenizer, pair.prior, device=str(device))
    expected = next(pipeline.tokenizer.parameters()).device
    models: list[nn.Module] = [load_tokenizer(pair.tokenizer, device=device), load_prior(pair.prior, device=device)]
    for model in models:
        assert {parameter.device for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "cpu:x", "meta"])
def test_a_missing_device_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    for load in (load_tokenizer, load_prior):
        with pytest.raises(InputError, match=r"device .*got (none on this machine|nosuch|cpu:x|meta); |device, got"):
            load(tmp_path / "nosuch", device=device)


# One save


@pytest.mark.parametrize("number", READS)
def test_what_is_loaded_is_what_its_info_says(pair: Pair, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two a training run replaces while the pipeline reads, and when: they fit, or are refused."""
    for replace in (pair.save_tokenizer, pair.save_prior, pair.save):
        pair.save(OLD)
        with monkeypatch.context() as patch:
            after_read(patch, number, lambda replace=replace: replace(NEW))
            found = attempt(lambda: ImagePipeline.from_pretrained(pair.tokenizer, pair.prior, device="cpu"))
        if isinstance(found, InputError):
            assert "expected a prior in" in str(found)
            assert fingerprint_of(brightness_tokenizer(OLD)) in str(found)
            assert fingerprint_of(brightness_tokenizer(NEW)) in str(found)
            continue
        assert fingerprint_of(found.tokenizer) == found.tokenizer_info.fingerprint
        assert fingerprint_of(found.prior) == found.prior_info.fingerprint
        assert fingerprint_of(found.tokenizer) == found.prior_info.tokenizer_fingerprint
        assert found.tokenizer.config.num_codes == found.prior.config.num_codes


def test_the_prior_is_compared_with_the_tokenizer_that_was_loaded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the one that is in the folder when the prior is read."""
    with monkeypatch.context() as patch:
        after_read(patch, 2, lambda: pair.save_tokenizer(NEW))  # 1 is its config, 2 are its weights
        tokenizer, prior = load_pair(pair.tokenizer, pair.prior, "cpu")
    assert fingerprint_of(tokenizer.model) == fingerprint_of(brightness_tokenizer(OLD)) == tokenizer.info.fingerprint
    assert prior.info.tokenizer_fingerprint == tokenizer.info.fingerprint
    pair.save(OLD)
    with monkeypatch.context() as patch:
        after_read(patch, 2, lambda: pair.save(NEW))
        with pytest.raises(
            InputError, match=r"expected a prior in .*; name the tokenizer it was trained with, or train"
        ):
            load_pair(pair.tokenizer, pair.prior, "cpu")
    reloaded = load_pair(pair.tokenizer, pair.prior, "cpu")
    assert [trained.folder for trained in reloaded] == [pair.tokenizer, pair.prior]
    assert fingerprint_of(reloaded[0].model) == reloaded[1].info.tokenizer_fingerprint


def _decoded(pair: Pair) -> bytes:
    decode_codes(pair.folder / "codes", pair.tokenizer, pair.folder / "x.npy", device="cpu", force=True)
    return (pair.folder / "x.npy").read_bytes()


def _picture(pair: Pair) -> bytes:
    path = reconstruct_to_file(pair.tokenizer, pair.folder / "x.png", split="train", device="cpu", force=True)
    return path.read_bytes()


def _exported(pair: Pair) -> list[bytes]:
    export_codes(pair.tokenizer, pair.folder / "new", device="cpu", force=True)
    return [path.read_bytes() for path in sorted((pair.folder / "new").iterdir())]


COMMANDS: dict[str, Callable[[Pair], Any]] = {
    "evaluate": lambda pair: evaluate(pair.tokenizer, pair.prior, split="train", device="cpu").to_json(),
    "evaluate a tokenizer": lambda pair: evaluate(pair.tokenizer, split="train", device="cpu").to_json(),
    "measure-rate": lambda pair: measure_rate(pair.tokenizer, splits=["train"], device="cpu").to_json(),
    "reconstruct": _picture,
    "export-codes": _exported,
    "decode-codes": _decoded,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_uses_the_checkpoint_of_one_save(pair: Pair, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images, weights and fingerprint are all of the old run, or all of the new one; or it refuses."""
    run = COMMANDS[command]
    export_codes(pair.tokenizer, pair.folder / "codes", device="cpu")
    consistent = [run(pair)]
    pair.save(NEW)
    if command != "decode-codes":  # which refuses codes of another tokenizer
        consistent.append(run(pair))
        assert consistent[0] != consistent[1]
    refused = 0
    for number in range(1, 5):
        pair.save(OLD)
        with monkeypatch.context() as patch:
            after_read(patch, number, lambda: pair.save(NEW))
            found = attempt(lambda: run(pair))
        if isinstance(found, InputError):
            assert "made with this tokenizer" in str(found)
            refused += 1
        else:
            assert found in consistent
    assert refused < 4
