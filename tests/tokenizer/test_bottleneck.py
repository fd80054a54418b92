"""The baselines without codes: a Gaussian or nothing between encoder and decoder, against torch.distributions.

Legend: B batch, D latent channels, H W grid, C H' W' image.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tokenizer import VQVAE, Baseline, TokenizerConfig, build_model
from tokenizer.bottleneck import GaussianBottleneck
from tokenizer.config import Bottleneck

from .oracles import tiles

BASELINES: list[Bottleneck] = ["vae", "ae"]
D = 3
SMALL = {"hidden_channels": 8, "num_residual_layers": 1, "residual_channels": 4, "code_dim": D}

parametrize_baselines = pytest.mark.parametrize("bottleneck", BASELINES)


def tiny_config(bottleneck: Bottleneck, **fields: float) -> TokenizerConfig:
    return TokenizerConfig(**{**SMALL, "bottleneck": bottleneck, **fields})  # type: ignore[arg-type]


def tiny_baseline(bottleneck: Bottleneck, *, seed: int = 0, **fields: float) -> Baseline:
    """In float64, with an encoder loud enough that the images matter."""
    torch.manual_seed(seed)
    model = Baseline(tiny_config(bottleneck, **fields)).double()
    with torch.no_grad():
        model.encoder.layers[-1].weight.mul_(5)
    return model


def some_images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 8, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def gaussian_of(z: Tensor) -> Normal:
    """z [B,2D,H,W]: D means, then D log-variances."""
    half = z.shape[1] // 2
    return Normal(z[:, :half], z[:, half:].exp().sqrt())


# ---- the Gaussian


def test_kl_is_that_of_torch_summed_over_an_image_and_averaged_over_the_batch() -> None:
    torch.manual_seed(0)
    z = 2 * torch.randn(4, 2 * D, 2, 5, dtype=torch.float64)
    of_each = kl_divergence(gaussian_of(z), Normal(0.0, 1.0))  # [B,D,H,W]
    by_hand = sum(of_each[b].sum().item() for b in range(4)) / 4
    assert GaussianBottleneck()(z)[1].item() == pytest.approx(by_hand, rel=1e-12)
    assert GaussianBottleneck()(torch.zeros(4, 2 * D, 2, 5))[1] == 0


def test_draws_have_the_mean_and_the_deviation_and_do_not_know_each_other() -> None:
    torch.manual_seed(1)
    count, z = 20_000, torch.randn(1, 2 * D, 1, 2)
    latents, _ = GaussianBottleneck()(z.expand(count, -1, -1, -1))
    expected = gaussian_of(z)
    scores = ((latents - expected.mean) / expected.stddev).flatten(start_dim=1)  # [count,D*H*W], N(0,1) each
    assert scores.mean(dim=0).abs().max() < 5 / math.sqrt(count)
    assert (scores.std(dim=0) - 1).abs().max() < 5 / math.sqrt(2 * count)
    together = torch.corrcoef(scores.T) - torch.eye(scores.shape[1])
    assert together.abs().max() < 5 / math.sqrt(count)


def test_the_gradient_of_a_draw_is_the_identity_to_the_mean_and_half_the_noise_to_the_log_variance() -> None:
    torch.manual_seed(2)
    z = torch.randn(2, 2 * D, 2, 5, dtype=torch.float64, requires_grad=True)
    latents, _ = GaussianBottleneck()(z)
    upstream = torch.randn_like(latents)
    latents.backward(upstream)
    assert z.grad is not None
    noise = (latents - gaussian_of(z).mean).detach()  # deviation * eps
    assert noise.abs().min() > 0
    assert torch.equal(z.grad[:, :D], upstream)
    torch.testing.assert_close(z.grad[:, D:], upstream * 0.5 * noise)


def test_the_seed_decides_what_is_drawn() -> None:
    model, images, drawn = tiny_baseline("vae"), some_images(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(model(images).reconstruction)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- encode and decode


@pytest.mark.parametrize("training", [True, False])
def test_encode_is_the_mean_and_draws_nothing(training: bool) -> None:
    model, images = tiny_baseline("vae").train(training), some_images()
    before = torch.get_rng_state()
    latents = model.encode(images)
    assert torch.equal(latents, gaussian_of(model.encoder(images)).mean)
    assert torch.equal(model.encode(images), latents)
    assert torch.equal(torch.get_rng_state(), before)
    assert not latents.requires_grad


def test_forward_of_a_plain_autoencoder_is_decode_of_encode() -> None:
    model, images = tiny_baseline("ae"), some_images()
    assert torch.equal(model.encode(images), model.encoder(images))
    assert torch.equal(model(images).reconstruction, model.decode(model.encode(images)))


@parametrize_baselines
def test_decoded_pixels_lie_in_0_to_1(bottleneck: Bottleneck) -> None:
    model = tiny_baseline(bottleneck)
    model.decoder.layers[-1].weight.data.mul_(50)
    images, latents = some_images(), torch.randn(2, D, 2, 3, dtype=torch.float64)
    for pixels in (model.decode(latents), model(images).reconstruction):
        assert pixels.shape == images.shape
        assert (pixels.min(), pixels.max()) == (0, 1)
        assert not model.decode(latents).requires_grad


@pytest.mark.parametrize(("bottleneck", "channels"), [("vq", D), ("vae", 2 * D), ("ae", D)])
@pytest.mark.parametrize("downsample", [2, 4])
def test_channels_of_the_encoder_and_of_the_latents(bottleneck: Bottleneck, channels: int, downsample: int) -> None:
    model, images = build_model(tiny_config(bottleneck, downsample=downsample)), some_images().float()
    grid = (8 // downsample, 12 // downsample)
    assert model.encoder(images).shape == (2, channels, *grid)
    assert model.grid(8, 12) == grid
    assert model.encode(images).shape == ((2, *grid) if bottleneck == "vq" else (2, D, *grid))


@parametrize_baselines
def test_encoder_and_decoder_are_those_of_the_vqvae(bottleneck: Bottleneck) -> None:
    """But for the last layer of a Gaussian's encoder, which gives means and log-variances."""
    ours, theirs = Baseline(tiny_config(bottleneck)), VQVAE(tiny_config("vq"))
    shapes, expected = ({name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs))
    expected = {name: shape for name, shape in expected.items() if not name.startswith("quantizer.")}
    other = {name for name in expected if shapes[name] != expected[name]}
    last = f"encoder.layers.{len(ours.encoder.layers) - 1}"
    assert shapes.keys() == expected.keys()
    assert other == ({f"{last}.weight", f"{last}.bias"} if bottleneck == "vae" else set())


