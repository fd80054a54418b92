"""The optimizers: Muon against a slow oracle, which parameters it takes, and that their state is restored."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.runtime.optimizer import MOMENTUM, Muon, Optimizers, hidden_matrices, orthogonalized

SHAPES = [(16, 40), (40, 16), (20, 20)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """The quintic iteration on one matrix, written out: each singular value s becomes a s + b s^3 + c s^5, 5 times."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_is_the_iteration_on_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    expected = torch.stack([newton_schulz(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalized(matrices), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_singular_values_become_nearly_equal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(2, *shape)))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_keeps_the_directions_and_nearly_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape)
    exact, rounded = orthogonalized(matrices), orthogonalized(matrices, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert float(torch.cosine_similarity(exact.flatten(1), rounded.flatten(1)).min()) > 0.999
    values = torch.linalg.svdvals(rounded)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.4


def test_zero_orthogonalized_is_zero() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 16, 17)), torch.zeros(2, 16, 17))


def test_steps_against_one_weight_at_a_time() -> None:
    """Three steps of weights of several shapes, a convolution among them, with momentum by hand."""
    torch.manual_seed(0)
    weights = [torch.randn(16, 20), torch.randn(24, 16, 3, 1), torch.randn(16, 20)]
    weights = [weight.double().requires_grad_() for weight in weights]
    expected = [weight.detach().clone() for weight in weights]
    averages = [torch.zeros_like(weight) for weight in expected]
    muon = Muon(weights, lr=0.1)
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * weight.grad
            direction = (1 - MOMENTUM) * weight.grad + MOMENTUM * averages[i]
            matrix = newton_schulz(direction.reshape(len(direction), -1))
            expected[i] -= 0.1 * 0.2 * max(matrix.shape) ** 0.5 * matrix.reshape(weight.shape)
        muon.step()
    for weight, target in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), target)


def test_muon_in_bf16_steps_by_what_orthogonalized_returns_and_keeps_its_state_in_float32() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(16, 20, requires_grad=True)
    weight.grad = torch.randn(16, 20)
    muon = Muon([weight], lr=0.1, dtype=torch.bfloat16)
    muon.step()
    momentum = (1 - MOMENTUM) * weight.grad
    direction = weight.grad.lerp(momentum, MOMENTUM)
    expected = orthogonalized(direction[None], torch.bfloat16)[0] * (-0.1 * 0.2 * 20**0.5)
    torch.testing.assert_close(weight.detach(), expected)
    assert weight.dtype == muon.state[weight]["momentum"].dtype == torch.float32


def test_a_step_is_that_of_one_weight_at_a_time_bit_for_bit() -> None:
    """Momentum and the step itself are computed for all weights at once; nothing but the number of calls differs."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((16, 20), (24, 16, 3, 1), (16, 20), (40, 16))]
    alone = [weight.detach().clone().requires_grad_() for weight in weights]
    muon, others = Muon(weights, lr=0.1), [Muon([weight], lr=0.1) for weight in alone]
    for _ in range(3):
        for weight, other in zip(weights, alone, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        muon.step()
        for each in others:
            each.step()
    for weight, other in zip(weights, alone, strict=True):
        assert torch.equal(weight, other)


def test_no_gradients_at_all_are_no_step() -> None:
    weight = torch.ones(16, 16, requires_grad=True)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(16, 16))


def test_a_weight_without_a_gradient_stays() -> None:
    weight, other = torch.ones(16, 16, requires_grad=True), torch.ones(16, 16, requires_grad=True)
    other.grad = torch.eye(16)
    Muon([weight, other], lr=0.1).step()
    assert torch.equal(weight, torch.ones(16, 16))
    assert not torch.equal(other, torch.ones(16, 16))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 16, 3), nn.Conv2d(16, 17, 1), nn.Conv2d(17, 3, 1), nn.Embedding(20, 20))


def test_which_weights_are_matrices() -> None:
    """Of the convolutions those with 16 rows and columns: 16 x 18 and 17 x 16, not 3 x 17; embeddings never."""
    model = network()
    assert [tuple(weight.shape) for weight in hidden_matrices(model)] == [(16, 2, 3, 3), (17, 16, 1, 1)]


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_every_parameter_is_stepped_once(name: str) -> None:
    model = network()
    optimizers = Optimizers(model, name, 0.1)
    optimized = [p for member in optimizers.members.values() for group in member.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    assert ("muon" in optimizers.members) == (name == "muon")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    give_gradients(model, 1)
    optimizers.step(0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))  # the rate acts
    optimizers.step(0.1)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_type_of_the_products_reaches_muon() -> None:
    models = network(), network(), network()
    for model, dtype in zip(models, (torch.bfloat16, torch.float32, None), strict=True):
        optimizers = Optimizers(model, "muon", 0.1, dtype=dtype)
        give_gradients(model, 1)
        optimizers.step(0.1)
    rounded, single, default = (hidden_matrices(model)[0].detach() for model in models)
    assert torch.equal(single, default)
    assert not torch.equal(rounded, single)
    torch.testing.assert_close(rounded, single, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_a_step_after_loading_is_the_step_without_saving(name: str) -> None:
    model, copy = network(), network()
    optimizers = Optimizers(model, name, 0.1)
    give_gradients(model, 1)
    optimizers.step(0.1)
    restored = Optimizers(copy, name, 0.1)
    copy.load_state_dict(model.state_dict())
    restored.load_tensors({key: tensor.clone() for key, tensor in optimizers.tensors().items()})
    for each, member in ((model, optimizers), (copy, restored)):
        give_gradients(each, 2)
        member.step(0.1)
    for one, other in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_a_loaded_state_has_the_layout_of_its_weights(name: str) -> None:
    """A checkpoint holds the usual layout; fused Adam reads the memory of weight and state alike."""
    plain, restored = network(), network().to(memory_format=torch.channels_last)
    member, other = Optimizers(plain, name, 0.1), Optimizers(restored, name, 0.1)
    give_gradients(plain, 1)
    member.step(0.1)
    restored.load_state_dict(plain.state_dict())
    other.load_tensors(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in member.tensors().items()}
    )
    weight = restored[0].weight
    assert not weight.is_contiguous()
    states = [state for each in other.members.values() for owner, state in each.state.items() if owner is weight]
    assert all(tensor.stride() == weight.stride() for state in states for tensor in state.values() if tensor.dim())
    for model, each in ((plain, member), (restored, other)):
        give_gradients(model, 2)
        each.step(0.1)
    for one, another in zip(plain.parameters(), restored.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the layout of the parameter, as autograd's
