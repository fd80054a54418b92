"""Pillow's warnings while it reads files that may be damaged, or made to do damage."""

import threading
import warnings
from types import TracebackType

from PIL import Image


class PillowWarnings:
    """Within `with`, in any thread, a decompression bomb is an error, and other warnings of Pillow are not shown.

    `warnings.catch_warnings` is made for one thread. So the first thread that enters sets the filters, and the last one
    that leaves restores them; no thread waits for another one's file.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            self._inside += 1

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.__exit__(None, None, None)
