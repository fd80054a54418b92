"""The gated PixelCNN: p(codes | label) = product over the positions of the grid of p(code | codes before it, label).

"Before" is raster order: all rows above, and what is left in the same row.

Legend: B batch, C channels, H W grid, K codes.

[1] van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import PriorConfig
from .layers import GatedLayer

NO_LABEL = -1  # of an item whose label is hidden; known to a prior with label dropout


class GatedPixelCNN(nn.Module):
    """Maps codes [B,H,W] (and labels [B]) to logits [B,K,H,W]; those at (i, j) depend on codes before (i, j) alone."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_codes, config.channels)
        self.layers = nn.ModuleList(
            GatedLayer(
                config.channels,
                config.kernel_size if index else config.first_kernel_size,
                label_rows=config.label_rows,
                hides_labels=config.label_dropout > 0,
                index=index,
                attention=config.attends(index),
                dropout=config.dropout,
            )
            for index in range(config.num_layers)
        )
        self.to_logits = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(config.channels, config.output_channels, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(config.output_channels, config.num_codes, kernel_size=1),
        )

    def forward(self, codes: Tensor, labels: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Return the logits [B,K,H,W] of every position, given the codes [B,H,W] before it and the labels [B].

        Args:
            codes: [B,H,W] of any integer type, in [0,K).
            labels: [B]; None for a prior without classes.
            keys: int64 [B], in [0, 2^62): what dropout drops of an item in training depends on its key alone. Without,
                it depends on torch's own generator.

        Raises:
            ValueError: codes that are not [B,H,W], or labels that do not fit the configuration.
        """
        if codes.ndim != 3:
            raise ValueError(f"expected codes [B,H,W], got the shape {list(codes.shape)}")
        self.check_labels(labels, len(codes))
        vertical = horizontal = embedded = rearrange(self.embedding(codes.long()), "b h w c -> b c h w")
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, embedded, labels, keys)
        return self.to_logits(horizontal)

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """Raise ValueError unless `labels` are [batch] in [0,num_classes), or None for a prior without classes.

        A prior with label dropout also knows NO_LABEL.
        """
        num_classes = self.config.num_classes
        if num_classes == 0:
            if labels is not None:
                raise ValueError("this prior was trained without labels: expected None, got labels")
            return
        if labels is None:
            raise ValueError(f"this prior knows {num_classes} classes: expected labels [B], got None")
        if labels.shape != (batch,):
            raise ValueError(f"expected one label for each of {batch} grids, got the shape {list(labels.shape)}")
        lowest, also = (NO_LABEL, ", or -1 for none") if self.config.label_dropout else (0, "")
        if not torch.compiler.is_compiling() and not bool(((labels >= lowest) & (labels < num_classes)).all()):
            raise ValueError(f"expected labels from 0 to {num_classes - 1}{also}, got {sorted(set(labels.tolist()))}")
