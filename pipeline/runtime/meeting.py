"""Where the processes of a group meet: a key-value store over TCP, and in it names for this start of the group alone.

Under torchrun its agent hosts the store, and keeps it with all its keys while it restarts the workers. So the addresses
of processes that are gone are still in it, and a process that reads one waits for ever (seen with 3 processes in torch
2.14). The count of restarts cannot tell the starts apart: agents of several machines count their own failures only. So
the main process draws a name for every start, and the others ask for it.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, TypeVar, cast
from uuid import uuid4

import torch.distributed as dist

from ..errors import InputError

T = TypeVar("T")

JOIN_WITHIN = 30 * 60.0  # seconds, in which all processes must have started; as in torch
PATIENCE = timedelta(days=7)  # how long a process waits for the others, whose shares of the work take different times
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25  # seconds between two looks at the store
ROOM = "codegrid"  # the prefix of all our keys
LOST = "lost"  # the key under which all count who notice that a process is lost


class Store(Protocol):
    """Keys and values that all processes share, as torch has it; each call is a message and its answer."""

    def set(self, key: str, value: str) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """Return a value, once there is one."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return several values, once there are all."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys have values."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher, such as torchrun, says in the environment of each process that it starts."""

    rank: int  # of this process
    count: int  # of processes
    local_rank: int  # of this process on its machine
    host: str  # where the store is
    port: int
    hosted_by_agent: bool  # the store is torchrun's, which survives the processes; else process 0 hosts it

    @property
    def hosts_store(self) -> bool:
        """Whether this process hosts the store."""
        return self.rank == 0 and not self.hosted_by_agent


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """One start of a group, at which all processes have met."""

    name: str  # of this start; no other in the same store has it
    store: Store  # what this start alone keeps
    hosts: list[str]  # names of the machines of all processes, by rank


