"""Runs on two processes under torchrun, one of which is killed at a random moment; torchrun starts both again.

Right is: the run ends by itself, with the bytes of a run on two processes that nothing disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import workspace as of
from .program import Ended
from .verdicts import Tally, Verdict, run_cases
from .workspace import Command, Workspace, done, is_saved, longer

ROOT = Path(__file__).parents[2]
PROCESSES = 2
PROGRAM = """
import sys
import pipeline.training.loop as loop
loop.SAVE_EVERY_SECONDS = 0.1
import cli
cli.main(sys.argv[1:])
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "--max-restarts", "1"]
LINE = [sys.executable, "-m", *TORCHRUN, "--no-python", "--", sys.executable, "-c", PROGRAM]
EARLIEST, LATEST = 0.3, 0.8  # of an undisturbed run, the time of a kill: much of it is imports
HANG = 300.0  # seconds after which a run counts as one that never ends
COMMANDS = tuple(
    longer(command, "--steps", "400") for command in (of.TRAIN_TOKENIZER, of.TRAIN_DECODER, of.TRAIN_PRIOR)
)


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run that nothing disturbed."""

    result: dict[str, str]
    seconds: float


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Kill a process of n runs, as many of each training command."""
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:
        for number, command in enumerate(COMMANDS):
            copy = workspace.copy(Path(folder) / f"{command.name}-undisturbed")
            begin = time.monotonic()
            ended = done(_wait(_start(copy, command), command))
            undisturbed = Undisturbed(result=copy.result(command, ended), seconds=time.monotonic() - begin)

            def one(case: int, command: Command = command, undisturbed: Undisturbed = undisturbed) -> Verdict:
                name = f"process kills {seed} {command.name} {case}"
                with tempfile.TemporaryDirectory(dir=folder) as at:
                    return _kill_one(workspace.copy(Path(at) / "copy"), command, undisturbed, name)

            cases = range(len(range(number, n, len(COMMANDS))))
            for verdict in run_cases(one, cases, max(1, jobs // PROCESSES)):
                tally.add(verdict)


def _kill_one(workspace: Workspace, command: Command, undisturbed: Undisturbed, name: str) -> Verdict:
    """Run a command, kill one of its processes at a random moment, and judge what came of it."""
    chance = random.Random(name)
    torchrun = _start(workspace, command)
    outcome = "it had ended before the kill"
    try:
        torchrun.wait(chance.uniform(EARLIEST, LATEST) * undisturbed.seconds)
    except subprocess.TimeoutExpired:
        if _kill(torchrun.pid, rank=chance.randrange(PROCESSES)):
            saved = is_saved(workspace.folder / command.result)
            outcome = f"the same bytes, {'from a save' if saved else 'from the beginning, as nothing was saved'}"
    ended = _wait(torchrun, command)
    wrong = ended.hung or ended.status != 0 or workspace.result(command, ended) != undisturbed.result
    if wrong:
        outcome = "it does not end" if ended.hung else "it fails" if ended.status else "other bytes"
    detail = ended.shown() if wrong else ""
    what = f"{command.name}, one of {PROCESSES} processes"
    return Verdict(part="processes", what=what, outcome=outcome, wrong=wrong, case=name, detail=detail)


def _start(workspace: Workspace, command: Command) -> "subprocess.Popen[str]":
    """Start a command on several processes."""
    surroundings = workspace.surroundings()
    environment = {**os.environ, **surroundings.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*LINE, *workspace.line(command)],
        cwd=surroundings.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait(torchrun: "subprocess.Popen[str]", command: Command) -> Ended:
    """Wait until torchrun ends; end it and its processes after HANG seconds."""
    hung = False
    try:
        printed, _ = torchrun.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(torchrun.pid, signal.SIGKILL)
        printed, _ = torchrun.communicate()
    return Ended(command.arguments, torchrun.returncode, "", printed, hung)


def _kill(torchrun: int, rank: int) -> bool:
    """Kill the process of this rank; return whether there was one."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children")
    for pid in children.read_text().split() if children.exists() else []:
        with suppress(OSError):
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                os.kill(int(pid), signal.SIGKILL)
                return True
    return False
