"""Runs that are killed or asked to stop at random moments, and started again until they are done.

After each SIGKILL the folder is usable, or what reads it says in one line that nothing is there yet. A signal that asks
to stop ends a run with its status and without a traceback. In the end the result is, byte for byte, that of a run that
nothing disturbed.
"""

import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import workspace as of
from .program import Ended, Program, run
from .verdicts import Tally, Verdict, run_cases
from .workspace import Command, Workspace, done, is_saved, longer

PER_RUN = 4  # kills at most, before a run is left to end
SAVE_EVERY = 0.02  # seconds
EARLIEST = 0.01  # seconds after its start that a run is stopped
CLOSED, TWICE = "closed pipe", "SIGINT twice"
STATUS = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130, TWICE: 130, CLOSED: 141}  # of a run that was asked to stop
BY_ITSELF = {"SIGTERM": -15, "SIGHUP": -1}  # of a command that has nothing to save, or not yet
PAUSE = 0.02  # seconds between two Ctrl-C


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is killed, how it is started again, and what reads what is left."""

    command: Command
    again: tuple[str, ...]  # added to start it again
    reader: Command | None  # None where nothing but the command itself reads what is left
    share: float  # of the kills


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A run that nothing disturbed."""

    result: dict[str, str]
    seconds: float


