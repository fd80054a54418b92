"""Checkpoints: what is loaded is what was saved, bit for bit, or the user is told what is wrong in one line."""

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.errors import InputError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import (
    FORMAT_VERSION,
    CheckpointInfo,
    TrainingState,
    check_same_tokenizer,
    load_training,
    read_info,
    save_checkpoint,
)
from pipeline.models.loading import load_prior, load_tokenizer
from pipeline.runtime.sealed_json import sealed
from tokenizer import VQVAE, TokenizerConfig

from ..conftest import Codegrid
from ..support import (
    HEIGHT,
    WIDTH,
    bits_of,
    brightness_tokenizer,
    digest_of,
    load_weights,
    save_prior,
    save_tokenizer,
    tiny_prior,
)


@pytest.fixture
def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TokenizerConfig(hidden_channels=4, residual_channels=2, num_codes=6, code_dim=3))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: VQVAE) -> Path:
    save_tokenizer(tmp_path / "run", tokenizer, class_names=["a", "é"])
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("expected ")
    return str(error.value)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of config.json, on purpose: its checksum fits."""
    path = folder / "config.json"
    content = json.loads(path.read_text("utf-8")) | changes
    del content["checksum"]
    path.write_bytes(sealed(content))


def replace_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write other weights, with their fingerprint."""
    data = safetensors.torch.save(weights)
    (folder / "model.safetensors").write_bytes(data)
    rewrite(folder, fingerprint=hashlib.sha256(data).hexdigest())


# Round trip


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_a_tokenizer_comes_back_bit_for_bit(tmp_path: Path, codebook_update: Any) -> None:
    """Also counts, sums and the state of the codebook (E10), so that a further step is the same one."""
    torch.manual_seed(0)
    config = TokenizerConfig(hidden_channels=4, residual_channels=2, num_codes=6, codebook_update=codebook_update)
    model, images = VQVAE(config), torch.rand(2, 3, HEIGHT, WIDTH)
    model.train()(images)
    save_tokenizer(tmp_path, model)
    loaded = load_tokenizer(tmp_path)
    assert not loaded.training
    assert loaded.config == config
    assert bits_of(loaded) == bits_of(model)
    assert torch.equal(loaded.encode(images), model.encode(images))
    steps = []
    for either in (model, loaded):
        torch.manual_seed(1)
        steps.append((either.train()(images).loss.item(), bits_of(either)))
    assert steps[0] == steps[1]
    assert steps[0][1] != bits_of(load_tokenizer(tmp_path))  # the step did move something


def test_a_prior_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_prior(num_classes=3)
    save_prior(tmp_path, model, "f" * 64, ["a", "b", "c"])
    loaded = load_prior(str(tmp_path))
    assert not loaded.training
    assert loaded.config == model.config
    assert bits_of(loaded) == bits_of(model)
    assert read_info(tmp_path, "prior").tokenizer_fingerprint == "f" * 64


def test_the_info_comes_back_with_fingerprint_and_versions(tmp_path: Path, tokenizer: VQVAE) -> None:
    info = CheckpointInfo(
        kind="tokenizer",
        config=asdict(tokenizer.config),
        step=12,
        class_names=["b", "été", "0"],
        preprocessing={"height": HEIGHT, "width": WIDTH, "channels": 3},
        training={"data": "/some/où", "lr": 1e-3, "image_size": [8, 12], "seed": 2**40},
        metrics={"nmse": 0.1},
    )
    written = save_checkpoint(tmp_path, info, tokenizer.state_dict())
    assert read_info(tmp_path, "tokenizer") == written
    assert replace(written, fingerprint="", versions={}) == info
    assert {"torch", "numpy"} <= set(written.versions)
    content = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert set(content) == {field.name for field in fields(CheckpointInfo)} | {"checksum"}
    assert content["format_version"] == FORMAT_VERSION


def test_the_fingerprint_is_the_sha256_of_the_weights(saved: Path, tokenizer: VQVAE) -> None:
    fingerprint = read_info(saved, "tokenizer").fingerprint
    assert fingerprint == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        tokenizer.quantizer.codebook[0, 0] += 1e-6
    assert save_tokenizer(saved, tokenizer).fingerprint != fingerprint


def test_anyone_reads_the_weights_with_safetensors(saved: Path, tokenizer: VQVAE) -> None:
    found = safetensors.torch.load_file(saved / "model.safetensors")
    assert found.keys() == tokenizer.state_dict().keys() == load_weights(saved).keys()
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_weights_that_are_views_are_saved_as_they_look(tmp_path: Path, tokenizer: VQVAE) -> None:
    weights = dict(tokenizer.state_dict())
    transposed = torch.randn(3, 6).T  # not contiguous
    weights["quantizer.codebook"] = transposed
    save_checkpoint(tmp_path, save_tokenizer(tmp_path, tokenizer), weights)
    assert torch.equal(load_tokenizer(tmp_path).quantizer.codebook, transposed)


def test_the_training_state_comes_back(tmp_path: Path, tokenizer: VQVAE) -> None:
    tensors = {"random/cpu": torch.get_rng_state(), "a/0/step": torch.tensor(3.0), "b": torch.randn(2, 3).T}
    state = TrainingState(tensors=tensors, values={"step": 3, "best": {"nmse": 0.1 + 0.2}})
    save_tokenizer(tmp_path, tokenizer, state=state)
    found = load_training(tmp_path)
    assert found.values == state.values
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert all(found.tensors[name].dtype == tensors[name].dtype for name in tensors)


