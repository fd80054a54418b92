"""The tokenizer as a whole: `encode`, `decode`, the losses, the errors, every option trained for two steps.

Legend: B batch, C image channels, H' W' image, H W grid of codes, K codes.
"""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizer import VQVAE, TokenizerConfig
from tokenizer.config import CodebookUpdate
from tokenizer.objective import reconstruction_loss

from .oracles import UPDATES, nearest_by_hand, rows_of, tiles, tiny_vqvae

# ---- every option


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("update", UPDATES)
def test_two_steps_with_every_option(update: CodebookUpdate, downsample: int, in_channels: int) -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(
        in_channels=in_channels,
        hidden_channels=6,
        num_residual_layers=1,
        residual_channels=4,
        downsample=downsample,
        num_codes=8,
        code_dim=3,
        codebook_update=update,
    )
    model, images = VQVAE(config), torch.rand(2, in_channels, 32, 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        result = model(images)
        result.loss.backward()
        optimizer.step()
        assert torch.isfinite(result.loss)
    assert result.reconstruction.shape == images.shape
    assert result.codes.shape == (2, *model.grid(32, 48)) == (2, 32 // downsample, 48 // downsample)
    assert result.codes.dtype == torch.int64
    assert result.codes.min() >= 0
    assert result.codes.max() < 8
    for name, tensor in model.state_dict().items():
        if name != "quantizer.revived":  # nothing dies in two steps
            assert not torch.equal(tensor, before[name]), f"{name} has not learned"
    assert model.decode(model.encode(images)).shape == images.shape


@pytest.mark.parametrize("update", UPDATES)
def test_training_lowers_the_loss(update: CodebookUpdate) -> None:
    torch.manual_seed(1)
    small = {"hidden_channels": 16, "num_residual_layers": 1, "residual_channels": 8, "num_codes": 16, "code_dim": 3}
    model = VQVAE(TokenizerConfig(**small, in_channels=1, codebook_update=update, data_variance=0.25))
    optimizer, images, losses = torch.optim.Adam(model.parameters(), lr=1e-2), tiles(1), []
    for _ in range(60):
        optimizer.zero_grad()
        result = model(images)
        result.loss.backward()
        optimizer.step()
        losses.append(result.reconstruction_loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.1
    assert len(result.codes.unique()) > 4
    error = (model.eval()(images).reconstruction - images).square().mean().item()
    assert error < 0.1 * images.var(correction=0).item()


# ---- encode and decode


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_encode_and_decode_are_what_forward_does(update: CodebookUpdate, training: bool) -> None:
    model = tiny_vqvae(seed=2, codebook_update=update).train(training)
    images = torch.rand(3, 3, 12, 20)
    codes = model.encode(images)
    reconstruction = model.decode(codes)
    result = model(images)  # last: in training mode it moves the codebook
    assert len(codes.unique()) > 3
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.reconstruction, reconstruction)
    assert not codes.requires_grad
    assert not reconstruction.requires_grad


def test_codes_are_the_nearest_to_the_vectors_of_the_encoder() -> None:
    model, images = tiny_vqvae(seed=3).double(), torch.rand(2, 3, 12, 20).double()
    expected = nearest_by_hand(rows_of(model.encoder(images)), model.quantizer.codebook)
    assert model.encode(images).flatten().tolist() == expected


@pytest.mark.parametrize("training", [True, False])
def test_an_image_has_the_same_codes_in_any_batch(training: bool) -> None:
    model, images = tiny_vqvae(seed=4).double().train(training), torch.rand(5, 3, 12, 20).double()
    codes = model.encode(images)
    pixels = model.decode(codes)
    for part in (slice(0, 1), slice(2, 4), slice(4, 5)):
        assert torch.equal(model.encode(images[part]), codes[part])
        torch.testing.assert_close(model.decode(codes[part]), pixels[part], rtol=0, atol=1e-12)
    assert torch.equal(model.encode(images), codes)


def test_decoded_pixels_lie_in_0_to_1() -> None:
    model = tiny_vqvae(seed=5).eval()
    model.quantizer.set_codebook(100 * torch.randn(16, 3))
    images, codes = torch.rand(2, 3, 8, 12), torch.randint(0, 16, (2, 2, 3))
    assert model.decoder(model.quantizer.lookup(codes)).abs().max() > 2
    for pixels in (model.decode(codes), model(images).reconstruction):
        assert pixels.min() == 0
        assert pixels.max() == 1


@pytest.mark.parametrize("corner", [(0, 0), (0, 4), (2, 0), (2, 4)])
def test_a_corner_of_the_image_changes_that_corner_of_the_codes(corner: tuple[int, int]) -> None:
    """And the way back: a code changes the pixels around its place, on a grid that is not square."""
    row, column = corner
    model = tiny_vqvae(seed=6, num_residual_layers=0).double()
    images = torch.full((1, 3, 12, 20), 0.5, dtype=torch.float64)
    marked = images.clone()
    marked[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.rand(3, 4, 4)
    in_corner = model.encoder(marked)[:, :, row, column]
    model.quantizer.set_codebook(torch.cat([rows_of(model.encoder(images)), in_corner]))  # 15 places and the mark
    codes, with_mark = model.encode(images), model.encode(marked)
    assert with_mark[0, row, column] == 15
    assert not (codes == 15).any()
    far = (2 - row, 4 - column)  # the opposite corner
    assert with_mark[0][far] == codes[0][far]

    changed = codes.clone()
    changed[0, row, column] = 15
    difference = (model.decode(changed) - model.decode(codes)).abs().sum(dim=1)[0]  # [H',W']
    by_code = difference.reshape(3, 4, 5, 4).sum(dim=(1, 3))  # [H,W]
    assert by_code[row, column] > 0
    assert by_code[far] == 0


@pytest.mark.parametrize(("downsample", "grid"), [(2, (12, 20)), (4, (6, 10)), (8, (3, 5))])
def test_grid_is_the_shape_of_the_codes(downsample: int, grid: tuple[int, int]) -> None:
    model = tiny_vqvae(seed=7, downsample=downsample)
    assert model.grid(24, 40) == grid
    assert model.encode(torch.rand(1, 3, 24, 40)).shape == (1, *grid)


# ---- the losses


@pytest.mark.parametrize("update", UPDATES)
def test_losses_add_up(update: CodebookUpdate) -> None:
    model = tiny_vqvae(seed=8, codebook_update=update, commitment_weight=0.7, data_variance=0.05).eval()
    images = torch.rand(2, 3, 12, 20)
    result = model(images)
    vectors = model.encoder(images)
    chosen = model.quantizer.lookup(result.codes)
    error = (model.decoder(chosen) - images).square().mean().item()
    distance = (vectors - chosen).square().mean().item()
    assert result.reconstruction_loss.item() == pytest.approx(error / 0.05, rel=1e-5)
    assert result.commitment_loss.item() == pytest.approx(distance, rel=1e-5)
    assert result.codebook_loss.item() == pytest.approx(distance, rel=1e-5)
    weight = 0.7 + (update == "gradient")
    assert result.loss.item() == pytest.approx(error / 0.05 + weight * distance, rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 1, 8, 12), (2, 3, 4, 20)])
def test_predicting_the_mean_scores_1(shape: tuple[int, ...]) -> None:
    torch.manual_seed(9)
    images = torch.rand(shape) ** 2
    variance = images.var(correction=0).item()
    assert reconstruction_loss(images.mean().expand(shape), images, variance).item() == pytest.approx(1, rel=1e-5)
    assert reconstruction_loss(images, images, variance).item() == 0


def test_the_loss_sees_the_pixels_before_the_clamp() -> None:
    model, images = tiny_vqvae(seed=9).eval(), torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        list(model.decoder.parameters())[-2].mul_(100)  # the weights of the last layer
    result = model(images)
    error = (model.decoder(model.quantizer.lookup(result.codes)) - images).square().mean().item()
    assert error > 2 * (result.reconstruction - images).square().mean().item()
    assert result.reconstruction_loss.item() == pytest.approx(error, rel=1e-5)


def test_a_pixel_out_of_range_keeps_its_gradient() -> None:
    decoded = torch.tensor([[[[-1.0, 3.0]]]], requires_grad=True)
    reconstruction_loss(decoded, torch.tensor([[[[0.0, 1.0]]]]), 0.5).backward()
    assert decoded.grad is not None
    assert decoded.grad.flatten().tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_repeating_the_batch_changes_no_loss(update: CodebookUpdate, training: bool) -> None:
    torch.manual_seed(10)
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)

    def losses(images: Tensor) -> list[float]:
        result = tiny_vqvae(codebook_update=update).double().train(training)(images)
        return [result.loss.item(), result.reconstruction_loss.item(), result.commitment_loss.item()]

    assert losses(torch.cat([images] * 3)) == pytest.approx(losses(images), rel=1e-12)


