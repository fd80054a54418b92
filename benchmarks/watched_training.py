"""The program under watch, for `benchmarks.scale`: each process writes a line of JSON after each step and each save.

    torchrun ... -m benchmarks.watched_training WATCH ARGUMENT ...

WATCH is JSON, the fields of `Watch`; the arguments are those of the command line. Linux only.
"""

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import tokenizer.processes
from cli import main
from pipeline.training import loop
from pipeline.training.shared_steps import SharedSteps
from tokenizer.quantizer import VectorQuantizer

BEGAN = time.time()
TCP_INFO, BYTES_SENT = 11, 200  # of Linux: the option of a socket, and where in its answer the bytes are that it sent
RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is watched, and what is done to the program."""

    folder: str  # for the reports, "rank-0.jsonl" and so on
    states: Sequence[int] = ()  # steps after which process 0 stores the weights in the folder, "after-10.safetensors"
    kill_after: int | None = None  # steps, after which the last process is killed, in the first attempt
    save_every: float = loop.SAVE_EVERY_SECONDS
    local_codebook: bool = False  # each process updates and revives its codebook by its own vectors alone: wrong


def bytes_sent() -> int:
    """Return how many bytes all TCP connections of this process have sent, without the headers of their packets."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is closed already, or not of TCP
            if file.readlink().name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(file.name))) as connection:
                    answer = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
                total += struct.unpack_from("<Q", answer, BYTES_SENT)[0]
    return total


def install(watch: Watch) -> None:
    """Let the training loop report, and be disturbed, as `watch` says."""
    loop.SAVE_EVERY_SECONDS = watch.save_every
    report = (Path(watch.folder) / f"rank-{RANK}.jsonl").open("a", buffering=1)
    step_of, save_of = loop._Trainer._step, loop._Trainer.save

    def write(**values: Any) -> None:
        report.write(json.dumps({"attempt": ATTEMPT, "time": time.time(), **values}) + "\n")

    def step(self: Any, rate: float) -> dict[str, Tensor]:
        before, began = bytes_sent(), time.perf_counter()
        losses: dict[str, Tensor] = step_of(self, rate)
        seconds = time.perf_counter() - began
        write(step=self.step, seconds=seconds, sent=bytes_sent() - before, loss=losses["loss"].item())
        if RANK == 0 and self.step in watch.states:
            _store(self.stage.model.state_dict(), Path(watch.folder) / f"after-{self.step}.safetensors")
        if self.step == watch.kill_after and ATTEMPT == 0 and int(os.environ["WORLD_SIZE"]) - 1 == RANK:
            write(killed=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    def save(self: Any) -> None:
        began = time.perf_counter()
        save_of(self)
        write(saved=self.step, seconds=time.perf_counter() - began)

    loop._Trainer._step, loop._Trainer.save = step, save  # type: ignore[method-assign]
    if watch.local_codebook:
        _make_codebook_local()
    write(began=BEGAN)


def _make_codebook_local() -> None:
    """Let each process update its codebook as if it were alone, after the same start."""
    update_of = VectorQuantizer.update

    def update(self: VectorQuantizer) -> None:
        count, tokenizer.processes.count_of_processes = tokenizer.processes.count_of_processes, lambda: 1
        try:
            update_of(self)
        finally:
            tokenizer.processes.count_of_processes = count

    VectorQuantizer.update = update  # type: ignore[method-assign]
    SharedSteps.check_equal = lambda self, stage, step: None  # type: ignore[method-assign]


def _store(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Store a copy of tensors."""
    safetensors.torch.save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    install(Watch(**json.loads(sys.argv[1])))
    main(sys.argv[2:])
