"""Inception features of images, with the network and the weights that published FIDs are computed with.

The weights are a pickle, which could run any code, and torch-fidelity unpickles what it is given. So only the official
file is handed to it: its bytes are compared with their SHA-256 first, and those same bytes are handed over.

Heusel et al. 2017, arXiv:1706.08500. Legend: N images, n in a batch, C channels, H W image.
"""

import hashlib
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn

from ..errors import InputError
from ..models.shares import map_on_all
from ..runtime.process_group import ALONE, ProcessGroup
from ..runtime.progress import with_progress
from ..runtime.untrusted_files import read_regular, unreadable

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_BYTES = 95_628_359
FEATURES = 2048  # of the last pooling, which FID is computed of
BATCH = 32  # images of 299 x 299 at a time; their activations take about 0.5 GB


def inception_features(
    network: nn.Module,
    images: Callable[[int, int], Tensor],
    count: int,
    what: str = "images",
    group: ProcessGroup = ALONE,
) -> np.ndarray:
    """Return the Inception features of images 0 .. count - 1, float32 [N,2048], with a progress bar.

    The images are resized to 299 x 299 as TensorFlow did for the first FIDs; a grey channel is repeated. A value
    depends on the batch and the device by rounding alone.

    Args:
        network: of `load_inception`, on any device.
        images: (start, stop) -> uint8 images [stop - start,C,H,W], C = 1 or 3.
        count: N.
        what: they are, for the line of progress.
        group: processes that take turns with the batches; each must call this, and gets the features of all images.

    Raises:
        ValueError: the images are not such images.
    """
    starts = range(0, count, BATCH)
    shown = with_progress(
        starts, count, f"computing Inception features of {what}", size=lambda start: min(BATCH, count - start)
    )
    batches = map_on_all(lambda start: _features(network, images(start, min(start + BATCH, count))), shown, group)
    return np.concatenate([np.empty((0, FEATURES), np.float32), *batches])


def load_inception(weights: Path) -> nn.Module:
    """Return the network, uint8 images [n,3,H,W] -> a tuple of its features [n,2048], in `eval()` mode on the CPU.

    Args:
        weights: the file of WEIGHTS_URL, under any name.

    Raises:
        InputError: torch-fidelity is not installed, or the file is missing, cannot be read or is another one.
    """
    if find_spec("torch_fidelity") is None:
        raise InputError(
            expected="the library torch-fidelity, for Inception features",
            got="none",
            do="pip install 'codegrid[fidelity]'",
        )
    data = _official_weights(weights)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # here: it takes seconds

    return FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=io.BytesIO(data))


def _official_weights(path: Path) -> bytes:
    """Return the content of the official file. Raise InputError for any other."""
    try:
        data = read_regular(path, WEIGHTS_BYTES)
    except FileNotFoundError:
        raise _not_the_weights(path, "no file") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise _not_the_weights(path, str(error)) from None
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS_SHA256:
        raise _not_the_weights(path, f"{len(data):,} bytes with the SHA-256 {found[:8]}...")
    return data


def _not_the_weights(path: Path, got: str) -> InputError:
    return InputError(
        expected=f"the Inception weights {WEIGHTS_NAME} at {path}", got=got, do=f"download them from {WEIGHTS_URL}"
    )


@torch.no_grad()
def _features(network: nn.Module, images: Tensor) -> np.ndarray:
    """Return the features [n,2048] of a batch of images."""
    batch = _colour(images).to(next(network.parameters()).device)
    # Without TensorFloat-32, which keeps 10 bits of each factor.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        (features,) = network(batch)
    return features.cpu().numpy()


def _colour(images: Tensor) -> Tensor:
    """Return images uint8 [n,C,H,W], C = 1 or 3, as [n,3,H,W]. Raise ValueError for others."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected uint8 images [n,1 or 3,H,W], got {images.dtype} {list(images.shape)}")
    return images if images.shape[1] == 3 else repeat(images, "n 1 h w -> n c h w", c=3)
