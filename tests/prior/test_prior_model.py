"""`GatedPixelCNN` as a whole: shapes, batches, labels, codes as names, what it refuses; and what `PriorConfig` does."""

import dataclasses
from typing import Any

import pytest
import torch

from prior import GatedPixelCNN, PriorConfig
from prior.objective import cross_entropy

from .oracles import Grid, generator, positive_, tiny_prior

GRIDS = [(8, 16), (16, 8), (1, 5), (5, 1), (1, 1)]


def some_codes(batch: int, grid: Grid, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, (batch, *grid), generator=generator(seed))


@pytest.mark.parametrize("grid", GRIDS)
def test_logits_for_each_position_of_any_grid(grid: Grid) -> None:
    assert tiny_prior()(some_codes(2, grid)).shape == (2, 5, *grid)


@pytest.mark.parametrize("grid", [(8, 16), (16, 8)])
def test_the_first_rows_alone_have_the_logits_they_have_in_the_whole(grid: Grid) -> None:
    """What lets a sampler run the rows it has drawn and no more."""
    prior, codes = tiny_prior(), some_codes(2, grid)
    whole = prior(codes)
    for rows in (1, 2, grid[0] - 1):
        torch.testing.assert_close(prior(codes[:, :rows]), whole[:, :, :rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_codes_of_any_integer_type(dtype: torch.dtype) -> None:
    prior, codes = tiny_prior(), some_codes(2, (3, 5))
    assert torch.equal(prior(codes.to(dtype)), prior(codes))


def test_the_type_of_the_weights_is_the_type_of_the_logits() -> None:
    codes = some_codes(2, (3, 5))
    assert tiny_prior()(codes).dtype == torch.float64
    assert tiny_prior().float()(codes).dtype == torch.float32


def test_an_item_knows_nothing_of_its_batch_in_training() -> None:
    prior, codes = tiny_prior().train(), some_codes(4, (3, 5))
    others = torch.cat([codes[:1], some_codes(3, (3, 5), seed=1)])
    alone = prior(codes[:1])
    torch.testing.assert_close(prior(codes)[:1], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(prior(others)[:1], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(prior(codes)[1:], prior(others)[1:])


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    plain, dropping = tiny_prior(), tiny_prior(dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    codes = some_codes(2, (3, 5))
    assert torch.equal(dropping.eval()(codes), plain(codes))
    assert not torch.allclose(dropping.train()(codes), plain(codes))


def test_every_parameter_is_trained() -> None:
    """None is left without a gradient: distributed training would wait for it for ever."""
    prior = positive_(tiny_prior(num_classes=2))
    codes = some_codes(2, (3, 5))
    cross_entropy(prior(codes, torch.tensor([0, 1])), codes).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in prior.parameters())


@pytest.mark.parametrize("position", [(0, 0), (2, 3)])
def test_the_label_reaches_both_stacks_of_every_layer(position: Grid) -> None:
    prior = positive_(tiny_prior(num_classes=3))
    tables = [layer.label_bias.weight for layer in prior.layers]
    logits = prior(some_codes(1, (4, 6)), torch.tensor([1]))[0, :, position[0], position[1]]
    for gradient in torch.autograd.grad(logits.sum(), tables):
        vertical, horizontal = gradient[1].chunk(2)
        assert (vertical != 0).all()
        assert (horizontal != 0).all()
        assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_two_labels_give_different_logits_from_the_first_position_on(num_layers: int) -> None:
    prior = positive_(tiny_prior(num_classes=3, num_layers=num_layers))
    logits = prior(some_codes(1, (4, 6)).repeat(3, 1, 1), torch.arange(3))
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert ((logits[a] - logits[b]).abs() > 1e-6).all()


def test_labels_go_with_their_items() -> None:
    prior, codes = tiny_prior(num_classes=3), some_codes(4, (3, 5))
    labels = torch.tensor([2, 0, 1, 1])
    each = [prior(codes[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(prior(codes, labels), torch.cat(each), rtol=0, atol=1e-12)


def renamed(prior: GatedPixelCNN, names: torch.Tensor) -> GatedPixelCNN:
    """The prior that calls code k `names[k]`: the rows of its embedding and of its output are moved."""
    other = tiny_prior(num_codes=len(names))
    other.load_state_dict(prior.state_dict())
    with torch.no_grad():
        other.embedding.weight[names] = prior.embedding.weight
        for new, old in zip(other.to_logits[-1].parameters(), prior.to_logits[-1].parameters(), strict=True):
            new[names] = old
    return other


def test_codes_are_names_without_order() -> None:
    """Renamed codes give the renamed logits, and training from there goes the same way."""
    prior, names = tiny_prior(num_codes=7), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    other = renamed(prior, names)
    codes = torch.randint(7, (4, 3, 5), generator=generator())
    torch.testing.assert_close(other(names[codes])[:, names], prior(codes), rtol=0, atol=1e-12)
    losses = []
    for model, data in ((prior, codes), (other, names[codes])):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss = cross_entropy(model(data), data)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] < 0.8 * cross_entropy(other(codes), codes).item()  # it did learn: these names, not the old ones


def test_codes_that_are_not_grids_are_refused() -> None:
    for shape in [(5,), (3, 5), (2, 1, 3, 5)]:
        with pytest.raises(ValueError, match=r"expected codes \[B,H,W\], got the shape"):
            tiny_prior()(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "3 classes: expected labels"),
        (torch.tensor([0, 1, 2]), "one label for each of 2 grids, got the shape"),
        (torch.tensor(1), "one label for each of 2 grids, got the shape"),
        (torch.tensor([[0], [1]]), "one label for each of 2 grids, got the shape"),
        (torch.tensor([0, 3]), "labels from 0 to 2, got"),
        (torch.tensor([-1, 0]), "labels from 0 to 2, got"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_prior(num_classes=3)(some_codes(2, (3, 5)), labels)


def test_a_prior_without_classes_refuses_labels() -> None:
    with pytest.raises(ValueError, match="without labels"):
        tiny_prior()(some_codes(2, (3, 5)), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_codes", 1),
        ("num_codes", 0),
        ("num_classes", -1),
        ("channels", 0),
        ("num_layers", 0),
        ("output_channels", 0),
        ("kernel_size", 2),
        ("kernel_size", 0),
        ("kernel_size", -1),
        ("first_kernel_size", 1),
        ("first_kernel_size", 4),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    fields: dict[str, Any] = {"num_codes": 5, field: value}
    with pytest.raises(ValueError, match=rf"PriorConfig\.{field}: expected .*, got {value}"):
        PriorConfig(**fields)


def test_the_least_of_every_field_is_a_prior() -> None:
    least = {"num_codes": 2, "num_classes": 1, "channels": 1, "num_layers": 1, "output_channels": 1}
    prior = GatedPixelCNN(PriorConfig(**least, kernel_size=1, first_kernel_size=3))
    assert prior(torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)).shape == (1, 2, 2, 3)


def test_a_config_cannot_be_changed_and_comes_back_from_its_fields() -> None:
    config = PriorConfig(num_codes=5, num_classes=3, dropout=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_codes = 6  # type: ignore[misc]
    assert PriorConfig(**dataclasses.asdict(config)) == config
