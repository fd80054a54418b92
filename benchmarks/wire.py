"""What the processes of a training exchange in a step, in bytes, from the sizes of the models."""

from dataclasses import dataclass

from torch import nn

from pipeline.images.glyph_drawing import CLASS_NAMES
from pipeline.training.recipes import LARGE_PRIOR, LARGE_TOKENIZER, PriorSettings, TokenizerSettings
from pipeline.training.train_prior import network_config
from prior import GatedPixelCNN
from tokenizer import VQVAE, TokenizerConfig
from tokenizer.discriminator import Discriminator

GBIT = 1e9 / 8  # bytes a second
AGREEMENT = 64  # bytes: four numbers, each with a flag, in float64 (`SharedSteps.agree`)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What a step of a stage exchanges, in bytes that are added up over the processes (all-reduced)."""

    name: str
    gradients: int  # float32
    statistics: int = 0  # of the codebook, or of the balance of a decoder's losses, float64
    agreement: int = AGREEMENT

    @property
    def visible(self) -> int:
        """Those that cannot travel while gradients are computed."""
        return self.statistics + self.agreement

    @property
    def total(self) -> int:
        return self.gradients + self.visible


def share(size: int, processes: int, gigabits: float, seconds: float) -> float:
    """Return the share of a step's time that `size` bytes take on a ring, where computing takes so many `seconds`."""
    sending = on_a_ring(size, processes) / (gigabits * GBIT)
    return sending / (sending + seconds)


def on_a_ring(size: int, processes: int) -> float:
    """Return the bytes that each process sends, and receives, to add up `size` bytes over all."""
    return 2 * (processes - 1) / processes * size


def wires() -> list[Wire]:
    """Return the stages with the default settings and with those of the large recipes, for the built-in glyphs."""
    return [
        _tokenizer_wire("tokenizer", TokenizerSettings()),
        _decoder_wire(),
        _prior_wire("prior", PriorSettings()),
        _tokenizer_wire("tokenizer, large", LARGE_TOKENIZER),
        _prior_wire("prior, large", LARGE_PRIOR),
    ]


def _tokenizer_config(settings: TokenizerSettings) -> TokenizerConfig:
    names = ("num_codes", "code_dim", "hidden_channels", "num_residual_layers", "residual_channels", "downsample")
    return TokenizerConfig(in_channels=3, **{name: getattr(settings, name) for name in names})


def _tokenizer_wire(name: str, settings: TokenizerSettings) -> Wire:
    config = _tokenizer_config(settings)
    return Wire(
        name=name, gradients=4 * parameters(VQVAE(config)), statistics=8 * config.num_codes * (config.code_dim + 1)
    )


def _decoder_wire() -> Wire:
    config = _tokenizer_config(TokenizerSettings())
    decoder = VQVAE(config).decoder
    balance = 8 * (2 * decoder.last_layer.numel() + 1)
    return Wire(
        name="decoder", gradients=4 * (parameters(decoder) + parameters(Discriminator(config))), statistics=balance
    )


def _prior_wire(name: str, settings: PriorSettings) -> Wire:
    config = network_config(settings, num_codes=512, num_classes=len(CLASS_NAMES), grid=(8, 8))
    return Wire(name=name, gradients=4 * parameters(GatedPixelCNN(config)))


def parameters(model: nn.Module) -> int:
    """Return how many numbers of a model are learned by gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
