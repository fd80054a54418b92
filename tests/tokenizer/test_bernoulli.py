"""The VAE with a Bernoulli likelihood, against loops, torch.distributions and the paper's bound.

Legend: B batch, C channels, H' W' image, D latent channels.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from tokenizer import Baseline, TokenizerConfig
from tokenizer.config import Bottleneck
from tokenizer.objective import bernoulli_loss

from .oracles import tiles
from .test_bottleneck import gaussian_of, some_images, tiny_baseline, tiny_config

VALUES = 3 * 8 * 12  # of one of `some_images`


def bernoulli_vae(**fields: float) -> Baseline:
    return tiny_baseline("vae", **{"likelihood": "bernoulli", **fields})  # type: ignore[arg-type]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the cross-entropy


def test_the_loss_is_the_sum_over_an_image_and_the_mean_over_the_batch() -> None:
    logits, images = random_logits(2, 3, 2, 5), torch.rand(2, 3, 2, 5, dtype=torch.float64)
    nats = [0.0, 0.0]
    for b, c, y, x in itertools.product(range(2), range(3), range(2), range(5)):
        p, value = 1 / (1 + math.exp(-logits[b, c, y, x].item())), images[b, c, y, x].item()
        nats[b] -= value * math.log(p) + (1 - value) * math.log(1 - p)
    assert bernoulli_loss(logits, images).item() == pytest.approx(sum(nats) / 2, rel=1e-12)


def test_the_loss_of_a_grey_image_is_the_mean_over_all_ways_to_binarise_it() -> None:
    """All 2^6 binary images, each as likely as its values say."""
    logits, image, mean = random_logits(1, 1, 2, 3), torch.rand(1, 1, 2, 3, dtype=torch.float64), 0.0
    for bits in itertools.product((0.0, 1.0), repeat=6):
        binary = torch.tensor(bits, dtype=torch.float64).reshape(1, 1, 2, 3)
        chance = torch.where(binary == 1, image, 1 - image).prod().item()
        mean -= chance * Bernoulli(logits=logits).log_prob(binary).sum().item()
    assert bernoulli_loss(logits, image).item() == pytest.approx(mean, rel=1e-12)


def test_the_loss_is_lowest_where_the_probability_is_the_value() -> None:
    """There it is the entropy of the value, not 0; its gradient per image is probability - value."""
    images, logits = torch.rand(2, 1, 2, 3, dtype=torch.float64), random_logits(2, 1, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(bernoulli_loss(logits, images), logits)
    torch.testing.assert_close(gradient, (logits.sigmoid() - images) / 2)
    at_best = bernoulli_loss(images.logit(), images).item()
    assert at_best == pytest.approx(Bernoulli(images).entropy().sum().item() / 2, rel=1e-12)
    assert at_best > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-3e4, -200.0, 200.0, 3e4])
def test_black_and_white_images_have_a_finite_loss_however_sure_the_decoder(
    dtype: torch.dtype, value: float, logit: float
) -> None:
    """As it is not by way of a probability, which is 0 or 1 there. A sure and right decoder costs nothing."""
    logits = torch.full((2, 1, 3, 5), logit, dtype=dtype, requires_grad=True)
    loss = bernoulli_loss(logits, torch.full((2, 1, 3, 5), value))
    loss.backward()
    wrong = (logit > 0) != (value == 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(15 * abs(logits[0, 0, 0, 0].item()) * wrong)
    assert logits.grad is not None
    expected = torch.full_like(logits.grad, (0.5 if logit > 0 else -0.5) * wrong)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_cross_entropy_in_float32(dtype: torch.dtype) -> None:
    logits, images = random_logits(2, 3, 8, 12).to(dtype), some_images().float()
    with torch.autocast("cpu", dtype=dtype):
        under = bernoulli_loss(logits, images)
    assert under.dtype == torch.float32
    assert torch.equal(under, bernoulli_loss(logits.float(), images))


# ---- the model


def negative_bound(model: Baseline, images: Tensor, seed: int) -> Tensor:
    """Return the negative evidence lower bound in nats per image, with the latents that this seed draws."""
    torch.manual_seed(seed)
    posterior = gaussian_of(model.encoder(images))
    logits = model.decoder(posterior.mean + posterior.stddev * torch.randn_like(posterior.mean))
    log_likelihood = Bernoulli(logits=logits, validate_args=False).log_prob(images)
    divergence = kl_divergence(posterior, Normal(0.0, 1.0))
    return (divergence.flatten(1).sum(1) - log_likelihood.flatten(1).sum(1)).mean()


def test_the_loss_and_its_gradient_are_those_of_the_negative_evidence_lower_bound() -> None:
    """Of every parameter, per value of an image, with the KL weight as it is by default."""
    model, images = bernoulli_vae(), some_images(3)
    torch.manual_seed(6)
    loss = model(images).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    bound = negative_bound(model, images, seed=6)
    torch.testing.assert_close(loss, bound / VALUES)
    expected = torch.autograd.grad(bound / VALUES, list(model.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_both_terms_are_nats_per_image_and_the_weight_is_of_the_kl_alone() -> None:
    images, results = some_images(), {}
    for weight in (0.0, 0.1, 4.0):
        torch.manual_seed(7)
        results[weight] = bernoulli_vae(kl_weight=weight)(images)
        nats = results[weight].reconstruction_loss + weight * results[weight].kl
        torch.testing.assert_close(results[weight].loss, nats / VALUES)
    assert results[0.0].kl > 1
    for name in ("kl", "reconstruction_loss"):
        assert getattr(results[0.0], name) == getattr(results[0.1], name) == getattr(results[4.0], name)
    torch.manual_seed(7)
    other_variance = bernoulli_vae(kl_weight=4.0, data_variance=0.01)(images)
    assert other_variance.loss == results[4.0].loss  # the variance of the data is the Gaussian's alone


def test_decoded_pixels_are_the_probabilities() -> None:
    """Also of logits that a clamp would make black or white."""
    model, images = bernoulli_vae(), some_images()
    model.decoder.layers[-1].weight.data.mul_(50)
    latents = torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = model.decoder(latents)
    assert logits.min() < -2
    assert logits.max() > 3
    torch.testing.assert_close(model.decode(latents), 1 / (1 + torch.exp(-logits)))
    torch.manual_seed(8)
    reconstruction = model(images).reconstruction
    torch.manual_seed(8)
    drawn, _ = model.bottleneck(model.encoder(images))
    assert torch.equal(reconstruction, model.decoder(drawn).sigmoid())
    assert torch.equal(model.encode(images), tiny_baseline("vae").encode(images))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_images_of_one_colour_train(value: float) -> None:
    torch.manual_seed(9)
    model = Baseline(tiny_config("vae", likelihood="bernoulli"))  # type: ignore[arg-type]
    images, optimizer, losses = torch.full((4, 3, 8, 12), value), torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(images).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert (model.decode(model.encode(images)) - images).abs().max() < 0.05


def test_training_under_autocast_lowers_the_bound() -> None:
    torch.manual_seed(12)
    model, images, losses = Baseline(tiny_config("vae", likelihood="bernoulli")), tiles(3), []  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(images)
        assert {result.loss.dtype, result.reconstruction_loss.dtype, result.kl.dtype} == {torch.float32}
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.6 * losses[0]


# ---- the config


def test_the_kl_weight_is_by_default_that_of_the_likelihood() -> None:
    assert TokenizerConfig().kl_weight == TokenizerConfig(likelihood="gaussian", bottleneck="vae").kl_weight == 0.1
    assert TokenizerConfig(likelihood="bernoulli", bottleneck="vae").kl_weight == 1.0
    assert TokenizerConfig(likelihood="bernoulli", bottleneck="vae", kl_weight=0.1).kl_weight == 0.1
    assert TokenizerConfig(kl_weight=0).kl_weight == 0


@pytest.mark.parametrize("likelihood", ["Bernoulli", "", None, 1])
def test_another_likelihood_is_refused(likelihood: object) -> None:
    with pytest.raises(ValueError, match=r"TokenizerConfig\.likelihood: expected 'gaussian' or 'bernoulli', got"):
        TokenizerConfig(bottleneck="vae", likelihood=likelihood)  # type: ignore[arg-type]


@pytest.mark.parametrize("bottleneck", ["vq", "ae"])
def test_a_bernoulli_that_would_do_nothing_is_refused(bottleneck: Bottleneck) -> None:
    expected = rf"TokenizerConfig\.likelihood: expected 'gaussian' with the bottleneck '{bottleneck}', got 'bernoulli'"
    with pytest.raises(ValueError, match=expected):
        TokenizerConfig(bottleneck=bottleneck, likelihood="bernoulli")
