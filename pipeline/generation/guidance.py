"""Classifier-free guidance [1] as a user meets it: its default, and which priors can be guided.

The one place for the default; the command line shows it in its help, which is why this file imports no torch. What
suits a prior is measured when it is trained (`chosen_guidance.py`) and kept in its config.

[1] Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from prior import PriorConfig, SamplingParameters

    from ..models.loading import TrainedPrior

DEFAULT_GUIDANCE = 2.0  # of the commands, for priors with label dropout; the Python functions default to 1
MEASURED = "guidance"  # the name, among the numbers of a prior's checkpoint, of what suits it


def default_guidance(config: "PriorConfig", metrics: Mapping[str, float] = MappingProxyType({})) -> float:
    """Return the guidance that the commands draw with if none is named.

    Args:
        config: of the prior; one that cannot be guided has 1.
        metrics: of its checkpoint. Where they do not say what suits it, as in those of earlier versions and of a
            training that has not ended, DEFAULT_GUIDANCE is taken.
    """
    return metrics.get(MEASURED, DEFAULT_GUIDANCE) if config.label_dropout > 0 else 1.0


def with_default_guidance(parameters: "SamplingParameters", prior: "TrainedPrior") -> "SamplingParameters":
    """Return the parameters with the default guidance of a prior."""
    return replace(parameters, guidance=default_guidance(prior.model.config, prior.info.metrics))


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
