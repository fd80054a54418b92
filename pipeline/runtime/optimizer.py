"""The optimizers of every training: Muon for convolutions and linear layers, Adam for everything else.

Muon takes the momentum of a weight's gradient and makes its singular values nearly equal, so that a step moves every
direction of the weight alike; a step has the root mean square that Adam's would have, so one learning rate does for
both. On the tokenizer it reaches in 1,000 steps what Adam reaches in 2,000 (benchmarks/README.md).

torch.optim.Muon (torch 2.9) takes matrices alone, one at a time; here a convolution counts as the matrix
[first dimension, all others], and weights of one shape are orthogonalised in one batch. As in [1], that may be done in
bf16, for a direction needs no more digits: it takes a third of the time where the processor has bf16.

[1] Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
[2] Liu et al. 2025, Muon is Scalable for LLM Training, arXiv:2502.16982, eq. 4 (the size of a step)
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

MOMENTUM = 0.95
SMALLEST_SIDE = 16  # of a matrix; with fewer rows or columns there is little to equalise
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration [1]


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum [1] of parameters with two dimensions or more.

    Args:
        parameters: weights; all but the first dimension count as one.
        lr: learning rate, on the scale of Adam's.
        dtype: to orthogonalise in, that of the weights by default; momentum and weights keep their own.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(parameters, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step for every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter, direction in zip(parameters, self._directions(parameters), strict=True):
                by_shape[(parameter.shape[0], parameter[0].numel())].append((parameter, direction))
            for shape, pairs in by_shape.items():
                matrices = torch.stack([direction.reshape(shape) for _, direction in pairs])
                steps = orthogonalized(matrices, self.dtype) * (-group["lr"] * 0.2 * max(shape) ** 0.5)
                moved = [step.view(parameter.shape) for (parameter, _), step in zip(pairs, steps, strict=True)]
                torch._foreach_add_([parameter for parameter, _ in pairs], moved)

    def _directions(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return Nesterov's momentum of each: between its gradient and their moving average, which it updates."""
        if not parameters:
            return []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return list(torch._foreach_lerp(gradients, momenta, MOMENTUM))


def orthogonalized(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return about U V^T of each U S V^T in matrices [n,R,C]: singular values between 0.7 and 1.2 [1]; of 0, 0.

    Computed in `dtype`, that of the matrices by default; in bf16 the singular values are up to a tenth further from 1.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrices else x.mT).to(matrices.dtype)


class Optimizers:
    """The optimizers of a model: Muon and Adam, or Adam alone.

    Args:
        model: the one whose parameters are optimised.
        name: "muon" (with Adam for what is not a large matrix) or "adam".
        lr: learning rate of both.
        dtype: of the products of Muon, that of the weights by default.
    """

    def __init__(self, model: nn.Module, name: str, lr: float, *, dtype: torch.dtype | None = None) -> None:
        matrices = hidden_matrices(model) if name == "muon" else []
        known = set(matrices)
        others = [parameter for parameter in model.parameters() if parameter not in known]
        self.members: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            self.members["muon"] = Muon(matrices, lr, dtype=dtype)
        if others:
            self.members["adam"] = torch.optim.Adam(others, lr=lr, fused=True)

    def step(self, lr: float) -> None:
        """Take one step at this learning rate."""
        for optimizer in self.members.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for optimizer in self.members.values():
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimizers by name, such as "muon/0/momentum"."""
        return {
            f"{name}/{index}/{key}": tensor
            for name, optimizer in self.members.items()
            for index, state in optimizer.state_dict()["state"].items()
            for key, tensor in state.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for name, optimizer in self.members.items():
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for path, tensor in tensors.items():
                owner, index, key = path.split("/")
                if owner == name:
                    state[int(index)][key] = _laid_out_as(optimizer.param_groups[0]["params"][int(index)], tensor)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of convolutions and linear layers that have at least SMALLEST_SIDE rows and columns.

    Where the weight that a layer computes with is a function of another, such as that divided by its spectral norm,
    the other is the parameter.
    """
    layers = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    weights = [_parameter_of(module) for module in model.modules() if isinstance(module, layers)]
    return [weight for weight in weights if min(weight.shape[0], weight[0].numel()) >= SMALLEST_SIDE]


def _laid_out_as(parameter: Tensor, state: Tensor) -> Tensor:
    """Return a tensor of an optimizer's state in the memory layout of its parameter, if it has the same shape.

    A checkpoint holds it in the usual layout, and fused Adam reads both as they are in memory, whatever their layouts.
    """
    if state.shape != parameter.shape or state.stride() == parameter.stride():
        return state
    return torch.empty_like(parameter, dtype=state.dtype, device=state.device).copy_(state)


def _parameter_of(layer: nn.Module) -> Tensor:
    """Return the parameter behind the weight of a layer."""
    parametrized = is_parametrized(layer, "weight")
    return layer.get_parameter("parametrizations.weight.original" if parametrized else "weight")
