"""Hidden labels: which are dropped, the row of the label tables they get, and who accepts them."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prior import GatedPixelCNN, PriorConfig, sample_codes
from prior.incremental import IncrementalPrior
from prior.model import NO_LABEL
from prior.objective import cross_entropy, drop_labels

from .oracles import generator, positive_, tiny_prior
from .test_causality import seen
from .test_incremental import logits_column_by_column


def some_codes(count: int) -> Tensor:
    return torch.randint(5, (count, 3, 5), generator=generator())


# Dropping


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_label_is_dropped_on_its_own(share: float) -> None:
    """The share of the items, within 4.5 standard deviations; and of pairs within a batch the share squared."""
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(10)
    dropped = torch.stack([drop_labels(labels, share) == NO_LABEL for _ in range(200)])  # [batches, items]

    def agrees(found: Tensor, expected: float) -> bool:
        return abs(float(found.double().mean()) - expected) < 4.5 * math.sqrt(expected * (1 - expected) / found.numel())

    assert agrees(dropped, share)
    assert agrees(dropped[:, ::2] & dropped[:, 1::2], share**2)  # never whole batches
    assert agrees(dropped[::2] & dropped[1::2], share**2)  # nor always the same items
    assert all(agrees(dropped[:, labels == label], share) for label in range(10))


def test_the_other_labels_and_the_argument_stay() -> None:
    torch.manual_seed(0)
    labels = torch.randint(7, (500,), generator=generator())
    before = labels.clone()
    found = drop_labels(labels, 0.3)
    assert torch.equal(labels, before)
    assert found.dtype == labels.dtype
    assert found.shape == labels.shape
    assert torch.equal(found[found != NO_LABEL], labels[found != NO_LABEL])
    assert 0 < int((found == NO_LABEL).sum()) < 500


def test_torchs_generator_decides_and_a_share_of_0_leaves_it_alone() -> None:
    labels, found = torch.arange(100), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(drop_labels(labels, 0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(drop_labels(labels, 0.5), found[0])
    state = torch.get_rng_state()
    assert torch.equal(drop_labels(labels, 0.0), labels)
    assert torch.equal(torch.get_rng_state(), state)


# The tables


@pytest.mark.parametrize(("share", "rows"), [(0.0, 3), (0.1, 4)])
def test_label_dropout_is_one_more_row_of_each_layer_and_nothing_else(share: float, rows: int) -> None:
    prior = tiny_prior(num_classes=3, label_dropout=share)
    assert prior.config.label_rows == rows
    assert [list(layer.label_bias.weight.shape) for layer in prior.layers] == [[rows, 16]] * 3
    plain = tiny_prior(num_classes=3).state_dict()
    assert prior.state_dict().keys() == plain.keys()
    differ = {name for name, value in prior.state_dict().items() if value.shape != plain[name].shape}
    assert differ == ({f"layers.{i}.label_bias.weight" for i in range(3)} if share else set())


def test_no_label_reads_the_last_row_and_the_others_theirs() -> None:
    """The gradient of a batch by the rows, in both stacks of every layer."""
    prior = positive_(tiny_prior(num_classes=3, label_dropout=0.1))
    tables = [layer.label_bias.weight for layer in prior.layers]
    for label, row in ((0, 0), (2, 2), (NO_LABEL, 3)):
        logits = prior(some_codes(1), torch.tensor([label]))
        for gradient in torch.autograd.grad(logits[..., -1].sum(), tables):
            assert (gradient[row] != 0).all()
            assert (gradient[[other for other in range(4) if other != row]] == 0).all()


def test_with_labels_it_is_the_prior_without_dropout() -> None:
    """The same weights, without the row: bit for bit the same logits."""
    prior, plain = tiny_prior(num_classes=3, label_dropout=0.1), tiny_prior(num_classes=3)
    state = {name: x[:3] if name.endswith("label_bias.weight") else x for name, x in prior.state_dict().items()}
    plain.load_state_dict(state)
    labels, codes = torch.tensor([2, 0, 1, 1]), some_codes(4)
    assert torch.equal(prior(codes, labels), plain(codes, labels))


@torch.no_grad()
def test_the_incremental_network_knows_no_label_too() -> None:
    prior, labels = tiny_prior(num_classes=3, label_dropout=0.1), torch.tensor([2, NO_LABEL, 0, NO_LABEL])
    found, expected = logits_column_by_column(prior, some_codes(4), labels), prior(some_codes(4), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, prior(some_codes(4), torch.tensor([2, 2, 0, 2])))


def test_the_row_of_no_label_is_trained_by_hidden_labels() -> None:
    torch.manual_seed(0)
    prior, codes = tiny_prior(num_classes=3, label_dropout=0.5), some_codes(40)
    labels = drop_labels(torch.arange(40) % 3, 0.5)
    cross_entropy(prior(codes, labels), codes).backward()
    for layer in prior.layers:
        assert (layer.label_bias.weight.grad != 0).any(dim=1).tolist() == [True] * 4


@pytest.mark.parametrize("label", [0, NO_LABEL])
def test_label_dropout_opens_no_future_and_no_blind_spot(label: int) -> None:
    """As of a prior without it, with a label and without one."""
    grid = (4, 6)
    dropping, plain = (
        positive_(tiny_prior(first_kernel_size=7, num_layers=6, num_classes=3, **fields))
        for fields in ({"label_dropout": 0.1}, {})
    )
    expected = seen(plain, grid, labels=True)

    def run(codes: Tensor, labels: Tensor | None) -> Tensor:
        return dropping(codes, torch.full((len(codes),), label))

    assert torch.equal(seen(dropping, grid, run=run), expected)
    assert expected.any()


def test_a_compiled_prior_knows_no_label() -> None:
    prior, labels = tiny_prior(num_classes=3, label_dropout=0.1), torch.tensor([2, NO_LABEL])
    try:
        compiled = torch.compile(prior, backend="eager", fullgraph=True)
        assert torch.equal(compiled(some_codes(2), labels), prior(some_codes(2), labels))
    finally:
        torch.compiler.reset()


# Who accepts what


@pytest.mark.parametrize("labels", [[-1, 0], [2, -1], [-1, -1]])
def test_no_label_is_known_with_label_dropout_alone(labels: list[int]) -> None:
    tiny_prior(num_classes=3, label_dropout=0.1).check_labels(torch.tensor(labels), 2)
    for call in (
        lambda prior: prior.check_labels(torch.tensor(labels), 2),
        lambda prior: prior(some_codes(2), torch.tensor(labels)),
        lambda prior: sample_codes(prior, 2, (3, 5), labels=torch.tensor(labels)),
    ):
        with pytest.raises(ValueError, match="expected labels from 0 to 2, got"):
            call(tiny_prior(num_classes=3))
    with pytest.raises(IndexError):
        IncrementalPrior(tiny_prior(num_classes=3), 2, 5, torch.tensor(labels))


@pytest.mark.parametrize("labels", [[-2, 0], [3, 0], [4, -1]])
def test_other_labels_out_of_range_are_refused(labels: list[int]) -> None:
    """Also the number of the row that "no label" has: it is no class."""
    with pytest.raises(ValueError, match="expected labels from 0 to 2, or -1 for none, got"):
        tiny_prior(num_classes=3, label_dropout=0.1).check_labels(torch.tensor(labels), 2)


def test_labels_are_still_needed() -> None:
    with pytest.raises(ValueError, match="3 classes: expected labels"):
        tiny_prior(num_classes=3, label_dropout=0.1)(some_codes(2))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(value: float) -> None:
    message = f"PriorConfig.label_dropout: expected from 0 to below 1, got {value}"
    with pytest.raises(ValueError, match=message):
        PriorConfig(num_codes=5, num_classes=3, label_dropout=value)


def test_a_prior_without_classes_has_no_labels_to_hide() -> None:
    message = r"PriorConfig\.label_dropout: expected 0 for a prior without classes, got 0\.1"
    with pytest.raises(ValueError, match=message):
        PriorConfig(num_codes=5, label_dropout=0.1)
    assert PriorConfig(num_codes=5).label_rows == 0


def test_a_config_from_before_is_one_without_label_dropout() -> None:
    fields: dict[str, Any] = dataclasses.asdict(PriorConfig(num_codes=5, num_classes=3))
    assert fields.pop("label_dropout") == 0
    assert PriorConfig(**fields) == PriorConfig(num_codes=5, num_classes=3)
    old = GatedPixelCNN(PriorConfig(**fields))
    assert {tuple(layer.label_bias.weight.shape) for layer in old.layers} == {(3, 4 * 64)}
