"""Stage one: images to a small grid of discrete codes, and back (VQ-VAE). Depends on torch and einops alone."""

from .config import TokenizerConfig
from .model import VQVAE, Baseline, BaselineOutput, VQVAEOutput, build_model
from .quantizer import QuantizerOutput, VectorQuantizer

__all__ = [
    "VQVAE",
    "Baseline",
    "BaselineOutput",
    "QuantizerOutput",
    "TokenizerConfig",
    "VQVAEOutput",
    "VectorQuantizer",
    "build_model",
]
