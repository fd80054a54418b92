"""What a job of torchrun remembers over restarts, and that its processes find each other again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime.restarts import JobMemory

from ..support import ROOT

# Process 1 dies in the first two attempts. Process 0 comes late to the others, so that they see what is still in the
# store about the processes that are gone.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from pipeline.runtime.process_group import process_group
from pipeline.runtime.restarts import JobMemory

rank, attempt, memory = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), JobMemory()
known = [memory.knows(key) for key in ("begun", "saved \\udcff", "other")]
time.sleep(0.5 if rank == 0 and attempt else 0)
with process_group() as group:
    Path(sys.argv[1], f"{attempt}-{rank}").write_text(f"{known} {group.gather(rank)}")
    if group.is_main:
        memory.note(["begun", "saved \\udcff", "begun"][attempt])
    group.wait()
    if rank == 1 and attempt < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    group.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_job_remembers_over_restarts_in_which_processes_meet_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=2"]
    job = [*start, str(program), str(tmp_path)]
    ended = subprocess.run(job, cwd=ROOT, env=environment(), timeout=100, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = {path.name: path.read_text() for path in tmp_path.glob("?-?")}
    known = [[False, False, False], [True, False, False], [True, True, False]]
    assert found == {f"{attempt}-{rank}": f"{known[attempt]} [0, 1, 2]" for attempt in range(3) for rank in range(3)}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_without_torchrun_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    memory = JobMemory()
    memory.note("begun")
    assert not memory.knows("begun")
