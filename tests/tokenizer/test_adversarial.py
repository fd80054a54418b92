"""The losses of a sharp decoder: against closed forms, finite differences, and two plain training steps.

Legend: B batch, C channels, H' W' image, H W grid of codes.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer import TokenizerConfig
from tokenizer.adversarial import (
    BALANCE,
    LARGEST_RATIO,
    LARGEST_SHIFT,
    Augmentation,
    balance_weight,
    hinge_loss,
    sharpening_losses,
)
from tokenizer.discriminator import Discriminator
from tokenizer.networks import Decoder

SIZE, CELL = (32, 64), 4  # pixels
GRID = (8, 16)
VARIANCE = 0.05


def config_of(channels: int = 3, downsample: int = 4) -> TokenizerConfig:
    return TokenizerConfig(
        in_channels=channels,
        hidden_channels=6,
        num_residual_layers=1,
        residual_channels=4,
        code_dim=3,
        downsample=downsample,
    )


class Case:
    """A decoder, its discriminator, and a batch, in float64."""

    def __init__(self, config: TokenizerConfig, size: tuple[int, int] = SIZE, count: int = 3) -> None:
        torch.manual_seed(0)
        self.decoder, self.discriminator = Decoder(config).double(), Discriminator(config).double()
        grid = [side // config.downsample for side in size]
        self.vectors = torch.randn(count, config.code_dim, *grid, dtype=torch.float64)
        self.images = torch.rand(count, config.in_channels, *size, dtype=torch.float64)

    def losses(self) -> Tensor:
        torch.manual_seed(1)
        return sharpening_losses(self.decoder, self.discriminator, self.vectors, self.images, VARIANCE).loss


@pytest.fixture
def case() -> Case:
    return Case(config_of())


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters()), retain_graph=True))


def the_same_augmentation(count: int) -> Augmentation:
    """The one that `Case.losses` draws."""
    torch.manual_seed(1)
    return Augmentation.draw(torch.rand(count, 3), GRID, torch.device("cpu"))


def test_each_network_follows_the_gradient_of_its_own_loss_alone(case: Case) -> None:
    other = copy.deepcopy(case.discriminator)  # in which the power iteration is as far
    loss = case.losses()
    found = gradients(case.decoder, loss), gradients(case.discriminator, loss)

    # The oracle: two separate losses, each network held constant in that of the other.
    augment = the_same_augmentation(len(case.images))
    decoded = case.decoder(case.vectors)
    codes = augment(case.vectors)
    logits = other(augment(decoded), codes)
    error = F.mse_loss(decoded, case.images) / VARIANCE
    of_error, of_logits = gradients(case.decoder, error), gradients(case.decoder, -logits.mean())
    last = [parameter is case.decoder.last_layer for parameter in case.decoder.parameters()].index(True)
    weight = 0.8 * min(0.1, float(of_error[last].norm() / of_logits[last].norm()))
    expected = [a + weight * b for a, b in zip(of_error, of_logits, strict=True)]
    real = other(augment(case.images), codes)  # once more through the power iteration, as in the losses
    hinge = F.relu(1 - real).mean() + F.relu(1 + logits).mean()
    for one, another in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, another)
    for one, another in zip(found[1], gradients(other, hinge), strict=True):
        torch.testing.assert_close(one, another)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_balance_weight_against_finite_differences(case: Case, scale: float) -> None:
    """The norm of a gradient by the weight of the last layer is that of the differences over each of its numbers."""
    last, step = case.decoder.last_layer, 1e-6
    augment = the_same_augmentation(len(case.images))
    frozen = case.discriminator.eval()  # no power iteration changes it between two differences

    def terms() -> Tensor:
        decoded = case.decoder(case.vectors)
        error = F.mse_loss(decoded, case.images) / VARIANCE
        return torch.stack([error, -scale * frozen(augment(decoded), case.vectors).mean()])

    with torch.no_grad():
        slopes = []
        for place in itertools.product(*map(range, last.shape)):
            before = float(last[place])
            last[place] = before + step
            above = terms()
            last[place] = before - step
            slopes.append((above - terms()) / (2 * step))
            last[place] = before
        error, logits = torch.stack(slopes).norm(dim=0)
    decoded = case.decoder(case.vectors)
    leaf = decoded.detach().requires_grad_()
    (of_error,) = torch.autograd.grad(F.mse_loss(leaf, case.images) / VARIANCE, leaf)
    (of_logits,) = torch.autograd.grad(-scale * frozen(augment(leaf), case.vectors).mean(), leaf)
    weight = balance_weight(decoded, of_error, of_logits, last)
    assert float(weight) == pytest.approx(BALANCE * min(LARGEST_RATIO, float(error / logits)), rel=1e-6)
    assert (float(error / logits) > LARGEST_RATIO) == (scale < 1e3)


def test_a_discriminator_without_a_gradient_gets_the_largest_weight_and_no_more(case: Case) -> None:
    decoded = case.decoder(case.vectors)
    weight = balance_weight(decoded, torch.ones_like(decoded), torch.zeros_like(decoded), case.decoder.last_layer)
    assert float(weight) == pytest.approx(BALANCE * LARGEST_RATIO)
    nothing = balance_weight(decoded, torch.zeros_like(decoded), torch.ones_like(decoded), case.decoder.last_layer)
    assert float(nothing) == 0


def test_the_hinge_loss_by_hand() -> None:
    real, drawn = torch.tensor([[[2.0, 0.5], [-1.0, 1.0]]]), torch.tensor([[[-3.0, 0.0], [1.0, -0.5]]])
    assert float(hinge_loss(real, drawn)) == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0.5) / 4)
    assert float(hinge_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))) == 2


def test_the_loss_is_the_error_the_linearised_logits_and_the_hinge(case: Case) -> None:
    torch.manual_seed(1)
    found = sharpening_losses(case.decoder, case.discriminator, case.vectors, case.images, VARIANCE)
    decoded = case.decoder(case.vectors).detach()
    assert float(found.error) == pytest.approx(float(F.mse_loss(decoded, case.images)) / VARIANCE)
    assert 0 < float(found.weight) <= BALANCE * LARGEST_RATIO
    assert float(found.discriminator) > 0
    assert not any(value.requires_grad for value in (found.error, found.weight, found.discriminator))


def test_in_bf16_the_losses_are_of_float32() -> None:
    case = Case(config_of())
    decoder, discriminator = case.decoder.float(), case.discriminator.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discriminator(case.images.float(), case.vectors.float()).dtype == torch.bfloat16
        found = sharpening_losses(decoder, discriminator, case.vectors.float(), case.images.float(), VARIANCE)
    assert {found.loss.dtype, found.error.dtype, found.discriminator.dtype, found.weight.dtype} == {torch.float32}
    found.loss.backward()
    networks = (decoder, discriminator)
    assert all(bool(parameter.grad.isfinite().all()) for network in networks for parameter in network.parameters())  # type: ignore[union-attr]
    logits = torch.full((1, 3, 5), 1 / 3, dtype=torch.bfloat16)
    assert float(hinge_loss(logits, logits)) == pytest.approx(2, rel=1e-6)  # in bf16 1.34 is rounded


# The augmentation


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_moves_pixels_as_a_slow_loop_does(channels: int) -> None:
    torch.manual_seed(3)
    images = torch.rand(40, channels, *SIZE)
    augment = Augmentation.draw(torch.rand(len(images), 3), GRID, images.device)
    moved = augment(images)
    height, width = SIZE
    for index in range(len(images)):
        for row, column in itertools.product(range(height), range(width)):
            above = inside(row - CELL * int(augment.down[index]), height)
            left = inside(column - CELL * int(augment.right[index]), width)
            target = width - 1 - column if augment.flips[index] else column
            assert torch.equal(moved[index, :, row, target], images[index, :, above, left])
    assert set(augment.down.tolist()) == {-1, 0, 1}
    assert set(augment.right.tolist()) == {-2, -1, 0, 1, 2}
    assert set(augment.flips.tolist()) == {False, True}


def inside(position: int, side: int) -> int:
    """The position in a line of `side` that is mirrored at both ends: 1 0 | 0 1 2 ... side-1 | side-1 side-2."""
    endless = [*range(side), *reversed(range(side))]
    return endless[position % (2 * side)]


def test_every_cell_of_an_augmented_picture_keeps_its_code() -> None:
    """Of a picture that shows in each pixel the number of its cell, the vectors being that number."""
    torch.manual_seed(0)
    vectors = torch.arange(GRID[0] * GRID[1], dtype=torch.float32).view(1, 1, *GRID).repeat(40, 1, 1, 1)
    pictures = vectors.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)
    augment = Augmentation.draw(torch.rand(40, 3), GRID, vectors.device)
    moved, codes = augment(pictures), augment(vectors)
    assert torch.equal(moved, codes.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3))
    assert not torch.equal(codes, vectors)


def test_a_pattern_with_the_period_of_the_codes_stays_in_place() -> None:
    """Whatever the shift: inside, each pixel of the picture is the one at its place in a cell, mirrored or not."""
    torch.manual_seed(0)
    cells = torch.arange(CELL * CELL, dtype=torch.float32).view(1, 1, CELL, CELL)
    pattern = cells.repeat(30, 1, *(side // CELL for side in SIZE))
    augment = Augmentation.draw(torch.rand(30, 3), GRID, pattern.device)
    moved = augment(pattern)
    mirrored = torch.where(augment.flips[:, None, None, None], pattern.flip(3), pattern)
    edge = int(max(SIZE) * LARGEST_SHIFT)
    assert bool(augment.down.any())
    assert torch.equal(moved[..., edge:-edge, edge:-edge], mirrored[..., edge:-edge, edge:-edge])


def test_grids_too_small_for_a_shift_are_flipped_alone() -> None:
    augment = Augmentation.draw(torch.rand(20, 3), (1, 2), torch.device("cpu"))
    assert not bool(augment.down.any() or augment.right.any())
    assert bool(augment.flips.any())


def test_real_and_drawn_images_are_augmented_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the decoder drew the real images, the discriminator would see the same pictures twice."""
    seen: list[Tensor] = []
    perfect = nn.Identity()

    class Perfect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last_layer = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, vectors: Tensor) -> Tensor:
            return case.images * self.last_layer

    monkeypatch.setattr(
        case.discriminator, "forward", lambda images, vectors: (seen.append(images), perfect(images.sum(dim=1)))[1]
    )
    torch.manual_seed(2)
    sharpening_losses(Perfect(), case.discriminator, case.vectors, case.images, VARIANCE)  # type: ignore[arg-type]
    drawn, real = seen
    assert torch.equal(drawn, real)
    assert not torch.equal(real, case.images)


