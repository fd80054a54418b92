"""The convolution over kept rows against torch's own over the whole grid, kept as vectors and as codes.

Legend: n samples, H W grid, R rows and S columns of the kernel, C channels, K codes.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prior.incremental import IncrementalPrior
from prior.kept_rows import KeptCodes, KeptRows

from .oracles import generator, tiny_prior

N, H, W, C, C_OUT, K = 2, 5, 4, 3, 6, 7
KERNELS = [(1, 3), (2, 3), (3, 7), (1, 1), (3, 5)]


def inputs(kernel: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """codes [n,H,W], embeddings [K,C], taps [R,S,C,C_out]"""
    embeddings, taps = (
        torch.randn(shape, dtype=torch.float64, generator=generator(seed))
        for seed, shape in enumerate([(K, C), (*kernel, C, C_OUT)])
    )
    return torch.randint(K, (N, H, W), generator=generator(2)), embeddings, taps


def whole(codes: Tensor, embeddings: Tensor, taps: Tensor) -> Tensor:
    """[H+1,W,n,C_out]: row i from the rows i-R .. i-1, nothing outside of the grid."""
    rows, columns, _, _ = taps.shape
    padded = F.pad(embeddings[codes].permute(0, 3, 1, 2), (columns // 2, columns // 2, rows, 0))
    return F.conv2d(padded, taps.permute(3, 2, 0, 1)).permute(2, 3, 0, 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("as_codes", [False, True])
def test_rows_that_come_one_by_one_give_the_convolution(kernel: tuple[int, int], as_codes: bool) -> None:
    """Added to what is there; and after three rows the samples continue in another order."""
    codes, embeddings, taps = inputs(kernel)
    kept = KeptCodes(embeddings, taps, N, W) if as_codes else KeptRows(taps, N, W)
    swapped = torch.tensor([1, 0])
    expected = whole(codes, embeddings, taps)
    for row in range(H + 1):
        outputs = torch.ones(W * N, C_OUT, dtype=torch.float64)
        kept.add_to(outputs)
        found = outputs.view(W, N, C_OUT) - 1
        torch.testing.assert_close(found, expected[row], rtol=0, atol=1e-13)
        if row == 3:
            kept.select(swapped)
            codes = codes[swapped]
            expected = whole(codes, embeddings, taps)
        if row < H:
            following = codes[:, row].T  # [W,n]
            kept.next_row().copy_(following if as_codes else embeddings[following])


@pytest.mark.parametrize(("num_samples", "kind"), [(1, KeptRows), (2, KeptCodes)])
def test_a_table_is_made_where_it_costs_at_most_what_a_row_does(num_samples: int, kind: type) -> None:
    """6 codes, 3 columns."""
    first, *others = IncrementalPrior(tiny_prior(num_codes=6), num_samples, 3, None)._rows
    assert type(first) is kind
    assert {type(rows) for rows in others} == {KeptRows}
