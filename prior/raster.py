"""The one loop over positions: grids are completed row by row, from the left, each code drawn given those before it.

Sampling is this loop alone; completion (`completion.py`) runs it over the particles of a particle filter, and reads
after each row how likely the known codes in it were.

With guidance both predictions, with the label and without, come from one network over 2n grids: first all with their
labels, then the same grids without. With guidance 1 or 0 it runs over n grids, as it does for a prior without classes.

Legend: n grids, H W grid, K codes.
"""

import torch
from torch import Tensor

from .choosing import SamplingParameters, choose_codes, guided_logits
from .incremental import IncrementalPrior
from .model import NO_LABEL, GatedPixelCNN

UNKNOWN = -1  # a position that the prior is to draw


class Raster:
    """Draws n grids, of which some codes are known, one row at a time.

    Args:
        prior: in `eval()` mode, and unchanged meanwhile.
        known: [n,H,W] codes, UNKNOWN where one is to be drawn.
        uniforms: [n,H*W] in [0,1), float64, one for each position in raster order.
        labels: [n], or None.
        parameters: how to choose a code; with guidance other than 1 the prior must know NO_LABEL.
        weigh: whether `log_likelihood` is computed.
    """

    def __init__(
        self,
        prior: GatedPixelCNN,
        known: Tensor,
        uniforms: Tensor,
        labels: Tensor | None,
        parameters: SamplingParameters,
        *,
        weigh: bool = False,
    ) -> None:
        device = next(prior.parameters()).device
        self.chooser = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        count, _, self.width = known.shape
        self.codes = known.to(device, copy=True, memory_format=torch.contiguous_format)
        self.unknown = self.codes == UNKNOWN
        self.any_unknown = self.unknown.any(dim=0).tolist()
        self.any_known = (~self.unknown).any(dim=0).tolist()
        self.positions = self.codes.view(count, -1).unbind(dim=1)  # views, in raster order
        self.uniforms = uniforms.T.contiguous().to(self.chooser).unbind(dim=0)
        self.parameters, self.weigh = parameters, weigh
        self.log_likelihood = torch.zeros(count, dtype=torch.float64, device=self.chooser)  # of the known codes so far
        self.guided = parameters.predictions == 2
        labels = labels_of_predictions(labels, parameters.guidance)
        self.network = IncrementalPrior(
            prior,
            count * parameters.predictions,
            self.width,
            None if labels is None else labels.to(device),
            vertical_dtype=torch.bfloat16 if parameters.precision == "bf16" else None,
        )

    def draw_row(self, row: int) -> None:
        """Draw the unknown codes of the next row.

        Raises:
            ValueError: the logits are not finite.
        """
        self.network.start_row()
        extremes: list[Tensor] = []  # of the logits at each position, which are finite if these are
        for column in range(self.width):
            features = self.network.features(column)
            codes = self.positions[row * self.width + column]
            any_unknown, any_known = self.any_unknown[row][column], self.any_known[row][column]
            if any_unknown or self.weigh:
                logits = self._logits(features)
                extremes += logits.aminmax()
            if any_unknown:
                chosen = choose_codes(logits, self.uniforms[row * self.width + column], self.parameters)
                chosen = chosen.to(codes.device)
                codes.copy_(torch.where(self.unknown[:, row, column], chosen, codes) if any_known else chosen)
            if self.weigh and any_known:
                self._weigh(logits, row, column)
            self.network.set_codes(column, codes.repeat(2) if self.guided else codes)
        if extremes:
            check_finite(torch.stack(extremes), row)  # once a row: a CPU-GPU sync

    def result(self) -> Tensor:
        """Return the codes [n,H,W], once all rows are drawn."""
        return self.codes

    def select(self, samples: Tensor) -> None:
        """Continue, between two rows, with these samples [n], indices of the present ones, of the same grids."""
        samples = samples.to(self.codes.device)
        self.codes.copy_(self.codes[samples])  # in place, for `positions` are views of it
        self.network.select(torch.cat([samples, len(self.codes) + samples]) if self.guided else samples)

    def _logits(self, features: Tensor) -> Tensor:
        """Return the logits [n,K] to choose from, of what the network found at a column."""
        logits = self.network.logits(features)
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = guided_logits(conditional, unconditional, self.parameters.guidance)
        return logits.to(self.chooser)

    def _weigh(self, logits: Tensor, row: int, column: int) -> None:
        """Add the log-probability of the codes known at a position: with guidance, before temperature and the cuts."""
        codes, unknown = (x[:, row, column].to(self.chooser) for x in (self.codes, self.unknown))
        likelihood = logits.double().log_softmax(dim=1).gather(1, codes[:, None])[:, 0]
        self.log_likelihood += likelihood.masked_fill(unknown, 0)


def labels_of_predictions(labels: Tensor | None, guidance: float) -> Tensor | None:
    """Return the labels of the grids that the network runs over, for labels [n]: [n], or [2n] for two predictions."""
    if labels is None or guidance == 1:
        return labels
    hidden = torch.full_like(labels, NO_LABEL)
    return hidden if guidance == 0 else torch.cat([labels, hidden])


def check_finite(logits: Tensor, row: int) -> None:
    """Raise ValueError unless logits of a row, in any shape, are finite."""
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"expected finite logits of the prior, got NaN or infinity in row {row} of the grid; "
            "train it again, with a lower --lr"
        )
