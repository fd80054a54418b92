"""Two sets of features as every metric takes them: checked, in float64, on the CPU.

Legend: N and M rows, D dimensions.
"""

import numpy as np
import torch
from torch import Tensor

Features = np.ndarray | Tensor  # [N,D] of any float type, on the CPU

BLOCK_BYTES = 2**25  # 32 MiB, of one block of an N x M matrix; a function holds a few such blocks, never the matrix
LARGEST_NORM = 1e48  # of a row; the kernel is the cube of a product of two, and 1e308 the largest float64


def feature_pair(a: Features, b: Features, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Return two sets of features, [N,D] and [M,D], as float64.

    Args:
        a: a numpy array or a tensor on the CPU, of any float type.
        b: the same, with as many dimensions.
        least: rows that each must have.

    Raises:
        ValueError: they are not such arrays, have fewer rows, or hold NaN, infinity or a row longer than
            LARGEST_NORM.
    """
    first, second = _as_float64(a, least), _as_float64(b, least)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"expected as many dimensions in both sets, got {first.shape[1]} and {second.shape[1]}")
    return first, second


def rows_at_once(row_length: int) -> int:
    """Return how many rows of so many float64 values make a block."""
    return max(1, BLOCK_BYTES // (8 * row_length))


def _as_float64(features: Features, least: int) -> Tensor:
    tensor = _as_tensor(features)
    if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.device.type != "cpu" or tensor.shape[1] == 0:
        raise _not_features(f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}")
    if len(tensor) < least:
        raise ValueError(f"expected at least {least} rows of features, got {len(tensor)}")
    tensor = tensor.detach().double()
    if not bool((torch.linalg.vector_norm(tensor, dim=1) <= LARGEST_NORM).all()):  # false for NaN
        raise ValueError(f"expected finite features, got NaN, infinity or a row longer than {LARGEST_NORM:g}")
    return tensor


def _as_tensor(features: Features) -> Tensor:
    """Return an array of a float type as a tensor, a tensor as it is. Raise ValueError for anything else."""
    if isinstance(features, Tensor):
        return features
    if not isinstance(features, np.ndarray):
        raise _not_features(f"a {type(features).__name__}")
    if features.dtype.kind != "f":
        raise _not_features(f"{features.dtype} {list(features.shape)}")
    # A copy, because torch warns of what cannot be written, and lacks arrays of the other byte order or of 80 bits.
    return torch.from_numpy(np.array(features, dtype=np.float64))


def _not_features(got: str) -> ValueError:
    return ValueError(f"expected features [N,D] of a float type, an array or a tensor on the CPU, got {got}")
