"""The folded gate against the gate and the convolution, one after the other."""

import torch
from torch import nn

from prior.folded_gate import FoldedGate, double_features, negated_gate, output_matrix
from prior.layers import gate

from .oracles import generator


def test_one_sigmoid_is_the_gate_and_the_convolution_after_it() -> None:
    """Twice, so that nothing of the first call is left in the buffer; 6 samples of 3 channels, 5 outputs."""
    convolution = nn.Conv2d(3, 5, kernel_size=1).double()
    folded = FoldedGate(convolution.weight.detach(), num_samples=6, channels=3)
    for seed in (0, 1):
        before = 2 * torch.randn(6, 6, dtype=torch.float64, generator=generator(seed))
        expected = convolution(gate(before)[:, :, None, None])[:, :, 0, 0]
        found = folded(double_features(before)) @ output_matrix(convolution)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_the_negated_gate_is_written_where_it_is_wanted() -> None:
    """The output is a view with gaps, as in the rows that the vertical stack keeps."""
    before = 2 * torch.randn(4, 7, 6, dtype=torch.float64, generator=generator(2))
    expected = -gate(before.flatten(0, 1)).view(4, 7, 3)
    found = torch.zeros(4, 7, 2, 3, dtype=torch.float64)
    negated_gate(double_features(before), out=found[:, :, 1])
    torch.testing.assert_close(found[:, :, 1], expected, rtol=0, atol=1e-15)
    assert found[:, :, 0].count_nonzero() == 0
