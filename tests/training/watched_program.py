"""The program, for a test: it saves after every step, and does what a test asks for in a step of a process.

    python watched_program.py ACTIONS ARGUMENT ...

ACTIONS is JSON, a list of [attempt, rank, step, action]: in this attempt of torchrun, in the process of this rank,
while the losses of this step (from 1) are computed. An action is "kill" (SIGKILL), "int" or "term" (to the process that
torchrun is), "raise" (an error of this process alone), or "nan" (losses that are not finite).
"""

import json
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor

from cli import main
from pipeline.errors import InputError
from pipeline.training import loop
from pipeline.training.decoder_stage import DecoderStage
from pipeline.training.prior_stage import PriorStage
from pipeline.training.tokenizer_stage import TokenizerStage

actions = json.loads(sys.argv[1])
loop.SAVE_EVERY_SECONDS = 0.0
step = 0


def act() -> str | None:
    """Do what is asked for in this step; return the action, if there is one."""
    here = [int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), int(os.environ.get("RANK", "0")), step]
    for *place, action in actions:
        if place != here:
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action in ("int", "term"):
            os.kill(os.getppid(), {"int": signal.SIGINT, "term": signal.SIGTERM}[action])
        if action == "raise":
            raise InputError(expected="no error", got="one in this process alone", do="see whose line is printed")
        return str(action)
    return None


real_step = loop._Trainer._step


def counted(self: Any, rate: float) -> dict[str, Tensor]:
    global step
    step = self.step + 1
    return real_step(self, rate)


loop._Trainer._step = counted  # type: ignore[method-assign]
for stage in (TokenizerStage, PriorStage, DecoderStage):

    def losses(self: Any, batch: Any, real: Any = stage.losses) -> dict[str, Tensor]:
        found: dict[str, Tensor] = real(self, batch)
        if act() == "nan":
            found["loss"] = found["loss"] * torch.nan
        return found

    stage.losses = losses  # type: ignore[method-assign]

main(sys.argv[2:])
