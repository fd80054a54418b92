"""Fuzzed files for the readers of checkpoints, training states, manifests and arrays, in this process for speed.

A file is mutated (`mutations.py`), the hashes that name it are made to fit, as a stranger would, and a command reads
it. It may load, or be refused in one line. Wrong are: any other error, a line that is too long or that controls the
terminal, memory that grows, a load without end, and an opened file outside the folder.
"""

import hashlib
import json
import os
import re
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from pipeline.models.checkpoint import PREVIOUS
from pipeline.runtime.sealed_json import CHECKSUM, sealed

from . import workspace as of
from .mutations import MUTATE, mutate_bytes
from .program import Ended
from .safe_process import ENDLESS, SafeProcess
from .verdicts import Tally, Verdict, run_cases
from .workspace import STEPS, Command, Workspace

BATCH = 100  # cases in one process
DEAD = 40.0  # seconds after which a process that tells nothing is ended
GROWTH = 256 * 2**20  # bytes that a load may take
LONGEST_LINE = 2_000  # characters
RAW_BYTES = 0.25  # share of the files with random bytes; the others are valid in form
RESEALED = 0.8  # share of the files whose hash is made to fit
NAN = "0000c07f"  # all numbers of a file, as `mutations.py` says it
NO_MEMORY = "an.t allocate|annot allocate|nable to allocate|out of memory"  # whatever caught that error
GOOD = ("loaded", "refused in one line")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Commands that read files, and the files."""

    name: str
    files: tuple[str, ...]  # patterns, relative to the workspace
    commands: tuple[Command, ...]


_ONE = ("--n", "1", "--force")
_SAMPLE = of.command("sample --tokenizer tokenizer --prior prior --out new/s", *_ONE, *of.CPU)
_DECODE = of.command("decode-codes codes --tokenizer tokenizer --out new/x.npy", *_ONE, *of.CPU)
_RESUME = tuple(
    of.command(f"train-{kind} --out {kind} --resume --steps {STEPS}", *of.CPU) for kind in ("tokenizer", "prior")
)
_LEARN = of.command("train-prior --codes codes --out new/p --steps 1 --force", *of.SMALL_PRIOR)
DRAWING = (_SAMPLE, _DECODE, of.RECONSTRUCT, of.EVALUATE)
READERS = (
    Reader(
        name="config.json and model.safetensors",
        files=tuple(
            f"{kind}/{name}" for kind in ("tokenizer", "prior") for name in ("config.json", "model.safetensors")
        ),
        commands=(_SAMPLE, _SAMPLE, _SAMPLE, _DECODE, of.RECONSTRUCT, of.EVALUATE, of.VERIFY, *_RESUME),
    ),
    Reader(
        name="training.safetensors",
        files=("tokenizer/training.safetensors", "prior/training.safetensors"),
        commands=_RESUME,
    ),
    Reader(
        name="manifest.json, names, shard entries",
        files=("codes/manifest.json", "codes/names-*.json", "partial/manifest.json", "partial/shard-*.json"),
        commands=(of.VERIFY, _DECODE, _LEARN, of.EXPORT_AGAIN, of.EXPORT_REST),
    ),
    Reader(
        name=".npy headers",
        files=("codes/codes-*.npy", "codes/labels-*.npy", "cache/images/*/*.npy", "cache/images/*/index.json"),
        commands=(of.VERIFY, _DECODE, _LEARN, of.RECONSTRUCT, of.EXPORT_AGAIN),
    ),
)


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Fuzz n files, as many for each reader."""
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:

        def run(batch: int) -> list[Verdict]:
            cases = range(batch * BATCH, min(n, (batch + 1) * BATCH))
            return list(_isolated(workspace, Path(folder) / str(batch), cases, seed))

        for verdicts in run_cases(run, range(-(-n // BATCH)), jobs):
            for verdict in verdicts:
                tally.add(verdict)


def _isolated(workspace: Workspace, folder: Path, cases: range, seed: int) -> Iterator[Verdict]:
    """Yield the verdict of each case; a process that dies or hangs costs the case at which it did."""
    following = cases.start
    while following < cases.stop:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run_batch(workspace, folder, range(following, cases.stop), seed, writing)
        os.close(writing)
        for line in _lines(reading):
            yield Verdict(**json.loads(line))
            following += 1
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if following < cases.stop:
            yield _died(following, seed, status)
            following += 1
        shutil.rmtree(folder, ignore_errors=True)


def _lines(reading: int) -> Iterator[bytes]:
    """Yield the lines that come through a pipe, until it ends or nothing comes for DEAD seconds."""
    kept = b""
    while select.select([reading], [], [], DEAD)[0] and (data := os.read(reading, 2**16)):
        *lines, kept = (kept + data).split(b"\n")
        yield from lines


def _died(number: int, seed: int, status: int) -> Verdict:
    """Return the verdict of the case that ended its process."""
    what = READERS[number % len(READERS)].name
    outcome = f"no end, nor by an alarm, within {DEAD:.0f} s" if status == -signal.SIGKILL else f"status {status}"
    return Verdict(part="fuzz", what=what, outcome=outcome, wrong=True, case=f"fuzz {seed} {number}")


def _run_batch(workspace: Workspace, folder: Path, cases: range, seed: int, writing: int) -> NoReturn:
    """Run cases in this process, tell the verdict of each, and end it."""
    try:
        process = SafeProcess((folder, workspace.original))
        for number in cases:
            verdict = _run_case(workspace, folder, process, number, seed)
            os.write(writing, (json.dumps(vars(verdict)) + "\n").encode())
    finally:
        os._exit(0)


def _run_case(workspace: Workspace, folder: Path, process: SafeProcess, number: int, seed: int) -> Verdict:
    """Fuzz one file and read it."""
    reader, random = READERS[number % len(READERS)], Random(f"fuzz {seed} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    copy = workspace.copy(folder, own_cache=True)
    for kept in folder.glob(f"*/{PREVIOUS}"):
        shutil.rmtree(kept)  # so that a reader has nothing to fall back on
    file = random.choice(sorted(path for pattern in reader.files for path in folder.glob(pattern)))
    name, data = file.relative_to(folder), file.read_bytes()
    mutate = mutate_bytes if random.random() < RAW_BYTES else MUTATE[file.suffix]
    mutated, done = mutate(data, random)
    file.write_bytes(mutated)
    if random.random() < RESEALED:
        reseal(folder, data, mutated)
    command = random.choice([command for command in reader.commands if _reads(command, name)])
    ended, grown = process.run(copy, command)
    outcome = judge(ended, grown, process.opened, draws_from_nan=NAN in done and command in DRAWING)
    return Verdict(
        part="fuzz",
        what=reader.name,
        outcome=outcome,
        wrong=outcome not in GOOD,
        case=f"fuzz {seed} {number}: {name} {done}",
        detail=ended.shown() if outcome not in GOOD else "",
    )


def judge(ended: Ended, grown: int, opened: list[str], *, draws_from_nan: bool) -> str:
    """Return what happened, in words: one of GOOD, or what is wrong."""
    if ended.hung:
        return f"no end within {ENDLESS:.0f} s"
    if opened:
        return f"{opened[0][:60]} opened"
    if ended.raw:
        return f"raw: {re.sub('[0-9]+', 'N', (ended.errors or ended.err.splitlines())[-1])[:70]}"
    if grown > GROWTH or re.search(NO_MEMORY, ended.err):
        return "memory grows"
    if ended.status == 0:
        return "draws from weights that are not numbers" if draws_from_nan else GOOD[0]
    if ended.status != 1 or len(ended.errors) != 1:
        return f"status {ended.status} and {len(ended.errors)} error lines"
    if len(ended.errors[0]) > LONGEST_LINE:
        return f"an error line of more than {LONGEST_LINE:,} characters"
    return GOOD[1] if ended.errors[0].isprintable() else "an error line with control characters"


def _reads(command: Command, file: Path) -> bool:
    """Return whether a command reads a file, by the folder it is in."""
    return command.name == "reconstruct" if file.parts[0] == "cache" else file.parts[0] in command.arguments


def reseal(folder: Path, before: bytes, after: bytes) -> None:
    """Make the hashes fit: those that JSON in the folder names of a file's old bytes, and those of the JSON itself."""
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (before, after))
    for path in folder.rglob("*.json"):
        content = path.read_bytes()
        if old in content:
            path.write_bytes(content.replace(old, new))
        with suppress(ValueError, RecursionError):
            parsed = json.loads(path.read_bytes())
            if isinstance(parsed, dict) and parsed.pop(CHECKSUM, None) is not None:
                path.write_bytes(sealed(parsed))
