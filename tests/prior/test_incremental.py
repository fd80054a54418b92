"""The network run a column at a time says what one forward pass says."""

import pytest
import torch
from torch import Tensor, nn

from prior import GatedPixelCNN
from prior.incremental import IncrementalPrior
from prior.layers import GatedLayer

from .oracles import Grid, generator, tiny_prior

GRIDS = [(1, 1), (1, 9), (9, 1), (7, 7), (8, 16), (16, 8)]


def rows_of_logits(network: IncrementalPrior, codes: Tensor) -> list[Tensor]:
    """[n,K,W] of each row of codes [n,R,W] that follows; the codes of a position are set after its logits are there."""
    rows = []
    for row in codes.unbind(dim=1):
        network.start_row()
        columns = []
        for column, known in enumerate(row.unbind(dim=1)):
            columns.append(network.logits(network.features(column)).clone())
            network.set_codes(column, known)
        rows.append(torch.stack(columns, dim=2))
    return rows


@torch.no_grad()
def logits_column_by_column(prior: GatedPixelCNN, codes: Tensor, labels: Tensor | None) -> Tensor:
    """[n,K,H,W]"""
    return torch.stack(rows_of_logits(IncrementalPrior(prior, len(codes), codes.shape[2], labels), codes), dim=2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_logits_are_those_of_the_forward_pass(
    grid: Grid, num_samples: int, num_classes: int, dtype: torch.dtype, error: float
) -> None:
    prior = tiny_prior(num_classes=num_classes).to(dtype)
    codes = torch.randint(5, (num_samples, *grid), generator=generator())
    labels = (torch.arange(num_samples) + 1) % 3 if num_classes else None
    found, expected = logits_column_by_column(prior, codes, labels), prior(codes, labels)
    assert found.dtype == dtype
    assert expected.std() > 0.4  # the error allowed is nothing beside them
    torch.testing.assert_close(found, expected, rtol=0, atol=error)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("first", [3, 7])
@torch.no_grad()
def test_logits_are_those_of_the_forward_pass_with_any_kernels(first: int, kernel: int, layers: int) -> None:
    """Also where a kernel is larger than the grid."""
    for num_classes in (0, 2):
        shape = {"first_kernel_size": first, "kernel_size": kernel, "num_layers": layers}
        prior = tiny_prior(num_classes=num_classes, **shape)
        for grid in (*GRIDS, (2, 3), (3, 2)):
            for num_samples in (1, 5):
                codes = torch.randint(5, (num_samples, *grid), generator=generator())
                labels = torch.arange(num_samples) % 2 if num_classes else None
                found = logits_column_by_column(prior, codes, labels)
                torch.testing.assert_close(found, prior(codes, labels), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layers", "every"), [(2, 1), (5, 2), (4, 3), (3, 1)])
@pytest.mark.parametrize("channels", [4, 6, 3])
@torch.no_grad()
def test_logits_are_those_of_the_forward_pass_with_attention(channels: int, layers: int, every: int) -> None:
    prior = tiny_prior(channels=channels, num_layers=layers, attention_every=every, num_classes=2)
    for grid in (*GRIDS, (2, 3), (3, 2)):
        for num_samples in (1, 5):
            codes = torch.randint(5, (num_samples, *grid), generator=generator())
            labels = torch.arange(num_samples) % 2
            found, expected = logits_column_by_column(prior, codes, labels), prior(codes, labels)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(("first", "kernel", "layers"), [(3, 3, 1), (7, 3, 3), (3, 5, 2), (5, 1, 2)])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("every", [0, 1])
@torch.no_grad()
def test_selected_samples_go_on_as_if_there_had_been_no_others(
    every: int, after: int, first: int, kernel: int, layers: int
) -> None:
    """Some twice, some never, in another order, each with its label; twice, the second time one row later."""
    shape = {"first_kernel_size": first, "kernel_size": kernel, "num_layers": layers, "attention_every": every}
    prior = tiny_prior(num_classes=4, **shape)
    codes, labels = torch.randint(5, (4, 5, 6), generator=generator(1)), torch.arange(4)
    network = IncrementalPrior(prior, 4, 6, labels)
    rows_of_logits(network, codes[:, :after])
    for row, samples in ((after, torch.tensor([2, 2, 0, 3])), (after + 1, torch.tensor([3, 1, 1, 0]))):
        network.select(samples)
        codes, labels = codes[samples], labels[samples]
        alone = IncrementalPrior(prior, 4, 6, labels)
        rows_of_logits(alone, codes[:, :row])
        (found,), (expected,) = (rows_of_logits(n, codes[:, row : row + 1]) for n in (network, alone))
        error = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=error)
        torch.testing.assert_close(found, prior(codes, labels)[:, :, row], rtol=0, atol=error)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 1e-9, 1e-5), (torch.bfloat16, 1e-4, 0.3), (None, 0, 1e-12)]
)
@pytest.mark.parametrize("num_samples", [1, 5])
@torch.no_grad()
def test_the_vertical_stack_alone_is_computed_in_its_type(
    dtype: torch.dtype | None, least: float, most: float, num_samples: int
) -> None:
    """The top row of the grid sees no row above, and the type of the bias alone."""
    prior = tiny_prior()
    codes = torch.randint(5, (num_samples, 4, 3), generator=generator())
    rows = rows_of_logits(IncrementalPrior(prior, num_samples, 3, None, vertical_dtype=dtype), codes)
    error = (torch.stack(rows, dim=2) - prior(codes)).abs()
    assert rows[0].dtype == torch.float64
    assert least <= float(error.max()) < most


def test_a_layer_that_is_not_known_is_refused_and_not_left_out() -> None:
    class Louder(GatedLayer):
        """Computes something else, and is a GatedLayer by its type."""

    for layer in (nn.Identity(), Louder(4, 3)):
        prior = tiny_prior()
        prior.layers.insert(1, layer)
        with pytest.raises(TypeError, match=f"layer 1: expected a GatedLayer, got a {type(layer).__name__}"):
            IncrementalPrior(prior, 1, 3, None)


def test_a_head_that_is_not_known_is_refused_and_not_left_out() -> None:
    prior = tiny_prior()
    prior.to_logits.insert(2, nn.Dropout())
    with pytest.raises(TypeError, match=r"to_logits: expected ReLU, Conv2d, ReLU, Conv2d, got .*'Dropout'"):
        IncrementalPrior(prior, 1, 3, None)
