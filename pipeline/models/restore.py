"""From the files of a checkpoint to a network with exactly these weights, whoever wrote them.

Nothing is allocated by what a config says before the file of the weights is known to be of that size, and a network is
compared with the file in the names, shapes and types of all its tensors before that file is read.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prior import PriorConfig
from tokenizer import TokenizerConfig

from ..errors import InputError
from ..images.preprocessing import Preprocessing
from ..runtime.schema import from_json, short
from .checkpoint import MODEL, TRAIN_COMMAND, CheckpointInfo, read_checkpoint
from .tensor_file import Outline, check_finite, check_outlines, outlines_of, parse_tensors

LARGEST_SIDE = 2**14  # pixels of an image that a tokenizer takes
UNUSED_SIZE = 2**16  # that a config may name beyond its weights: a model without codes has a number of codes

Config = TypeVar("Config", TokenizerConfig, PriorConfig)
Model = TypeVar("Model", bound=nn.Module)


def restore(
    folder: Path, kind: str, config_type: type[Config], build: Callable[[Config], Model]
) -> tuple[Model, CheckpointInfo]:
    """Load a checkpoint of this kind: the network in `eval()` mode on the CPU, and its info.

    Args:
        folder: of the checkpoint.
        kind: "tokenizer", "decoder" or "prior".
        config_type: of the `config` in its `config.json`.
        build: makes the network, whose `state_dict()` the weights are.

    Raises:
        InputError: there is no intact checkpoint of this kind, or it is of no such network, or of NaN or infinity.
    """
    info, data = read_checkpoint(folder, kind, partial(check_network, config_type, build))
    try:
        weights = parse_tensors(data)
        check_finite(weights)
        model = build(parse_config(config_type, info))
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise no_network(folder, kind, error) from None
    return model.eval(), info


def no_network(folder: Path, kind: str, error: Exception) -> InputError:
    """Return the error for a checkpoint whose files are intact, and which is no model."""
    return InputError(
        expected=f"the weights of a {kind} in {folder / MODEL}",
        got=" ".join(str(error).split()) or type(error).__name__,
        do=f"restore the folder from a copy, or run {TRAIN_COMMAND[kind]} again",
    )


def check_network(
    config_type: type[Config],
    build: Callable[[Config], nn.Module],
    info: CheckpointInfo,
    found: Mapping[str, Outline],
) -> None:
    """Raise ValueError unless the config is of a model whose weights have these shapes and types.

    The model that they are compared with has no memory.
    """
    config = parse_config(config_type, info)
    _check_sizes(config, found, unused={"num_codes"} if info.kind == "decoder" else set())  # which has no codebook
    try:
        with torch.device("meta"), _WithoutNumbers():
            expected = build(config).state_dict()
    except RuntimeError as error:  # a size beyond all numbers
        raise ValueError(f"a config of no network ({error})") from None
    check_outlines(outlines_of(expected), found)


class _WithoutNumbers(TorchFunctionMode):
    """Draws no numbers for the parameters of a model: on the meta device there are none.

    There, to draw some would import torch's compiler, which takes a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def parse_config(config_type: type[Config], info: CheckpointInfo) -> Config:
    """Return the configuration of the model. Raise ValueError if it is none, or does not fit the rest of the info."""
    unknown = sorted(info.config.keys() - {item.name for item in fields(config_type)})
    if unknown:
        raise ValueError(f"the unknown field {short(unknown[0])} in its config")
    config, size = from_json(config_type, info.config, "config"), _parse_size(info.preprocessing)
    if isinstance(config, TokenizerConfig):
        if config.in_channels != size.channels or size.height % config.downsample or size.width % config.downsample:
            raise ValueError(f"a network that does not take images of {size.height}x{size.width}x{size.channels}")
    elif config.num_classes != len(info.class_names):
        raise ValueError(f"{short(config.num_classes)} classes with {len(info.class_names)} names")
    return config


def _parse_size(preprocessing: Mapping[str, int]) -> Preprocessing:
    """Return the form of the images. Raise ValueError if there is no such form."""
    try:
        size = from_json(Preprocessing, preprocessing, "preprocessing")
    except InputError as error:
        raise ValueError(f"{short(error.got)} in place of {error.expected}") from None
    if max(size.height, size.width) > LARGEST_SIDE:
        raise ValueError(f"images of {short(size.height)}x{short(size.width)} pixels, more than {LARGEST_SIDE} a side")
    return size


def _check_sizes(config: TokenizerConfig | PriorConfig, found: Mapping[str, Outline], *, unused: Set[str]) -> None:
    """Raise ValueError if the config has a size, other than the `unused` ones, that exceeds all that the file holds."""
    tensors, numbers = len(found), sum(outline.count for outline in found.values())
    for name, value in vars(config).items():
        most = tensors if name.endswith("_layers") else max(numbers, UNUSED_SIZE)
        if type(value) is int and value > most and name not in unused:
            raise ValueError(
                f"a config of {short(value)} {name}, and weights of {tensors} tensors, {short(numbers)} numbers"
            )
