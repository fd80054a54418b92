"""Where the two stages meet, and everything that touches files: images, codes, checkpoints, training, sampling.

The names below load on first use, so that `import pipeline` (and with it `codegrid --help`) stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codes import CodeDataset
    from .errors import InputError
    from .generate import ImagePipeline
    from .loading import load_prior, load_tokenizer
    from .sources import open_images

__all__ = ["CodeDataset", "ImagePipeline", "InputError", "load_prior", "load_tokenizer", "open_images"]

_HOME = {
    "CodeDataset": "codes",
    "ImagePipeline": "generate",
    "InputError": "errors",
    "load_prior": "loading",
    "load_tokenizer": "loading",
    "open_images": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