STAGES = (
    Stage(
        command=longer(of.TRAIN_TOKENIZER, "--steps", "40"),
        again=("--resume",),
        reader=of.command("evaluate --tokenizer new/tokenizer", *of.CPU),
        share=0.3,
    ),
    Stage(
        command=longer(of.TRAIN_DECODER, "--steps", "40"),
        again=("--resume",),
        reader=of.command("reconstruct --tokenizer new/sharp --n 1 --out new/one.png --force", *of.CPU),
        share=0.15,
    ),
    Stage(
        command=longer(of.TRAIN_PRIOR, "--steps", "40"),
        again=("--resume",),
        reader=of.command("sample --n 1 --tokenizer tokenizer --prior new/prior --out new/one --force", *of.CPU),
        share=0.2,
    ),
    Stage(
        command=longer(of.EXPORT, "--shard-size", "2"),
        again=(),
        reader=of.command("decode-codes new/codes --tokenizer tokenizer --n 1 --out new/one.npy --force", *of.CPU),
        share=0.2,
    ),
    Stage(command=longer(of.SAMPLE, "--n", "150"), again=("--force",), reader=None, share=0.1),
    Stage(command=of.DECODE, again=("--force",), reader=None, share=0.05),
)


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Kill n runs, ask a quarter as many to stop by the four signals, and close the pipe of some."""
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:
        for stage in STAGES:
            undisturbed = _undisturbed(workspace, stage, Path(folder))
            for way in ("SIGKILL", *STATUS):
                wanted = round(n * stage.share * (1 if way == "SIGKILL" else 0.25 / (len(STATUS) - 1)))
                _measure_stage(workspace, stage, way, undisturbed, Path(folder), tally, max(1, wanted), seed, jobs)


def _undisturbed(workspace: Workspace, stage: Stage, folder: Path) -> Undisturbed:
    """Return the second of two undisturbed runs: the first of a process reads more from the disk."""
    for number in range(2):
        copy = workspace.copy(folder / f"{stage.command.name}-undisturbed-{number}")
        begin = time.monotonic()
        ended = done(run(copy.line(stage.command), copy.surroundings(SAVE_EVERY)))
        found = Undisturbed(result=copy.result(stage.command, ended), seconds=time.monotonic() - begin)
    return found


def _measure_stage(
    workspace: Workspace,
    stage: Stage,
    way: str,
    undisturbed: Undisturbed,
    folder: Path,
    tally: Tally,
    wanted: int,
    seed: int,
    jobs: int,
) -> None:
    """Begin runs until as many were stopped as are wanted."""

    def one(number: int) -> list[Verdict]:
        name = f"kills {seed} {stage.command.name} {way} {number}"
        with tempfile.TemporaryDirectory(dir=folder) as at:
            copy = workspace.copy(Path(at) / "copy")
            return list(_stop_again_and_again(copy, stage, way, undisturbed, random.Random(name), name))

    first = tally.count("kills", _row(stage, way))
    stopped, begun = 0, 0
    while stopped < wanted and begun < 20 * wanted:
        runs = max(jobs, (wanted - stopped) // PER_RUN)
        for verdicts in run_cases(one, range(begun, begun + runs), jobs):
            for verdict in verdicts:
                tally.add(verdict)
        begun += runs
        stopped = tally.count("kills", _row(stage, way)) - first


def _stop_again_and_again(
    workspace: Workspace, stage: Stage, way: str, undisturbed: Undisturbed, random: random.Random, name: str
) -> Iterator[Verdict]:
    """Yield a verdict for each time that one run was stopped; a wrong result in the end is one for the last time."""
    verdicts: list[Verdict] = []
    history: list[str] = []
    surroundings = workspace.surroundings(SAVE_EVERY, pipe=way == CLOSED)
    while True:
        again = stage.again if history else ()
        program = Program(workspace.line(stage.command, *again), surroundings)
        stopped = len(verdicts) < PER_RUN and not program.ends_within(
            random.uniform(EARLIEST, 0.7 * undisturbed.seconds)
        )
        graceful = stopped and program.catches(signal.SIGTERM)
        if stopped:
            _stop(program, way)
        ended = program.wait()
        history.append(ended.shown())
        if not stopped or ended.status == 0:  # it was done before the signal came
            break
        outcome, wrong = _after_stop(workspace, stage, way, graceful, ended, history)
        verdicts.append(_verdict(stage, way, name, outcome, wrong, history))
        if wrong:
            yield from verdicts
            return
    right = ended.status == 0 and not ended.raw and workspace.result(stage.command, ended) == undisturbed.result
    if not right:
        outcome = "another result in the end" if ended.status == 0 else "it cannot be started again"
        verdicts[-1:] = [_verdict(stage, way, name, outcome, True, history)]
    yield from verdicts


def _stop(program: Program, way: str) -> None:
    """Kill a run, or ask it to stop."""
    if way == CLOSED:
        program.close_output()
        return
    program.signal(getattr(signal, way.split()[0]))
    if way == TWICE and not program.ends_within(PAUSE):
        program.signal(signal.SIGINT)


def _after_stop(
    workspace: Workspace, stage: Stage, way: str, graceful: bool, ended: Ended, history: list[str]
) -> tuple[str, bool]:
    """Return what was found after a run was stopped, and whether it is wrong; a reader's output goes into `history`.

    A `graceful` run is one that saves when it is asked to stop.
    """
    if ended.hung:
        return "it does not end", True
    if way != "SIGKILL":
        if ended.raw or ended.errors:
            return "it ends with an error", True
        if ended.status != STATUS[way] and (graceful or ended.status != BY_ITSELF.get(way)):
            return f"it ends with status {ended.status}", True
    if stage.reader is None:
        return "started again", False
    found = workspace.run(stage.reader)
    history.append(found.shown())
    if found.status == 0 and not found.raw:
        return "usable at once", False
    if found.status != 1 or found.raw or len(found.errors) != 1:
        return "reading what is left fails", True
    if is_saved(workspace.folder / stage.command.result):
        return "what was saved is refused", True
    return "nothing saved yet, which one line says", False


def _verdict(stage: Stage, way: str, name: str, outcome: str, wrong: bool, history: list[str]) -> Verdict:
    detail = "\n".join(history[-3:]) if wrong else ""
    return Verdict(part="kills", what=_row(stage, way), outcome=outcome, wrong=wrong, case=name, detail=detail)


def _row(stage: Stage, way: str) -> str:
    return f"{stage.command.name}, {way}"
