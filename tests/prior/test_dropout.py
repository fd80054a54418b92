"""What is dropped of an item: as often as asked, by its key alone, and alike wherever it is computed.

Legend: B batch, C channels, H W grid, K codes, n draws.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prior import GatedPixelCNN, PriorConfig
from prior.dropout import ItemDropout, kept, mixed_bits
from prior.objective import cross_entropy
from prior.uniforms import draw_seed

SHAPE = torch.Size([8, 5, 6])  # C, H, W of an item
FAR = 4.5  # standard deviations, that none of some thousand numbers is away from its mean


def keys_of(count: int, seed: int = 0) -> Tensor:
    """Keys as a training has them."""
    return torch.from_numpy(np.random.default_rng(seed).integers(2**62, size=count))


def correlation(one: Tensor, other: Tensor) -> float:
    """Correlation of two choices of n activations, in units of its standard deviation if they are independent."""
    both = torch.stack([one.flatten(), other.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1]) * math.sqrt(one.numel())


# The random bits


def mixed_by_hand(x: int) -> int:
    """lowbias32 on Python's integers, as its author writes it in C on unsigned ones."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def undone_by_hand(x: int) -> int:
    """The inverse of `mixed_by_hand`."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 2**32) & 0xFFFFFFFF
    x ^= x >> 15 ^ x >> 30
    x = x * pow(0x7FEB352D, -1, 2**32) & 0xFFFFFFFF
    return x ^ x >> 16


def sample_of_int32() -> Tensor:
    """Some thousand numbers, with all that is special among them."""
    random = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), *(2**bit for bit in range(31))])
    return torch.cat([special, random, torch.arange(1000)]).unique().to(torch.int32)


def test_bits_are_mixed_as_by_hand_and_can_be_told_apart_again() -> None:
    """A permutation: no two numbers become one."""
    numbers = sample_of_int32()
    found = mixed_bits(numbers)
    assert found.dtype == torch.int32
    assert [x & 0xFFFFFFFF for x in found.tolist()] == [mixed_by_hand(x) for x in numbers.tolist()]
    assert [undone_by_hand(x & 0xFFFFFFFF) for x in found.tolist()] == [x & 0xFFFFFFFF for x in numbers.tolist()]
    assert len(found.unique()) == len(numbers)


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_changes_about_half_of_the_bits(bit: int) -> None:
    numbers = sample_of_int32()
    flip = 2**bit - (2**32 if bit == 31 else 0)
    changed = mixed_bits(numbers) ^ mixed_bits(numbers ^ torch.tensor(flip, dtype=torch.int32))
    shares = torch.stack([(changed >> place & 1).double().mean() for place in range(32)])
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert 0.4 < shares.min() <= shares.max() < 0.6


# Which activations are dropped


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_share_that_is_dropped(share: float, layer: int) -> None:
    """Of all, of each item, and of each place: within the bounds of a binomial."""
    keep = kept(keys_of(600), layer, SHAPE, share).double()
    assert keep.shape == (600, *SHAPE)
    for means, count in (
        (keep.mean()[None], keep.numel()),
        (keep.mean(dim=(1, 2, 3)), SHAPE.numel()),
        (keep.mean(dim=0).flatten(), 600),
    ):
        deviations = (means - (1 - share)).abs() / math.sqrt(share * (1 - share) / count)
        assert deviations.max() < FAR
        assert len(means) < 10 or deviations.square().mean() == pytest.approx(1, abs=0.35)  # nor too even


def test_choices_of_layers_items_and_places_are_independent() -> None:
    keys = keys_of(400)
    layers = [kept(keys, layer, SHAPE, 0.3) for layer in range(4)]
    for one in range(4):
        for other in range(one):
            assert abs(correlation(layers[one], layers[other])) < FAR
        for lag in (1, 2, 7):
            assert abs(correlation(layers[one][lag:], layers[one][:-lag])) < FAR  # of items
    keep = layers[1].flatten(start_dim=1)
    for lag in (1, 2, 6, 30, 31, 120):
        assert abs(correlation(keep[:, lag:], keep[:, :-lag])) < FAR  # of places


def test_neighbouring_keys_and_keys_of_equal_high_bits_drop_other_activations() -> None:
    """The random bits are mixed: keys need not be far apart."""
    for step in (1, 2, 2**16, 2**30):
        one, other = (kept(torch.arange(500) * 3 + start, 0, SHAPE, 0.5) for start in (0, step))
        assert abs(correlation(one, other)) < FAR
    assert not torch.equal(kept(keys_of(4, 0), 0, SHAPE, 0.5), kept(keys_of(4, 1), 0, SHAPE, 0.5))


def test_an_item_loses_the_same_in_any_batch() -> None:
    """Whatever its place, its neighbours and the size of the batch are."""
    keys = keys_of(7)
    whole = kept(keys, 2, SHAPE, 0.4)
    assert torch.equal(torch.cat([kept(key[None], 2, SHAPE, 0.4) for key in keys]), whole)
    assert torch.equal(torch.cat([kept(part, 2, SHAPE, 0.4) for part in keys.split([3, 1, 3])]), whole)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    assert torch.equal(kept(keys[order], 2, SHAPE, 0.4), whole[order])
    assert torch.equal(kept(keys[[3, 3]], 2, SHAPE, 0.4), whole[[3, 3]])


def test_more_is_dropped_of_what_was_dropped_already() -> None:
    """With a larger share, the same random number of an activation is below it."""
    keys = keys_of(5)
    fewer, more = kept(keys, 0, SHAPE, 0.6), kept(keys, 0, SHAPE, 0.2)
    assert not (fewer & ~more).any()
    assert fewer.sum() < more.sum()


# The module


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    x, keys = torch.rand(300, *SHAPE) + 1, keys_of(300)
    dropout = ItemDropout(0.25, 1).train()
    found = dropout(x, keys)
    keep = kept(keys, 1, SHAPE, 0.25)
    torch.testing.assert_close(found, torch.where(keep, x / 0.75, torch.zeros(())))
    deviation = float(x.square().mean()) ** 0.5 * math.sqrt(0.25 / 0.75 / x.numel())
    assert abs(float((found - x).mean())) < FAR * deviation


def test_in_evaluation_and_with_share_0_nothing_is_done() -> None:
    x, keys = torch.randn(2, *SHAPE), keys_of(2)
    assert ItemDropout(0.5, 0).eval()(x, keys) is x
    assert ItemDropout(0.5, 0).eval()(x) is x
    assert ItemDropout(0.0, 0).train()(x, keys) is x
    assert ItemDropout(0.0, 0).train()(x) is x


def test_without_keys_it_is_the_dropout_of_torch() -> None:
    x = torch.randn(3, *SHAPE)
    torch.manual_seed(3)
    found = ItemDropout(0.3, 5).train()(x)
    torch.manual_seed(3)
    assert torch.equal(found, F.dropout(x, 0.3))
    assert not torch.equal(found, x)


def test_with_keys_the_generator_of_torch_is_left_alone() -> None:
    torch.manual_seed(3)
    before = draw_seed(None)
    torch.manual_seed(3)
    ItemDropout(0.3, 5).train()(torch.zeros(3, *SHAPE), keys_of(3))
    assert draw_seed(None) == before


def test_the_gradient_comes_from_what_is_kept_alone() -> None:
    x, keys = torch.randn(3, *SHAPE, requires_grad=True), keys_of(3)
    ItemDropout(0.4, 2).train()(x, keys).sum().backward()
    keep = kept(keys, 2, SHAPE, 0.4)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(keep, torch.tensor(1 / 0.6), torch.zeros(())))


def test_values_that_are_not_finite_and_dropped_are_gone() -> None:
    x = torch.full((2, *SHAPE), math.inf)
    found = ItemDropout(0.5, 0).train()(x, keys_of(2))
    assert not found.isnan().any()
    assert torch.equal(found == 0, ~kept(keys_of(2), 0, SHAPE, 0.5))


def test_in_half_precision_the_same_is_dropped() -> None:
    x, keys = torch.ones(3, *SHAPE, dtype=torch.bfloat16), keys_of(3)
    found = ItemDropout(0.5, 2).train()(x, keys)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found != 0, kept(keys, 2, SHAPE, 0.5))


def test_a_compiled_one_drops_the_same() -> None:
    """Integers that overflow, shifts of negative numbers: traced, they are the same."""
    x, keys = torch.randn(4, *SHAPE), keys_of(4)
    dropout = ItemDropout(0.3, 2).train()
    compiled = torch.compile(dropout, backend="aot_eager")
    for part in (slice(None), slice(1)):
        assert torch.equal(compiled(x[part], keys[part]), dropout(x[part], keys[part]))


# The prior


@pytest.fixture
def model() -> GatedPixelCNN:
    torch.manual_seed(0)
    config = PriorConfig(
        num_codes=9, num_classes=3, channels=6, num_layers=4, first_kernel_size=3, attention_every=2, dropout=0.4
    )
    return GatedPixelCNN(config).train()


def items() -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B,H,W], labels [B] and keys [B] of five items."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(9, (5, 4, 3), generator=random), torch.tensor([0, 2, 1, 1, 0]), keys_of(5)


def test_logits_of_an_item_in_training_are_the_same_alone_and_in_a_batch(model: GatedPixelCNN) -> None:
    """Which makes a batch divisible: among processes, or into parts that are computed one after the other."""
    codes, labels, keys = items()
    whole = model(codes, labels, keys).detach()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(codes[order], labels[order], keys[order]), whole[order])
    for item in range(5):
        torch.testing.assert_close(model(codes[[item]], labels[[item]], keys[[item]])[0], whole[item])
    assert not torch.allclose(model(codes, labels, keys_of(5, seed=1)), whole, atol=0.01)
    evaluated = model.eval()(codes, labels)
    assert not torch.allclose(evaluated, whole, atol=0.01)
    assert torch.equal(model(codes, labels, keys), evaluated)


def test_gradients_of_a_batch_are_those_of_its_parts(model: GatedPixelCNN) -> None:
    codes, labels, keys = items()
    cross_entropy(model(codes, labels, keys), codes).backward()
    whole = gradients_of(model)
    for part in (slice(0, 1), slice(1, 5)):
        loss = cross_entropy(model(codes[part], labels[part], keys[part]), codes[part])
        (loss * (len(codes[part]) / 5)).backward()
    for found, expected in zip(gradients_of(model), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_each_layer_drops_others(model: GatedPixelCNN) -> None:
    """The same key, and the same place: with one choice for all layers, a channel would be off throughout."""
    dropouts = [module for module in model.modules() if isinstance(module, ItemDropout)]
    assert [dropout.layer for dropout in dropouts] == [0, 1, 2, 3]
    x, keys = torch.ones(200, 6, 4, 3), keys_of(200)
    found = [dropout(x, keys) != 0 for dropout in dropouts]
    for one in range(4):
        for other in range(one):
            assert abs(correlation(found[one], found[other])) < FAR


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return the gradients, and remove them."""
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert len(found) == len(list(model.parameters()))
    return found
