"""What runs on a CUDA device, and what it has in common with the CPU; skipped where there is none.

pytest -m gpu
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.codes.dataset import CodeDataset
from pipeline.codes.export import export_codes
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.images.preprocessing import to_float
from pipeline.runtime.device import use_fast_layout
from pipeline.runtime.optimizer import Optimizers
from pipeline.training.prefetch import Prefetcher
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior
from pipeline.training.train_tokenizer import train_tokenizer
from tokenizer import VQVAE, TokenizerConfig
from tokenizer.quantizer import VectorQuantizer

from .conftest import Trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
SMALL = {"hidden_channels": 8, "residual_channels": 4, "num_residual_layers": 1, "num_codes": 16, "code_dim": 4}


def ended_well(folder: Path, step: int) -> bool:
    """Return whether a run ended at this step, with finite numbers in every line of its log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return lines[-1]["step"] == step and None not in [value for line in lines for value in line.values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_stages_train_resume_export_and_sample(precision: str, tmp_path: Path, image_folder: Path) -> None:
    tokenizer, codes, prior = tmp_path / "tokenizer", tmp_path / "codes", tmp_path / "prior"
    common = {"precision": precision}
    for steps, resume in ((3, False), (6, True)):
        run = RunFolder(out=tokenizer, device="cuda", resume=resume)
        train_tokenizer(run, {"data": str(image_folder), **SMALL, **common, "steps": steps})
        assert ended_well(tokenizer, steps)
    export_codes(tokenizer, codes, device="cuda")
    for steps, resume in ((3, False), (6, True)):
        run = RunFolder(out=prior, device="cuda", resume=resume)
        overrides = {"codes": str(codes), "channels": 4, "num_layers": 2, **common, "steps": steps}
        train_prior(run, overrides, tokenizer)
        assert ended_well(prior, steps)
    sampled = ImagePipeline.from_pretrained(tokenizer, prior, device="cuda").sample(5, seed=0)
    assert sampled.images.shape == (5, 3, 8, 12)
    assert sampled.images.dtype == torch.uint8
    assert sampled.codes.shape == (5, 2, 3)
    assert bool(((sampled.codes >= 0) & (sampled.codes < 16)).all())


def test_codes_of_both_devices_agree_on_most_positions(trained: Trained, tmp_path: Path) -> None:
    """Sums are rounded in another order, so that a vector between two codes may take the other one."""
    export_codes(trained.tokenizer, tmp_path / "codes", device="cuda")
    data = [CodeDataset(folder) for folder in (trained.codes, tmp_path / "codes")]
    here, there = (codes.batch(np.arange(len(codes)))[0] for codes in data)
    assert here.shape == there.shape
    assert float((here == there).double().mean()) > 0.9


def test_a_batch_becomes_the_same_floats_on_either_device() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels.to(CUDA)).cpu(), to_float(levels))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_what_is_prefetched_is_what_is_loaded(ahead: int) -> None:
    """Batches are large, the device is kept busy, and each tensor is dropped while its step is still in the queue."""

    def load(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(256, (64, 3, 64, 64), generator=generator).byte(), torch.full((64,), step)

    busy, sums = torch.randn(2048, 2048, device=CUDA), []
    with Prefetcher(load, CUDA, first=0, last=20, ahead=ahead) as prefetcher:
        for step in [*range(12), *range(5, 20)]:  # with a rollback
            images, numbers = prefetcher.get(step)
            assert images.device == numbers.device == CUDA
            busy = (busy @ busy).clamp(-1, 1)
            sums.append((step, images.long().sum() + numbers.sum()))
            del images, numbers
    for step, total in sums:
        assert int(total) == sum(int(tensor.long().sum()) for tensor in load(step))


def test_autocast_changes_no_code() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4).to(CUDA).eval()
    vectors = torch.randn(8, 4, 5, 7, device=CUDA)
    codes = quantizer.nearest(vectors)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(vectors), codes)
        assert torch.equal(quantizer(vectors).codes, codes)
    assert quantizer.codebook.dtype == torch.float32


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_a_step_after_loading_is_a_step_in_the_fast_layout(name: str) -> None:
    """Fused Adam on CUDA takes weights and state in one layout only."""
    config = TokenizerConfig(hidden_channels=32, residual_channels=16, num_residual_layers=1, num_codes=16)
    images, models = torch.rand(4, 3, 8, 12, device=CUDA), []
    state: dict[str, Tensor] = {}
    for _ in range(2):
        torch.manual_seed(0)
        model = VQVAE(config).to(CUDA)
        use_fast_layout(model, CUDA, "bf16")
        optimizers = Optimizers(model, name, 1e-3)
        if state:
            optimizers.load_tensors(state)
        else:
            step(model, optimizers, images)
            state = {key: tensor.cpu().contiguous() for key, tensor in optimizers.tensors().items()}
        step(model, optimizers, images)
        models.append(model)
    assert all(bool(parameter.isfinite().all()) for model in models for parameter in model.parameters())


def step(model: VQVAE, optimizers: Optimizers, images: Tensor) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(images).loss
    optimizers.zero_grad()
    loss.backward()
    optimizers.step(1e-3)