# ---- the losses


def test_the_loss_of_a_vae_is_the_negative_evidence_lower_bound() -> None:
    """With a decoder of variance kl_weight / 2 of the data's, in units of that variance, less what is constant."""
    model, images = tiny_baseline("vae", kl_weight=0.3, data_variance=0.07), some_images(3)
    torch.manual_seed(6)
    loss = model(images).loss
    torch.manual_seed(6)
    latents, _ = model.bottleneck(model.encoder(images))
    variance = 0.07 * 0.3 / 2
    likelihood = Normal(model.decoder(latents), math.sqrt(variance)).log_prob(images) + 0.5 * math.log(
        2 * math.pi * variance
    )
    price = kl_divergence(gaussian_of(model.encoder(images)), Normal(0.0, 1.0))
    bound = (likelihood.flatten(1).sum(1) - price.flatten(1).sum(1)).mean()  # nats per image
    torch.testing.assert_close(loss, -bound * 2 * variance / 0.07 / images[0].numel())


def test_kl_weight_scales_the_kl_per_value_of_the_image_and_nothing_else() -> None:
    images, results = some_images(), {}
    for weight in (0.0, 0.1, 4.0):
        model = tiny_baseline("vae", kl_weight=weight)
        torch.manual_seed(7)
        results[weight] = model(images)
        torch.testing.assert_close(
            results[weight].loss - results[weight].reconstruction_loss, weight * results[weight].kl / (3 * 8 * 12)
        )
    assert results[0.0].kl > 1
    assert results[0.0].kl == results[0.1].kl == results[4.0].kl
    assert results[0.0].reconstruction_loss == results[0.1].reconstruction_loss == results[4.0].reconstruction_loss
    assert results[0.0].loss == results[0.0].reconstruction_loss


def test_the_loss_of_a_plain_autoencoder_is_its_squared_error() -> None:
    model, images = tiny_baseline("ae", kl_weight=9.0, data_variance=0.05), some_images()
    result = model(images)
    expected = (model.decoder(model.encoder(images)) - images).square().mean() / 0.05
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    assert result.loss == result.reconstruction_loss
    assert result.kl == 0


