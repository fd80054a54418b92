"""The default guidance of a prior: the smallest at which it recognises its samples, against a slow posterior.

Legend: n samples, H W grid of codes, C classes.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.generation import chosen_guidance
from pipeline.generation.chosen_guidance import SCALES, SURE, _labels, choose_guidance, recognised_share
from pipeline.generation.guidance import DEFAULT_GUIDANCE
from pipeline.models.checkpoint import add_metrics, read_info
from prior import GatedPixelCNN, sample_codes

from ..conftest import Codegrid, Trained
from ..support import GRID, tiny_prior

CLASSES = 3


@pytest.fixture
def prior() -> GatedPixelCNN:
    return tiny_prior(num_classes=CLASSES, label_dropout=0.1).eval()


def slow_posterior(prior: GatedPixelCNN, codes: Tensor, label: int) -> float:
    """p(label | codes [H,W]) with equally likely labels, one code at a time."""
    likelihoods = []
    for other in range(CLASSES):
        probabilities = prior(codes[None], torch.tensor([other])).double().softmax(dim=1)[0]
        product = 1.0
        for row in range(codes.shape[0]):
            for column in range(codes.shape[1]):
                product *= float(probabilities[codes[row, column], row, column])
        likelihoods.append(product)
    return likelihoods[label] / sum(likelihoods)


@pytest.mark.parametrize("guidance", [2.0, 4.0])
@torch.no_grad()
def test_the_share_is_the_mean_posterior_of_the_samples(prior: GatedPixelCNN, guidance: float) -> None:
    for parameter in prior.parameters():
        parameter *= 0.4  # as it is, it would be sure of all
    labels = torch.arange(5) % CLASSES
    generator = torch.Generator().manual_seed(7)
    codes = sample_codes(prior, 5, GRID, labels=labels, guidance=guidance, generator=generator)
    expected = [slow_posterior(prior, codes[n], int(labels[n])) for n in range(5)]
    found = recognised_share(prior, GRID, 5, guidance, 7)
    assert found == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert 1 / CLASSES < found < 0.99


def with_shares(patch: pytest.MonkeyPatch, *shares: float) -> list[tuple[float, int]]:
    """Make the prior recognise these shares at the scales in turn; return what was asked for."""
    asked: list[tuple[float, int]] = []

    def share(prior: GatedPixelCNN, grid: tuple[int, int], count: int, guidance: float, seed: int) -> float:
        asked.append((guidance, count))
        return shares[len(asked) - 1]

    patch.setattr(chosen_guidance, "recognised_share", share)
    return asked


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ((1.0,), 2.0),
        ((SURE,), 2.0),
        ((0.9989, 0.9991), 3.0),
        ((0.9, 0.99, 0.9995), 4.0),
        ((0.5, 0.6, 0.7), 4.0),
        ((0.998, 0.7, 0.6), 2.0),
        ((0.7, 0.998, 0.6), 3.0),
    ],
)
def test_the_smallest_at_which_it_is_sure_is_chosen(
    prior: GatedPixelCNN, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...], chosen: float
) -> None:
    asked = with_shares(monkeypatch, *shares)
    found = choose_guidance(prior, GRID)
    assert found.guidance == chosen
    assert found.recognised == dict(zip(SCALES, shares, strict=False))
    assert [scale for scale, _ in asked] == list(SCALES[: len(shares)])  # and nothing is measured in vain
    assert f"{chosen:g} is the default of sample" in found.in_words
    assert SCALES[0] == DEFAULT_GUIDANCE


@pytest.mark.parametrize(
    ("grid", "count"), [((8, 8), 512), ((4, 6), 512), ((16, 16), 128), ((32, 32), 32), ((64, 64), 32)]
)
def test_large_grids_are_sampled_less_often(
    prior: GatedPixelCNN, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], count: int
) -> None:
    monkeypatch.setattr(chosen_guidance, "FEWEST", 32)
    monkeypatch.setattr(chosen_guidance, "MOST", 512)
    asked = with_shares(monkeypatch, 1.0)
    choose_guidance(prior, grid)
    assert asked == [(2.0, count)]


def test_of_more_classes_than_samples_evenly_spaced_ones_are_sampled() -> None:
    assert _labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert _labels(3, 3).tolist() == [0, 1, 2]
    assert _labels(4, 10).tolist() == [0, 2, 5, 7]


# What training does with it


def test_training_ends_with_the_guidance_in_the_config(
    trained: Trained, tmp_path: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_shares(monkeypatch, 0.5, 1.0, 0.5, 0.6, 0.7)
    out = tmp_path / "prior"
    command = ("train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2, "--device", "cpu")
    outcome = codegrid(*command, "--steps", 2, "--out", out)
    assert outcome.status == 0
    assert (
        "guidance: the prior recognises 50.00% with 2, 100.00% with 3 of its samples, so 3 is the default"
        in outcome.out
    )
    info = read_info(out, "prior")
    assert info.metrics["guidance"] == 3
    assert len(asked) == 2
    again = codegrid(*command, "--steps", 2, "--out", out, "--resume")
    assert (again.status, len(asked), read_info(out, "prior")) == (0, 2, info)  # it is not measured twice
    assert codegrid(*command, "--steps", 3, "--out", out, "--resume").status == 0
    assert (len(asked), read_info(out, "prior").metrics["guidance"]) == (5, 4)


def test_a_run_that_was_killed_before_it_was_chosen_chooses_it_when_resumed(
    trained: Trained, tmp_path: Path, codegrid: Codegrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "prior"
    command = (
        "train-prior",
        "--codes",
        trained.codes,
        "--channels",
        4,
        "--num-layers",
        2,
        "--device",
        "cpu",
        "--out",
        out,
    )

    def stop(*arguments: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chosen_guidance, "recognised_share", stop)
        assert codegrid(*command, "--steps", 1).status == 130
    assert "guidance" not in read_info(out, "prior").metrics
    weights = (out / "model.safetensors").read_bytes()
    with_shares(monkeypatch, 1.0)
    assert codegrid(*command, "--steps", 1, "--resume").status == 0
    assert read_info(out, "prior").metrics["guidance"] == 2
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_prior_that_cannot_be_guided_has_none(trained: Trained, tmp_path: Path, codegrid: Codegrid) -> None:
    command = ("train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2, "--device", "cpu")
    assert codegrid(*command, "--label-dropout", 0, "--steps", 1, "--out", tmp_path / "prior").status == 0
    assert "guidance" not in read_info(tmp_path / "prior", "prior").metrics


def test_a_guidance_in_a_strangers_config_is_checked(trained: Trained, tmp_path: Path, codegrid: Codegrid) -> None:
    folder = shutil.copytree(trained.prior, tmp_path / "prior")
    add_metrics(folder, read_info(folder, "prior"), {"guidance": -1.0})
    outcome = codegrid("sample", "--tokenizer", trained.tokenizer, "--prior", folder, "--out", tmp_path / "samples")
    assert outcome.status == 1
    assert outcome.error_lines == ["Error: guidance: expected a finite number of 0 or more, got -1.0"]
