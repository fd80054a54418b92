"""The same numbers under autocast, in float64 and under `torch.compile`.

Legend: B batch, D code dimension, N vectors, K codes.
"""

import copy
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.runtime.device import compile_networks
from tokenizer import VQVAE, TokenizerConfig, VectorQuantizer
from tokenizer.config import CodebookUpdate

from .oracles import UPDATES, nearest_by_hand, quantizer_with, rows_of, state_bytes, tiles, tiny_vqvae

# ---- autocast


def crowded(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A codebook [256,4] and z [2,4,9,11] of which bfloat16 distances would get many codes wrong."""
    torch.manual_seed(0)
    codebook, z = 2 + torch.randn(256, 4), 2 + torch.randn(2, 4, 9, 11).to(dtype)
    vectors = rows_of(z)
    rough = codebook.square().sum(dim=1) - 2 * (vectors.bfloat16() @ codebook.bfloat16().T).float()
    exact = torch.tensor(nearest_by_hand(vectors, codebook))
    assert (rough.argmin(dim=1) != exact).sum() > 10
    return codebook, z


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_in_the_quantizer(dtype: torch.dtype, update: CodebookUpdate, training: bool) -> None:
    codebook, z = crowded()
    plain = quantizer_with(codebook, codebook_update=update).train(training)
    under = quantizer_with(codebook, codebook_update=update).train(training)
    expected = plain(z)
    with torch.autocast("cpu", dtype=dtype):
        codes = under.nearest(z)
        result = under(z)
    assert torch.equal(codes, expected.codes)
    for name, value in vars(expected).items():
        assert getattr(result, name).dtype == value.dtype, name
        assert torch.equal(getattr(result, name), value), name
    assert state_bytes(under) == state_bytes(plain)
    assert under.codebook.dtype == torch.float32


@pytest.mark.parametrize("update", UPDATES)
def test_vectors_of_low_precision_are_quantized_in_float32(update: CodebookUpdate) -> None:
    """What an encoder under autocast hands over."""
    codebook, z = crowded(torch.bfloat16)
    quantizer = quantizer_with(codebook, codebook_update=update)
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = quantizer(z)
    assert result.codes.flatten().tolist() == nearest_by_hand(rows_of(z.detach()), codebook)
    assert torch.equal(result.vectors, codebook[result.codes].movedim(-1, 1))
    assert result.loss.dtype == torch.float32
    expected = (z.detach().float() - result.vectors.detach()).square().mean()
    torch.testing.assert_close(result.commitment_loss.detach(), expected)
    upstream = torch.randn(z.shape).bfloat16()
    result.vectors.backward(upstream.float())
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)


@pytest.mark.parametrize("revival_threshold", [0.0, 0.02])
def test_a_hundred_steps_under_autocast_with_nine_codes_in_ten_dead(revival_threshold: float) -> None:
    torch.manual_seed(1)
    codebook = torch.cat([torch.randn(4, 3), 1e4 * (1 + torch.rand(36, 3))])
    quantizer = quantizer_with(codebook, ema_decay=0.8, revival_threshold=revival_threshold)
    for _ in range(100):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = quantizer(torch.randn(1, 3, 40).bfloat16())
        assert torch.isfinite(result.loss)
    for name in ("codebook", "counts", "sums"):
        tensor = getattr(quantizer, name)
        assert tensor.dtype == torch.float32, name
        assert torch.isfinite(tensor).all(), name
    if revival_threshold:
        assert quantizer.codebook.abs().max() < 100
    else:
        torch.testing.assert_close(quantizer.codebook[4:], codebook[4:], rtol=1e-3, atol=0)


@pytest.mark.parametrize("update", UPDATES)
def test_a_model_trains_under_autocast(update: CodebookUpdate) -> None:
    model = tiny_vqvae(seed=2, codebook_update=update, hidden_channels=16, residual_channels=8)
    optimizer, images, losses = torch.optim.Adam(model.parameters(), lr=1e-2), tiles(3), []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(images)
        assert result.loss.dtype == torch.float32
        result.loss.backward()
        optimizer.step()
        losses.append(result.reconstruction_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.quantizer.codebook.dtype == torch.float32


# ---- float64


def test_float64_tells_codes_apart_that_float32_cannot() -> None:
    codebook = torch.tensor([[1.0, 1.0], [1.0 + 1e-10, 1.0], [1.0 + 2e-10, 1.0]], dtype=torch.float64)
    assert len({tuple(row) for row in codebook.float().tolist()}) == 1
    quantizer = quantizer_with(codebook)
    assert quantizer.lookup(torch.tensor([[0, 1, 2]])).dtype == torch.float64
    spread = (codebook - 1) * 1e10  # 0, 1, 2: distances of 1e-20 are beyond |e|^2 - 2 z e, of 1 are not
    quantizer.set_codebook(1e-3 * spread)
    assert quantizer.nearest(1e-3 * spread.T[None] + 4e-4).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("update", UPDATES)
def test_a_float64_model_is_float64_everywhere(update: CodebookUpdate) -> None:
    model = tiny_vqvae(seed=3, codebook_update=update).double()
    single = tiny_vqvae(seed=3, codebook_update=update)
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    result, in_single = model(images), single(images.float())
    result.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float64}
    assert {value.dtype for value in vars(result).values()} == {torch.float64, torch.int64}
    assert model.quantizer.codebook.dtype == model.quantizer.counts.dtype == torch.float64
    assert torch.equal(result.codes, in_single.codes)
    torch.testing.assert_close(result.loss.float(), in_single.loss, rtol=1e-4, atol=1e-5)


# ---- torch.compile

# The checks, the start and the revival break the graph, and there torch itself looks at `.grad` of tensors on the way.
graph_breaks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def train_three_steps(
    model: VQVAE | VectorQuantizer, step: Callable[..., Any], batches: list[Tensor]
) -> list[list[float]]:
    """The losses and codes that `step`, compiled or not, gives while it trains `model`."""
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.05)
    seen = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)  # the same draw for a start or a revival
        optimizer.zero_grad()
        result = step(batch.clone().requires_grad_())
        result.loss.backward()
        optimizer.step()
        seen.append([result.loss.item(), result.commitment_loss.item(), *result.codes.flatten().tolist()])
    return seen


@graph_breaks
@pytest.mark.parametrize("update", UPDATES)
def test_compiled_quantizer_is_the_eager_one(update: CodebookUpdate) -> None:
    """`aot_eager` traces the in-place updates as a real backend does. A code lies far away, so that one is revived."""
    torch.manual_seed(4)
    codebook = torch.cat([torch.randn(7, 3), torch.full((1, 3), 1000.0)])
    quantizer = quantizer_with(codebook, codebook_update=update, ema_decay=0.5, revival_threshold=0.2)
    compiled, batches = copy.deepcopy(quantizer), [torch.randn(2, 3, 4, 5) for _ in range(3)]
    torch.compiler.reset()
    expected = train_three_steps(quantizer, quantizer, batches)
    assert train_three_steps(compiled, torch.compile(compiled, backend="aot_eager"), batches) == expected
    assert state_bytes(compiled) == state_bytes(quantizer)
    assert quantizer.codebook[7].norm() < 100


@graph_breaks
def test_compiled_model_is_the_eager_one() -> None:
    torch.manual_seed(5)
    model = VQVAE(
        TokenizerConfig(hidden_channels=4, num_residual_layers=1, residual_channels=2, num_codes=8, code_dim=3)
    )
    compiled, batches = copy.deepcopy(model), [torch.rand(2, 3, 8, 12) for _ in range(3)]
    torch.compiler.reset()
    expected = train_three_steps(model, model, batches)
    assert train_three_steps(compiled, torch.compile(compiled, backend="eager"), batches) == expected
    assert state_bytes(compiled) == state_bytes(model)


CAN_COMPILE = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()


@graph_breaks
@pytest.mark.skipif(not CAN_COMPILE, reason="no C++ compiler")
def test_compiled_networks_give_the_losses_and_gradients_of_the_eager_ones() -> None:
    """With the backend that `--compile` takes; the names of the weights stay. Takes 20 s."""
    model = tiny_vqvae(seed=6, data_variance=0.08)
    compiled, images, results = copy.deepcopy(model), torch.rand(2, 3, 8, 12), []
    torch.compiler.reset()
    counters.clear()
    compile_networks(compiled.encoder, compiled.decoder)
    for each in (model, compiled):
        results.append(each(images))
        results[-1].loss.backward()
    assert counters["stats"]["unique_graphs"] == 2
    eager, fused = results
    assert torch.equal(fused.codes, eager.codes)
    for name in ("loss", "reconstruction_loss", "commitment_loss", "reconstruction"):
        torch.testing.assert_close(getattr(fused, name), getattr(eager, name), rtol=1e-4, atol=1e-6)
    for (name, expected), found in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert expected.grad is not None, name
        assert found.grad is not None, name
        largest = float(expected.grad.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4 * largest)
    assert compiled.state_dict().keys() == model.state_dict().keys()