@parametrize_baselines
def test_repeating_the_batch_changes_no_loss(bottleneck: Bottleneck) -> None:
    """A Gaussian's deviation is made nothing: another draw would be another loss."""
    model, images = tiny_baseline(bottleneck), some_images()
    if bottleneck == "vae":
        model.encoder.layers[-1].bias.data[D:] = -60
    once, thrice = model(images), model(images.repeat(3, 1, 1, 1))
    for name in ("loss", "reconstruction_loss", "kl"):
        torch.testing.assert_close(getattr(thrice, name), getattr(once, name), rtol=1e-9, atol=0)


@parametrize_baselines
def test_training_lowers_the_loss(bottleneck: Bottleneck) -> None:
    torch.manual_seed(8)
    small = {"hidden_channels": 16, "num_residual_layers": 1, "residual_channels": 8, "code_dim": D, "in_channels": 1}
    model = Baseline(TokenizerConfig(**small, bottleneck=bottleneck, data_variance=0.25))  # type: ignore[arg-type]
    optimizer, images = torch.optim.Adam(model.parameters(), lr=1e-2), tiles(1)
    before, losses = copy.deepcopy(model.state_dict()), []
    for _ in range(80):
        optimizer.zero_grad()
        result = model(images)
        result.loss.backward()
        optimizer.step()
        losses.append(result.reconstruction_loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.2
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), f"{name} has not learned"


def test_a_heavy_kl_weight_makes_every_latent_the_standard_normal() -> None:
    """What the term is for: nothing else is learned when it outweighs the error."""
    torch.manual_seed(9)
    model = Baseline(tiny_config("vae", kl_weight=1e4))
    optimizer, images = torch.optim.Adam(model.parameters(), lr=1e-2), tiles(3)
    model.encoder.layers[-1].bias.data += 2
    for _ in range(150):
        optimizer.zero_grad()
        result = model(images)
        result.loss.backward()
        optimizer.step()
    gaussian = gaussian_of(model.encoder(images))
    assert gaussian.mean.abs().max() < 0.1
    assert (gaussian.stddev - 1).abs().max() < 0.1


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_gaussian_in_float32(dtype: torch.dtype) -> None:
    """Given what an encoder under autocast hands over."""
    z, outcomes = torch.randn(2, 2 * D, 2, 5, generator=torch.Generator().manual_seed(10)).to(dtype), []
    for enabled in (True, False):
        torch.manual_seed(11)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            outcomes.append(GaussianBottleneck()(z if enabled else z.float()))
    for under, plain in zip(*outcomes, strict=True):
        assert under.dtype == torch.float32
        assert torch.equal(under, plain)


@parametrize_baselines
def test_a_model_trains_under_autocast(bottleneck: Bottleneck) -> None:
    torch.manual_seed(12)
    model, images, losses = Baseline(tiny_config(bottleneck, data_variance=0.25)), tiles(3), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(images)
        assert result.loss.dtype == torch.float32
        result.loss.backward()
        optimizer.step()
        losses.append(result.reconstruction_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


@parametrize_baselines
def test_a_float64_model_is_float64_everywhere(bottleneck: Bottleneck) -> None:
    result = tiny_baseline(bottleneck)(some_images())
    assert {value.dtype for value in vars(result).values()} == {torch.float64}


# ---- the errors


@parametrize_baselines
def test_a_vqvae_has_no_other_bottleneck(bottleneck: Bottleneck) -> None:
    with pytest.raises(ValueError, match=f"VQVAE: expected the bottleneck 'vq', got '{bottleneck}'"):
        VQVAE(tiny_config(bottleneck))
    assert type(build_model(tiny_config(bottleneck))) is Baseline


def test_a_baseline_has_no_codebook() -> None:
    with pytest.raises(ValueError, match="Baseline: expected the bottleneck 'vae' or 'ae', got 'vq'"):
        Baseline(tiny_config("vq"))
    assert type(build_model(tiny_config("vq"))) is VQVAE


@parametrize_baselines
@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 8, 12), r"\[B,3,H,W\]"), ((3, 8, 12), r"\[B,3,H,W\]"), ((2, 3, 8, 13), "multiples of 4, got 8x13")],
)
def test_images_that_do_not_fit_raise(bottleneck: Bottleneck, shape: tuple[int, ...], message: str) -> None:
    model = Baseline(tiny_config(bottleneck))
    calls: tuple[Callable[[Tensor], object], ...] = (model, model.encode)
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(torch.rand(shape))