def test_the_gradient_goes_back_through_the_augmentation() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 1, 16, 8, dtype=torch.float64, requires_grad=True)
    augment = Augmentation.draw(torch.rand(2, 3), (16, 8), images.device)
    assert torch.autograd.gradcheck(augment, (images,))


# The discriminator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
def test_there_is_a_logit_for_each_code(channels: int, downsample: int) -> None:
    config = config_of(channels, downsample)
    case = Case(config, size=(16, 48), count=2)
    logits = case.discriminator(case.images, case.vectors)
    assert logits.shape == (2, 16 // downsample, 48 // downsample)
    assert torch.isfinite(case.losses())


def test_a_logit_sees_the_pixels_and_the_codes_around_its_cell(case: Case) -> None:
    images, vectors = case.images.requires_grad_(), case.vectors.requires_grad_()
    logits = case.discriminator(images, vectors)
    of_pixels, of_codes = torch.autograd.grad(logits[0, 1, 1], [images, vectors])
    cell = of_pixels[0, :, 4:8, 4:8]
    assert bool((cell != 0).all())
    assert not bool(of_pixels[1:].any())  # nothing of other images
    assert not bool(of_codes[1:].any())
    around = of_codes[0].abs().sum(dim=0) != 0
    assert bool(around[:3, :3].all())
    assert int(around.sum()) == 9


@torch.no_grad()
def test_the_logits_by_hand(case: Case) -> None:
    """Pixels on [-1,1], two halvings and a 3x3 layer, then what every code says of its cell."""
    discriminator = case.discriminator.eval()
    first, second, third = [layer for layer in discriminator.features if isinstance(layer, nn.Conv2d)]
    features = 2 * case.images - 1
    for layer, stride in ((first, 2), (second, 2), (third, 1)):
        features = F.conv2d(features, layer.weight, layer.bias, stride=stride, padding=1)
        features = torch.maximum(features, 0.2 * features)
    unconditional, embedding = discriminator.unconditional, discriminator.embedding
    alone = F.conv2d(features, unconditional.weight, unconditional.bias, padding=1)[:, 0]
    of_codes = F.conv2d(case.vectors, embedding.weight, embedding.bias, padding=1)
    expected = alone + torch.einsum("bchw,bchw->bhw", features, of_codes)
    torch.testing.assert_close(discriminator(case.images, case.vectors), expected)


def test_no_layer_of_the_discriminator_enlarges_what_it_is_given(case: Case) -> None:
    """The largest singular value of each weight is 1, once the power iteration has converged."""
    for _ in range(200):
        case.discriminator(case.images, case.vectors)
    layers = [module for module in case.discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 5
    for layer in layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)) == pytest.approx(1, rel=1e-3)
