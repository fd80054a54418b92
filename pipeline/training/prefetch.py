"""The tensors of coming steps, loaded by a thread and on their way to the device while the present step computes.

The thread loads a few steps ahead. On CUDA it also pins what it loaded and copies it on a stream of its own, so that
neither the host nor the device waits for a copy. Every step gets what `load` returns for it, bit for bit, however far
ahead that is done.

On the CPU a thread takes from the step as much as it saves: there, steps are loaded when they are asked for.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

AHEAD = 2  # steps that are loaded before they are asked for, where the device is not the CPU
PATIENCE = 1.0  # seconds that `close` waits for a step that is being loaded

Load = Callable[[int], tuple[Tensor, ...]]  # step -> its tensors on the CPU; a function of the step alone


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What the thread has made of a step."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None = None  # when their copies to CUDA are done; None if they are still on the CPU


class Prefetcher:
    """Returns the tensors of each step on the device, as a rule without waiting for them, within `with`.

    Args:
        load: returns the tensors of a step on the CPU, the same whenever it is called; called from another thread.
        device: where `get` returns them.
        first: the step that is asked for first.
        last: the end of the run: steps are below it.
        ahead: steps to load before they are asked for; 0 loads each when it is asked for, without a thread. By default
            0 on the CPU and AHEAD elsewhere.

    Attributes:
        waited: seconds that `get` has taken so far.

    Raises:
        ValueError: `ahead` is negative.
    """

    def __init__(self, load: Load, device: torch.device, *, first: int, last: int, ahead: int | None = None) -> None:
        if ahead is not None and ahead < 0:
            raise ValueError(f"ahead: expected 0 or more steps, got {ahead}")
        self.waited = 0.0
        self._load, self._device, self._last = load, device, last
        self._ahead = (0 if device.type == "cpu" else AHEAD) if ahead is None else ahead
        self._next = first  # the first step that the thread has not been asked for
        self._coming: deque[tuple[int, Future[_Loaded]]] = deque()  # the steps that it has been asked for, in order
        self._requests: SimpleQueue[tuple[int, Future[_Loaded]] | None] = SimpleQueue()
        self._closed = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._ahead else None
        self._thread = self._start_thread() if self._ahead else None
        self._request()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, step: int) -> tuple[Tensor, ...]:
        """Return the tensors of a step on the device; quickest if it is the step after the last one.

        Raises:
            ValueError: the step is not below `last`, or the prefetcher is closed.
            Exception: whatever `load` raised for this step; the next call loads it again.
        """
        start = time.perf_counter()
        try:
            if self._closed or step >= self._last:
                raise ValueError(f"step: expected one below {self._last} before `close`, got {step}")
            return self._on_device(self._loaded(step))
        finally:
            self.waited += time.perf_counter() - start

    def seek(self, step: int) -> None:
        """Forget what is loaded, and load from `step` on, as after a rollback."""
        self._forget()
        self._next = step
        self._request()

    def close(self) -> None:
        """Stop the thread. If it does not finish its step within PATIENCE, it ends by itself after that step."""
        self._forget()
        if self._thread is not None and not self._closed:
            self._requests.put(None)
            self._thread.join(PATIENCE)
        self._closed = True

    def _loaded(self, step: int) -> _Loaded:
        """Return what was loaded of a step, once it is."""
        if self._thread is None:
            return _Loaded(tensors=self._load(step))
        if not self._coming or self._coming[0][0] != step:
            self.seek(step)
        _, future = self._coming.popleft()
        self._request()
        return future.result()

    def _request(self) -> None:
        """Ask the thread for the next steps, until it has `ahead` of them."""
        while not self._closed and len(self._coming) < self._ahead and self._next < self._last:
            request = (self._next, Future[_Loaded]())
            self._coming.append(request)
            self._requests.put(request)
            self._next += 1

    def _forget(self) -> None:
        """Cancel what was asked for; of a step that is being loaded, the result is dropped."""
        for _, future in self._coming:
            future.cancel()
        self._coming.clear()

    def _on_device(self, loaded: _Loaded) -> tuple[Tensor, ...]:
        """Return the tensors on the device, ready for its present stream."""
        if loaded.copied is None:
            return tuple(tensor.to(self._device) for tensor in loaded.tensors)
        present = torch.cuda.current_stream(self._device)
        present.wait_event(loaded.copied)
        for tensor in loaded.tensors:
            tensor.record_stream(present)  # or the memory could be used again while this stream still reads it
        return loaded.tensors

    def _start_thread(self) -> threading.Thread:
        """Start the thread; a daemon, so that one which never gets its data does not keep the program from ending."""
        ready = threading.Event()
        thread = threading.Thread(target=self._work, args=(ready,), name="prefetch", daemon=True)
        thread.start()
        ready.wait()
        # What the thread has set is also what threads begin with that start from now on.
        torch.set_num_threads(torch.get_num_threads())
        return thread

    def _work(self, ready: threading.Event) -> None:
        """Load what is asked for, in order, until None is."""
        torch.set_num_threads(1)  # of this thread: the others are for the steps
        torch.get_num_threads()  # the first call would take over the number that `_start_thread` sets for later threads
        ready.set()
        while (request := self._requests.get()) is not None:
            step, future = request
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._load_ahead(step))
                except BaseException as error:  # whatever it is, `get` raises it, in the thread of the training
                    future.set_exception(error)
            del future, request  # or the tensors would live until the next step is loaded

    def _load_ahead(self, step: int) -> _Loaded:
        """Load a step and, on CUDA, start its copy to the device, which goes on while thread and device work."""
        tensors = self._load(step)
        if self._stream is None:
            return _Loaded(tensors=tensors)
        with torch.cuda.stream(self._stream):
            # The memory that `pin_memory` takes is not given away before the copies out of it are done.
            tensors = tuple(tensor.pin_memory().to(self._stream.device, non_blocking=True) for tensor in tensors)
            return _Loaded(tensors=tensors, copied=self._stream.record_event())