@pytest.mark.parametrize("update", UPDATES)
def test_where_the_gradients_go(update: CodebookUpdate) -> None:
    """Reconstruction: encoder and decoder; commitment: the encoder alone; codebook loss: the codebook alone."""
    torch.manual_seed(11)
    images = torch.rand(2, 3, 8, 12)

    def reached(loss: str) -> set[str]:
        model = tiny_vqvae(codebook_update=update)
        value = getattr(model(images), loss)
        if not value.requires_grad:
            return set()
        value.backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached("reconstruction_loss") == {"encoder", "decoder"}
    assert reached("commitment_loss") == {"encoder"}
    assert reached("codebook_loss") == ({"quantizer"} if update == "gradient" else set())
    assert reached("loss") == {"encoder", "decoder"} | ({"quantizer"} if update == "gradient" else set())


def test_the_gradient_of_the_decoder_enters_the_encoder_unchanged() -> None:
    model, images = tiny_vqvae(seed=12).eval(), torch.rand(2, 3, 8, 12)
    model(images).reconstruction_loss.backward()
    through_the_model = [parameter.grad for parameter in model.encoder.parameters()]

    chosen = model.quantizer.lookup(model.encode(images)).detach().requires_grad_()
    loss = reconstruction_loss(model.decoder(chosen), images, 1.0)
    (at_the_decoder,) = torch.autograd.grad(loss, chosen)
    by_hand = torch.autograd.grad(model.encoder(images), list(model.encoder.parameters()), at_the_decoder)
    for gradient, expected in zip(through_the_model, by_hand, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_every_option_reaches_the_quantizer() -> None:
    options: dict[str, Any] = {
        "num_codes": 11, "code_dim": 5, "codebook_update": "gradient", "commitment_weight": 0.6, "ema_decay": 0.7,
        "revival_threshold": 0.3,
    }  # fmt: skip
    quantizer = VQVAE(TokenizerConfig(hidden_channels=4, **options)).quantizer
    assert {name: getattr(quantizer, name) for name in options} == options
    assert quantizer.codebook.shape == (11, 5)


# ---- the errors


@pytest.mark.parametrize("shape", [(2, 1, 8, 12), (2, 4, 8, 12), (3, 8, 12), (8, 12), (2, 12, 8, 3)])
def test_images_of_a_wrong_shape_raise(shape: tuple[int, ...]) -> None:
    model = tiny_vqvae()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=r"\[B,3,H,W\]"):
            call(torch.rand(shape))


