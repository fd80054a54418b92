"""How the codebook moves: its start, the moving averages, the gradient, the revival of the dead, and when it must not.

Legend: B batch, D code dimension, N vectors, K codes. Vectors are [N,D]; the quantizer takes them as [1,D,N].
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tokenizer import VectorQuantizer
from tokenizer.config import CodebookUpdate

from .oracles import UPDATES, as_batch, quantizer_with, state_bytes, tiny_vqvae


def number_of_different_rows(codebook: Tensor) -> int:
    return len({tuple(row) for row in codebook.tolist()})


def assert_average_is_consistent(quantizer: VectorQuantizer) -> None:
    torch.testing.assert_close(quantizer.codebook, quantizer.sums / quantizer.counts[:, None])


def assert_finite(quantizer: VectorQuantizer) -> None:
    for name in {"codebook", "counts", "sums"} & set(quantizer.state_dict()):
        assert torch.isfinite(getattr(quantizer, name)).all(), name


# ---- the start, on vectors of the first batch


@pytest.mark.parametrize("update", UPDATES)
def test_starts_on_different_vectors_of_the_first_batch(update: CodebookUpdate) -> None:
    torch.manual_seed(0)
    background = torch.tensor([[7.0, 7.0, 7.0]]).expand(190, 3)
    drawn = torch.randn(10, 3)
    vectors = torch.cat([background, drawn])[torch.randperm(200)]  # 95 % of one vector, as in a picture
    quantizer = VectorQuantizer(8, 3, codebook_update=update)
    result = quantizer(as_batch(vectors))
    start = rows_used(result.vectors, result.codes, 8)
    in_batch = {tuple(row) for row in vectors.tolist()}
    assert len(start) == len(set(start.values())) >= 5
    assert set(start.values()) <= in_batch
    assert number_of_different_rows(quantizer.codebook) == 8


def rows_used(vectors: Tensor, codes: Tensor, num_codes: int) -> dict[int, tuple[float, ...]]:
    """The vector that each used code stands for in a result of the quantizer on one item."""
    flat = vectors[0].flatten(start_dim=1).T.tolist()
    found = {code: tuple(vector) for code, vector in zip(codes.flatten().tolist(), flat, strict=True)}
    assert all(0 <= code < num_codes for code in found)
    return found


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("num_vectors", [1, 2, 64, 511])
def test_a_batch_smaller_than_the_codebook_gives_no_code_twice(num_vectors: int, update: CodebookUpdate) -> None:
    torch.manual_seed(1)
    vectors = torch.randn(num_vectors, 4)
    quantizer = VectorQuantizer(512, 4, codebook_update=update)
    result = quantizer(as_batch(vectors))
    assert torch.isfinite(quantizer.codebook).all()
    assert number_of_different_rows(quantizer.codebook) == 512
    assert result.commitment_loss.item() == 0  # each vector of the batch has a code exactly on it


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("update", UPDATES)
def test_constant_input(update: CodebookUpdate, value: float) -> None:
    torch.manual_seed(2)
    quantizer = VectorQuantizer(32, 3, codebook_update=update, ema_decay=0.8, revival_threshold=0.1)
    z = torch.full((2, 3, 4, 5), value)
    for _ in range(40):
        result = quantizer(z)
        assert len(result.codes.unique()) == 1
        torch.testing.assert_close(result.vectors, z, rtol=0, atol=1e-3)
    assert_finite(quantizer)
    assert number_of_different_rows(quantizer.codebook) > 16


def test_starts_once_and_not_after_set_codebook() -> None:
    torch.manual_seed(3)
    codebook = torch.randn(6, 3)
    quantizer = quantizer_with(codebook)
    result = quantizer(10 + torch.randn(1, 3, 50))
    assert torch.equal(result.vectors, codebook[result.codes].movedim(-1, 1))


# ---- the moving averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moving_averages_agree_with_one_hot(dtype: torch.dtype) -> None:
    """Oracle: [1, appendix A.1] with an explicit one-hot matrix. A step is seen after it: e_t is used at t + 1."""
    torch.manual_seed(4)
    num_codes, decay = 7, 0.9
    codebook = torch.randn(num_codes, 3, dtype=dtype)
    quantizer = VectorQuantizer(num_codes, 3, ema_decay=decay, revival_threshold=0).to(dtype)
    quantizer.set_codebook(codebook)
    expected, counts, sums = codebook, torch.ones(num_codes, dtype=dtype), codebook.clone()
    batches = [torch.randn(2, 3, 4, 5, dtype=dtype) + shift for shift in (0, 1, 2, -3, 0, 5)]
    for z in batches:
        result = quantizer(z)
        vectors = z.movedim(1, -1).reshape(-1, 3)
        nearest = (vectors[:, None] - expected[None]).square().sum(dim=2).argmin(dim=1)
        one_hot = torch.zeros(len(vectors), num_codes, dtype=dtype)
        one_hot[torch.arange(len(vectors)), nearest] = 1
        counts = decay * counts + (1 - decay) * one_hot.sum(dim=0)
        sums = decay * sums + (1 - decay) * one_hot.T @ vectors
        expected = sums / counts[:, None]
        assert torch.equal(result.codes.flatten(), nearest)
        error = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(quantizer.counts, counts, rtol=error, atol=error)
        torch.testing.assert_close(quantizer.sums, sums, rtol=error, atol=error)
        torch.testing.assert_close(quantizer.codebook, expected, rtol=error, atol=error)
    assert not torch.allclose(expected, codebook, atol=0.1)


def test_a_step_by_hand() -> None:
    """Codes (0,0) and (8,0), each with count 1; the batch (2,0), (0,2), (6,4); decay 1/2.

    code 0: count (1 + 2) / 2 = 1.5, sum ((0,0) + (2,2)) / 2 = (1,1),  so (2/3, 2/3)
    code 1: count (1 + 1) / 2 = 1,   sum ((8,0) + (6,4)) / 2 = (7,2)
    """
    quantizer = quantizer_with(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), ema_decay=0.5)
    quantizer(as_batch(torch.tensor([[2.0, 0.0], [0.0, 2.0], [6.0, 4.0]])))
    assert quantizer.counts.tolist() == [1.5, 1.0]
    assert quantizer.sums.tolist() == [[1.0, 1.0], [7.0, 2.0]]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[2 / 3, 2 / 3], [7.0, 2.0]]))


def test_an_unused_code_keeps_its_place_and_its_count_only_decays() -> None:
    torch.manual_seed(5)
    codebook = torch.cat([torch.zeros(1, 4), 50 + 10 * torch.rand(63, 4)])
    quantizer = quantizer_with(codebook, ema_decay=0.99, revival_threshold=0)
    for step in range(1, 21):
        assert not quantizer(torch.rand(2, 4, 3, 5)).codes.any()  # all on code 0
        torch.testing.assert_close(quantizer.codebook[1:], codebook[1:], rtol=1e-4, atol=0)
        torch.testing.assert_close(quantizer.counts[1:], torch.full((63,), 0.99**step))


def test_the_first_step_leaves_untouched_codes_where_the_data_put_them() -> None:
    torch.manual_seed(6)
    vectors = torch.randn(16, 3)
    quantizer = VectorQuantizer(64, 3)
    result = quantizer(as_batch(vectors))
    untouched = torch.bincount(result.codes.flatten(), minlength=64) == 0
    assert untouched.sum() == 48
    assert quantizer.codebook.norm(dim=1).max() < 1.1 * vectors.norm(dim=1).max()  # [E1] nothing thrown 1e5 away
    assert quantizer.codebook.norm(dim=1).min() > 0.9 * vectors.norm(dim=1).min()  # [E2] nothing at zero
    assert_average_is_consistent(quantizer)


def test_the_first_updates_after_a_start_on_data_keep_less() -> None:
    """Counts start at N / K = 7.5; update t = 0, 1, .. keeps (1 + t) / (10 + t) of them, `ema_decay` at most."""
    torch.manual_seed(7)
    quantizer = VectorQuantizer(8, 3, ema_decay=0.3, revival_threshold=0)
    counts = torch.full((8,), 7.5)
    for kept in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3):  # 4 / 13 is above 0.3
        result = quantizer(torch.randn(2, 3, 5, 6))
        counts = kept * counts + (1 - kept) * torch.bincount(result.codes.flatten(), minlength=8)
        torch.testing.assert_close(quantizer.counts, counts)
        assert_average_is_consistent(quantizer)


def test_a_codebook_set_by_hand_keeps_its_share_also_after_a_start_on_data() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 4, ema_decay=0.5, revival_threshold=0)
    quantizer(torch.randn(1, 4, 30))
    quantizer.set_codebook(torch.eye(4))
    quantizer(as_batch(torch.eye(4)[[0, 0, 0, 2]]))
    assert quantizer.counts.tolist() == [2.0, 0.5, 1.0, 0.5]  # half of 1 and half of 3, 0, 1, 0


def test_nothing_overflows_when_nine_codes_in_ten_die() -> None:
    torch.manual_seed(8)
    codebook = torch.cat([torch.randn(4, 3), 1e4 * (1 + torch.rand(36, 3))])
    quantizer = quantizer_with(codebook, ema_decay=0.6, revival_threshold=0)
    for _ in range(250):  # 0.6^250 is 0 in float32, and on the way there few bits of a count are left
        quantizer(torch.randn(1, 3, 20))
    assert_finite(quantizer)
    torch.testing.assert_close(quantizer.codebook[4:], codebook[4:], rtol=1e-3, atol=0)
    assert quantizer.counts[4:].max() < 1e-30
    quantizer(as_batch(quantizer.codebook[20:21] + 1))  # and a code that comes back from there follows the data
    torch.testing.assert_close(quantizer.codebook[20], codebook[20] + 1, rtol=1e-3, atol=0)


@pytest.mark.parametrize("update", UPDATES)
def test_a_result_shows_the_codebook_before_the_step(update: CodebookUpdate) -> None:
    torch.manual_seed(9)
    codebook = torch.randn(6, 3)
    quantizer = quantizer_with(codebook, codebook_update=update, ema_decay=0.5)
    z = torch.randn(2, 3, 4, 5)
    result = quantizer(z)
    old = codebook[result.codes].movedim(-1, 1)
    assert torch.equal(result.vectors, old)
    assert result.commitment_loss.item() == pytest.approx((z - old).square().mean().item(), rel=1e-6)
    if update == "ema":
        assert not torch.equal(quantizer.codebook, codebook)


def test_moving_averages_find_the_centres_of_the_data() -> None:
    torch.manual_seed(10)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    quantizer = quantizer_with(centres + 0.8 * torch.rand(4, 2), ema_decay=0.8)
    for _ in range(40):
        quantizer(as_batch(centres.repeat(30, 1) + 0.1 * torch.randn(120, 2)))
    torch.testing.assert_close(quantizer.codebook, centres, rtol=0, atol=0.05)


# ---- the gradient


def test_gradient_codebook_follows_the_vectors_that_chose_it() -> None:
    torch.manual_seed(11)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    codebook = torch.cat([centres + 0.8 * torch.rand(3, 2), torch.tensor([[90.0, 90.0]])])
    quantizer = quantizer_with(codebook, codebook_update="gradient", revival_threshold=0)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    assert [group["params"] for group in optimizer.param_groups] == [[quantizer.codebook]]
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(as_batch(centres.repeat(30, 1) + 0.1 * torch.randn(90, 2))).loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantizer.codebook[:3].detach(), centres, rtol=0, atol=0.05)
    assert torch.equal(quantizer.codebook[3], codebook[3])  # no gradient where nobody is


def test_gradient_codebook_does_not_move_without_an_optimizer() -> None:
    torch.manual_seed(12)
    codebook = torch.randn(6, 3)
    quantizer = quantizer_with(codebook, codebook_update="gradient")
    for _ in range(3):
        quantizer(torch.randn(2, 3, 4, 5)).loss.backward()
    assert torch.equal(quantizer.codebook, codebook)


# ---- the revival of dead codes


@pytest.mark.parametrize("update", UPDATES)
def test_a_revived_code_stays_where_it_was_put(update: CodebookUpdate) -> None:
    torch.manual_seed(13)
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    far = torch.tensor([[1000.0, 1000.0]])
    options = {"codebook_update": update, "ema_decay": 0.5, "revival_threshold": 0.1}
    quantizer = quantizer_with(torch.cat([centres, far]), **options)
    batch = centres.repeat(5, 1)
    for _ in range(10):
        batch = centres.repeat(5, 1) + torch.rand(15, 2)
        quantizer(as_batch(batch))
        if quantizer.codebook[3].norm() < 100:
            break
    revived = quantizer.codebook[3].detach().clone()
    assert int(quantizer.revived) == 1
    assert tuple(revived.tolist()) in {tuple(row) for row in batch.tolist()}
    elsewhere = centres[(centres - revived).norm(dim=1) > 10] + 0.1
    for _ in range(2):
        assert 3 not in quantizer(as_batch(elsewhere)).codes
        torch.testing.assert_close(quantizer.codebook[3].detach(), revived, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("update", UPDATES)
def test_revived_codes_are_different_vectors_of_the_batch_and_are_used(update: CodebookUpdate) -> None:
    torch.manual_seed(14)
    codebook = torch.cat([torch.randn(16, 4), 1000 + torch.randn(16, 4)])
    quantizer = quantizer_with(codebook, codebook_update=update, ema_decay=0.8)
    dead = torch.arange(16, 32)
    batch = torch.empty(0)
    for _ in range(40):
        batch = torch.randn(256, 4)
        before = quantizer.codebook.detach().clone()
        quantizer(as_batch(batch))
        if quantizer.codebook[dead].abs().max() < 100:
            break
    revived = (quantizer.codebook.detach()[dead] != before[dead]).any(dim=1)
    rows = {tuple(row) for row in batch.tolist()}
    assert revived.all()
    assert all(tuple(row) in rows for row in quantizer.codebook[dead].tolist())
    assert number_of_different_rows(quantizer.codebook) == 32
    if update == "ema":
        assert_average_is_consistent(quantizer)
    used = quantizer(as_batch(torch.randn(256, 4))).codes.unique()
    assert len(set(used.tolist()) & set(dead.tolist())) >= 12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("update", UPDATES)
def test_a_code_is_never_revived_onto_a_vector_that_has_a_code(update: CodebookUpdate, seed: int) -> None:
    """Of the three vectors in the batch, two have a code exactly on them, in sums that float32 holds exactly."""
    torch.manual_seed(seed)
    codebook = torch.tensor([[0.0, 0.0], [16.0, 0.0], [0.0, 16.0], [1024.0, 1024.0]])
    quantizer = quantizer_with(codebook, codebook_update=update, ema_decay=0.5, revival_threshold=0.1)
    batch = torch.tensor([[4.0, 2.0], [16.0, 0.0], [0.0, 16.0]]).repeat(5, 1)
    for _ in range(10):
        if int(quantizer.revived) == 0:
            quantizer(as_batch(batch))
    assert int(quantizer.revived) == 1
    assert quantizer.codebook[1:].tolist() == [[16.0, 0.0], [0.0, 16.0], [4.0, 2.0]]


def test_revival_lowers_the_error() -> None:
    torch.manual_seed(15)
    codebook = torch.cat([torch.randn(4, 2), 1000 + torch.randn(28, 2)])
    errors = {}
    for threshold in (0.0, 0.02):
        quantizer = quantizer_with(codebook, ema_decay=0.9, revival_threshold=threshold)
        for _ in range(60):
            errors[threshold] = quantizer(torch.randn(1, 2, 200)).commitment_loss.item()
    assert errors[0.02] < 0.5 * errors[0.0]


def test_threshold_zero_never_revives() -> None:
    torch.manual_seed(16)
    codebook = torch.cat([torch.randn(4, 2), torch.tensor([[1000.0, 1000.0]])])
    quantizer = quantizer_with(codebook, ema_decay=0.5, revival_threshold=0)
    for _ in range(200):
        quantizer(torch.randn(1, 2, 20))
    torch.testing.assert_close(quantizer.codebook[4], codebook[4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("update", UPDATES)
def test_codes_in_use_are_never_revived_however_small_the_batch(update: CodebookUpdate) -> None:
    """64 codes take turns, 8 vectors at a time: each is used 1/8 of a time a step, far below 1."""
    torch.manual_seed(17)
    codebook = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    quantizer = quantizer_with(codebook, codebook_update=update)
    for step in range(160):
        turn = (8 * step + torch.arange(8)) % 64
        quantizer(as_batch(codebook[turn] + 0.1 * torch.randn(8, 2)))
    torch.testing.assert_close(quantizer.codebook.detach(), codebook, rtol=0, atol=0.3)


@pytest.mark.parametrize("update", UPDATES)
def test_usage_adds_up_over_batches(update: CodebookUpdate) -> None:
    quantizer = quantizer_with(torch.eye(4), codebook_update=update, ema_decay=0.9, revival_threshold=0)
    for row in (0, 2):
        quantizer(as_batch(torch.eye(4)[[row] * 10]))
    expected = [0.81 + 0.9, 0.81, 0.81 + 1.0, 0.81]
    torch.testing.assert_close(quantizer.counts, torch.tensor(expected))


# ---- when the codebook must not move


def eval_calls(quantizer: VectorQuantizer) -> dict[str, Callable[[Tensor], object]]:
    return {
        "forward": lambda z: quantizer.eval()(z),
        "forward and backward": lambda z: quantizer.eval()(z.requires_grad_()).loss.backward(),
        "nearest in training mode": lambda z: quantizer.train().nearest(z),
        "lookup in training mode": lambda z: quantizer.train().lookup(z.abs().long()[:, 0] % 8),
    }


@pytest.mark.parametrize(
    "call", ["forward", "forward and backward", "nearest in training mode", "lookup in training mode"]
)
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_nothing_but_training_changes_a_bit(update: CodebookUpdate, started: bool, call: str) -> None:
    torch.manual_seed(18)
    quantizer = VectorQuantizer(8, 3, codebook_update=update, ema_decay=0.5, revival_threshold=0.9)
    if started:  # with dead codes that wait for the next training step
        quantizer.set_codebook(torch.cat([torch.randn(4, 3), 1000 + torch.randn(4, 3)]))
        quantizer.counts[4:] = 1e-3
    before, names = state_bytes(quantizer), set(quantizer.state_dict())
    assert set(before) == names, "every buffer must be saved with the model"
    for _ in range(3):
        eval_calls(quantizer)[call](5 * torch.randn(2, 3, 4, 5))
    assert state_bytes(quantizer) == before
    quantizer.train()(5 * torch.randn(2, 3, 4, 5))
    assert state_bytes(quantizer) != before


@pytest.mark.parametrize("update", UPDATES)
def test_encode_and_decode_never_change_the_model(update: CodebookUpdate) -> None:
    torch.manual_seed(19)
    model, images = tiny_vqvae(in_channels=1, codebook_update=update), torch.rand(2, 1, 8, 12)
    for training in (True, False):
        model.train(training)
        before = state_bytes(model)
        model.decode(model.encode(images))
        assert state_bytes(model) == before
    model.eval()(images).loss.backward()
    assert state_bytes(model) == before
    model.train()(images)
    assert state_bytes(model) != before


@pytest.mark.parametrize("update", UPDATES)
def test_the_codebook_is_one_tensor_for_life(update: CodebookUpdate) -> None:
    torch.manual_seed(20)
    quantizer = VectorQuantizer(8, 3, codebook_update=update, ema_decay=0.5, revival_threshold=0.5)
    tensors = {name: (id(tensor), tensor.data_ptr()) for name, tensor in quantizer.state_dict(keep_vars=True).items()}
    parameters = [id(parameter) for parameter in quantizer.parameters()]
    moved = 0
    for step in range(6):
        if step == 3:
            quantizer.set_codebook(torch.randn(8, 3))
        before = state_bytes(quantizer)
        quantizer(torch.randn(1, 3, 12) + 100 * step)  # far away each time, so that codes die and are revived
        moved += state_bytes(quantizer)["codebook"] != before["codebook"]
        for name, tensor in quantizer.state_dict(keep_vars=True).items():
            assert (id(tensor), tensor.data_ptr()) == tensors[name], name
    assert moved >= 3
    assert [id(parameter) for parameter in quantizer.parameters()] == parameters


def test_set_codebook_copies() -> None:
    vectors = torch.randn(5, 3)
    quantizer = quantizer_with(vectors)
    vectors.zero_()
    assert quantizer.codebook.any(dim=1).all()
    assert_average_is_consistent(quantizer)


# ---- saving


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_a_step_after_loading_is_the_step_without_saving(update: CodebookUpdate, started: bool) -> None:
    def train_step(quantizer: VectorQuantizer, seed: int) -> None:
        torch.manual_seed(seed)  # the same draw for a start or a revival
        optimizer = torch.optim.SGD([*quantizer.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
        z = torch.randn(2, 3, 4, 5, requires_grad=True)
        quantizer(z).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    options: dict[str, Any] = {"codebook_update": update, "ema_decay": 0.7, "revival_threshold": 0.5}
    torch.manual_seed(21)
    original = VectorQuantizer(8, 3, **options)
    for seed in range(4 if started else 0):
        train_step(original, seed)
    loaded = VectorQuantizer(8, 3, **options)
    loaded.load_state_dict(load(save({name: t.contiguous() for name, t in original.state_dict().items()})))
    assert state_bytes(loaded) == state_bytes(original)
    for seed in range(100, 103):
        train_step(original, seed)
        train_step(loaded, seed)
        assert state_bytes(loaded) == state_bytes(original)
