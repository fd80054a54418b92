"""The logits at a position depend on all positions before it in raster order, and on no other: no leak, no blind spot.

Both sides are asked of the gradient in float64: exactly zero to the position itself and all after it, not zero to all
before it that the kernels reach. Weights above 0 (`positive_`) keep a gradient from vanishing by cancellation.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prior import GatedPixelCNN, PriorConfig
from prior.objective import cross_entropy

from .oracles import Given, Grid, generator, past, positive_, reach, tiny_prior

GRIDS = [(8, 16), (16, 8), (1, 16), (16, 1), (1, 1)]
ENOUGH_LAYERS = 13  # 3 columns by the first layer and 1 by each later one: the 15 across a row of 16


def seen(prior: GatedPixelCNN, grid: Grid, *, run: Callable[..., Tensor] | None = None, labels: bool = False) -> Tensor:
    """[H*W,H*W] bool: has output position `o` a gradient to input position `p`?

    One backward pass answers for all: item `o` of a batch of H*W is asked about its position `o`.
    """
    positions = math.prod(grid)
    vectors = 0.5 + torch.rand(positions, *grid, prior.config.channels, dtype=torch.float64, generator=generator())
    codes = torch.zeros(positions, *grid, dtype=torch.long)
    embedding, prior.embedding = prior.embedding, Given(vectors)
    try:
        logits = (prior if run is None else run)(
            codes, torch.arange(positions) % prior.config.num_classes if labels else None
        )
        each = torch.arange(positions)
        (gradient,) = torch.autograd.grad(logits.flatten(2)[each, :, each].sum(), prior.embedding.vectors)
    finally:
        prior.embedding = embedding
    assert gradient.isfinite().all()
    return (gradient != 0).any(dim=3).flatten(1)


def deep_prior(seed: int = 0, **fields: int) -> GatedPixelCNN:
    fields = {"first_kernel_size": 7, "num_layers": ENOUGH_LAYERS, **fields}
    return positive_(tiny_prior(**fields), seed=seed)


def train(prior: GatedPixelCNN, grid: Grid, steps: int = 1) -> None:
    """Optimizer steps with weight decay, which move every weight, also one that a mask had set to 0."""
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, weight_decay=0.5)
    codes = torch.randint(prior.config.num_codes, (4, *grid), generator=generator())
    before = [parameter.detach().clone() for parameter in prior.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(prior(codes), codes).backward()
        optimizer.step()
    assert all((old != new).all() for old, new in zip(before, prior.parameters(), strict=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_every_position_sees_all_before_it_and_nothing_else(grid: Grid) -> None:
    prior = deep_prior()
    assert torch.equal(seen(prior, grid), past(grid))
    train(prior, grid)
    assert torch.equal(seen(prior, grid), past(grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_else_is_seen_with_weights_of_either_sign(grid: Grid) -> None:
    assert not (seen(tiny_prior(num_layers=4, first_kernel_size=7), grid) & ~past(grid)).any()


@pytest.mark.parametrize("grid", [(6, 9), (9, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize(
    ("first", "kernel", "layers"), [(3, 3, 1), (7, 3, 1), (3, 3, 2), (7, 3, 3), (3, 5, 2), (5, 1, 3)]
)
def test_a_shallow_prior_sees_exactly_what_its_kernels_reach(first: int, kernel: int, layers: int, grid: Grid) -> None:
    prior = positive_(tiny_prior(first_kernel_size=first, kernel_size=kernel, num_layers=layers))
    assert torch.equal(seen(prior, grid), reach(prior.config, grid))


@pytest.mark.parametrize("grid", [(6, 9), (9, 6), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize(("layers", "every"), [(2, 1), (3, 2), (4, 1), (4, 3)])
def test_attention_sees_all_that_any_position_up_to_it_knows(layers: int, every: int, grid: Grid) -> None:
    prior = positive_(tiny_prior(first_kernel_size=3, num_layers=layers, attention_every=every))
    assert torch.equal(seen(prior, grid), reach(prior.config, grid))
    mixed = tiny_prior(first_kernel_size=3, num_layers=layers, attention_every=every)
    assert not (seen(mixed, grid) & ~past(grid)).any()


@pytest.mark.parametrize("grid", [(8, 16), (16, 8)])
def test_one_attention_closes_what_few_layers_cannot_reach(grid: Grid) -> None:
    without, attending = (tiny_prior(first_kernel_size=3, num_layers=3, attention_every=every) for every in (0, 2))
    assert not torch.equal(seen(positive_(without), grid), past(grid))
    after_training = positive_(attending)
    train(after_training, grid)
    assert torch.equal(seen(after_training, grid), past(grid))


def test_one_row_up_and_four_columns_right_is_no_blind_spot() -> None:
    """(-1, +4): beyond the 3 columns of the first kernel; only a later layer that looks at its own row reaches it."""
    height, width = 3, 11
    from_output = seen(positive_(tiny_prior(first_kernel_size=7, num_layers=2)), (height, width))
    asked = [(i, j) for i in range(1, height) for j in range(width - 4)]
    assert all(from_output[i * width + j, (i - 1) * width + j + 4] for i, j in asked)
    assert not any(from_output[i * width + j, (i - 1) * width + j + 5] for i, j in asked if j + 5 < width)


def test_the_documented_prior_sees_110_past_and_0_future_positions() -> None:
    """The layers of the default configuration; row 8, column 6 of a grid 13 wide: 8 * 13 + 6 = 110 lie before it."""
    prior = positive_(GatedPixelCNN(PriorConfig(num_codes=5, channels=4, output_channels=6)).double())
    position = 8 * 13 + 6
    from_output = seen(prior, (10, 13))[position]
    assert int(from_output[:position].sum()) == 110
    assert int(from_output[position:].sum()) == 0


@pytest.mark.parametrize("layers", [3, 6])
def test_a_prior_with_attention_sees_110_past_and_0_future_positions_whatever_its_depth(layers: int) -> None:
    config = PriorConfig(
        num_codes=5, channels=4, output_channels=6, num_layers=layers, first_kernel_size=3, attention_every=2
    )
    position = 8 * 13 + 6
    from_output = seen(positive_(GatedPixelCNN(config).double()), (10, 13))[position]
    assert int(from_output[:position].sum()) == 110
    assert int(from_output[position:].sum()) == 0


def test_changed_codes_change_later_logits_and_no_others() -> None:
    """The same by way of the integers, without gradients: change each position in turn."""
    grid, prior = (4, 6), deep_prior(num_layers=6)
    codes = torch.randint(5, grid, generator=generator())
    changed = codes.repeat(24, 1, 1)
    changed.view(24, 24).diagonal().add_(1).remainder_(5)
    with torch.no_grad():
        difference = (prior(changed) - prior(codes[None])).abs().amax(dim=1).flatten(1)  # [changed, output]
    assert torch.equal(difference > 1e-12, past(grid).T)


def test_one_backward_pass_for_each_output_says_the_same() -> None:
    """`seen` asks for all outputs at once; here one after the other, on a prior with a reach of less than all."""
    grid, prior = (3, 5), positive_(tiny_prior(first_kernel_size=3, num_layers=2))
    prior.embedding = Given(torch.ones(1, *grid, 4, dtype=torch.float64))
    logits = prior(torch.zeros(1, *grid, dtype=torch.long)).flatten(2)
    rows = [
        torch.autograd.grad(logits[0, :, o].sum(), prior.embedding.vectors, retain_graph=True)[0] for o in range(15)
    ]
    one_by_one = torch.stack([(row != 0).any(dim=3).flatten() for row in rows])
    assert torch.equal(one_by_one, reach(prior.config, grid))
    assert torch.equal(one_by_one, seen(prior, grid))


def test_labels_open_no_future() -> None:
    prior = deep_prior(num_layers=6, num_classes=3)
    assert torch.equal(seen(prior, (4, 6), labels=True), past((4, 6)))


def test_train_mode_opens_no_future() -> None:
    prior = deep_prior(num_layers=6).train()
    assert torch.equal(seen(prior, (4, 6)), past((4, 6)))


def test_dropout_opens_no_future() -> None:
    torch.manual_seed(0)
    prior = positive_(tiny_prior(dropout=0.5)).train()
    assert not (seen(prior, (4, 6)) & ~past((4, 6))).any()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilation_opens_no_future(backend: str) -> None:
    grid = (3, 5)
    prior = deep_prior(num_layers=4)
    train(prior, grid)
    compiled = torch.compile(prior, backend=backend, fullgraph=True)
    assert torch.equal(seen(prior, grid, run=compiled), past(grid))


def test_a_loaded_state_opens_no_future() -> None:
    grid, trained = (4, 6), deep_prior(num_layers=6)
    train(trained, grid, steps=2)
    loaded = deep_prior(num_layers=6, seed=1)
    loaded.load_state_dict(trained.state_dict(), strict=True)
    codes = torch.randint(5, (2, *grid), generator=generator())
    assert torch.equal(loaded(codes), trained(codes))
    assert torch.equal(seen(loaded, grid), past(grid))


def test_averaged_weights_open_no_future() -> None:
    grid, prior = (4, 6), deep_prior(num_layers=6)
    averaged = AveragedModel(prior, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(prior, grid)
        averaged.update_parameters(prior)
    weights = zip(averaged.module.parameters(), prior.parameters(), strict=True)
    assert all((mean != last).any() for mean, last in weights)
    assert torch.equal(seen(averaged.module, grid), past(grid))
