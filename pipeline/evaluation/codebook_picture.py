"""The codebook as a picture: how often each code is used, and what it decodes to, the most used first.

|||||||||||....       one bar for each code, as high as its share of the most used one
[] [] [] [] [] []     what a patch of this code alone decodes to; codes not in use are white
[] [] [] ...
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from tokenizer import VQVAE

from ..images.png import tile
from ..images.preprocessing import to_uint8

MOST_CODES = 1024  # that one picture shows
COLUMNS = 32
TILE = 16  # pixels
BARS = 96  # pixels that the highest bar takes


def codebook_picture(tokenizer: VQVAE, histogram: Tensor) -> Tensor:
    """Return a picture uint8 [C,H,W] of the codes of `histogram` [K]: the MOST_CODES most used ones."""
    counts, order = histogram.cpu().sort(descending=True, stable=True)
    counts, order = counts[:MOST_CODES], order[:MOST_CODES]
    tiles = code_tiles(tokenizer, order)
    tiles[counts == 0] = 255
    sheet = tile(tiles, COLUMNS)
    return torch.cat([bars(counts, sheet.shape), sheet], dim=1)


@torch.no_grad()
def code_tiles(tokenizer: VQVAE, codes: Tensor) -> Tensor:
    """Return what each of `codes` [n] decodes to in the middle of a 5x5 grid of itself, uint8 [n,C,TILE,TILE]."""
    side, device = tokenizer.config.downsample, next(tokenizer.parameters()).device
    grids = repeat(codes, "n -> n h w", h=5, w=5).to(device)
    patches = torch.cat([tokenizer.decode(batch) for batch in grids.split(256)])
    middle = patches[:, :, 2 * side : 3 * side, 2 * side : 3 * side]
    return to_uint8(torch.nn.functional.interpolate(middle, size=(TILE, TILE))).cpu()


def bars(counts: Tensor, sheet: torch.Size) -> Tensor:
    """Return a bar chart of `counts` [n] as wide as a sheet [C,H,W]: uint8 [C,BARS,W], black on white."""
    channels, _, width = sheet
    columns = torch.arange(width) * len(counts) // width
    heights = counts[columns] * BARS // counts.max().clamp_min(1)
    filled = rearrange(torch.arange(BARS, 0, -1), "y -> y 1") <= heights
    return repeat(torch.where(filled, 0, 255).to(torch.uint8), "y x -> c y x", c=channels)
