"""Where the two stages meet, and everything that touches files: images, codes, checkpoints, training, sampling.

The names below load on first use, so that `import pipeline` (and with it `codegrid --help`) stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codes.dataset import CodeDataset
    from .errors import InputError
    from .evaluation.distances import frechet_distance, kernel_distance, monge_distance, sliced_wasserstein
    from .evaluation.neighbours import precision_recall_density_coverage
    from .generation.image_pipeline import ImagePipeline
    from .images.image_set import open_images
    from .models.loading import load_prior, load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CodeDataset",
    "ImagePipeline",
    "InputError",
    "frechet_distance",
    "kernel_distance",
    "load_prior",
    "load_tokenizer",
    "monge_distance",
    "open_images",
    "precision_recall_density_coverage",
    "sliced_wasserstein",
]

_HOME = {
    "CodeDataset": "codes.dataset",
    "ImagePipeline": "generation.image_pipeline",
    "InputError": "errors",
    "frechet_distance": "evaluation.distances",
    "kernel_distance": "evaluation.distances",
    "load_prior": "models.loading",
    "load_tokenizer": "models.loading",
    "monge_distance": "evaluation.distances",
    "open_images": "images.image_set",
    "precision_recall_density_coverage": "evaluation.neighbours",
    "sliced_wasserstein": "evaluation.distances",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
