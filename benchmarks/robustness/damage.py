"""Damaged files, each read by every command that reads its folder.

A run is good if it refuses in one line that names the file; if it goes on without the file (from the checkpoint before
it, or with a cache that it makes again) and a line says so; or if its result is, byte for byte, that of no damage.
"""

import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from . import workspace as of
from .damages import DAMAGES, Damage, delete, replace, rubbish
from .program import HANG, Ended
from .verdicts import Tally, Verdict, run_cases
from .workspace import Command, Workspace, done

READERS: dict[str, tuple[Command, ...]] = {
    "tokenizer": (
        *(of.RESUME_TOKENIZER, of.TRAIN_PRIOR, of.EXPORT, of.EXPORT_AGAIN, of.VERIFY, of.DECODE),
        *(of.SAMPLE, of.COMPLETE, of.RECONSTRUCT, of.EVALUATE, of.RATE),
    ),
    "prior": (of.RESUME_PRIOR, of.RESUME_A_MOMENT, of.SAMPLE, of.COMPLETE, of.EVALUATE, of.RATE),
    "codes": (of.VERIFY, of.DECODE, of.DECODE_ARRAY, of.TRAIN_PRIOR, of.RESUME_PRIOR, of.EXPORT_AGAIN),
    "partial": (of.EXPORT_REST,),
    "cache": (of.TRAIN_TOKENIZER, of.EVALUATE, of.EXPORT, of.VERIFY_IMAGES, of.RECONSTRUCT),
}
PLANTED = (  # files that a command looks for and that are not there: rubbish in their place
    *(f"{run}/{name}" for run in ("tokenizer", "prior") for name in ("commit.json", "model.safetensors.new")),
    *(f"{run}/.codegrid.lock" for run in ("tokenizer", "prior", "codes", "partial")),
    *("partial/shard-00003.json", "partial/codes-00003.npy", "partial/manifest.json.new"),
)


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    file: str  # relative to the workspace
    damage: Damage
    other: str | None  # a valid file to put in its place

    @property
    def folder(self) -> str:
        return self.file.split("/")[0]


@dataclass(frozen=True)
class Expected:
    """The results of a command that are right: without damage, and with the checkpoint before the last."""

    undamaged: dict[str, str]
    previous: dict[str, str] | None  # None where no such checkpoint is kept


def measure(workspace: Workspace, tally: Tally, *, n: int, seed: int, jobs: int) -> None:
    """Damage n files, one at a time, and run what reads them."""
    cases = _cases(workspace.folder, seed)
    with tempfile.TemporaryDirectory(dir=workspace.folder.parent) as folder:
        expected = _expected(workspace, Path(folder))

        def run(number: int) -> list[Verdict]:
            generator = random.Random(f"damage {seed} {number}")
            at = Path(folder) / str(number)
            return list(_run_case(workspace, cases[number % len(cases)], expected, at, generator, f"{seed} {number}"))

        for verdicts in run_cases(run, range(n), jobs):
            for verdict in verdicts:
                tally.add(verdict)


def _cases(folder: Path, seed: int) -> list[Case]:
    """Return every file with every damage, in random order."""
    files = [path for name in READERS for path in sorted((folder / name).rglob("*")) if path.is_file()]
    pictures = [path for path in files if path.parent.name == "pictures"]
    names = [str(path.relative_to(folder)) for path in files if path not in pictures[1:]]
    cases = [Case(name, damage, _other(folder, name)) for name, damage in product(names, DAMAGES)]
    cases += [Case(name, rubbish, None) for name in PLANTED]
    random.Random(f"damage {seed}").shuffle(cases)
    return cases


def _other(folder: Path, name: str) -> str | None:
    """Return another valid file of the same kind, if there is one."""
    path = folder / name
    twin = folder / "other" / name.replace("partial/", "codes/")
    beside = [file for file in path.parent.glob(f"*{path.suffix}") if file.name[:5] == path.name[:5] and file != path]
    if "cache/" in name:
        beside = [file for file in (folder / "cache").rglob(f"*{path.suffix}") if file != path]
    found = [file for file in (twin, *sorted(beside)) if file.is_file()]
    return str(found[0].relative_to(folder)) if found else None


