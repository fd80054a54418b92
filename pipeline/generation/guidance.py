"""Classifier-free guidance [1] as a user meets it: its default, and which priors can be guided.

The one place for the default; the command line shows it in its help, which is why this file imports no torch.

[1] Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from prior import PriorConfig, SamplingParameters

DEFAULT_GUIDANCE = 2.0  # of the commands, for priors with label dropout; the Python functions default to 1


def default_guidance(config: "PriorConfig") -> float:
    """Return the guidance that the commands draw with if none is named: 1 for a prior that cannot be guided."""
    return DEFAULT_GUIDANCE if config.label_dropout > 0 else 1.0


def with_default_guidance(parameters: "SamplingParameters", config: "PriorConfig") -> "SamplingParameters":
    """Return the parameters with the default guidance for a prior of this configuration."""
    return replace(parameters, guidance=default_guidance(config))


def check_guidance(config: "PriorConfig", guidance: float) -> None:
    """Raise InputError if a prior of this configuration cannot be guided and `guidance` is not 1, the plain prior.

    Only a prior that was trained with label dropout can predict without a label, which guidance compares with.
    """
    if guidance == 1 or config.label_dropout > 0:
        return
    if config.num_classes:
        prior, do = "trained without label dropout", "omit --guidance, or train one with train-prior --label-dropout"
    else:
        prior = "trained without labels"
        do = "omit --guidance, or train on images with classes, with train-prior --label-dropout"
    raise InputError(expected=f"guidance 1 for a prior that was {prior}", got=f"{guidance:g}", do=do)
