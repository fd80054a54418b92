"""The golden files: states and answers as they were written by `tests/golden/make_tokenizer_golden.py`.

A change that is meant to be neutral leaves codes equal and numbers within 1e-6.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenizer import VQVAE, TokenizerConfig, VectorQuantizer
from tokenizer.config import CodebookUpdate

from ..golden.make_tokenizer_golden import FOLDER, QUANTIZER, answers, steps
from .oracles import UPDATES


def assert_as_written(told: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    assert told.keys() == written.keys()
    for name, expected in written.items():
        if expected.is_floating_point():
            close = torch.allclose(told[name], expected, rtol=1e-6, atol=1e-6)
            assert close, f"{name} is not what it was"
        else:
            assert torch.equal(told[name], expected), name


def test_a_tokenizer_answers_as_it_did() -> None:
    model = VQVAE(TokenizerConfig(**json.loads((FOLDER / "tokenizer_config.json").read_text())))
    model.load_state_dict(load_file(FOLDER / "tokenizer_state.safetensors"))
    written = load_file(FOLDER / "tokenizer_answers.safetensors")
    images = written.pop("images")
    assert_as_written(answers(model, images), written)


@pytest.mark.parametrize("update", UPDATES)
def test_a_codebook_learns_as_it_did(update: CodebookUpdate) -> None:
    written = load_file(FOLDER / "tokenizer_steps.safetensors")
    quantizer = VectorQuantizer(**QUANTIZER, codebook_update=update)
    quantizer.set_codebook(written["codebook"])
    all_told = list(steps(quantizer, written["batches"]))
    assert len(all_told) == len(written["batches"]) > 1
    for number, told in enumerate(all_told):
        prefix = f"{update}.{number}."
        assert_as_written(
            told, {name.removeprefix(prefix): t for name, t in written.items() if name.startswith(prefix)}
        )
