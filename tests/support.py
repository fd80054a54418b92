"""What the tests of the pipeline share: images a reader checks by eye, and a tokenizer whose codes are known.

A "brightness" tokenizer is a real `VQVAE` with weights set by hand: the code of a cell of 2x2 pixels is the level
nearest to the mean of the cell, and a code decodes to a cell of that level. With 16 codes, grey value 17 k is code k.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.checkpoint import CheckpointInfo, TrainingState, save_checkpoint
from prior import GatedPixelCNN, PriorConfig
from tokenizer import VQVAE, Baseline, TokenizerConfig
from tokenizer.config import Bottleneck

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH, CELL = 8, 12, 2  # pixels
GRID = (HEIGHT // CELL, WIDTH // CELL)
LEVELS = 16
STEP = 255 // (LEVELS - 1)  # grey values between two levels
LOUD = 2.0**20  # of an input this large, ReLU and SiLU are the identity to the last bit


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """The lines on standard error that tell no progress."""
        lines = [line.strip() for line in self.err.splitlines()]
        return [line for line in lines if line and not re.search(r"\d of [\d,]+ .*\(\d+ %\)", line)]


def as_a_program(*arguments: object, cwd: Path) -> Outcome:
    """Run `python cli.py ...` in a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for the duration, and afterwards as many as before, whatever happens."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def brightness_tokenizer(num_codes: int = LEVELS, *, data_variance: float = 1.0) -> VQVAE:
    """Return a tokenizer of grey images, whose code k of a 2x2 cell means the brightness k / (num_codes - 1)."""
    model = VQVAE(_brightness_config(num_codes=num_codes, data_variance=data_variance)).eval()
    _set_to_means_of_cells(model)
    model.quantizer.set_codebook(torch.linspace(0, 1, num_codes)[:, None])
    return model


def brightness_baseline(bottleneck: Bottleneck, *, data_variance: float = 1.0) -> Baseline:
    """Return the same without codes: the latent of a cell is its mean, and the deviation of a Gaussian is e."""
    model = Baseline(_brightness_config(bottleneck=bottleneck, data_variance=data_variance)).eval()
    _set_to_means_of_cells(model)
    if bottleneck == "vae":
        model.encoder.layers[-1].bias.data[1] = 2
    return model


def _brightness_config(**fields: Any) -> TokenizerConfig:
    return TokenizerConfig(
        in_channels=1,
        hidden_channels=2,
        num_residual_layers=0,
        residual_channels=1,
        downsample=CELL,
        code_dim=1,
        **fields,
    )


def _set_to_means_of_cells(model: VQVAE | Baseline) -> None:
    """Set weights by which the encoder returns the mean of each cell, the decoder a cell of that brightness."""
    down, *encoder_mixes, to_code = (layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d))
    decoder_mix, up = (layer for layer in model.decoder.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        down.weight[0, 0, 1:3, 1:3] = 0.25 * LOUD  # of the 4x4 kernel, what is inside the cell
        down.bias[0] = 0.5 * LOUD  # type: ignore[index]
        to_code.weight[0, 0, 0, 0] = 1 / LOUD
        decoder_mix.weight[0, 0, 1, 1] = LOUD
        up.weight[0, 0, 1:3, 1:3] = 1 / LOUD
        up.bias[0] = -0.5  # type: ignore[index]
        for mix in encoder_mixes:
            mix.weight[0, 0, 1, 1] = 1


def cells_of(path: Path) -> np.ndarray:
    """Return the codes [H,W] of a picture whose cells are of one level each: the oracle of `brightness_tokenizer`."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (HEIGHT, WIDTH)
    return pixels[::CELL, ::CELL] // STEP


def draw_cells(path: Path, codes: np.ndarray) -> None:
    """Write a grey picture with a cell of level k for each code k of [H,W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.kron(codes, np.ones((CELL, CELL), dtype=np.int64)) * STEP
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def fill_with_cells(folder: Path, names: Sequence[str], seed: int = 0) -> Path:
    """Write a picture of random levels under each of the names; return the folder."""
    random = np.random.default_rng(seed)
    for name in names:
        draw_cells(folder / name, random.integers(0, LEVELS, GRID))
    return folder


def save_tokenizer(
    folder: Path,
    model: VQVAE | Baseline,
    data: Path | str = "glyphs",
    class_names: Sequence[str] = (),
    state: TrainingState | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> CheckpointInfo:
    """Save `model` as a checkpoint, trained for 7 steps on `data` in this size."""
    info = CheckpointInfo(
        kind="tokenizer",
        config=asdict(model.config),
        step=7,
        class_names=list(class_names),
        preprocessing={"height": size[0], "width": size[1], "channels": model.config.in_channels},
        training={"data": str(data), "data_root": None},
    )
    return save_checkpoint(folder, info, model.state_dict(), state)


def tiny_prior(
    num_codes: int = LEVELS, num_classes: int = 0, seed: int = 0, label_dropout: float = 0.0
) -> GatedPixelCNN:
    """Return a prior with random weights, larger than fresh ones, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = PriorConfig(
        num_codes=num_codes,
        num_classes=num_classes,
        channels=4,
        num_layers=2,
        output_channels=8,
        first_kernel_size=3,
        label_dropout=label_dropout,
    )
    model = GatedPixelCNN(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of model.safetensors."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def save_prior(
    folder: Path, model: GatedPixelCNN, tokenizer_fingerprint: str, class_names: Sequence[str] = ()
) -> CheckpointInfo:
    """Save `model` as a checkpoint that belongs to the tokenizer of this fingerprint, trained for 5 steps."""
    info = CheckpointInfo(
        kind="prior",
        config=asdict(model.config),
        step=5,
        class_names=list(class_names),
        preprocessing={"height": HEIGHT, "width": WIDTH, "channels": 1},
        training={"codes": None},
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
    return save_checkpoint(folder, info, model.state_dict())


def digest_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder (or of one file), by name."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits_of(model: nn.Module) -> dict[str, Any]:
    """Return every parameter and buffer as bytes, to compare bit for bit."""
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in model.state_dict().items()}


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest memory block that any operation returns, backward included."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result
