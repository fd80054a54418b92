"""Labels: from the numbering of a data set to that of a prior. `resolve_labels` is tested with `ImagePipeline`."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.models.labels import all_labelled, match_labels
from pipeline.models.loading import TrainedPrior, load_trained_prior

from ..support import save_prior, tiny_prior


def prior_of(folder: Path, class_names: list[str]) -> TrainedPrior:
    save_prior(folder, tiny_prior(num_classes=len(class_names)), "", class_names)
    return load_trained_prior(folder, "cpu")


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    """The data set has fewer classes than the prior, in another order."""
    prior = prior_of(tmp_path, ["cat", "dog", "été"])
    data = ("été", "cat")
    found = match_labels(np.array([0, 1, 1, 0]), data, prior)
    assert [prior.info.class_names[label] for label in found] == ["été", "cat", "cat", "été"]
    assert found.dtype == np.int64


def test_a_prior_without_classes_needs_no_labels(tmp_path: Path) -> None:
    labels = np.array([-1, 4])
    assert match_labels(labels, (), prior_of(tmp_path, [])) is labels


@pytest.mark.parametrize(
    ("labels", "class_names", "got"),
    [
        ([0, 1], ("cat", "cow"), "the class cow"),
        ([0, -1], ("cat", "dog"), "images without labels"),
        ([-1, -1], (), "images without labels"),
    ],
)
def test_labels_that_the_prior_does_not_know(
    tmp_path: Path, labels: list[int], class_names: tuple[str, ...], got: str
) -> None:
    expected = rf"labelled with the prior's classes \(cat, dog\), got {got}; use images with those classes"
    with pytest.raises(InputError, match=expected):
        match_labels(np.array(labels), class_names, prior_of(tmp_path, ["cat", "dog"]))


def test_all_are_labelled_only_if_there_are_classes_and_no_label_is_missing() -> None:
    shards = [np.array([0, 1]), np.array([1])]
    assert all_labelled(["a", "b"], shards)
    assert not all_labelled([], shards)
    assert not all_labelled(["a", "b"], [*shards, np.array([1, -1])])
