"""The committed prior of `tests/golden` still answers what it answered: logits to 1e-6, drawn codes exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from prior import GatedPixelCNN, PriorConfig

from ..golden.make_prior_golden import FOLDER, answers

ASKED = ("codes", "labels", "known")


@pytest.fixture
def golden_prior() -> GatedPixelCNN:
    prior = GatedPixelCNN(PriorConfig(**json.loads((FOLDER / "prior_config.json").read_text())))
    prior.load_state_dict(load_file(FOLDER / "prior_state.safetensors"), strict=True)
    return prior.eval()


def test_the_golden_prior_answers_as_before(golden_prior: GatedPixelCNN) -> None:
    expected = load_file(FOLDER / "prior_answers.safetensors")
    found = answers(golden_prior.double(), *(expected.pop(name) for name in ASKED))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = 1e-6 if value.is_floating_point() else 0
        torch.testing.assert_close(found[name], value, rtol=0, atol=error, msg=f"{name} is not what it was")


@torch.no_grad()
def test_the_golden_prior_answers_so_in_single_precision(golden_prior: GatedPixelCNN) -> None:
    expected = load_file(FOLDER / "prior_answers.safetensors")
    found = golden_prior(expected["codes"], expected["labels"])
    torch.testing.assert_close(found, expected["logits"].float(), rtol=1e-5, atol=1e-5)