@pytest.mark.parametrize("size", [(8, 13), (9, 12), (10, 10)])
def test_sides_that_are_no_multiple_raise(size: tuple[int, int]) -> None:
    model = tiny_vqvae()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=f"multiples of 4, got {size[0]}x{size[1]}"):
            call(torch.rand(2, 3, *size))


def test_codes_that_cannot_be_decoded_raise() -> None:
    model = tiny_vqvae()
    for shape in [(2, 3), (6,), (1, 1, 2, 3)]:
        with pytest.raises(ValueError, match=r"\[B,H,W\]"):
            model.decode(torch.zeros(shape, dtype=torch.int64))
    for code in (-1, 16):
        with pytest.raises(ValueError, match="from 0 to 15"):
            model.decode(torch.full((1, 2, 3), code))


def test_an_image_that_is_not_finite_raises() -> None:
    images = torch.rand(2, 3, 8, 12)
    images[1, 2, 0, 3] = float("nan")
    model = tiny_vqvae()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match="finite"):
            call(images)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("in_channels", [0, -1]),
        ("hidden_channels", [0, 7]),
        ("residual_channels", [0]),
        ("num_residual_layers", [-1]),
        ("code_dim", [0]),
        ("downsample", [0, 1, 3, 6, 32]),
        ("num_codes", [1, 0]),
        ("codebook_update", ["EMA", "", None]),
        ("commitment_weight", [-0.1, float("nan")]),
        ("ema_decay", [0.0, 1.0, 1.5, float("nan")]),
        ("revival_threshold", [-0.1, 1.0, float("nan")]),
        ("data_variance", [0.0, -1.0, float("nan")]),
        ("bottleneck", ["VAE", "", None]),
        ("kl_weight", [-0.1, float("nan"), float("inf")]),
        ("likelihood", ["Gaussian", "", None, "bernoulli"]),
    ],
)
def test_a_field_out_of_its_range_is_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"TokenizerConfig\.{field}: expected .*, got {value!r}"):
            TokenizerConfig(**{field: value})


def test_the_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        TokenizerConfig().num_codes = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        TokenizerConfig(3)  # type: ignore[call-arg]


@pytest.mark.parametrize(("downsample", "layers"), [(2, 1), (4, 2), (8, 3), (16, 4)])
def test_downsampling_layers(downsample: int, layers: int) -> None:
    assert TokenizerConfig(downsample=downsample).num_downsampling_layers == layers
