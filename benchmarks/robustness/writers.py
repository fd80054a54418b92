"""Two processes that write into one folder, the second started at a random moment of the first.

It is good if one of them ends with its result, byte for byte that of a run alone, and the other is refused in one line
that names the process of the first. After a SIGKILL of the first, a second one runs at once.
"""

import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from . import workspace as of
from .program import Ended, Program
from .verdicts import Tally, Verdict, run_cases
from .workspace import Command, Workspace, done, longer

EARLIEST, LATEST = 0.0, 0.4  # share of the time of a run alone after which the second starts


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A command that is started twice."""

    name: str
    command: Command  # long enough that the second finds the first at work
    second: tuple[str, ...]  # added for the second, which without it is refused for the files that it finds


_TOKENIZER, _PRIOR = (longer(command, "--steps", "60") for command in (of.TRAIN_TOKENIZER, of.TRAIN_PRIOR))
_EXPORT = longer(of.EXPORT, "--shard-size", "1")
PAIRS = (
    Pair(name="train-tokenizer, then --resume", command=_TOKENIZER, second=("--resume",)),
    Pair(name="train-tokenizer, then --force", command=_TOKENIZER, second=("--force",)),
    Pair(name="train-prior, then --resume", command=_PRIOR, second=("--resume",)),
    Pair(name="train-prior, then --force", command=_PRIOR, second=("--force",)),
    Pair(name="export-codes, twice", command=_EXPORT, second=()),
    Pair(name="export-codes, then --force", command=_EXPORT, second=("--force",)),
    Pair(name="sample, then --force", command=longer(of.SAMPLE, "--n", "300"), second=("--force",)),
    Pair(
        name="complete, then --force",
        command=longer(of.COMPLETE, "--n", "16", "--candidates", "400"),
        second=("--force",),
    ),
    Pair(name="decode-codes, then --force", command=of.DECODE, second=("--force",)),
)


@dataclass(frozen=True)
class Alone:
    """A run that no other disturbs."""

    result: dict[str, str]
    seconds: float


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Start every command twice, n times, and then a third as often once more after a kill."""
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:
        for pair in PAIRS:
            alone = _alone(workspace, pair, Path(folder) / f"{pair.name}, alone")

            def one(number: int, pair: Pair = pair, alone: Alone = alone) -> Verdict:
                name = f"writers {seed} {pair.name} {number}"
                with tempfile.TemporaryDirectory(dir=folder) as at:
                    copy = workspace.copy(Path(at) / "copy")
                    run = _run_pair if number < n else _run_after_kill
                    return run(copy, pair, alone, Random(name), name)

            for verdict in run_cases(one, range(n + -(-n // 3)), jobs):
                tally.add(verdict)


def _alone(workspace: Workspace, pair: Pair, folder: Path) -> Alone:
    """Return a run alone: the second of two, for the first reads more from the disk."""
    for number in range(2):
        copy = workspace.copy(folder.with_name(f"{folder.name} {number}"))
        begin = time.monotonic()
        ended = done(copy.run(pair.command))
        alone = Alone(copy.result(pair.command, ended), time.monotonic() - begin)
    return alone


def _run_pair(workspace: Workspace, pair: Pair, alone: Alone, random: Random, name: str) -> Verdict:
    """Start a command, a moment later start it again, and wait for both."""
    first = Program(workspace.line(pair.command), workspace.surroundings())
    early = first.ends_within(random.uniform(EARLIEST, LATEST) * alone.seconds)
    second = Program(workspace.line(pair.command, *pair.second), workspace.surroundings())
    programs = {first.pid: first.wait(), second.pid: second.wait()}
    same = workspace.result(pair.command, programs[first.pid]) == alone.result
    outcome, wrong = judge(programs, same)
    if early and not wrong:
        outcome = "one after the other"
    detail = f"processes {first.pid}, {second.pid}\n" + "\n".join(ended.shown(500) for ended in programs.values())
    return _verdict(pair, outcome, wrong, name, detail)


def judge(programs: dict[int, Ended], same: bool) -> tuple[str, bool]:
    """Return how two runs by process id ended, and whether that is wrong; `same`: whether the result is right."""
    winners = [pid for pid, ended in programs.items() if ended.status == 0]
    if any(ended.hung or ended.raw or ended.status < 0 for ended in programs.values()):
        return "a traceback, raw error or hang", True
    if not same:
        return f"{len(winners)} of 2 end well, with another result", True
    if len(winners) != 1:
        return ("one after the other, the result undisturbed", False) if winners else ("none ends well", True)
    (loser,) = (ended for pid, ended in programs.items() if pid not in winners)
    if loser.status != 1 or len(loser.errors) != 1:
        return f"refused with status {loser.status} and {len(loser.errors)} error lines", True
    if not re.search(rf"\b{winners[0]}\b", loser.errors[0]):
        return "refused, and the first is not named", True
    return "one refused, the other undisturbed", False


def _run_after_kill(workspace: Workspace, pair: Pair, alone: Alone, random: Random, name: str) -> Verdict:
    """Start a command, kill it, and start it again at once."""
    first = Program(workspace.line(pair.command), workspace.surroundings())
    first.ends_within(random.uniform(EARLIEST, 1) * alone.seconds)
    first.signal(signal.SIGKILL)
    killed, ended = first.wait(), workspace.run(pair.command, *pair.second)
    right = ended.status == 0 and not ended.raw and workspace.result(pair.command, ended) == alone.result
    outcome = "runs at once after a kill" if right else "after a kill it does not run, or has another result"
    return _verdict(pair, outcome, not right, name, f"{killed.shown(500)}\n{ended.shown(500)}")


def _verdict(pair: Pair, outcome: str, wrong: bool, name: str, detail: str) -> Verdict:
    detail = detail if wrong else ""
    return Verdict(part="writers", what=pair.name, outcome=outcome, wrong=wrong, case=name, detail=detail)
