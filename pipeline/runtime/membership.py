"""How a process joins the others of its group and leaves them, and what it says when one of them is lost."""

import atexit
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from . import heartbeat
from .console import exit_at_once, skip_the_end_of_python
from .heartbeat import ENDED, FAILED, STOPPED, Heartbeat
from .meeting import (
    LOST,
    PATIENCE,
    ROOM,
    Launch,
    Meeting,
    Store,
    connect,
    end_key,
    meet,
    open_store,
    reach_store,
    wait_until,
    within,
)

SIGNAL_STATUSES = {128 + number for number in (1, 2, 15)}  # of a program that SIGHUP, SIGINT or SIGTERM ended
SETTLE = 0.2  # seconds
SIGNAL_WAIT = 1.0  # seconds: a signal to all processes does not reach all at once
CONNECTIONS = re.compile("gloo|nccl|connection|socket|pair closure", re.IGNORECASE)  # in errors about another process


class OtherProcessError(SystemExit):
    """Ends this process with status 1 and no message, because another one says what went wrong."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(kw_only=True)
class Membership:
    """What this process knows about the others, and they about it."""

    launch: Launch
    store: Store  # of this start of the group; through a connection that only the main thread uses
    heartbeat: Heartbeat
    broken: bool = False  # a connection to another process is gone

    def loss(self, error: RuntimeError) -> InputError | OtherProcessError:
        """Return the error to raise where a connection to another process is gone, as `error` says."""
        self.broken = self.heartbeat.is_leaving = True
        time.sleep(SETTLE)  # a process that ends closes its connections one by one, perhaps that of the store last
        message = in_short(error)
        if self.heartbeat.store_is_gone():
            return self._loss_of_store(message)
        try:
            ends = self._ends()
            if STOPPED in ends:
                time.sleep(SIGNAL_WAIT)  # the same signal may be on its way to this process, and is the better reason
            if FAILED in ends or self.store.add(LOST, 1) > 1:
                return OtherProcessError()
        except RuntimeError:
            return self._loss_of_store(message)
        if STOPPED in ends:
            return self.heartbeat.lost(f"a signal that ended {self.heartbeat.names([ends.index(STOPPED)])}")
        return self.heartbeat.lost(f"one lost ({message})")

    def _loss_of_store(self, message: str) -> InputError | OtherProcessError:
        """Return the error to raise where the machine of process 0, with the store, is gone."""
        if self.heartbeat.is_told or not self.heartbeat.speaks_without_store():
            return OtherProcessError()
        return self.heartbeat.lost(f"{self.heartbeat.names([0])} lost ({message})")

    def leave(self) -> None:
        """End the group in order."""
        skip_the_end_of_python()
        self._say(ENDED)
        dist.destroy_process_group()
        self._wait_for_others(math.inf)
        self.heartbeat.stop()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends because of an error, and make sure that it does.

        Connections on which something is under way cannot be closed: to end them waits for the others, and so does
        Python at its end. They are left to the system, which closes them as the process ends.
        """
        self.heartbeat.is_leaving = True
        status = _status(error)
        self._say(STOPPED if status in SIGNAL_STATUSES else FAILED)
        if isinstance(error, (InputError, OtherProcessError)) and not self.broken:
            dist.destroy_process_group()
        else:
            atexit.register(exit_at_once, status)
        self._wait_for_others(heartbeat.BEAT_EVERY + 1)  # in which they have read it
        self.heartbeat.stop()  # a program that handles the error may continue

    def _ends(self) -> list[str]:
        """Return how each process ended, by rank: an empty text for one that has not."""
        return [end.decode() for end in self.store.multi_get([end_key(rank) for rank in range(self.launch.count)])]

    def _say(self, end: str) -> None:
        """Tell the others how this process ends."""
        if not self.heartbeat.store_is_gone():
            self.store.set(end_key(self.launch.rank), end)

    def _wait_for_others(self, limit: float) -> None:
        """Wait until all have ended, or `limit` seconds, if this process hosts the store."""
        if self.launch.hosts_store:
            wait_until(lambda: all(self._ends()), limit)


@contextmanager
def membership(launch: Launch) -> Iterator[Membership]:
    """Join the others that the launcher started, and leave them at the end of `with`.

    Raises:
        InputError: they cannot be reached, or are lost as they start.
    """
    meeting = meet(open_store(launch), launch)
    member = _member(launch, meeting)
    member.heartbeat.start()
    try:
        _connect_to_others(launch, meeting, member)
        yield member
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            member.leave()
        else:
            member.fail(error)
        raise
    else:
        member.leave()


def is_loss(error: RuntimeError) -> bool:
    """Return whether gloo, NCCL or the store say with this error that another process is gone."""
    return isinstance(error, dist.DistError) or CONNECTIONS.search(str(error)) is not None


def _member(launch: Launch, meeting: Meeting) -> Membership:
    """Return the membership, with connections to the store that the heartbeat alone uses."""
    line, own = reach_store(launch), within(connect(launch), f"{ROOM}/{meeting.name}")
    beating = Heartbeat(own, meeting.hosts, line, launch.rank, in_main=not launch.hosted_by_agent)
    return Membership(launch=launch, store=meeting.store, heartbeat=beating)


def _connect_to_others(launch: Launch, meeting: Meeting, member: Membership) -> None:
    """Connect the collectives of torch. Raise InputError if a process is lost meanwhile."""
    if dist.is_initialized():  # of an earlier group in this process, which an error ended
        dist.destroy_process_group()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store: Any = within(meeting.store, "torch")
    try:
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.count, timeout=PATIENCE)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise member.loss(error) from None


def in_short(error: RuntimeError) -> str:
    """Return what a library says, without the file it was compiled from and its advice."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", line).partition(". This is typically")[0]


def _status(error: BaseException) -> int:
    """Return the status with which a program ends by this error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
