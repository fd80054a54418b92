"""Full disks: every command on a tmpfs with room for 0, 1, 2, ... more pages, so that every write fails in some case.

A file on a tmpfs takes whole pages, so these are all places at which a write can find no room. The same with room for
0, 1, 2, ... more files.

A run is good if it ends in one line with the path and, where pages are missing, the bytes; or with its result, byte for
byte, and one warning if its log or pictures found no room. Then no temporary file is left, a saved checkpoint loads
while the disk is still full, and once there is room the same command, with --resume or --force, ends with the
undisturbed bytes.
"""

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import workspace as of
from .program import Ended, Program, run
from .small_disk import SmallDisk, can_mount, on_small_disk
from .verdicts import Tally, Verdict, run_cases
from .workspace import Command, Workspace, done, is_saved

SAVE_EVERY = 0.0  # seconds: a training saves after each step
MARGIN = 1.3  # what is enough, in multiples of the most that was seen to be taken
_BYTES = re.compile(r"\d[\d,.]* ?(bytes|[kKMG]i?B)")
_TEMPORARY = re.compile(r".*\.new|\.building-.*|\.codegrid\.lock|tmp.*")
_OF_TOKENIZER, _OF_PRIOR = "evaluate --tokenizer {}", "evaluate --tokenizer tokenizer --prior {}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command whose folder is on the full disk."""

    name: str
    command: Command
    again: tuple[str, ...] = ()  # added once there is room
    reader: str = ""  # the command that loads the checkpoint that it writes
    cache: bool = False  # whether the image cache, still empty, is on the disk


JOBS = (
    Job(name="train-tokenizer", command=of.TRAIN_TOKENIZER, again=("--resume",), reader=_OF_TOKENIZER),
    Job(name="train-tokenizer --resume", command=of.RESUME_TOKENIZER, reader=_OF_TOKENIZER),
    Job(name="train-prior", command=of.TRAIN_PRIOR, again=("--resume",), reader=_OF_PRIOR),
    Job(name="train-prior --resume", command=of.RESUME_PRIOR, reader=_OF_PRIOR),
    Job(name="export-codes", command=of.EXPORT),
    Job(name="export-codes, the rest", command=of.EXPORT_REST),
    Job(name="export-codes --to npz", command=of.TABLE),
    Job(name="sample", command=of.SAMPLE, again=("--force",)),
    Job(name="complete", command=of.COMPLETE, again=("--force",)),
    Job(name="decode-codes, a folder", command=of.DECODE, again=("--force",)),
    Job(name="decode-codes, .npy", command=of.DECODE_ARRAY, again=("--force",)),
    Job(name="decode-codes, .png", command=of.DECODE_SHEET, again=("--force",)),
    Job(name="reconstruct", command=of.RECONSTRUCT, again=("--force",)),
    Job(name="evaluate --json", command=of.EVALUATE, again=("--force",)),
    Job(name="measure-rate --json", command=of.RATE, again=("--force",)),
    Job(name="the image cache", command=of.EVALUATE, again=("--force",), cache=True),
)


