"""Weights that are finite, and numbers of the model that are not: every command refuses them in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ..conftest import Codegrid
from ..support import brightness_tokenizer, save_prior, save_tokenizer, tiny_prior

LARGEST = torch.finfo(torch.float32).max


def overflowing(model: nn.Module, where: str) -> nn.Module:
    """Return the model with the largest weights that float32 has in the modules whose name starts with `where`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(where):
                parameter.copy_(torch.where(parameter >= 0, LARGEST, -LARGEST))
    return model


@pytest.fixture
def folders(tmp_path: Path, grey_folder: Path, where: str) -> tuple[Path, Path]:
    """A tokenizer and a prior, of which one overflows."""
    tokenizer, prior = brightness_tokenizer(), tiny_prior()
    if where == "prior":
        overflowing(prior, "")
    else:
        torch.manual_seed(0)
        for parameter in tokenizer.decoder.parameters():
            nn.init.normal_(parameter)
        overflowing(tokenizer, "decoder")
    info = save_tokenizer(tmp_path / "tokenizer", tokenizer, grey_folder)
    save_prior(tmp_path / "prior", prior, info.fingerprint)
    return tmp_path / "tokenizer", tmp_path / "prior"


Command = Callable[[Path, Path, Path], list[object]]
COMMANDS: dict[str, Command] = {
    "evaluate": lambda out, image, prior: ["evaluate", "--prior", prior, "--split", "train", "--json", out],
    "evaluate, picture": lambda out, image, prior: [
        *("evaluate", "--prior", prior, "--split", "train", "--picture", out / "x.png")
    ],
    "measure-rate": lambda out, image, prior: ["measure-rate", "--prior", prior, "--n", 3, "--json", out],
    "sample": lambda out, image, prior: ["sample", "--prior", prior, "--n", 2, "--out", out],
    "sample, greedy": lambda out, image, prior: [
        "sample",
        "--prior",
        prior,
        "--temperature",
        0,
        "--n",
        2,
        "--out",
        out,
    ],
    "complete": lambda out, image, prior: [
        *("complete", "--prior", prior, "--image", image, "--keep", "top", "--n", 2, "--candidates", 3, "--out", out)
    ],
    "complete, beside": lambda out, image, prior: [
        *("complete", "--prior", prior, "--image", image, "--keep", "right", "--n", 2, "--candidates", 3, "--out", out)
    ],
}


CASES = [(where, command) for where in ("prior", "decoder") for command in COMMANDS]


@pytest.mark.parametrize(("where", "command"), CASES)
def test_numbers_that_are_not_finite_are_refused_in_one_line(
    folders: tuple[Path, Path], command: str, tmp_path: Path, grey_folder: Path, codegrid: Codegrid
) -> None:
    """With status 1, and no file is written."""
    tokenizer, prior = folders
    image, out = next(grey_folder.rglob("*.png")), tmp_path / "out"
    outcome = codegrid(*COMMANDS[command](out, image, prior), "--tokenizer", tokenizer, "--device", "cpu")
    assert outcome.status == 1, outcome
    (line,) = outcome.error_lines
    assert line.startswith("Error: expected finite ")
    assert "nan" not in outcome.out
    assert not out.exists() or not list(out.rglob("*"))


@pytest.mark.parametrize("where", ["prior", "decoder"])
def test_a_tokenizer_alone_is_refused_too(
    folders: tuple[Path, Path], where: str, tmp_path: Path, codegrid: Codegrid
) -> None:
    outcome = codegrid("evaluate", "--tokenizer", folders[0], "--split", "train", "--device", "cpu")
    assert outcome.status == (0 if where == "prior" else 1)
    assert len(outcome.error_lines) == outcome.status
