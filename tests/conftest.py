"""Fixtures for all tests: a cache of their own, a folder of labelled images, a small trained run, the command line."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

import cli
from pipeline.codes.export import export_codes
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior
from pipeline.training.train_tokenizer import train_tokenizer

from .support import HEIGHT, WIDTH, Outcome, fill_with_cells, torch_threads

settings.register_profile("same every time", derandomize=True, deadline=None, database=None)
settings.load_profile("same every time")

CLASS_NAMES = ("disc", "line", "été")  # in code point order, as the program has them


@pytest.fixture(scope="session", autouse=True)
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.setenv("CODEGRID_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_samples_tell_which_guidance_suits_a_prior() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.generation.chosen_guidance.MOST", 6)
        patch.setattr("pipeline.generation.chosen_guidance.FEWEST", 6)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_signal_is_ignored() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP; tests send both."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    chosen = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 RGB pictures, 8 high and 12 wide, in 3 classes; a space and an accent in the folder's name."""
    folder = tmp_path_factory.mktemp("images") / "twelve pictures à voir"
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    random = np.random.default_rng(0)
    for number in range(12):
        name = CLASS_NAMES[number % 3]
        top, left = random.integers(2, 6), random.integers(3, 9)
        inside = {
            "disc": (rows - top) ** 2 + (columns - left) ** 2 < 7,
            "été": (abs(rows - top) < 2) & (abs(columns - left) < 3),
            "line": columns == left,
        }[name]
        ground, figure = random.integers(0, 100, 3), random.integers(150, 256, 3)
        path = folder / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(inside[..., None], figure, ground).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def grey_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 grey pictures of the levels that `brightness_tokenizer` knows, in 3 classes."""
    names = [f"{name}/{i}.png" for name in CLASS_NAMES for i in range(7)][:20]
    return fill_with_cells(tmp_path_factory.mktemp("grey") / "levels", names)


@dataclass(frozen=True)
class Trained:
    """The folders of a short run of both stages."""

    images: Path
    tokenizer: Path
    codes: Path
    prior: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Trained:
    """Three steps of both stages on `image_folder`."""
    folder = tmp_path_factory.mktemp("trained")
    made = Trained(image_folder, folder / "tokenizer", folder / "codes", folder / "prior")
    small = {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "num_codes": 16, "code_dim": 4}
    common = {"steps": 3, "precision": "fp32"}
    train_tokenizer(RunFolder(out=made.tokenizer, device="cpu"), {"data": str(image_folder), **small, **common})
    export_codes(made.tokenizer, made.codes, shard_size=4, device="cpu")
    overrides = {"codes": str(made.codes), "tokenizer": str(made.tokenizer), "channels": 4, "num_layers": 2, **common}
    train_prior(RunFolder(out=made.prior, device="cpu"), overrides, made.tokenizer)
    return made


Codegrid = Callable[..., Outcome]


@pytest.fixture
def codegrid(capsys: pytest.CaptureFixture[str]) -> Codegrid:
    """`codegrid("sample", "--n", 3) -> Outcome`: the whole program, in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return run
