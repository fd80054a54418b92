"""Whether a code data set and a tokenizer belong together."""

from ..errors import InputError
from ..models.checkpoint import check_same_tokenizer
from ..models.loading import TrainedTokenizer
from .dataset import CodeDataset


def check_made_by(codes: CodeDataset, tokenizer: TrainedTokenizer, do: str) -> None:
    """Raise InputError, with the remedy `do`, unless the tokenizer made the codes: it knows each, and has such grids.

    The fingerprint alone does not tell: a stranger's manifest may name any.
    """
    manifest, known = codes.manifest, tokenizer.model.config.num_codes
    (height, width), (found_height, found_width) = tokenizer.grid, manifest.grid
    what = f"codes in {codes.location}"
    check_same_tokenizer(tokenizer.info.fingerprint, manifest.tokenizer_fingerprint, what, do)
    if manifest.num_codes != known:
        raise InputError(expected=f"{what} out of {known}, as the tokenizer has", got=f"{manifest.num_codes}", do=do)
    if tokenizer.grid != manifest.grid:
        raise InputError(
            expected=f"{what} in grids of {height}x{width}, as the tokenizer has",
            got=f"{found_height}x{found_width}",
            do=do,
        )
