"""What defines a prior: the codes it is over, and the shape of its network."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The configuration of a `GatedPixelCNN`.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what is allowed.
    """

    num_codes: int  # K, values a code can take
    num_classes: int = 0  # labels it is conditioned on; 0 for none
    channels: int = 64  # width of each of the two stacks
    num_layers: int = 6  # gated layers, the first (type A) included
    kernel_size: int = 3  # of every layer after the first; odd
    first_kernel_size: int = 7  # of the type A layer; odd, 3 or more
    attention_every: int = 0  # causal attention after every this many layers, counted from the second; 0 for none
    output_channels: int = 256  # between the two 1x1 layers that end in K logits
    dropout: float = 0.0  # share of the activations dropped after each gate of the horizontal stack, in training
    label_dropout: float = 0.0  # share of the training items whose label is hidden; above 0 the prior knows "no label"

    def __post_init__(self) -> None:
        _require(self.num_codes >= 2, self, "num_codes", "at least 2")
        _require(self.num_classes >= 0, self, "num_classes", "0 or more")
        for name in ("channels", "num_layers", "output_channels"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.attention_every >= 0, self, "attention_every", "0 or more")
        _require(self.kernel_size >= 1 and self.kernel_size % 2 == 1, self, "kernel_size", "an odd number")
        first = self.first_kernel_size
        _require(first >= 3 and first % 2 == 1, self, "first_kernel_size", "an odd number of 3 or more")
        for name in ("dropout", "label_dropout"):
            _require(0 <= getattr(self, name) < 1, self, name, "from 0 to below 1")
        _require(
            self.label_dropout == 0 or self.num_classes > 0, self, "label_dropout", "0 for a prior without classes"
        )

    @property
    def label_rows(self) -> int:
        """The rows of each table of labels: one for each class, and with label dropout a last one for "no label"."""
        return self.num_classes + (self.label_dropout > 0)

    def attends(self, layer: int) -> bool:
        """Return whether the layer of this index, counted from 0, ends in attention."""
        return self.attention_every > 0 and layer > 0 and layer % self.attention_every == 0

    @property
    def num_attending(self) -> int:
        """How many layers end in attention."""
        return sum(map(self.attends, range(self.num_layers)))


def _require(holds: bool, config: PriorConfig, field: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"PriorConfig.{field}: expected {allowed}, got {getattr(config, field)!r}")
