"""What the training loop needs to know about a run."""

from dataclasses import dataclass
from typing import Any

import torch

from .recipes import DecoderSettings, PriorSettings, TokenizerSettings


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know about a run."""

    steps: int  # in all, those before a resume included
    batch_size: int  # of a step, over all processes
    learning_rate: float  # after the warm-up
    seed: int
    device: torch.device
    precision: str  # "auto", "fp32" or "bf16"
    optimizer: str = "muon"  # or "adam"
    accumulate: int = 1  # parts that the batch of a process is computed in, one after the other
    decays: bool = True  # whether the learning rate falls to 0 at the end
    evaluations: int = 8  # over the whole run, the last at its end
    keep_best: bool = False  # model.safetensors holds the weights of the best evaluation, not the last weights
    evaluate_first: bool = False  # also evaluate before the first step, so that nothing worse is ever the best

    @classmethod
    def from_settings(
        cls, settings: TokenizerSettings | PriorSettings | DecoderSettings, device: torch.device, **extra: Any
    ) -> "LoopSettings":
        """Return the loop settings of a training: what the user chose, and `extra`, which the user does not choose."""
        names = ("steps", "batch_size", "seed", "precision", "optimizer", "accumulate")
        shared = {name: getattr(settings, name) for name in names}
        return cls(**shared, learning_rate=settings.lr, device=device, **extra)
