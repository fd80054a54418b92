"""Slow, obvious counterparts of what the package does fast, and the small tokenizers the tests ask about.

Legend: B batch, D code dimension, S one to three positions, N = B * prod(S) vectors, K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer import VQVAE, TokenizerConfig, VectorQuantizer
from tokenizer.config import CodebookUpdate

UPDATES: list[CodebookUpdate] = ["ema", "gradient"]


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """[N,K], by broadcasting, in float64."""
    return (vectors[:, None].double() - codebook[None].double()).square().sum(dim=2)


def nearest_by_hand(vectors: Tensor, codebook: Tensor) -> list[int]:
    """The first k of the smallest distance, one vector at a time: Python's `min` returns the first of equals."""
    return [min(range(len(codebook)), key=row.__getitem__) for row in squared_distances(vectors, codebook).tolist()]


def rows_of(z: Tensor) -> Tensor:
    """[B,D,*S] -> [N,D], with positions in row-major order, one index at a time."""
    flat = z.flatten(start_dim=2)  # [B,D,prod S]
    return torch.stack([flat[b, :, s] for b in range(flat.shape[0]) for s in range(flat.shape[2])])


def as_batch(vectors: Tensor) -> Tensor:
    """[N,D] -> z [1,D,N]"""
    return vectors.T[None]


def quantizer_with(codebook: Tensor, **options: Any) -> VectorQuantizer:
    quantizer = VectorQuantizer(*codebook.shape, **options).to(codebook.dtype)
    quantizer.set_codebook(codebook)
    return quantizer


def tiny_vqvae(*, seed: int = 0, **fields: Any) -> VQVAE:
    """A few thousand weights, and a codebook on vectors of the encoder itself: the codes move with the image."""
    torch.manual_seed(seed)
    small = {"hidden_channels": 8, "num_residual_layers": 1, "residual_channels": 4, "num_codes": 16, "code_dim": 3}
    model = VQVAE(TokenizerConfig(**{**small, **fields}))
    side = 4 * model.config.downsample
    with torch.no_grad():
        vectors = model.encoder(torch.rand(model.config.num_codes, model.config.in_channels, side, side))
        model.quantizer.set_codebook(vectors[:, :, 1, 2])  # [K,D], one vector of each image
    return model


def tiles(in_channels: int) -> Tensor:
    """8 images [8,C,8,12] of black and white tiles, 4 pixels wide: a fresh tiny tokenizer learns them in 60 steps."""
    return (
        torch.rand(8, 1, 2, 3)
        .round()
        .repeat_interleave(4, dim=2)
        .repeat_interleave(4, dim=3)
        .repeat(1, in_channels, 1, 1)
    )


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    """Every parameter and every buffer, saved with the model or not, bit for bit."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors}
