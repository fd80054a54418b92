"""Stage one: images to a small grid of discrete codes, and back (VQ-VAE). Depends on torch and einops alone."""

from .config import TokenizerConfig
from .model import VQVAE, VQVAEOutput
from .quantizer import QuantizerOutput, VectorQuantizer

__all__ = ["VQVAE", "QuantizerOutput", "TokenizerConfig", "VQVAEOutput", "VectorQuantizer"]
