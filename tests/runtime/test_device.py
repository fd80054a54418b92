"""The layout of the weights, and waiting for a device."""

from pathlib import Path

import pytest
import torch

from pipeline.models.checkpoint import CheckpointInfo, TrainingState, save_checkpoint
from pipeline.runtime import device as device_module
from pipeline.runtime.device import synchronize, use_fast_layout
from tokenizer import VQVAE, TokenizerConfig

SMALL = TokenizerConfig(hidden_channels=8, residual_channels=4, num_residual_layers=1, num_codes=16, code_dim=4)


def small() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(SMALL)


def layouts(model: VQVAE) -> set[bool]:
    """Return whether the weights of convolutions with a kernel are in the usual layout."""
    return {p.is_contiguous() for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1}


@pytest.mark.parametrize(
    ("device", "precision", "usual"),
    [
        ("cpu", "bf16", True),
        ("cpu", "auto", True),
        ("mps", "bf16", True),
        ("cuda", "fp32", True),
        ("cuda", "bf16", False),
    ],
)
def test_where_the_layout_changes(device: str, precision: str, usual: bool) -> None:
    model = small()
    use_fast_layout(model, torch.device(device), precision)
    assert layouts(model) == {usual}


def test_auto_precision_decides_about_the_layout_as_about_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (False, True):
        monkeypatch.setattr(device_module, "has_fast_bf16", lambda device, fast=fast: fast)
        model = small()
        use_fast_layout(model, torch.device("cuda"), "auto")
        assert layouts(model) == {not fast}


def test_the_layout_changes_no_byte_of_a_checkpoint(tmp_path: Path) -> None:
    """Weights and the state of a run, whose file is not read back here."""
    info = CheckpointInfo(kind="tokenizer", config={}, step=0, class_names=[], preprocessing={}, training={})
    for layout in (torch.contiguous_format, torch.channels_last):
        weights = small().to(memory_format=layout).state_dict()
        state = TrainingState(tensors=dict(weights), values={})
        save_checkpoint(tmp_path / str(layout), info, weights, state)
    usual, other = (tmp_path / str(layout) for layout in (torch.contiguous_format, torch.channels_last))
    for name in ("model.safetensors", "training.safetensors"):
        assert (usual / name).read_bytes() == (other / name).read_bytes()


def test_the_layout_changes_results_in_rounding_only_and_stays_when_weights_are_loaded() -> None:
    usual, other = small(), small().to(memory_format=torch.channels_last)
    other.load_state_dict(usual.state_dict())
    assert layouts(other) == {False}
    images = torch.rand(3, 3, 8, 12)
    found, expected = (model.eval()(images) for model in (other, usual))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction)


def test_a_device_without_a_queue_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        synchronize(torch.device(name))
    assert waited == [torch.device("cuda:1"), "mps"]