@dataclass(frozen=True)
class Undisturbed:
    """A run with room for everything."""

    result: dict[str, str]
    pages: int  # enough for it
    files: int


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Run every command with up to n amounts of room, from none to enough, in pages and in files.

    They are evenly spread, and the same for every `seed`.
    """
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:
        if not can_mount(Path(folder) / "tried"):
            print("full-disk: skipped, this user may not mount a tmpfs")
            return
        for job in JOBS:
            _measure_job(workspace, job, Path(folder), tally, n, jobs)


def _measure_job(workspace: Workspace, job: Job, folder: Path, tally: Tally, n: int, jobs: int) -> None:
    """Run one command with all amounts of room."""
    undisturbed = on_small_disk(
        folder / "undisturbed", lambda disk: _undisturbed(_copy(workspace, job, disk), job, disk)
    )
    rooms = [("pages", room) for room in _spread(undisturbed.pages, n)]
    rooms += [("files", room) for room in _spread(undisturbed.files, n)]

    def one(number: int) -> Verdict:
        unit, room = rooms[number]
        return on_small_disk(
            folder / str(number),
            lambda disk: _run_case(_copy(workspace, job, disk), job, disk, unit, room, undisturbed),
        )

    for verdict in run_cases(one, range(len(rooms)), jobs):
        tally.add(verdict)


def _copy(workspace: Workspace, job: Job, disk: SmallDisk) -> Workspace:
    """Return a copy of the workspace on the disk, with an empty cache if that is to be on it too."""
    copy = workspace.copy(disk.folder / "copy")
    if job.cache:
        (copy.folder / "cache").mkdir()
    return copy


def _spread(most: int, n: int) -> list[int]:
    """Return 0 to most, or at most n + 1 numbers evenly spread between them."""
    return sorted({round(most * i / min(n, most)) for i in range(min(n, most) + 1)}) if most else [0]


def _undisturbed(workspace: Workspace, job: Job, disk: SmallDisk) -> Undisturbed:
    """Run a command with room for everything, and watch how much it takes."""
    pages, files = disk.free()
    lowest_pages, lowest_files = pages, files
    program = Program(workspace.line(job.command), workspace.surroundings(SAVE_EVERY))
    while not program.ends_within(0):
        now_pages, now_files = disk.free()
        lowest_pages, lowest_files = min(lowest_pages, now_pages), min(lowest_files, now_files)
    result = workspace.result(job.command, done(program.wait()))
    taken = pages - lowest_pages, files - lowest_files
    return Undisturbed(_essential(result), *(math.ceil(MARGIN * count) + 1 for count in taken))


def _run_case(
    workspace: Workspace, job: Job, disk: SmallDisk, unit: str, room: int, undisturbed: Undisturbed
) -> Verdict:
    """Run a command with little room, look at what is left, and run it again with room."""
    disk.leave(**{unit: room})
    ended = run(workspace.line(job.command), workspace.surroundings(SAVE_EVERY))
    outcome, wrong = judge(ended, workspace.result(job.command, ended), undisturbed, unit)
    history = [ended.shown(700)]
    if not wrong and (left := [path.name for path in disk.folder.rglob("*") if _TEMPORARY.fullmatch(path.name)]):
        outcome, wrong = f"left behind: {re.sub('[0-9]+', 'N', left[0])[:30]}", True
    if not wrong and job.reader:
        found = run([*job.reader.format(job.command.result).split(), *of.CPU], workspace.surroundings())
        history.append(found.shown(700))
        if found.status != 0 and (len(found.errors) != 1 or is_saved(workspace.folder / job.command.result)):
            outcome, wrong = "the checkpoint does not load", True
    if not wrong:
        disk.leave()
        again = workspace.run(job.command, *job.again)
        history.append(again.shown(700))
        if again.status != 0 or again.raw or _essential(workspace.result(job.command, again)) != undisturbed.result:
            outcome, wrong = "another result once there is room" if again.status == 0 else "it cannot go on", True
    case = f"full-disk: {job.name} with room for {room} {unit}"
    detail = "\n".join(history) if wrong else ""
    return Verdict(part="full-disk", what=job.name, outcome=outcome, wrong=wrong, case=case, detail=detail)


def judge(ended: Ended, result: dict[str, str], undisturbed: Undisturbed, unit: str) -> tuple[str, bool]:
    """Return what a run on a full disk did, and whether it is wrong."""
    if ended.hung:
        return "no end", True
    if ended.status < 0:
        return f"killed by signal {-ended.status}", True
    if ended.raw:
        return "traceback or raw error", True
    if ended.status == 0:
        if _essential(result) != undisturbed.result:
            return "another result, silently", True
        return ("done, with a warning" if "Warning" in ended.err else "done"), False
    if ended.status != 1 or len(ended.errors) != 1:
        return f"status {ended.status} and {len(ended.errors)} error lines", True
    if not re.search(r"\bnew\b|tokenizer|prior|partial|cache", ended.errors[0]):
        return "the line names no path", True
    if unit == "pages" and not _BYTES.search(ended.errors[0]):
        return "the line names no bytes", True
    return "refused in one line", False


def _essential(result: dict[str, str]) -> dict[str, str]:
    """Return the result without pictures of a training, which may find no room."""
    return {name: digest for name, digest in result.items() if not name.startswith("pictures/")}
