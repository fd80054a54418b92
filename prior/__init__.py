"""Stage two: the probability of a grid of codes, and drawing new ones (gated PixelCNN).

Depends on torch and einops alone.
"""

from .completion import complete_codes
from .config import PriorConfig
from .model import GatedPixelCNN
from .sampling import sample_codes

__all__ = ["GatedPixelCNN", "PriorConfig", "complete_codes", "sample_codes"]
