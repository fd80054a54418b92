"""Features for the tests of the metrics."""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pipeline.evaluation import feature_sets


def normal(rows: int, dims: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Return rows of N(shift, scale^2 I), float64 [rows,dims]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=generator, dtype=torch.float64) * scale + shift


def small_blocks(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    """Make every block of a matrix hold this many values at most, or one row."""
    monkeypatch.setattr(feature_sets, "BLOCK_BYTES", 8 * values)


def torch_fidelity(module: str) -> ModuleType:
    """Return a module of torch-fidelity; skip the test where it is not installed."""
    pytest.importorskip("torch_fidelity")
    return importlib.import_module(f"torch_fidelity.{module}")


BAD_FEATURES = [
    (torch.zeros(3), "[N,D]"),
    (torch.zeros(3, 2, 1), "[N,D]"),
    (torch.zeros(3, 0), "[N,D]"),
    (torch.zeros(3, 2, dtype=torch.int64), "float type"),
    (torch.zeros(3, 2, device="meta"), "on the CPU, got"),
    (torch.zeros(0, 2), "at least"),
    (torch.zeros(3, 4), "as many dimensions in both sets, got"),
    (torch.tensor([[1.0, float("nan")]] * 9), "finite"),
    (torch.tensor([[1.0, 2.0]] * 8 + [[float("-inf"), 0.0]]), "finite"),
    (torch.tensor([[1.0, 2.0]] * 8 + [[1e200, 0.0]], dtype=torch.float64), "longer than"),
]
