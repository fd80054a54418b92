"""A small but complete workspace: images, a run of each stage, code data sets, a cache; and every command on it.

    images/         48 colour pictures in 3 classes, of 16 x 12 pixels
    cache/          the image cache
    tokenizer/      6 steps; codes/ of it in 5 shards, and partial/, an export of the same that was interrupted
    prior/          6 steps on codes/
    other/          the same again with another seed: files that are valid, but not those

A case works on a copy. Paths on the command line are relative to it, so that results are the same bytes in any copy;
only the images are those of the original, which no command writes.
"""

import hashlib
import json
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.runtime.sealed_json import sealed

from .program import HANG, Ended, Program, Surroundings, run

CLASSES = ("disc", "line", "été")
HEIGHT, WIDTH, IMAGES = 16, 12, 48
STEPS = 6  # of either stage
SMALL = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4"]
SMALL_TOKENIZER = [*SMALL, "--hidden-channels", "8", "--residual-channels", "4", "--num-residual-layers", "1"]
SMALL_TOKENIZER += ["--num-codes", "16", "--code-dim", "4"]
SMALL_PRIOR = [*SMALL, "--channels", "4", "--num-layers", "2"]
CPU = ["--device", "cpu"]
VOLATILE = ("metrics.jsonl", "previous", ".codegrid.lock")  # times of day, and what depends on when a run was saved


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command on a workspace."""

    arguments: tuple[str, ...]  # without the path of the images, which `line` adds
    result: str  # the file or folder that it writes, relative to the workspace; "" for none
    images: bool = False  # whether --data names the images
    stopped: bool = False  # by SIGTERM, once it has saved

    @property
    def name(self) -> str:
        return self.arguments[0]

    def line(self, images: Path) -> list[str]:
        """Return the command line."""
        return [*self.arguments, *(["--data", str(images)] if self.images else [])]


def command(line: str, *more: str, result: str = "", images: bool = False) -> Command:
    """Return a command from its line, split at spaces, and further arguments."""
    return Command(arguments=(*line.split(), *more), result=result, images=images)


def longer(short: Command, *more: str) -> Command:
    """Return a command with further arguments, which take the place of those before them."""
    return replace(short, arguments=(*short.arguments, *more))


TRAIN_TOKENIZER = command(
    f"train-tokenizer --out new/tokenizer --steps {STEPS}", *SMALL_TOKENIZER, result="new/tokenizer", images=True
)
TRAIN_DECODER = command(
    f"train-decoder --tokenizer tokenizer --out new/sharp --steps {STEPS}", *CPU, result="new/sharp", images=True
)
TRAIN_PRIOR = command(
    f"train-prior --codes codes --tokenizer tokenizer --out new/prior --steps {STEPS}",
    *SMALL_PRIOR,
    result="new/prior",
)
RESUME_TOKENIZER = command(
    f"train-tokenizer --out tokenizer --resume --steps {2 * STEPS}", *CPU, result="tokenizer", images=True
)
RESUME_PRIOR = command(f"train-prior --out prior --resume --steps {2 * STEPS}", *CPU, result="prior")
RESUME_A_MOMENT = replace(longer(RESUME_PRIOR, "--steps", "600"), result="prior/model.safetensors", stopped=True)
EXPORT = command("export-codes --tokenizer tokenizer --out new/codes --shard-size 8", *CPU, result="new/codes")
EXPORT_AGAIN = command("export-codes --tokenizer tokenizer --out codes --shard-size 8", *CPU, result="codes")
EXPORT_REST = command("export-codes --tokenizer tokenizer --out partial --shard-size 8", *CPU, result="partial")
TABLE = command("export-codes --tokenizer tokenizer --out new/codes --to npz", *CPU, result="new/codes")
VERIFY = command("verify-codes codes --tokenizer tokenizer")
VERIFY_IMAGES = command("verify-codes codes", images=True)
DECODE = command("decode-codes codes --tokenizer tokenizer --out new/decoded", *CPU, result="new/decoded")
DECODE_ARRAY = command("decode-codes codes --tokenizer tokenizer --out new/x.npy", *CPU, result="new/x.npy")
DECODE_SHEET = command("decode-codes codes --tokenizer tokenizer --out new/x.png", *CPU, result="new/x.png")
SAMPLE = command("sample --n 6 --tokenizer tokenizer --prior prior --out new/samples", *CPU, result="new/samples")
COMPLETE = command(
    "complete --image picture.png --keep top --n 2 --candidates 4 --tokenizer tokenizer --prior prior"
    " --out new/completions",
    *CPU,
    result="new/completions",
)
RECONSTRUCT = command("reconstruct --tokenizer tokenizer --n 4 --out new/r.png", *CPU, result="new/r.png")
EVALUATE = command("evaluate --tokenizer tokenizer --prior prior --json new/e.json", *CPU, result="new/e.json")
RATE = command(
    "measure-rate --tokenizer tokenizer --prior prior --split test --json new/m.json", *CPU, result="new/m.json"
)


@dataclass(frozen=True)
class Workspace:
    """A workspace, and how to run commands in it and in its copies."""

    folder: Path
    original: Path  # whose images and, unless a copy has its own, whose cache are used

    def copy(self, folder: Path, *, own_cache: bool = False) -> "Workspace":
        """Copy everything but images, other/ and, unless it is to be damaged, the cache; return the copy."""
        unused = ["images", "other", *([] if own_cache else ["cache"])]
        shutil.copytree(
            self.folder, folder, symlinks=True, ignore=lambda at, names: unused if at == str(self.folder) else []
        )
        (folder / "new").mkdir(exist_ok=True)
        return Workspace(folder, self.original)

    def surroundings(self, save_every: float | None = None, *, pipe: bool = False) -> Surroundings:
        """Return where commands run: here, with the cache of this folder if it has one."""
        cache = self.folder / "cache"
        environment = {"CODEGRID_CACHE": str(cache if cache.exists() else self.original / "cache")}
        return Surroundings(folder=self.folder, environment=environment, save_every=save_every, pipe=pipe)

    def line(self, command: Command, *more: str) -> list[str]:
        """Return the command line of a command, with further arguments."""
        return [*command.line(self.original / "images"), *more]

    def run(self, command: Command, *more: str) -> Ended:
        """Run a command to its end."""
        if command.stopped:
            return self._run_until_saved(command, *more)
        return run(self.line(command, *more), self.surroundings())

    def _run_until_saved(self, command: Command, *more: str) -> Ended:
        """Run a training until it has saved, then ask it to stop, and count that as a good end."""
        config = (self.folder / command.result).with_name("config.json")
        before = config.stat().st_mtime_ns if config.exists() else 0
        program = Program(self.line(command, *more), self.surroundings(save_every=0))
        while not program.ends_within(0.005) and time.monotonic() - program.began < HANG:
            if config.exists() and config.stat().st_mtime_ns != before:
                program.signal(signal.SIGTERM)
                break
        ended = program.wait()
        return replace(ended, status=0) if ended.status == 128 + signal.SIGTERM else ended

    def result(self, command: Command, ended: Ended) -> dict[str, str]:
        """Return what a command did, to compare: the hash of each file, or without files what it printed."""
        return digests(self.folder / command.result) if command.result else {"printed": ended.out}


def make_workspace(folder: Path) -> Workspace:
    """Make the workspace. Raise RuntimeError if a command fails that should not."""
    workspace = Workspace(folder, folder)
    (folder / "cache").mkdir(parents=True)
    _draw(folder / "images")
    shutil.copy(sorted((folder / "images").rglob("*.png"))[0], folder / "picture.png")
    _make_runs(workspace, 1)
    (folder / "other").mkdir()
    for name in ("tokenizer", "codes", "prior"):
        (folder / name).rename(folder / "other" / name)
    _make_runs(workspace, 0)
    _interrupt(folder / "codes", folder / "partial")
    return workspace


def digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file below a folder but the VOLATILE, by name."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = {str(file.relative_to(path)): file for file in files}
    kept = {name: file for name, file in names.items() if not set(Path(name).parts) & set(VOLATILE)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in kept.items()}


def is_saved(folder: Path) -> bool:
    """Return whether a run folder holds a checkpoint, or a folder of codes a grid."""
    if (folder / "manifest.json").exists():
        return bool(json.loads((folder / "manifest.json").read_bytes())["count"])
    return any((folder / name).exists() for name in ("config.json", "commit.json"))


def done(ended: Ended) -> Ended:
    """Return it. Raise RuntimeError unless it ended well."""
    if ended.status != 0:
        raise RuntimeError(f"this should work: {ended.shown()}")
    return ended


def _make_runs(workspace: Workspace, seed: int) -> None:
    """Train both stages and export the codes between them."""
    for command, out in ((TRAIN_TOKENIZER, "tokenizer"), (EXPORT, "codes"), (TRAIN_PRIOR, "prior")):
        seeds = ["--seed", str(seed)] if command is not EXPORT else []
        line = workspace.line(command, "--out", out, *seeds)
        done(run(line, workspace.surroundings(save_every=0)))  # so that there is a checkpoint before the last


def _draw(folder: Path) -> None:
    """Write the pictures: a disc, a line or a rectangle of one colour on another."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(IMAGES):
        top, left = random.integers(3, 12), random.integers(3, 9)
        distance = (rows - top) ** 2 + (columns - left) ** 2
        inside = (distance < 9, columns == left, (abs(rows - top) < 3) & (abs(columns - left) < 3))[number % 3]
        ground, figure = random.integers(0, 100, 3), random.integers(150, 256, 3)
        path = folder / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(inside[..., None], figure, ground).astype(np.uint8)).save(path)


def _interrupt(complete: Path, partial: Path) -> None:
    """Make of a complete export what a kill leaves: two shards in the manifest, one in its own entry, two missing."""
    shutil.copytree(complete, partial)
    content = json.loads((complete / "manifest.json").read_bytes())
    shards = content["shards"]
    del content["checksum"]
    kept = {**content, "shards": shards[:2], "count": sum(s["count"] for s in shards[:2]), "statistics": {}}
    (partial / "manifest.json").write_bytes(sealed(kept))
    (partial / "shard-00002.json").write_text(json.dumps(shards[2]))
    (partial / "README.md").unlink()
    for shard in shards[3:]:
        for name in shard["files"]:
            (partial / name).unlink()
