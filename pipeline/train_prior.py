"""Stage two: train a gated PixelCNN on code grids."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prior import GatedPixelCNN, PriorConfig, sample_codes
from prior.objective import cross_entropy
from tokenizer import VQVAE

from .checkpoint import CONFIG, CheckpointInfo, check_same_tokenizer, load_tokenizer, read_info
from .code_manifest import MANIFEST, read_manifest
from .codes import CodeDataset
from .device import choose_device, compile_networks
from .errors import InputError
from .evaluate import measure_prior
from .export import export_codes
from .images import to_uint8
from .loop import LoopSettings, run_training
from .pictures import save_grid
from .settings import RunFolder, claim_run, clear_run, recorded, saved_run, settle
from .splits import held_out, split_rows

PICTURES = 32  # samples in the picture of each evaluation
EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    """What a user can choose about stage two; the rest of `PriorConfig` follows from the codes."""

    codes: str | Sequence[str] | None = None  # folders of code data sets; None exports the tokenizer's own images first
    tokenizer: str | None = None  # folder of the tokenizer; needed to export, and to draw pictures
    steps: int = 2000
    batch_size: int = 32
    lr: float = 4e-3
    seed: int = 0
    precision: str = "auto"
    optimizer: str = "muon"
    compile: bool = False
    channels: int = 64
    num_layers: int = 6
    kernel_size: int = 3
    dropout: float = 0.0


class Grids(Protocol):
    """Code grids with labels: what `CodeDataset` is, and what arrays can be made into."""

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Codes [n,H,W] and labels [n], int64."""


class PriorStage:
    """The prior, as the training loop sees it."""

    score = "bits_per_code"
    remark = ""

    def __init__(
        self, model: GatedPixelCNN, grids: Grids, aside: np.ndarray, draw: Callable[[Path], None] | None = None
    ) -> None:
        self.model, self.grids, self._draw = model, grids, draw
        self.device = next(model.parameters()).device
        self.train_rows, self.held_out_rows = split_rows(aside)
        self.num_items = len(self.train_rows)

    def losses(self, indices: np.ndarray) -> dict[str, Tensor]:
        codes, labels = (part.to(self.device) for part in self.grids.batch(self.train_rows[indices]))
        return {"loss": cross_entropy(self.model(codes, labels if self.model.config.num_classes else None), codes)}

    def status(self) -> dict[str, float]:
        return {}

    def evaluate(self) -> dict[str, float]:
        return {"bits_per_code": measure_prior(self.model, self._held_out_batches())}

    def draw(self, path: Path) -> None:
        if self._draw is not None:
            self._draw(path)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass

    def _held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.held_out_rows), EVALUATION_BATCH):
            yield self.grids.batch(self.held_out_rows[start : start + EVALUATION_BATCH])


def train_prior(run: RunFolder, given: Mapping[str, Any], default_tokenizer: Path) -> CheckpointInfo:
    """Train a prior into `run.out`; `given` are fields of `PriorSettings`, None for the default.

    Args:
        run: where to write.
        given: the chosen settings.
        default_tokenizer: the tokenizer when `given` names none and one is needed or fits.

    Raises:
        InputError: the codes, the tokenizer, a setting or the folder cannot be used, or a loss is not finite.
    """
    saved = saved_run(run, "prior")
    settings = settle(PriorSettings, given, saved)
    device = choose_device(run.device)
    tokenizer_folder = _tokenizer_folder(settings, default_tokenizer)
    codes = _open_codes(run, saved, settings, tokenizer_folder)
    required = settings.tokenizer is not None
    tokenizer = _matching_tokenizer(tokenizer_folder, codes, required=required, device=device)

    torch.manual_seed(settings.seed)
    config = config_for(settings, codes) if saved is None else PriorConfig(**saved.config)
    model = GatedPixelCNN(config).to(device)
    if settings.compile:
        compile_networks(model)
    draw = None if tokenizer is None else _sampler(model, tokenizer, codes.manifest.grid, settings.seed)
    stage = PriorStage(model, codes, held_out(codes.names()), draw)
    print(explanation(stage, codes))
    info = CheckpointInfo(
        kind="prior",
        config=asdict(config),
        step=0,
        class_names=list(codes.manifest.class_names) if config.num_classes else [],
        preprocessing=codes.manifest.image,
        training={
            **recorded(settings),
            "tokenizer": str(tokenizer_folder) if required or settings.codes is None else None,
        },
        tokenizer_fingerprint=codes.manifest.tokenizer_fingerprint,
    )
    loop = LoopSettings.chosen(settings, device, keep_best=True)
    clear_run(run, saved)
    return run_training(stage, info, loop, run.out, resume=saved is not None)


def config_for(settings: PriorSettings, codes: CodeDataset) -> PriorConfig:
    """The configuration of the model: what was chosen, and what the codes say. Labels count if every grid has one."""
    manifest = codes.manifest
    labelled = bool(manifest.class_names) and all(shard.labels.min() >= 0 for shard in codes.shards())
    return PriorConfig(
        num_codes=manifest.num_codes,
        num_classes=len(manifest.class_names) if labelled else 0,
        channels=settings.channels,
        num_layers=settings.num_layers,
        kernel_size=settings.kernel_size,
        dropout=settings.dropout,
    )


