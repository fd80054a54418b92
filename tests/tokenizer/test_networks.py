"""Encoder and decoder: shapes for every option, the alignment of pixels and codes, no layer without a part in it.

Legend: B batch, C image channels, H' W' image, H W grid of codes, D code dimension.
"""

import pytest
import torch
from torch import nn

from tokenizer import TokenizerConfig
from tokenizer.networks import Decoder, Encoder, ResidualBlock


def small_config(**fields: int) -> TokenizerConfig:
    small = {"hidden_channels": 6, "num_residual_layers": 1, "residual_channels": 4, "code_dim": 3}
    return TokenizerConfig(**{**small, **fields})  # type: ignore[arg-type]


SILU = ()  # in a list of layers


def layers_of(network: nn.Module) -> list[tuple[int, ...]]:
    """(channels in, channels out, kernel size, stride) of each convolution, SILU between, in the order of running."""
    layers: list[tuple[int, ...]] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            layers.append((module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0]))
        elif not list(module.children()):
            assert type(module) is nn.SiLU
            layers.append(SILU)
    return layers


def convolutions(network: nn.Module) -> list[tuple[int, ...]]:
    return [layer for layer in layers_of(network) if layer != SILU]


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_shapes(in_channels: int, downsample: int) -> None:
    config = small_config(in_channels=in_channels, downsample=downsample)
    images = torch.rand(2, in_channels, 2 * downsample, 3 * downsample)
    vectors = Encoder(config)(images)
    assert vectors.shape == (2, 3, 2, 3)
    assert Decoder(config)(vectors).shape == images.shape


def test_the_default_layers() -> None:
    """Those of the paper [1, section 4.1] and its example [2], but for the departures that networks.py tells of."""
    residual = [SILU, (128, 32, 3, 1), SILU, (32, 128, 1, 1)] * 4
    assert layers_of(Encoder(TokenizerConfig())) == [
        (3, 64, 4, 2), SILU, (64, 128, 4, 2), SILU, *residual, SILU, (128, 8, 1, 1)
    ]  # fmt: skip
    assert layers_of(Decoder(TokenizerConfig())) == [
        (8, 128, 3, 1), *residual, SILU, (128, 64, 4, 2), SILU, (64, 3, 4, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("downsample", "widths"), [(2, [(3, 6)]), (4, [(3, 3), (3, 6)]), (8, [(3, 3), (3, 6), (6, 6)])]
)
def test_one_stride_2_layer_for_every_factor_of_two(downsample: int, widths: list[tuple[int, int]]) -> None:
    config = small_config(downsample=downsample)
    down = [layer[:2] for layer in convolutions(Encoder(config)) if layer[3] == 2]
    up = [layer[:2] for layer in convolutions(Decoder(config)) if layer[3] == 2]
    assert down == widths
    assert up == [(after, before) for before, after in widths[::-1]]


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_number_of_residual_blocks(layers: int) -> None:
    config = small_config(num_residual_layers=layers)
    for network in (Encoder(config), Decoder(config)):
        assert sum(isinstance(module, ResidualBlock) for module in network.modules()) == layers


def test_residual_block_adds_to_its_input() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(4, 2), torch.randn(2, 4, 3, 5)
    weights = dict(block.named_parameters())
    inside = nn.functional.conv2d(x * x.sigmoid(), weights["layers.1.weight"], weights["layers.1.bias"], padding=1)
    added = nn.functional.conv2d(inside * inside.sigmoid(), weights["layers.3.weight"], weights["layers.3.bias"])
    assert added.abs().min() > 0
    expected, before = x + added, x.clone()
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_a_shift_by_one_code_is_a_shift_by_downsample_pixels(downsample: int) -> None:
    """Away from the border, where the padding shows."""
    torch.manual_seed(1)
    config = small_config(downsample=downsample)
    encoder, decoder = Encoder(config).double(), Decoder(config).double()
    images = torch.rand(1, 3, 12 * downsample, 13 * downsample, dtype=torch.float64)
    down_and_right = images.roll((downsample, 2 * downsample), dims=(2, 3))
    vectors, moved = encoder(images), encoder(down_and_right)
    torch.testing.assert_close(moved[:, :, 5:-4, 6:-4], vectors[:, :, 4:-5, 4:-6])
    assert not torch.allclose(moved[:, :, 5:-4, 6:-4], vectors[:, :, 5:-4, 6:-4])

    pixels, moved = decoder(vectors), decoder(vectors.roll((1, 2), dims=(2, 3)))
    inner = slice(5 * downsample, 8 * downsample)
    before = slice(4 * downsample, 7 * downsample), slice(3 * downsample, 6 * downsample)
    torch.testing.assert_close(moved[:, :, inner, inner], pixels[:, :, before[0], before[1]])


def reach(downsample: int, place: int, around: int, pixels: int) -> torch.Tensor:
    """Which pixels of a line a code sees: its cell, `around` more to each side (one for every 3x3 in a row), and
    `downsample` - 1 pixels beyond (4x4 stride 2).

    downsample 4, code 2, around 1:  . 1111 1111 2222 3333 333 . .   pixels 1 to 18
    """
    first, last = downsample * (place - around) - (downsample - 1), downsample * (place + around + 2) - 2
    return torch.tensor([first <= pixel <= last for pixel in range(pixels)])


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("place", [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)])
@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_a_code_and_its_pixels_lie_at_the_same_place(downsample: int, place: tuple[int, int], blocks: int) -> None:
    """Exactly which pixels a code depends on, and which pixels depend on it; the grid is 5 x 7.

    With weights and inputs above 0, where SiLU rises, nothing cancels: a gradient of 0 means that there is no path.
    """
    torch.manual_seed(2)
    config = small_config(downsample=downsample, num_residual_layers=blocks)
    encoder, decoder = Encoder(config).double(), Decoder(config).double()
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        nn.init.uniform_(parameter, 0.01, 0.1)
    row, column = place
    height, width = 5 * downsample, 7 * downsample

    def seen(around: int) -> torch.Tensor:  # [H',W']
        pixels = torch.outer(reach(downsample, row, around, height), reach(downsample, column, around, width))
        assert not pixels.all()
        return pixels

    images = (0.6 + 0.4 * torch.rand(1, 3, height, width, dtype=torch.float64)).requires_grad_()
    (to_images,) = torch.autograd.grad(encoder(images)[0, :, row, column].sum(), images)
    assert torch.equal(to_images[0].sum(dim=0) > 0, seen(around=blocks))

    vectors = torch.ones(1, 3, 5, 7, dtype=torch.float64)
    nudged = vectors.clone()
    nudged[:, :, row, column] += 1
    assert torch.equal((decoder(nudged) - decoder(vectors))[0].sum(dim=0) > 0, seen(around=blocks + 1))


