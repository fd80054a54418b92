"""Inception features, with torch-fidelity's own network and random weights; only one file is ever unpickled."""

import hashlib
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.evaluation import inception
from pipeline.evaluation.inception import inception_features, load_inception

from .feature_samples import torch_fidelity


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)


class SmallNetwork(nn.Module):
    """Stands in for torch-fidelity's: each feature is the mean of a channel."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: io.BytesIO) -> None:
        super().__init__()
        assert features == ["2048"]
        self.scale = nn.Parameter(torch.tensor(float(feature_extractor_weights_path.read())), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        means = images.float().mean(dim=(2, 3))  # [n,3]
        return (self.scale * means[:, torch.arange(2048) % 3],)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the small network in the place of torch-fidelity, which need not be installed then."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = SmallNetwork
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(inception, "find_spec", lambda name: object())


@pytest.fixture
def small(library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return weights for the small network, which then are the official ones."""
    return official(tmp_path / "any name.pth", b"2.0", monkeypatch)


def official(path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file and make it the official one."""
    path.write_bytes(data)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(inception, "WEIGHTS_BYTES", len(data))
    return path


def pictures(count: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, 5, 7), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 8])
def test_every_image_has_its_features(channels: int, count: int, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "BATCH", 4)
    images, loaded = pictures(count, channels), []

    def load(start: int, stop: int) -> Tensor:
        loaded.append((start, stop))
        return images[start:stop]

    found = inception_features(load_inception(small), load, count)
    means = images.double().mean(dim=(2, 3)).numpy()
    assert found.shape == (count, 2048)
    assert found.dtype == np.float32
    for channel in range(3):
        assert found[:, channel] == pytest.approx(2 * means[:, channel if channels == 3 else 0], rel=1e-6)
    assert loaded == [(start, min(start + 4, count)) for start in range(0, count, 4)]


def test_the_network_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the form of the official file, through the real class."""
    network_class = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with monkeypatch.context() as patched:
        patched.setattr(network_class, "load_state_dict", lambda self, state: None)
        expected: Any = network_class("random", ["2048"], feature_extractor_weights_path=nothing)
    content = io.BytesIO()
    torch.save(expected.state_dict(), content)
    weights = official(tmp_path / "weights.pth", content.getvalue(), monkeypatch)
    images = pictures(2, 3)
    found = inception_features(load_inception(weights), lambda start, stop: images[start:stop], 2)
    assert np.array_equal(found, expected(images)[0].numpy())
    assert found.std(axis=1).min() > 0
    assert not np.array_equal(found[0], found[1])


def test_the_official_file_is_the_one_that_torch_fidelity_downloads() -> None:
    module = torch_fidelity("feature_extractor_inceptionv3")
    assert module.URL_INCEPTION_V3 == inception.WEIGHTS_URL
    assert inception.WEIGHTS_SHA256[:8] in inception.WEIGHTS_NAME  # torch.hub's own check of a download


@pytest.mark.parametrize("size", ["smaller", "the same", "larger"])
def test_no_other_file_is_unpickled(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_fidelity("feature_extractor_inceptionv3")
    attack = pickle.dumps(Attack(tmp_path / "attacked"))
    path = tmp_path / inception.WEIGHTS_NAME
    path.write_bytes(attack)
    change = {"smaller": 1, "the same": 0, "larger": -1}[size]
    monkeypatch.setattr(inception, "WEIGHTS_BYTES", len(attack) + change)
    with pytest.raises(
        InputError, match=r"expected the Inception weights .*, got .* bytes.*; download them from https"
    ):
        load_inception(path)
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(RuntimeError):  # as no weights, but too late
        torch.load(path, weights_only=False)
    assert (tmp_path / "attacked").exists()


@pytest.mark.usefixtures("library")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, got in ((tmp_path / "none.pth", "no file"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"got {got}; download them from https://.*6726825d.pth") as error:
            load_inception(path)
        assert str(path) in str(error.value)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"expected the library torch-fidelity.*pip install 'codegrid\[fidelity\]'"):
        load_inception(tmp_path / "none.pth")


@pytest.mark.parametrize("images", [pictures(2, 3).float(), pictures(2, 2), pictures(2, 3)[0]])
def test_other_images_are_refused(images: Tensor, small: Path) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 images \[n,1 or 3,H,W\], got torch"):
        inception_features(load_inception(small), lambda start, stop: images, 2)
