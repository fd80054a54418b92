"""Two decoders for the codes of one tokenizer, the plain and the sharp one, and where a folder keeps the sharp one.

The plain decoder is trained together with the encoder, on squared error, and draws the mean of what the codes leave
open: blur. The sharp one is trained later by train-decoder, on the same codes, and draws likely detail instead. It is a
checkpoint of its own inside the folder of the tokenizer:

    TOKENIZER/model.safetensors          encoder, codebook and plain decoder; codes and priors name their fingerprint
    TOKENIZER/decoder/model.safetensors  the sharp decoder alone
    TOKENIZER/decoder/config.json        its fingerprint, that of the tokenizer, and a TokenizerConfig to build it from

That config has the tokenizer's `in_channels`, `code_dim` and `downsample`; its widths may be others.
"""

import os
from pathlib import Path
from typing import Literal, get_args

from tokenizer import TokenizerConfig
from tokenizer.networks import Decoder

from ..errors import InputError
from ..runtime.atomic_files import COMMIT
from ..runtime.untrusted_files import unreadable
from .checkpoint import CONFIG, MODEL, PREVIOUS, CheckpointInfo, check_same_tokenizer, read_info
from .restore import parse_config, restore

DecoderName = Literal["plain", "sharp"]
DecoderChoice = Literal["auto", "plain", "sharp"]

FOLDER = "decoder"  # in that of the tokenizer
INVENTS_DETAIL = (
    "the sharp decoder invents likely detail where the codes leave it open, which costs a little error and PSNR; "
    "--decoder plain invents none"
)


def check_choice(decoder: str) -> None:
    """Raise ValueError unless this is a DecoderChoice."""
    if decoder not in get_args(DecoderChoice):
        raise ValueError(f"decoder: expected 'auto', 'plain' or 'sharp', got {decoder!r}")


def decoder_folder(tokenizer_folder: Path) -> Path:
    """Return the folder of the sharp decoder of a tokenizer."""
    return tokenizer_folder / FOLDER


def has_sharp_decoder(tokenizer_folder: Path) -> bool:
    """Return whether the folder of a tokenizer has a sharp decoder, which may be of another tokenizer.

    One that cannot be read is none; nor is the plain one, which is there as long as no other was better (step 0).
    """
    try:
        folder = find_sharp_decoder(tokenizer_folder)
        return folder is not None and read_info(folder, "decoder").step > 0
    except InputError:
        return False


def find_sharp_decoder(tokenizer_folder: Path, *, required: bool = False) -> Path | None:
    """Return the folder of the sharp decoder of a tokenizer, None if nothing was ever saved there.

    A folder in which train-decoder has not saved yet is none. A link to a folder is followed. A file, or a link to
    nothing, is refused: whoever put it there would not expect to get the pictures of the plain decoder.

    Raises:
        InputError: what has its name is no folder, or may not be read; or there is none though it is `required`.
    """
    folder = decoder_folder(tokenizer_folder)
    try:
        names = set(os.listdir(folder))
    except PermissionError as error:
        raise unreadable(folder, error) from None
    except OSError:
        if os.path.lexists(folder):
            raise InputError(
                expected=f"a folder that train-decoder wrote as {folder}",
                got="a link that leads nowhere" if folder.is_symlink() and not folder.exists() else "no folder",
                do="move it away, or use --decoder plain",
            ) from None
        names = set()
    if names & {CONFIG, MODEL, COMMIT, PREVIOUS}:
        return folder
    if required:
        raise InputError(
            expected=f"a sharp decoder in {folder}", got="none", do="run train-decoder, or omit --decoder sharp"
        )
    return None


def load_sharp_decoder(
    tokenizer_folder: Path, config: TokenizerConfig, info: CheckpointInfo
) -> tuple[Decoder, CheckpointInfo]:
    """Load the sharp decoder of a tokenizer: in `eval()` mode on the CPU.

    If its last save is damaged, the one before it is read, with a warning.

    Args:
        tokenizer_folder: in which it is.
        config: of the tokenizer.
        info: of the tokenizer that was loaded from there.

    Raises:
        InputError: there is no intact checkpoint of a decoder, or it decodes the codes of another tokenizer.
    """
    folder = decoder_folder(tokenizer_folder)
    try:
        network, found = restore(folder, "decoder", TokenizerConfig, Decoder)
    except InputError as error:
        raise InputError(expected=error.expected, got=error.got, do=f"{error.do}, or use --decoder plain") from None
    remedy = "run train-decoder again, or use --decoder plain"
    check_same_tokenizer(info.fingerprint, found.tokenizer_fingerprint, f"a decoder in {folder}", remedy)
    wanted, got = _takes(config, info), _takes(parse_config(TokenizerConfig, found), found)
    if wanted != got:
        raise InputError(expected=f"a decoder in {folder} {wanted}, as the tokenizer has", got=f"one {got}", do=remedy)
    return network, found


def _takes(config: TokenizerConfig, info: CheckpointInfo) -> str:
    """Return in words what a decoder decodes, and into what."""
    images = "{height}x{width}x{channels}".format(**info.preprocessing)
    return f"of codes of {config.code_dim} dimensions and {config.downsample} pixels a side, for images of {images}"
