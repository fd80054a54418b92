"""Groups of real processes: what they compute together, how they end, and what an environment may say."""

import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.runtime import meeting
from pipeline.runtime.membership import in_short, is_loss
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup, process_group

from ..support import ROOT
from .processes import free_port, run_processes

NAN = math.nan
NUMBERS = [[0.1, -3.0, 2.0**53 + 2, -math.inf, NAN, 5.0], [0.3 - 0.2, -4.0, 1.0, -math.inf, 5.0, NAN]]  # by rank


def values_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """What a process adds to the sums: (2, 3), neither contiguous nor exact in fewer bits."""
    return (torch.arange(6, dtype=torch.float64).reshape(3, 2).T * (rank + 1) + 2.0**-20).to(dtype)


# What the processes compute together


def compute(rank: int) -> None:
    with process_group() as group, process_group() as inner:
        assert inner is group
        assert (group.rank, group.count) == (rank, 2)
        maxima = group.maxima(NUMBERS[rank])
        assert maxima[:4] == [max(NUMBERS[0][0], NUMBERS[1][0]), -3.0, 2.0**53 + 2, -math.inf]
        assert [math.isnan(value) for value in maxima[4:]] == [True, True]
        assert group.maxima([]) == []
        for dtype in (torch.float32, torch.float64, torch.int64):
            own = values_of(rank, dtype)
            kept = own.clone()
            total = group.sums(own)
            expected = values_of(0, dtype).double() + values_of(1, dtype).double()
            assert total.dtype == torch.float64
            assert torch.equal(total, expected)
            assert torch.equal(own, kept)
        large = torch.tensor([2.0**30, 1.0][rank])  # their sum is no float32
        assert group.sums(large).item() == 2.0**30 + 1
        assert group.gather(rank) == [0, 1]
    assert not dist.is_initialized()
    with process_group() as again:  # a command may follow another
        assert again is not group
        assert again.gather("x" * (rank + 1)) == ["x", "xx"]


def test_maxima_and_sums_are_exact_and_a_group_opens_within_itself_and_again(tmp_path: Path) -> None:
    ended = run_processes(tmp_path, 2, compute)
    assert [(process.status, process.printed) for process in ended] == [(0, "")] * 2


def test_one_process_gets_what_it_gave_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", None)
    tensor = torch.ones(2, 3)
    assert ProcessGroup().sums(tensor) is tensor
    assert ProcessGroup().maxima((1.5, -2.0)) == [1.5, -2.0]
    with process_group() as group, process_group() as inner:
        assert inner is group
    with ProcessGroup().explaining_loss(), process_group():
        pass


def test_a_gpu_that_is_chosen_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [ProcessGroup(rank, 4, rank).device("auto") for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert ProcessGroup(3, 4, 3).device("cpu") == "cpu"
    assert ProcessGroup().device("auto") == "auto"
    assert chosen == ["cuda:0", "cuda:1", "cuda:0"]


# Ends


def end_late(rank: int) -> None:
    with process_group() as group:
        group.wait()
        time.sleep([0.3, 0.0, 3.0][rank])  # longer than a silence is borne; process 0 hosts the store


def test_a_process_that_ends_in_order_is_not_missed(tmp_path: Path) -> None:
    ended = run_processes(tmp_path, 3, end_late)
    assert [(process.status, process.printed) for process in ended] == [(0, "")] * 3


def fail_and_continue(rank: int) -> None:
    def refuse() -> None:
        raise InputError(expected="an image", got="a hole", do="mend it")

    with pytest.raises((InputError, OtherProcessError)), process_group() as group:
        group.run_on_main(refuse)
    assert not dist.is_initialized()
    with process_group() as group:
        assert group.gather(rank) == [0, 1]
    time.sleep(4 if rank == 0 else 0)  # longer than the silence of the other, which failed, is borne


def test_a_program_may_handle_an_error_and_continue(tmp_path: Path) -> None:
    ended = run_processes(tmp_path, 2, fail_and_continue)
    assert [(process.status, process.printed) for process in ended] == [(0, "")] * 2


STUCK = """
    import os, sys, time
    import torch, torch.distributed as dist
    from pipeline.runtime.process_group import process_group

    with process_group() as group:
        group.wait()
        if group.rank == 1:
            time.sleep(60)  # alive, and never comes to what process 0 has begun
        under_way = dist.all_reduce(torch.ones(3), async_op=True)
        print("said", end="")
        raise {error}
"""


@pytest.mark.parametrize(("error", "status"), [("ValueError('mine')", 1), ("SystemExit(143)", 143)])
def test_an_error_ends_the_process_while_a_connection_is_in_use(error: str, status: int) -> None:
    """Both `destroy_process_group` and the end of Python would wait for the other process."""
    program = textwrap.dedent(STUCK.format(error=error))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", program]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen(start, env=os.environ | place | {"RANK": rank}, **options) for rank in "01"]  # type: ignore[call-overload]
    try:
        said, printed = both[0].communicate(timeout=30)
    finally:
        both[1].kill()
        both[1].communicate()
    assert (both[0].returncode, said) == (status, "said")
    assert printed.count("Error") == ("mine" in error)


# Environments


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"MASTER_ADDR": None}, "expected the host of process 0 as MASTER_ADDR in the environment .*, got none; start"),
        ({"MASTER_PORT": None}, "expected a whole number as MASTER_PORT .*, got none; start the processes with torchr"),
        ({"RANK": "-1"}, "expected a whole number as RANK .*, got -1;"),
        ({"RANK": "2"}, r"expected a RANK below WORLD_SIZE \(2\) .*, got 2;"),
        ({"WORLD_SIZE": "two"}, "expected a whole number as WORLD_SIZE .*, got two;"),
        ({"LOCAL_RANK": "x"}, "expected a whole number as LOCAL_RANK .*, got x;"),
        ({}, r"expected process 0 to listen on 127\.0\.0\.1:\d+, got .*refused; check MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0"}, "expected all 2 processes to start within 0 minutes, got 1; look at what the others print"),
    ],
)
def test_an_environment_without_the_others_is_one_line(
    changed: dict[str, str | None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "JOIN_WITHIN", 0.05)
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (place | {"LOCAL_RANK": None, "TORCHELASTIC_USE_AGENT_STORE": None} | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line), process_group():
        pass


# Errors of libraries

GLOO = "[/w/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:2455: Connection reset by peer. "


def test_what_a_library_says_about_another_process_is_told_from_other_errors() -> None:
    assert is_loss(RuntimeError(GLOO + "This is typically caused by a remote worker hanging"))
    assert is_loss(dist.DistBackendError("NCCL error"))
    assert not is_loss(RuntimeError("The size of tensor a (3) must match the size of tensor b (2)"))
    assert not is_loss(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert (
        in_short(RuntimeError(GLOO + "This is typically so")) == "Read error [127.0.0.1]:2455: Connection reset by peer"
    )
    assert in_short(RuntimeError("")) == ""
