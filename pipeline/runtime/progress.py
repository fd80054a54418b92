"""Progress on standard error: one kind of bar for everything that takes long."""

import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Progress: TypeAlias = "tqdm[Any]"

SECONDS_ON_A_TERMINAL, SECONDS_IN_A_FILE = 0.1, 15.0  # between two updates of a bar; a log file needs few


def progress_bar(total: int, description: str | None, unit: str = "image", **options: Any) -> Progress:
    """Return a bar that counts to `total`, to be used in `with`, which ends its line; `options` are those of tqdm."""
    seconds = SECONDS_ON_A_TERMINAL if sys.stderr.isatty() else SECONDS_IN_A_FILE
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, mininterval=seconds, **options)


def with_progress(
    items: Iterable[Item],
    total: int,
    description: str,
    unit: str = "image",
    *,
    size: Callable[[Item], int] = lambda item: 1,
    **options: Any,
) -> Generator[Item, None, None]:
    """Yield `items`, with a bar that counts each once the caller is done with it.

    Args:
        items: what is yielded.
        total: the sum of the sizes of all items.
        description: what is done, shown before the bar.
        unit: what the bar counts.
        size: returns the size of an item, in that unit.
        options: those of tqdm.
    """
    with progress_bar(total, description, unit, **options) as bar:
        for item in items:
            yield item
            bar.update(size(item))
