"""A particle filter over grids: sequential importance resampling [1], a row at a time.

Each grid is drawn m times side by side. A particle is weighted by the probability that it gave to the known codes it
met; after each row the unlikely particles give way to copies of the likely ones; at the end one is chosen by weight.

Legend: n grids, m particles of each, H W grid, K codes; the particles of one grid follow each other.

[1] Doucet and Johansen 2009, A Tutorial on Particle Filtering and Smoothing, section 3.4
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from .choosing import SamplingParameters, choose_codes
from .model import GatedPixelCNN
from .raster import Raster


def uniforms_needed(num_particles: int, height: int, width: int) -> int:
    """Return how many uniforms a grid takes: one for each position of each particle, and one after each row."""
    return num_particles * height * width + height


class Particles:
    """Draws m particles of each of n grids; what is drawn of one grid does not depend on the others.

    Args:
        prior: in `eval()` mode, and unchanged meanwhile.
        known: [n,H,W] codes, UNKNOWN where one is to be drawn.
        num_particles: m.
        uniforms: [n,uniforms_needed(m, H, W)] in [0,1), float64.
        labels: [n,m], or None.
        parameters: how a particle chooses a code.
    """

    def __init__(
        self,
        prior: GatedPixelCNN,
        known: Tensor,
        num_particles: int,
        uniforms: Tensor,
        labels: Tensor | None,
        parameters: SamplingParameters,
    ) -> None:
        height = known.shape[1]
        positions, after_rows = uniforms.tensor_split((-height,), dim=1)
        self.raster = Raster(
            prior,
            repeat(known, "n h w -> (n m) h w", m=num_particles),
            rearrange(positions, "n (m hw) -> (n m) hw", m=num_particles),
            None if labels is None else labels.flatten(),
            parameters,
            weigh=num_particles > 1,
        )
        self.num_particles = num_particles
        self.after_rows = after_rows.T.contiguous().to(self.raster.chooser)  # [H,n]

    def draw_row(self, row: int) -> None:
        """Draw what is unknown of the next row; before each but the first, resample the particles by their weights."""
        if row > 0 and self.num_particles > 1:
            ancestors, log_weights = resample(self.log_weights, self.after_rows[row - 1])
            self.raster.select(ancestors)
            self.raster.log_likelihood = log_weights.flatten()
        self.raster.draw_row(row)

    def result(self) -> Tensor:
        """Return one of the particles of each grid, chosen by weight: codes [n,H,W]."""
        chosen = choose_codes(self.log_weights, self.after_rows[-1])
        first = torch.arange(len(chosen), device=chosen.device) * self.num_particles
        return self.raster.codes[(first + chosen).to(self.raster.codes.device)]

    @property
    def log_weights(self) -> Tensor:
        """Return the weights of the particles, [n,m] float64, up to a constant for each grid."""
        return rearrange(self.raster.log_likelihood, "(n m) -> n m", m=self.num_particles)


def resample(log_weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Resample particles systematically by their weights, in those grids whose weights have become uneven.

    Args:
        log_weights: [n,m].
        uniforms: [n] in [0,1).

    Returns:
        The ancestors, [n*m] indices into the particles of all grids one after another, and the log-weights [n,m] that
        their copies keep: of a resampled grid all equal.
    """
    count, num_particles = log_weights.shape
    weights = log_weights.softmax(dim=1)
    effective_number = 1 / weights.square().sum(dim=1, keepdim=True)  # of particles [1]
    uneven = effective_number < num_particles / 2
    steps = torch.arange(num_particles, device=weights.device)
    ends = weights.cumsum(dim=1)
    positions = ((steps + uniforms[:, None]) / num_particles).clamp_max(1 - 2**-52) * ends[:, -1:]
    chosen = torch.searchsorted(ends, positions, right=True)
    ancestors = torch.where(uneven, chosen, steps)
    first = torch.arange(count, device=weights.device)[:, None] * num_particles
    return (first + ancestors).flatten(), torch.where(uneven, 0.0, log_weights)
