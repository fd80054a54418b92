"""Training shared by processes that torchrun starts: what it computes, that any process may be lost, and who prints.

Each start takes some seconds, so each tests several things.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models.checkpoint import load_training
from pipeline.runtime.process_group import ProcessGroup
from pipeline.training.schedule import DataOrder

from ..conftest import Trained
from .training_runs import lines_of, same_run

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("watched_program.py")
TINY = ["--hidden-channels", 8, "--residual-channels", 4, "--num-residual-layers", 1, "--num-codes", 16]
COMMON = ["--device", "cpu", "--precision", "fp32", "--batch-size", 7]
Action = tuple[int, int, int, str]  # attempt, rank, step, what


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    errors: list[str]  # the lines of the program alone


def run(count: int, *arguments: object, actions: Sequence[Action] = (), restarts: int = 0) -> Ended:
    """Run a command in `count` processes, which do what `actions` ask for; one alone without torchrun."""
    program = [str(PROGRAM), json.dumps(actions), *map(str, arguments)]
    options = ["--standalone", "--nproc-per-node", str(count), "--monitor-interval", "0.1"]
    launcher = ["-m", "torch.distributed.run", *options, "--max-restarts", str(restarts), "--"] if count > 1 else []
    command = [sys.executable, *launcher, *program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment())
    errors = [line for line in ended.stderr.splitlines() if re.match(r"(process \d+ of \d+: )?Error: ", line)]
    return Ended(ended.returncode, ended.stdout, errors)


def environment() -> dict[str, str]:

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def worst_difference(one: Path, other: Path) -> float:
    """Return the largest difference of a weight or a number of the codebook, relative to the largest of its tensor."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    return max(
        float((first[name].double() - second[name].double()).abs().max() / (first[name].double().abs().max() + 1e-12))
        for name in first
        if first[name].is_floating_point() and bool(first[name].isfinite().all())
    )


def tokenizer_command(trained: Trained, out: Path, *more: object) -> list[Any]:
    return ["train-tokenizer", "--data", trained.images, "--out", out, "--steps", 6, *TINY, *COMMON, *more]


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(1, *tokenizer_command(trained, out)).status == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of three processes, whose parts of the batch of 7 are 2, 2 and 3 images."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(3, *tokenizer_command(trained, out)).status == 0
    return out


def test_several_processes_compute_what_one_does(alone: Path, undisturbed: Path) -> None:
    """Codes start on the first batch and are revived, so a codebook of each process its own would differ by far."""
    assert worst_difference(alone, undisturbed) < 1e-3
    codebooks = [weights_of(folder)["quantizer.codebook"] for folder in (alone, undisturbed)]
    torch.testing.assert_close(*codebooks, rtol=0, atol=1e-4 * float(codebooks[0].abs().max()))
    assert int(weights_of(alone)["quantizer.revived"]) == int(weights_of(undisturbed)["quantizer.revived"])
    for split in ("train", "held_out"):
        for one, other in zip(lines_of(alone, split), lines_of(undisturbed, split), strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"part", "seconds"}:
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_a_killed_process_is_started_again_to_the_bytes_of_an_undisturbed_run(
    trained: Trained, undisturbed: Path, tmp_path: Path
) -> None:
    """With three processes sums depend on where in a bucket a gradient is, which must not differ after a restart."""
    out = tmp_path / "run"
    ended = run(3, *tokenizer_command(trained, out), actions=[(0, 2, 4, "kill")], restarts=1)
    assert ended.status == 0
    same_run(out, undisturbed)
    assert len(ended.errors) == 1
    assert "expected all 3 processes to continue, got one lost" in ended.errors[0]


