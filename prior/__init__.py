"""Stage two: the probability of a grid of codes, and sampling new ones (gated PixelCNN).

Depends on torch and einops alone.
"""

from .choosing import SamplingParameters
from .completion import complete_codes
from .config import PriorConfig
from .model import GatedPixelCNN
from .sampling import sample_codes

__all__ = ["GatedPixelCNN", "PriorConfig", "SamplingParameters", "complete_codes", "sample_codes"]