def test_images_are_centred_on_zero_inside() -> None:
    torch.manual_seed(3)
    config = small_config()
    encoder, decoder = Encoder(config), Decoder(config)
    for network in (encoder, decoder):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    grey = torch.full((1, 3, 8, 12), 0.5)
    assert not encoder(grey).any()  # a network without biases maps 0 to 0
    assert encoder(grey + 0.1).any()
    assert torch.equal(decoder(torch.zeros(1, 3, 2, 3)), grey)


def test_the_decoder_reaches_below_0_and_above_1() -> None:
    """The loss needs the pixels as they are; `VQVAE` clamps what it hands out."""
    torch.manual_seed(4)
    pixels = Decoder(small_config())(100 * torch.randn(2, 3, 4, 5))
    assert pixels.min() < -0.1
    assert pixels.max() > 1.1


@pytest.mark.parametrize("downsample", [2, 16])
def test_every_weight_has_a_part_in_the_result(downsample: int) -> None:
    torch.manual_seed(5)
    config = small_config(downsample=downsample, num_residual_layers=2)
    encoder, decoder = Encoder(config), Decoder(config)
    images = torch.rand(2, 3, 2 * downsample, 3 * downsample)
    (decoder(encoder(images)) - images).square().mean().backward()
    for network in (encoder, decoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_items_of_a_batch_do_not_meet() -> None:
    """No batch statistics: the gradient of one item to the others is 0, in training mode too."""
    torch.manual_seed(6)
    config = small_config()
    images = torch.rand(3, 3, 8, 12, requires_grad=True)
    pixels = Decoder(config).train()(Encoder(config).train()(images))
    (to_images,) = torch.autograd.grad(pixels[1].square().sum(), images)
    assert to_images[1].any()
    assert not to_images[[0, 2]].any()