def test_what_one_process_raises_ends_all_with_its_own_line(trained: Trained, tmp_path: Path) -> None:
    """A restart does not resume what the first attempt refused; here both fail in the same way."""
    out = tmp_path / "run"
    ended = run(2, *tokenizer_command(trained, out), actions=[(0, 1, 3, "raise")])
    assert ended.status == 1
    assert ended.errors == [
        "process 2 of 2: Error: expected no error, got one in this process alone; see whose line is printed"
    ]
    assert load_training(out).values["step"] == 2
    again = run(2, *tokenizer_command(trained, out, "--steps", 8), restarts=1)
    assert again.status == 1
    assert len(again.errors) == 2
    assert all("use --resume to continue or --force" in line for line in again.errors)
    assert load_training(out).values["step"] == 2


@pytest.mark.parametrize("signal", ["term", "int"])
def test_a_signal_to_torchrun_saves_and_one_process_continues(
    trained: Trained, alone: Path, tmp_path: Path, signal: str
) -> None:
    """Every image of the epoch is seen once: the batches are those of one process, whoever computes them."""
    out = tmp_path / "run"
    ended = run(2, *tokenizer_command(trained, out), actions=[(0, 1, 3, signal)])
    assert ended.status != 0
    assert ended.errors == []
    stopped_at = load_training(out).values["step"]
    assert stopped_at in (3, 4)  # torchrun passes the signal on, while the step goes on
    assert run(1, "train-tokenizer", "--out", out, "--resume", "--device", "cpu").status == 0
    assert [line["step"] for line in lines_of(out, "train")] == list(range(1, 7))
    assert worst_difference(alone, out) < 1e-3


def test_parts_of_a_batch_are_those_of_one_order() -> None:
    """Stopped with 3 processes and continued with 2, then 1: 11 items, batches of 7."""
    order, seen = DataOrder(11, 7, seed=3), []
    for step, count in enumerate((3, 3, 2, 1, 1, 2, 3, 3, 1, 2, 1)):
        parts = [order.batch(step)[slice(*ProcessGroup(rank, count).bounds(7))] for rank in range(count)]
        seen += np.concatenate(parts).tolist()
    assert len(seen) == 77
    for epoch in range(7):
        assert sorted(seen[11 * epoch : 11 * epoch + 11]) == list(range(11))


def test_losses_that_are_not_finite_in_one_process_take_all_back(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = run(2, *tokenizer_command(trained, out), actions=[(0, 1, 4, "nan")])
    assert ended.status == 1
    assert ended.out.count("back to step 3, this once, with 0.5 times the learning rate") == 1
    assert len(ended.errors) == 1
    assert re.match(r"Error: expected finite losses, got loss = nan at step 4, in the batch of", ended.errors[0])
    assert load_training(out).values["step"] == 3


def test_the_other_stages(trained: Trained, tmp_path: Path) -> None:
    """A prior that exports its codes first, and a sharp decoder, in two processes and in one."""
    prior = ["train-prior", "--tokenizer", trained.tokenizer, "--channels", 4, "--num-layers", 3, "--steps", 4, *COMMON]
    decoder = ["train-decoder", "--tokenizer", trained.tokenizer, "--steps", 3, *COMMON]
    for count in (1, 2):
        ended = run(count, *prior, "--out", tmp_path / f"prior{count}")
        assert (ended.status, ended.errors) == (0, [])
        assert ended.out.count("done: 4 steps") == 1
        assert run(count, *decoder, "--out", tmp_path / f"decoder{count}").status == 0
    assert worst_difference(tmp_path / "prior1", tmp_path / "prior2") < 1e-3
    assert worst_difference(tmp_path / "decoder1/decoder", tmp_path / "decoder2/decoder") < 1e-3
    manifests = [json.loads((tmp_path / f"prior{count}/codes/manifest.json").read_text()) for count in (1, 2)]
    assert manifests[0]["shards"] == manifests[1]["shards"]


def test_more_processes_than_items_of_a_batch_are_refused(trained: Trained, tmp_path: Path) -> None:
    ended = run(2, *tokenizer_command(trained, tmp_path / "run", "--accumulate", 4))
    assert ended.status == 1
    assert len(ended.errors) == 1
    assert "expected --batch-size of 8 or more, the items of all processes, for 2 x 4 parts, got 7" in ended.errors[0]
    assert not (tmp_path / "run").exists()
