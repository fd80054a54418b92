"""The settings of a training that a user can choose, their defaults, and the published recipes.

The one place for these numbers: training takes its defaults from here and the command line shows them in its help,
which is why this file imports neither torch nor numpy. Measurements: benchmarks/README.md.
"""

from dataclasses import dataclass, field

from .settings import CHANGEABLE, PATH, check_shared

MOST_CODES = 2**24  # K; the codebook, and the embedding and the logits of a prior, have a row for each
LABEL_DROPOUT = 0.1  # of a prior whose grids all have a label
ATTENTION_EVERY = 2  # layers of a prior
FIRST_KERNEL = 3  # of a prior with attention, which reaches everything; without, it is that of `PriorConfig`, 7
MOST_ATTENDED = 256  # codes of a grid: at 16x16 a step takes 1.7 times as long with attention, at 32x32 three times
SHARPENING_SHARE = 0.25  # steps of a decoder's training, as a share of the tokenizer's; in time, about a third
LARGEST_SIDE = 2**14  # pixels; models/loading.py, which imports torch, loads no tokenizer of larger images


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Holds what a user can choose about stage one; the rest of `TokenizerConfig` follows from the images.

    Raises:
        ValueError: a setting of the loop is out of its range; `TokenizerConfig` checks those of the network.
    """

    data: str = field(default="glyphs", metadata=PATH)
    data_root: str | None = field(default=None, metadata=CHANGEABLE)
    image_size: tuple[int, int] | None = None  # height, width; None takes the source's own
    channels: int | None = None  # 1 or 3; None takes the source's own
    steps: int = field(default=1500, metadata=CHANGEABLE)
    batch_size: int = 32  # of a step, over all processes
    lr: float = 3e-3
    seed: int = 0
    precision: str = field(default="auto", metadata=CHANGEABLE)
    optimizer: str = "muon"
    accumulate: int = field(default=1, metadata=CHANGEABLE)  # parts that a batch is computed in
    compile: bool | None = field(default=None, metadata=CHANGEABLE)  # None: if it makes a long run faster
    sharp: bool = field(default=False, metadata=CHANGEABLE)  # whether a sharp decoder is trained as the last phase
    num_codes: int = 512
    code_dim: int = 8
    downsample: int = 4
    hidden_channels: int = 128
    num_residual_layers: int = 4
    residual_channels: int = 32
    codebook_update: str = "ema"
    commitment_weight: float = 1.0  # above the paper's 0.25: the lower error and the higher perplexity
    bottleneck: str = "vq"
    likelihood: str = "gaussian"
    kl_weight: float = None  # type: ignore[assignment]  # becomes 0.1, or 1 for bernoulli, as in `TokenizerConfig`

    def __post_init__(self) -> None:
        if self.kl_weight is None:
            object.__setattr__(self, "kl_weight", 1.0 if self.likelihood == "bernoulli" else 0.1)
        check_shared(self)
        if self.image_size and not all(1 <= side <= LARGEST_SIDE for side in self.image_size):
            raise ValueError(f"image_size: expected sides from 1 to {LARGEST_SIDE:,} pixels, got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    """Holds what a user can choose about stage two; the rest of `PriorConfig` follows from the codes.

    Raises:
        ValueError: a setting of the loop is out of its range; `PriorConfig` checks those of the network.
    """

    codes: str | list[str] | tuple[str, ...] | None = field(
        default=None, metadata=PATH
    )  # None: of the tokenizer's own images
    tokenizer: str | None = field(default=None, metadata=CHANGEABLE)  # its fingerprint is what must stay
    steps: int = field(default=2000, metadata=CHANGEABLE)
    batch_size: int = 32  # of a step, over all processes
    lr: float = 6e-3
    seed: int = 0
    precision: str = field(default="auto", metadata=CHANGEABLE)
    optimizer: str = "muon"
    accumulate: int = field(default=1, metadata=CHANGEABLE)  # parts that a batch is computed in
    compile: bool | None = field(default=None, metadata=CHANGEABLE)  # None: if it makes a long run faster
    channels: int = 64
    num_layers: int = 6
    kernel_size: int = 3
    attention_every: int | None = None  # None: ATTENTION_EVERY for up to MOST_ATTENDED codes and enough layers, else 0
    dropout: float = 0.1
    label_dropout: float | None = None  # None becomes LABEL_DROPOUT where every grid has a label, and 0 elsewhere

    def __post_init__(self) -> None:
        check_shared(self)


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """Holds what a user can choose about the training of a sharp decoder.

    Raises:
        ValueError: a setting is out of its range.
    """

    data: str | None = field(default=None, metadata=PATH)  # None: what the tokenizer was trained on
    data_root: str | None = field(default=None, metadata=CHANGEABLE)
    steps: int | None = field(default=None, metadata=CHANGEABLE)  # None: SHARPENING_SHARE of the tokenizer's
    batch_size: int = 32  # of a step, over all processes
    lr: float = 1e-3
    seed: int = 0
    precision: str = field(default="auto", metadata=CHANGEABLE)
    optimizer: str = "muon"
    accumulate: int = field(default=1, metadata=CHANGEABLE)  # parts that a batch is computed in

    def __post_init__(self) -> None:
        check_shared(self)


LARGE_TOKENIZER = TokenizerSettings(num_residual_layers=6, residual_channels=64)  # the lower error, at half the speed
LARGE_PRIOR = PriorSettings(channels=96, dropout=0.2)  # meant for an hour and more, and not measured to the end
