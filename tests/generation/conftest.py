"""Fixtures for the tests of generation: pipelines whose codes a reader knows, and one that was trained."""

from pathlib import Path

import pytest

from pipeline.generation.image_pipeline import ImagePipeline

from ..conftest import Trained
from ..support import brightness_tokenizer, save_prior, save_tokenizer, tiny_prior

CLASS_NAMES = ("2", "ring", "0")  # two of them look like the index of another


def pipeline_in(folder: Path, class_names: tuple[str, ...] = (), label_dropout: float = 0.0) -> ImagePipeline:
    """Save a brightness tokenizer and a small prior in `folder`, and load both."""
    fingerprint = save_tokenizer(folder / "tokenizer", brightness_tokenizer()).fingerprint
    prior = tiny_prior(num_classes=len(class_names), label_dropout=label_dropout)
    save_prior(folder / "prior", prior, fingerprint, class_names)
    return ImagePipeline.from_pretrained(str(folder / "tokenizer"), str(folder / "prior"), device="cpu")


@pytest.fixture
def labelled(tmp_path: Path) -> ImagePipeline:
    """A pipeline with the classes CLASS_NAMES."""
    return pipeline_in(tmp_path, CLASS_NAMES)


@pytest.fixture
def guided(tmp_path: Path) -> ImagePipeline:
    """A pipeline with the classes CLASS_NAMES, whose prior also knows "no label"."""
    return pipeline_in(tmp_path, CLASS_NAMES, label_dropout=0.1)


@pytest.fixture
def unlabelled(tmp_path: Path) -> ImagePipeline:
    """A pipeline without classes."""
    return pipeline_in(tmp_path)


@pytest.fixture
def colour(trained: Trained) -> ImagePipeline:
    """A pipeline with three classes and colour images, whose codes depend on pixels of other cells too."""
    return ImagePipeline.from_pretrained(trained.tokenizer, trained.prior, device="cpu")