def test_a_checkpoint_of_a_later_version_with_more_fields_is_read(saved: Path) -> None:
    rewrite(saved, something_new=[1, 2])
    assert read_info(saved, "tokenizer").class_names == ["a", "é"]


# What is refused


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path / "nosuch")
    assert "no such folder; run train-tokenizer or name another" in one_line(error)
    with pytest.raises(InputError) as error:
        load_prior(tmp_path)
    assert "got a folder without config.json; run train-prior" in one_line(error)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no such folder"):
        load_prior(tmp_path / "file")


def test_the_other_kind(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_prior(saved)
    assert "expected a prior checkpoint" in one_line(error)
    assert "got a tokenizer checkpoint; name the folder that train-prior wrote" in one_line(error)
    save_prior(tmp_path / "prior", tiny_prior(), "")
    with pytest.raises(InputError, match="got a prior checkpoint; name the folder that train-tokenizer wrote"):
        load_tokenizer(tmp_path / "prior")


@pytest.mark.parametrize("version", [1, FORMAT_VERSION + 1])
def test_another_format_version(saved: Path, version: int, codegrid: Codegrid) -> None:
    """Older or newer: reported before its config or its weights are read, and the same by the program."""
    rewrite(saved, format_version=version, config={"of": "another network"})
    before = digest_of(saved)
    expected = f"expected format version {FORMAT_VERSION} in {saved / 'config.json'}"
    message = f"{expected}, got {version}; use the version of codegrid that wrote it"
    for read in (load_tokenizer, lambda folder: read_info(folder, "tokenizer")):
        with pytest.raises(InputError) as error:
            read(saved)
        assert one_line(error) == message
    for command in (["evaluate", "--tokenizer", saved], ["train-tokenizer", "--out", saved, "--resume"]):
        outcome = codegrid(*command)
        assert (outcome.status, outcome.error_lines) == (1, [f"Error: {message}"])
    assert digest_of(saved) == before


@pytest.mark.parametrize("length", [0, 1, 7, 100, -1])
def test_a_truncated_file(saved: Path, length: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError) as error:
        load_tokenizer(saved)
    assert "restore the folder from a copy, or train-tokenizer with --force" in one_line(error)


def test_missing_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match="got no such file; restore"):
        load_tokenizer(saved)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.999])
def test_one_bit_flipped(saved: Path, place: float) -> None:
    """In the length of the header, the header, the weights, the last weight."""
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        load_tokenizer(saved)
    assert "with the fingerprint" in one_line(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"{}", b'"text"', b'{"model_type": "vqvae", "hidden_size": 3}'],
)
def test_a_config_of_another_program(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    for read in (load_tokenizer, load_prior):
        with pytest.raises(InputError) as error:
            read(saved)
        assert str(saved / "config.json") in one_line(error)


@pytest.mark.parametrize(
    "config",
    [
        {"num_codes": 7},  # the weights have 6
        {"num_codes": 1},  # out of range
        {"hidden_channels": 6},
        {"no_such_field": 1},
        {"num_codes": "many"},
    ],
)
def test_a_config_that_does_not_fit_the_weights(saved: Path, tokenizer: VQVAE, config: dict[str, Any]) -> None:
    rewrite(saved, config=asdict(tokenizer.config) | config)
    with pytest.raises(InputError) as error:
        load_tokenizer(saved)
    assert "expected the weights of a tokenizer in" in one_line(error)


def test_loading_is_strict(saved: Path, tokenizer: VQVAE) -> None:
    """D3: no tensor may be missing, unexpected or renamed."""
    complete = dict(tokenizer.state_dict())
    missing = {name: tensor for name, tensor in complete.items() if name != "quantizer.counts"}
    renamed = {f"module.{name}": tensor for name, tensor in complete.items()}
    for weights in (missing, complete | {"extra": torch.zeros(1)}, renamed):
        replace_weights(saved, weights)
        with pytest.raises(InputError, match=r"got no |got the unknown "):
            load_tokenizer(saved)
    replace_weights(saved, complete)
    assert bits_of(load_tokenizer(saved)) == bits_of(tokenizer)


def test_no_training_state_or_a_broken_one(saved: Path, tokenizer: VQVAE) -> None:
    with pytest.raises(InputError) as error:
        load_training(saved)
    assert "training.safetensors" in one_line(error)
    save_tokenizer(saved, tokenizer, state=TrainingState(tensors={"a": torch.zeros(2)}, values={}))
    path = saved / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="or train with --force to start anew"):
        load_training(saved)


def test_a_training_state_of_another_program(saved: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, saved / "training.safetensors")
    with pytest.raises(InputError, match=r"expected the training state .*, got a file that cannot be read"):
        load_training(saved)


def test_both_fingerprints_are_named() -> None:
    check_same_tokenizer("a" * 64, "a" * 64, "codes", "do this")
    with pytest.raises(InputError, match=f"codes made with this .*{'a' * 64}.*, got fingerprint {'b' * 64}; do this"):
        check_same_tokenizer("a" * 64, "b" * 64, "codes", "do this")


def test_reading_changes_nothing(saved: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()}
    load_tokenizer(saved)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()} == before


def test_a_brightness_tokenizer_does_what_its_docstring_says() -> None:
    """The oracle of other tests, checked here against itself."""
    model, codes = brightness_tokenizer(), torch.randint(16, (3, 4, 6))
    images = model.decode(codes)
    expected = (codes / 15).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None]
    torch.testing.assert_close(images, expected)
    assert torch.equal(model.encode(images), codes)
