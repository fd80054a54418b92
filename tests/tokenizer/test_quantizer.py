"""The vector quantizer as a function: nearest codes, straight-through vectors, the two losses, the errors.

How the codebook moves is in `test_codebook_learning.py`.

Legend: B batch, D code dimension, S one to three positions, N = B * prod(S) vectors, K codes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenizer import VectorQuantizer
from tokenizer.config import CodebookUpdate
from tokenizer.quantizer import DISTANCES_AT_ONCE, nearest_codes

from ..support import LargestTensor
from .oracles import UPDATES, nearest_by_hand, quantizer_with, rows_of, squared_distances

SHAPES = [(7,), (3, 5), (2, 3, 4)]  # S: time; H W; T H W


# ---- the nearest code


def test_code_is_the_nearest_and_not_the_farthest() -> None:
    torch.manual_seed(0)
    true_codes = torch.randint(0, 6, (2, 3, 5))
    noise = 0.05 * torch.randn(2, 6, 3, 5)
    z = 0.9 * torch.eye(6)[true_codes].movedim(-1, 1) + noise
    assert torch.equal(quantizer_with(torch.eye(6)).nearest(z), true_codes)


@pytest.mark.parametrize("at_once", [1, 10, 11, 12, 29, 110, 2**22])
def test_chunks_agree_with_broadcast_to_the_last_tie(at_once: int) -> None:
    torch.manual_seed(1)
    codebook = torch.randint(-2, 3, (11, 2)).float()  # 11 codes on 25 places
    vectors = torch.randint(-3, 4, (41, 2)).float()
    distances = squared_distances(vectors, codebook)
    ties = (distances == distances.min(dim=1, keepdim=True).values).sum(dim=1) > 1
    assert ties.sum() >= 10, "the data must hold exact ties for this test to mean anything"
    assert nearest_codes(vectors, codebook, at_once=at_once).tolist() == nearest_by_hand(vectors, codebook)


def test_of_equal_codes_the_lowest_wins() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    assert quantizer_with(codebook).nearest(torch.tensor([[[1.0], [2.0]]])).tolist() == [[1]]


@pytest.mark.parametrize("at_once", [1, 1000, 2**22])
@pytest.mark.parametrize("num_codes", [2, 3, 256, 257, 65_536])
def test_nearest_on_random_vectors_for_any_codebook_size(num_codes: int, at_once: int) -> None:
    torch.manual_seed(2)
    codebook, vectors = torch.randn(num_codes, 3), torch.randn(6, 3)
    codes = nearest_codes(vectors, codebook, at_once=at_once)
    distances = squared_distances(vectors, codebook)
    assert codes.dtype == torch.int64
    assert codes.shape == (6,)
    torch.testing.assert_close(distances[torch.arange(6), codes], distances.min(dim=1).values, rtol=0, atol=1e-5)


def test_first_and_last_of_65536_codes_round_trip() -> None:
    quantizer = quantizer_with(torch.arange(65_536.0)[:, None])
    codes = torch.tensor([[0, 1, 255, 256, 32_767, 32_768, 65_535]])
    # integers up to 2^16 have squares up to 2^32, past what float32 holds exactly
    assert torch.equal(quantizer.double().nearest(quantizer.lookup(codes)), codes)


@pytest.mark.parametrize("at_once", [4096, 2**18])
def test_no_tensor_is_larger_than_the_distances_at_once(at_once: int) -> None:
    torch.manual_seed(3)
    codebook, vectors = torch.randn(4096, 4), torch.randn(300, 4)
    with LargestTensor() as largest:
        nearest_codes(vectors, codebook, at_once=at_once)
    assert 4 * at_once <= largest.nbytes <= 4 * max(at_once, codebook.numel())


@pytest.mark.parametrize("update", UPDATES)
def test_a_training_step_never_holds_the_whole_distance_table(update: CodebookUpdate) -> None:
    torch.manual_seed(4)
    quantizer = VectorQuantizer(4096, 4, codebook_update=update)
    z = torch.randn(2, 4, 32, 32, requires_grad=True)  # N K = 2048 x 4096, twice DISTANCES_AT_ONCE
    assert z.numel() // 4 * 4096 > DISTANCES_AT_ONCE
    with LargestTensor() as largest:
        result = quantizer(z)
        (result.loss + result.vectors.sum()).backward()
        quantizer.lookup(result.codes)
    assert 4 * z.numel() < largest.nbytes <= 4 * DISTANCES_AT_ONCE


# ---- shapes and layout


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("update", UPDATES)
def test_one_to_three_dimensions_of_positions(size: tuple[int, ...], update: CodebookUpdate) -> None:
    torch.manual_seed(5)
    codebook, z = torch.randn(9, 4), torch.randn(2, 4, *size)
    quantizer = quantizer_with(codebook, codebook_update=update)
    result = quantizer(z)
    assert result.vectors.shape == z.shape
    assert result.codes.shape == (2, *size)
    assert result.codes.dtype == torch.int64
    assert result.codes.flatten().tolist() == nearest_by_hand(rows_of(z), codebook)
    assert torch.equal(rows_of(result.vectors), codebook[result.codes.flatten()])


@pytest.mark.parametrize("size", SHAPES)
def test_lookup_puts_the_vector_of_each_code_at_its_place(size: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    quantizer, codes = quantizer_with(torch.randn(9, 4)), torch.randint(0, 9, (2, *size))
    vectors = quantizer.lookup(codes)
    assert vectors.shape == (2, 4, *size)
    assert torch.equal(rows_of(vectors), torch.stack([quantizer.codebook[k] for k in codes.flatten().tolist()]))


def test_moving_the_positions_moves_the_codes_alike() -> None:
    torch.manual_seed(7)
    quantizer, z, order = quantizer_with(torch.randn(16, 4)), torch.randn(2, 4, 15), torch.randperm(15)
    assert torch.equal(quantizer.nearest(z[:, :, order]), quantizer.nearest(z)[:, order])


def test_layout_in_memory_changes_nothing() -> None:
    torch.manual_seed(8)
    quantizer, z = quantizer_with(torch.randn(16, 4)).eval(), torch.randn(2, 4, 3, 5)
    transposed = z.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (z.to(memory_format=torch.channels_last), transposed):
        assert torch.equal(quantizer(other).codes, quantizer(z).codes)
        assert torch.equal(quantizer(other).vectors, quantizer(z).vectors)


@pytest.mark.parametrize("training", [True, False])
def test_one_vector(training: bool) -> None:
    quantizer = quantizer_with(torch.tensor([[0.0, 0.0], [4.0, 3.0]])).train(training)
    result = quantizer(torch.tensor([[[4.0], [4.0]]]))
    assert result.codes.tolist() == [[1]]
    assert result.vectors.tolist() == [[[4.0], [3.0]]]
    assert result.commitment_loss.item() == 0.5


def test_codes_of_an_item_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(9)
    quantizer, z = quantizer_with(torch.randint(-3, 4, (16, 4)).float()), torch.randint(-3, 4, (5, 4, 2, 3)).float()
    alone = torch.cat([quantizer.nearest(item[None]) for item in z])
    assert torch.equal(quantizer.nearest(z), alone)


# ---- the straight-through vectors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_vectors_are_the_chosen_codes_bit_for_bit(scale: float, update: CodebookUpdate, training: bool) -> None:
    torch.manual_seed(10)
    codebook = torch.randn(12, 3)
    quantizer = quantizer_with(codebook, codebook_update=update).train(training)
    z = scale * torch.randn(2, 3, 4, 5)
    naive = z + (quantizer.lookup(quantizer.nearest(z)) - z)
    result = quantizer(z)
    expected = codebook[result.codes].movedim(-1, 1)
    assert not torch.equal(naive, expected), "z + (e - z) must round here for this test to mean anything"
    assert torch.equal(result.vectors, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("size", SHAPES)
def test_straight_through_gradient_is_exactly_the_identity(
    size: tuple[int, ...], update: CodebookUpdate, training: bool
) -> None:
    torch.manual_seed(11)
    quantizer = quantizer_with(torch.randn(12, 3), codebook_update=update).train(training)
    z = (100 * torch.randn(2, 3, *size)).requires_grad_()
    upstream = torch.randn_like(z)
    quantizer(z).vectors.backward(upstream)
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)
    assert quantizer.codebook.grad is None  # the reconstruction loss never reaches the codebook


# ---- the losses


def test_worked_example_of_the_lecture() -> None:
    """The squared distances to (1,2), (3,3), (0.5,0.5) are 0.17, 3.37, 3.37."""
    codebook = torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.5, 0.5]])
    quantizer = quantizer_with(codebook, codebook_update="gradient")
    decoder = torch.nn.Linear(2, 2)
    z = torch.tensor([1.4, 2.1]).reshape(1, 2, 1).requires_grad_()
    torch.testing.assert_close(
        squared_distances(z[:, :, 0], codebook), torch.tensor([[0.17, 3.37, 3.37]]).double(), rtol=0, atol=1e-6
    )

    result = quantizer(z)
    decoder(result.vectors[:, :, 0])  # shares the graph, takes no part in the terms below
    assert result.codes.tolist() == [[0]]
    assert result.vectors.flatten().tolist() == [1.0, 2.0]
    assert (z - result.vectors).square().sum().item() == pytest.approx(0.17)
    assert result.commitment_loss.item() == pytest.approx(0.085)
    assert result.codebook_loss.item() == pytest.approx(0.085)
    assert result.loss.item() == pytest.approx(0.085 + 0.25 * 0.085)

    inputs = [z, quantizer.codebook, *decoder.parameters()]
    to_z, *to_others = torch.autograd.grad(result.commitment_loss, inputs, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(to_z.flatten(), torch.tensor([0.4, 0.1]))  # 2 (z - e) / 2 elements
    assert to_others == [None, None, None]
    to_z, to_codebook, *to_decoder = torch.autograd.grad(result.codebook_loss, inputs, allow_unused=True)
    torch.testing.assert_close(to_codebook, torch.tensor([[-0.4, -0.1], [0.0, 0.0], [0.0, 0.0]]))
    assert to_z is None
    assert to_decoder == [None, None]


def loss_gradients(update: CodebookUpdate, commitment_weight: float) -> tuple[Tensor, Tensor | None]:
    """The gradient of `.loss` to z and to the codebook, from the same state and input every time."""
    torch.manual_seed(12)
    quantizer = quantizer_with(torch.randn(6, 3), codebook_update=update, commitment_weight=commitment_weight)
    z = torch.randn(2, 3, 2, 5, requires_grad=True)
    quantizer(z).loss.backward()
    assert z.grad is not None
    return z.grad, quantizer.codebook.grad


def test_commitment_weight_is_on_the_term_of_the_encoder() -> None:
    to_z_0, to_codebook_0 = loss_gradients("gradient", 0.0)
    to_z_1, to_codebook_1 = loss_gradients("gradient", 1.0)
    to_z_4, to_codebook_4 = loss_gradients("gradient", 4.0)
    assert to_codebook_0 is not None
    assert to_codebook_1 is not None
    assert to_codebook_4 is not None
    assert not to_z_0.any()
    assert to_z_1.any()
    assert to_codebook_0.any()
    torch.testing.assert_close(to_z_4, 4 * to_z_1)
    assert torch.equal(to_codebook_0, to_codebook_1)
    assert torch.equal(to_codebook_0, to_codebook_4)


def test_ema_loss_is_the_weighted_commitment_alone() -> None:
    to_z_0, to_codebook_0 = loss_gradients("ema", 0.0)
    to_z_1, _ = loss_gradients("ema", 1.0)
    to_z_4, to_codebook_4 = loss_gradients("ema", 4.0)
    assert not to_z_0.any()
    torch.testing.assert_close(to_z_4, 4 * to_z_1)
    assert to_codebook_0 is None
    assert to_codebook_4 is None


@pytest.mark.parametrize("update", UPDATES)
def test_losses_are_the_mean_square_over_every_element(update: CodebookUpdate) -> None:
    torch.manual_seed(13)
    codebook, z = torch.randn(6, 3), torch.randn(2, 3, 4, 5)
    result = quantizer_with(codebook, codebook_update=update, commitment_weight=0.7)(z)
    mean = squared_distances(rows_of(z), codebook).min(dim=1).values.sum().item() / z.numel()
    assert result.commitment_loss.item() == pytest.approx(mean, rel=1e-6)
    assert result.codebook_loss.item() == pytest.approx(mean, rel=1e-6)
    assert result.loss.item() == pytest.approx((0.7 + (update == "gradient")) * mean, rel=1e-6)
    for loss in (result.loss, result.commitment_loss, result.codebook_loss):
        assert loss.shape == ()


@pytest.mark.parametrize("update", UPDATES)
def test_codebook_loss_reaches_the_chosen_rows_only(update: CodebookUpdate) -> None:
    torch.manual_seed(14)
    codebook = torch.cat([torch.randn(3, 2), 100 + torch.randn(3, 2)])  # rows 3 to 5 are out of reach
    quantizer, z = quantizer_with(codebook, codebook_update=update), torch.randn(2, 2, 7)
    result = quantizer(z.requires_grad_())
    result.loss.backward()
    if update == "ema":
        assert not result.codebook_loss.requires_grad
        assert list(quantizer.parameters()) == []
        return
    assert quantizer.codebook.grad is not None
    used = torch.bincount(result.codes.flatten(), minlength=6) > 0
    assert used.tolist() == [True] * 3 + [False] * 3
    assert quantizer.codebook.grad.ne(0).any(dim=1).tolist() == used.tolist()


# ---- the errors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_raises_and_changes_nothing(value: float, started: bool, training: bool) -> None:
    quantizer = VectorQuantizer(5, 3).train(training)
    if started:
        quantizer.set_codebook(torch.randn(5, 3))
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    z = torch.zeros(2, 3, 2, 4)
    z[1, 2, 0, 3] = value
    for call in (quantizer, quantizer.nearest):
        with pytest.raises(ValueError, match="finite"):
            call(z)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 1, 3, 3), (2, 3), (3,), (2, 5, 3), (1, 3, 2, 2, 2, 2)])
def test_vectors_of_a_wrong_shape_raise(shape: tuple[int, ...]) -> None:
    quantizer = VectorQuantizer(5, 3)
    for call in (quantizer, quantizer.nearest):
        with pytest.raises(ValueError, match=r"\[B,3,\*S\]"):
            call(torch.zeros(shape))


def test_wrong_channels_raise_even_where_the_number_of_elements_would_fit() -> None:
    with pytest.raises(ValueError, match=r"got the shape \[2, 5, 3, 4\]"):
        VectorQuantizer(5, 3)(torch.zeros(2, 5, 3, 4))  # 120 elements, a multiple of D = 3


@pytest.mark.parametrize("code", [-1, 5, 10**6])
@pytest.mark.parametrize("size", SHAPES)
def test_lookup_out_of_range_raises(size: tuple[int, ...], code: int) -> None:
    codes = torch.zeros(2, *size, dtype=torch.int64)
    codes[-1, -1] = code
    with pytest.raises(ValueError, match="from 0 to 4"):
        VectorQuantizer(5, 3).lookup(codes)


@pytest.mark.parametrize(
    ("dtype", "num_codes"),
    [
        (torch.uint8, 256),
        (torch.int8, 256),
        (torch.int16, 256),
        (torch.int16, 65_536),
        (torch.uint16, 65_536),
        (torch.int32, 65_536),
    ],
)
def test_lookup_takes_codes_as_files_hold_them(dtype: torch.dtype, num_codes: int) -> None:
    """A code dataset is uint8 up to K = 256 and uint16 up to 65,536; K itself does not fit into either."""
    quantizer = VectorQuantizer(num_codes, 2)
    codes = torch.tensor([[0, 1, 127], [100, 2, 3]])
    assert torch.equal(quantizer.lookup(codes.to(dtype)), quantizer.lookup(codes))


def test_lookup_of_no_codes() -> None:
    assert VectorQuantizer(5, 3).lookup(torch.zeros(0, 2, 4, dtype=torch.int64)).shape == (0, 3, 2, 4)


@pytest.mark.parametrize("update", UPDATES)
def test_set_codebook_refuses_what_is_no_codebook(update: CodebookUpdate) -> None:
    quantizer = VectorQuantizer(5, 3, codebook_update=update)
    before = quantizer.codebook.detach().clone()
    for shape in [(3, 5), (4, 3), (5, 1), (5,), (15,)]:
        with pytest.raises(ValueError, match=r"expected a codebook \[5, 3\]"):
            quantizer.set_codebook(torch.zeros(shape))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quantizer.set_codebook(torch.full((5, 3), value))
    assert torch.equal(quantizer.codebook, before)


def test_an_unknown_way_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook_update"):
        VectorQuantizer(5, 3, codebook_update="EMA")  # type: ignore[arg-type]


PEAK = """
import torch
from pathlib import Path
from tokenizer.quantizer import nearest_codes
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
torch.set_num_threads(1)
vectors, codebook = torch.randn(4096, 64), torch.randn(65_536, 64)
nearest_codes(vectors[:64], codebook[:64])
before = peak()
nearest_codes(vectors, codebook)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_memory_of_a_search_is_that_of_one_chunk() -> None:
    """In a process of its own: 64 chunks of 16 MB, which a table freed and taken anew for each kept all at once.

    Not by `ru_maxrss`: that of a new process begins at the size of the one that started it, here of all these tests.
    """
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    assert 10_000 < int(found.stdout) < 100_000  # kB; what is seen is the one chunk