def _expected(workspace: Workspace, folder: Path) -> dict[tuple[str, Command], Expected]:
    """Return the right results of every command on every folder."""
    commands = {command for commands in READERS.values() for command in commands}
    undamaged = {
        command: _result(workspace.copy(folder / f"undamaged-{i}"), command) for i, command in enumerate(commands)
    }
    results = {}
    for name, readers in READERS.items():
        for i, command in enumerate(readers):
            previous = None
            if (workspace.folder / name / "previous").is_dir():
                older = workspace.copy(folder / f"{name}-previous-{i}")
                for path in (older.folder / name / "previous").iterdir():
                    path.replace(older.folder / name / path.name)
                ended = older.run(command)
                previous = older.result(command, ended) if ended.status == 0 else None
            results[name, command] = Expected(undamaged[command], previous)
    return results


def _result(workspace: Workspace, command: Command) -> dict[str, str]:
    return workspace.result(command, done(workspace.run(command)))


def _run_case(
    workspace: Workspace,
    case: Case,
    expected: dict[tuple[str, Command], Expected],
    folder: Path,
    random: random.Random,
    number: str,
) -> Iterator[Verdict]:
    """Yield a verdict for each command that reads the damaged file; each works on a copy with the same damage."""
    state = random.getstate()
    for command in READERS[case.folder]:
        random.setstate(state)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as at:
            copy = workspace.copy(Path(at) / "copy", own_cache=case.folder == "cache")
            other = None if case.other is None else workspace.folder / case.other
            done_to_it = case.damage(copy.folder / case.file, other, random)
            ended = copy.run(command)
            outcome, wrong = judge(ended, case, copy.result(command, ended), expected[case.folder, command])
        yield Verdict(
            part="damage",
            what=f"{case.folder}/, read by {len(READERS[case.folder])} commands",
            outcome=f"{outcome}: {_any_number(case)}, {command.name}" if wrong else outcome,
            wrong=wrong,
            case=f"damage {number}: {case.file} {done_to_it}",
            detail=ended.shown() if wrong else "",
        )


def judge(ended: Ended, case: Case, result: dict[str, str], expected: Expected) -> tuple[str, bool]:
    """Return what happened in words, and whether it is wrong."""
    named = _names(ended.err, case)
    if ended.hung:
        return f"no end within {HANG:.0f} s", True
    if ended.raw or ended.status < 0:
        return "traceback or raw error" if ended.status >= 0 else f"killed by signal {-ended.status}", True
    if ended.status != 0:
        if len(ended.errors) != 1 or ended.status != 1:
            return f"status {ended.status} and {len(ended.errors)} error lines", True
        return ("refused in one line", False) if named else ("refused, and the file is not named", True)
    if _same(result, expected.undamaged, case):
        return ("recovered, and a line says so" if named else "harmless: the same bytes"), False
    if named and expected.previous is not None and _same(result, expected.previous, case):
        return "recovered, and a line says so", False
    return ("another result" if named else "another result, silently"), True


def _names(text: str, case: Case) -> bool:
    """Return whether a text names the damaged file, or its folder where nobody could know more.

    That is: another valid file that does not fit the rest, for which two fingerprints do as well, a missing file that
    says what the folder is, and the cache, whose entries are folders.
    """
    path = Path(case.file)
    if path.name in text or (case.damage is replace and text.count("fingerprint") > 1):
        return True
    gone = case.damage is delete and path.name in ("config.json", "manifest.json")
    by_folder = gone or case.folder == "cache" or case.damage is replace
    return by_folder and bool(re.search(rf"(/|\bin |\bat |--out ){re.escape(path.parent.name)}\b", text))


def _any_number(case: Case) -> str:
    """Return the name of the file, the same for every shard."""
    return re.sub("[0-9]+", "N", Path(case.file).name)


def _same(result: dict[str, str], right: dict[str, str], case: Case) -> bool:
    """Return whether a result is the right one; a damaged picture of an earlier step, which nothing reads, stays."""
    own = case.file.partition("/")[2] if "/pictures/" in case.file else None
    names = {name for name in {*result, *right} if own is None or not name.startswith(own)}
    return all(result.get(name) == right.get(name) for name in names)