def read_launch(least: int = 2) -> Launch | None:
    """Return what the launcher says; None without one, or if it started less than `least` processes.

    Raises:
        InputError: the environment names a process of several, and not all that is needed to find the others.
    """
    count = _number("WORLD_SIZE", "1")
    if count < least or "RANK" not in os.environ:  # some schedulers leave WORLD_SIZE for a program that they start once
        return None
    rank, port = _number("RANK"), _number("MASTER_PORT")
    if rank >= count:
        raise _wrong(f"a RANK below WORLD_SIZE ({count})", str(rank))
    if not os.environ.get("MASTER_ADDR"):
        raise _wrong("the host of process 0 as MASTER_ADDR", "none")
    return Launch(
        rank=rank,
        count=count,
        local_rank=_number("LOCAL_RANK", "0"),
        host=os.environ["MASTER_ADDR"],
        port=port,
        hosted_by_agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


@cache  # so that a store that this process hosts is there as long as it
def open_store(launch: Launch) -> Store:
    """Return this process's connection to the store, and host it if nobody else does.

    Raises:
        InputError: the store cannot be hosted or reached.
    """
    if not launch.hosts_store:
        reach_store(launch).close()
    return connect(launch, hosts_store=launch.hosts_store)


def connect(launch: Launch, *, hosts_store: bool = False) -> Store:
    """Return a further connection to the store. Raise InputError if that is impossible."""
    try:
        return cast(
            "Store",
            dist.TCPStore(  # type: ignore[attr-defined]  # public, and documented
                launch.host,
                launch.port,
                is_master=hosts_store,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=PATIENCE,
            ),
        )
    except RuntimeError as error:
        raise _no_store(launch, str(error).splitlines()[0]) from None


def within(store: Store, prefix: str) -> Store:
    """Return the part of a store in which every key starts with `prefix`."""
    return cast("Store", dist.PrefixStore(prefix, cast("Any", store)))  # type: ignore[attr-defined]


def reach_store(launch: Launch) -> socket.socket:
    """Return a plain connection to the store, once something listens there. Raise InputError if nothing does.

    To ask the store itself about that prints pages of C++ stack on standard error.
    """
    error: OSError | None = None

    def connected() -> socket.socket | None:
        nonlocal error
        try:
            return socket.create_connection((launch.host, launch.port), timeout=10)
        except OSError as refused:
            error = refused
            return None

    line = wait_until(connected)
    if line is None:
        raise _no_store(launch, str(error))
    return line


def meet(store: Store, launch: Launch) -> Meeting:
    """Return once every process of this start has called this.

    Raises:
        InputError: one has not within JOIN_WITHIN.
    """
    name = _call(store, launch) if launch.rank == 0 else _answer(store, launch)
    start = within(store, f"{ROOM}/{name}")
    hosts = start.multi_get([f"host/{rank}" for rank in range(launch.count)])
    return Meeting(name=name, store=start, hosts=[host.decode(errors="replace") for host in hosts])


def wait_until(condition: Callable[[], T | None], limit: float | None = None) -> T | None:
    """Return what `condition` returns once that is true, or None after `limit` seconds (by default JOIN_WITHIN).

    A signal interrupts this, which it does not while a process waits inside of the store.
    """
    until = time.monotonic() + (JOIN_WITHIN if limit is None else limit)
    pause = FIRST_PAUSE
    while not (found := condition()):
        if time.monotonic() > until:
            return None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return found


def _call(store: Store, launch: Launch) -> str:
    """Draw the name of this start, tell it whoever asks, and return it once all have it."""
    name, others = uuid4().hex, range(1, launch.count)
    start = within(store, f"{ROOM}/{name}")
    _introduce(start, 0)

    def complete() -> bool:
        for rank in others:  # also those of earlier starts, whose questions are still there
            if store.check([f"{ROOM}/asks/{rank}"]):
                store.set(f"{ROOM}/answer/{store.get(f'{ROOM}/asks/{rank}').decode()}", name)
        return start.add("joined", 0) == len(others)

    if not wait_until(complete):
        raise _missing(launch, f"{1 + start.add('joined', 0)}")
    start.set("complete", "")
    return name


def _answer(store: Store, launch: Launch) -> str:
    """Ask the main process for the name of this start, and return it once all have it."""
    question = uuid4().hex
    store.set(f"{ROOM}/asks/{launch.rank}", question)
    if not wait_until(lambda: store.check([f"{ROOM}/answer/{question}"])):
        raise _missing(launch, "no main process")
    name = store.get(f"{ROOM}/answer/{question}").decode()
    start = within(store, f"{ROOM}/{name}")
    _introduce(start, launch.rank)
    start.add("joined", 1)
    if not wait_until(lambda: start.check(["complete"])):
        raise _missing(launch, f"{1 + start.add('joined', 0)}")
    return name


def _introduce(start: Store, rank: int) -> None:
    """Store what the others look for from the first moment on."""
    start.set(f"host/{rank}", socket.gethostname())
    start.set(beat_key(rank), "0")
    start.set(end_key(rank), "")
    start.add(LOST, 0)


def beat_key(rank: int) -> str:
    """Return the key under which a process counts its signs of life."""
    return f"beat/{rank}"


def end_key(rank: int) -> str:
    """Return the key under which a process says how it ended; it holds an empty text before."""
    return f"end/{rank}"


def _number(name: str, default: str = "") -> int:
    """Return the number in a variable of the environment. Raise InputError if there is none."""
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit()):
        raise _wrong(f"a whole number as {name}", text or "none")
    return int(text)


def _wrong(expected: str, got: str) -> InputError:
    do = "start the processes with torchrun, or with a launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    return InputError(expected=f"{expected} in the environment of a process of several", got=got, do=do)


def _no_store(launch: Launch, got: str) -> InputError:
    if launch.hosts_store:
        expected, do = f"port {launch.port} to be free on {launch.host}", "choose another MASTER_PORT for all processes"
    else:
        expected = f"process 0 to listen on {launch.host}:{launch.port}"
        do = "check MASTER_ADDR and MASTER_PORT, and whether that process has started"
    return InputError(expected=expected, got=got, do=do)


def _missing(launch: Launch, got: str) -> InputError:
    return InputError(
        expected=f"all {launch.count} processes to start within {JOIN_WITHIN / 60:.0f} minutes",
        got=got,
        do="look at what the others print, and start all again",
    )
