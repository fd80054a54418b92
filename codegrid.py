"""The public names of codegrid in one place: what `import codegrid` offers once the distribution is installed.

    import codegrid

    pipeline = codegrid.ImagePipeline.from_pretrained("checkpoints/tokenizer", "checkpoints/prior")
    images, codes = pipeline.sample(8)

The names are those of `tokenizer`, `prior` and `pipeline`. Each loads on first use, so that importing is immediate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline import __version__ as __version__

if TYPE_CHECKING:
    from pipeline import (
        CodeDataset,
        ImagePipeline,
        InputError,
        frechet_distance,
        kernel_distance,
        load_prior,
        load_tokenizer,
        monge_distance,
        open_images,
        precision_recall_density_coverage,
        sliced_wasserstein,
    )
    from prior import GatedPixelCNN, PriorConfig, SamplingParameters, complete_codes, sample_codes
    from tokenizer import (
        VQVAE,
        Baseline,
        BaselineOutput,
        QuantizerOutput,
        TokenizerConfig,
        VectorQuantizer,
        VQVAEOutput,
        build_model,
    )

__all__ = [
    "VQVAE",
    "Baseline",
    "BaselineOutput",
    "CodeDataset",
    "GatedPixelCNN",
    "ImagePipeline",
    "InputError",
    "PriorConfig",
    "QuantizerOutput",
    "SamplingParameters",
    "TokenizerConfig",
    "VQVAEOutput",
    "VectorQuantizer",
    "build_model",
    "complete_codes",
    "frechet_distance",
    "kernel_distance",
    "load_prior",
    "load_tokenizer",
    "monge_distance",
    "open_images",
    "precision_recall_density_coverage",
    "sample_codes",
    "sliced_wasserstein",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for package in map(import_module, ("pipeline", "prior", "tokenizer")):
            if name in package.__all__:
                return getattr(package, name)
    raise AttributeError(f"module 'codegrid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