def explanation(stage: PriorStage, codes: CodeDataset) -> str:
    """What is about to happen, in words."""
    config, (height, width) = stage.model.config, codes.manifest.grid
    return (
        f"{len(codes):,} grids of {height}x{width} codes to learn from, "
        f"{len(stage.held_out_rows):,} of them held out to check on, {config.num_classes or 'no'} classes\n"
        f"bits_per_code is what a code costs given those before it (guessing costs {math.log2(config.num_codes):.2f})"
    )


def _open_codes(
    run: RunFolder, saved: CheckpointInfo | None, settings: PriorSettings, tokenizer: Path | None
) -> CodeDataset:
    """The codes to learn, exported first if none were named; `run.out` is claimed on the way."""
    if settings.tokenizer is not None or settings.codes is None:
        assert tokenizer is not None
        load_tokenizer(tokenizer)  # one without codes is refused before anything is written
    if settings.codes is not None:
        codes = _whole(CodeDataset(settings.codes))
        claim_run(run, saved)
    else:
        assert tokenizer is not None
        claim_run(run, saved)
        codes = _whole(CodeDataset(_codes_of_own_images(tokenizer, run, saved)))
    if saved is not None:
        check_same_tokenizer(
            saved.tokenizer_fingerprint,
            codes.manifest.tokenizer_fingerprint,
            f"codes in {codes.where}",
            "train a new prior with another --out",
        )
    return codes


def _whole(codes: CodeDataset) -> CodeDataset:
    """`codes`, if there are any, all are there, and their labels are of their classes. Raises InputError."""
    manifest = codes.manifest
    if not manifest.complete:
        raise InputError(
            expected=f"all {manifest.total:,} grids in {codes.where}",
            got=f"{manifest.count:,}",
            do="run the export-codes that was interrupted once more: it goes on",
        )
    if not len(codes):
        raise InputError(expected=f"at least one grid in {codes.where}", got="none", do="export the codes of images")
    highest = max(int(shard.labels.max()) for shard in codes.shards())
    if manifest.class_names and highest >= len(manifest.class_names):
        raise InputError(
            expected=f"labels below {len(manifest.class_names)}, the number of class names in {codes.where}",
            got=str(highest),
            do="find the damaged shard with verify-codes",
        )
    return codes


def _tokenizer_folder(settings: PriorSettings, default: Path) -> Path | None:
    if settings.tokenizer is not None:
        return Path(settings.tokenizer)
    if settings.codes is None or (default / CONFIG).exists():
        return default
    return None


def _codes_of_own_images(tokenizer: Path, run: RunFolder, saved: CheckpointInfo | None) -> Path:
    """The codes of the images that the tokenizer was trained on, exported into the run unless they are there already.

    An export that was interrupted goes on, or with --force starts anew.
    """
    fingerprint = read_info(tokenizer, "tokenizer").fingerprint
    if saved is not None:
        check_same_tokenizer(
            saved.tokenizer_fingerprint,
            fingerprint,
            f"a tokenizer in {tokenizer}",
            "train a new prior with another --out",
        )
    out = run.out / "codes"
    found = read_manifest(out) if (out / MANIFEST).exists() else None
    if found is None or found.tokenizer_fingerprint != fingerprint:
        export_codes(tokenizer, out, device=run.device, force=True)
    elif not found.complete:
        export_codes(tokenizer, out, device=run.device, force=run.force)
    return out


def _matching_tokenizer(
    folder: Path | None, codes: CodeDataset, *, required: bool, device: torch.device
) -> VQVAE | None:
    """The tokenizer that made the codes, for pictures. One that was asked for must match; the default may be absent."""
    if folder is None:
        return None
    fingerprint, made_by = read_info(folder, "tokenizer").fingerprint, codes.manifest.tokenizer_fingerprint
    if required or fingerprint == made_by:
        remedy = f"export them again with export-codes --tokenizer {folder}, or name the tokenizer that made them"
        check_same_tokenizer(fingerprint, made_by, f"codes in {codes.where}", remedy)
        return load_tokenizer(folder).to(device)
    print(f"note: the tokenizer in {folder} did not make these codes; training goes on without pictures")
    return None


def _sampler(model: GatedPixelCNN, tokenizer: VQVAE, grid: tuple[int, int], seed: int) -> Callable[[Path], None]:
    """A function that draws PICTURES samples, the classes in turn, and writes them as one picture."""

    def draw(path: Path) -> None:
        device = next(model.parameters()).device
        num_classes = model.config.num_classes
        labels = torch.arange(PICTURES, device=device) % num_classes if num_classes else None
        generator = torch.Generator().manual_seed(seed)
        codes = sample_codes(model, PICTURES, grid, labels=labels, generator=generator)
        save_grid(to_uint8(tokenizer.decode(codes)), path, columns=8)

    return draw
