"""Signs of life: a process of a group that vanishes ends the others within a minute, and one of them says which it was.

A killed process closes its connections, which gloo sees at once. Of a machine that vanishes, a process that is stopped,
or NCCL that hangs, nobody sees anything: all wait for ever. So a thread of each process counts in the store (`beat`),
reads what the others count, and ends its own process once another has been silent for LOST_AFTER. A second thread does
the same if the store does not answer, on which the first then waits.

Both run while the process computes, for torch and the collectives release Python's lock. Time is counted by their own
clock and only while they run themselves: when a whole group is stopped for an hour and continued, nobody is lost. With
64 processes the store answers 13 questions a second, each for 128 short values.
"""

import os
import socket
import threading
import time
from collections.abc import Sequence

from ..errors import InputError
from .console import report
from .meeting import LOST, Store, beat_key, end_key

BEAT_EVERY = 5.0  # seconds
LOST_AFTER = 45.0  # seconds of silence
TICK = 0.5  # seconds between two looks at the clock

ENDED = "ended"  # in order
FAILED = "failed"  # by an error, which that process printed or knew that another prints
STOPPED = "stopped"  # by a signal, about which it prints nothing


class Heartbeat:
    """Tells the others that this process is alive, and finds out whether they are.

    Args:
        store: where all have met, through a connection that nothing else uses.
        hosts: names of the machines of all processes, by rank.
        line: a plain connection to the same server, which shows whether that is there.
        rank: of this process.
        in_main: whether process 0 hosts the store; otherwise it is an agent on the same machine.
    """

    def __init__(self, store: Store, hosts: Sequence[str], line: socket.socket, rank: int, *, in_main: bool) -> None:
        self._store, self._hosts, self._line, self._rank = store, hosts, line, rank
        self._store_in_main = in_main
        line.setblocking(False)
        self.is_told = False  # whether another process says what went wrong
        self.is_leaving = False  # whether this process is about to end by an error, which it may have to print
        self._ending = threading.Event()
        self._clock = 0.0  # seconds, in which this process ran
        self._answered = 0.0  # when the store last answered
        self._seen = [(b"", 0.0)] * len(self._hosts)  # the count of each process, and when it changed
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads, as far as they do not wait for the store."""
        self._ending.set()
        for thread in self._threads:
            thread.join(timeout=1)
        self._line.close()

    def store_is_gone(self) -> bool:
        """Return whether the server of the store has closed the connection: a question would print C++ stacks."""
        try:
            return not self._line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:  # it never sends anything
            return False
        except OSError:
            return True

    def speaks_without_store(self) -> bool:
        """Return whether it is this process that prints a line about a store that is gone.

        It is the first on another machine than that of process 0, where the store was; on that if there is no other.
        """
        ranks = range(len(self._hosts))
        elsewhere = [rank for rank in ranks if self._hosts[rank] != self._hosts[0]]
        return self._rank == (elsewhere or [*ranks][1 if self._store_in_main else 0 :])[0]

    def lost(self, got: str) -> InputError:
        """Return the error about a process that is lost."""
        return InputError(
            expected=f"all {len(self._hosts)} processes to continue",
            got=got,
            do="run the same command again, a training with --resume: what is saved is kept",
        )

    def names(self, ranks: Sequence[int]) -> str:
        """Return which process on which machine, and how many more."""
        first = f"process {ranks[0] + 1} of {len(self._hosts)} on {self._hosts[ranks[0]]}"
        return first if len(ranks) == 1 else f"{first} and {len(ranks) - 1} more"

    def _beat(self) -> None:
        """Count, and read what the others count, every BEAT_EVERY seconds until the store fails."""
        count, ranks = 0, range(len(self._hosts))
        keys = [*map(beat_key, ranks), *map(end_key, ranks), LOST]
        while not self._ending.wait(BEAT_EVERY if count else 0):
            if self.store_is_gone():
                return
            count += 1
            try:
                self._store.set(beat_key(self._rank), str(count))
                values = self._store.multi_get(keys)
            except RuntimeError:  # the store is gone, which `_watch` finds out
                return
            self._answered = now = self._clock
            for rank in ranks:
                if values[rank] != self._seen[rank][0]:
                    self._seen[rank] = (values[rank], now)
            self._judge([end.decode() for end in values[len(ranks) : -1]], lost=int(values[-1]))

    def _judge(self, ends: Sequence[str], *, lost: int) -> None:
        """End this process if another is lost, or has been silent for long. Without a line if another process has one.

        Args:
            ends: how each process ended, by rank.
            lost: how many processes have noticed a loss.
        """
        if lost and self.is_told and not self.is_leaving:  # for a whole round, in which this process could end in order
            self._end("")
        self.is_told = self.is_told or lost > 0 or FAILED in ends
        silent = [rank for rank, (_, since) in enumerate(self._seen) if self._answered - since > LOST_AFTER]
        if any(ends[rank] == FAILED for rank in silent):
            self._end("")
        if gone := [rank for rank in silent if not ends[rank]]:
            first = self._store.add(LOST, 1) == 1
            self._end(f"no sign of life from {self.names(gone)} for {LOST_AFTER:.0f} s" if first else "")

    def _watch(self) -> None:
        """Keep the clock, and end this process if the store does not answer for long."""
        last = time.monotonic()
        while not self._ending.wait(TICK):
            now = time.monotonic()
            self._clock += min(now - last, 2 * TICK)
            last = now
            if self._clock - self._answered > LOST_AFTER + BEAT_EVERY:
                got = f"no answer from the machine of {self.names([0])} for {LOST_AFTER:.0f} s"
                self._end(got if self.speaks_without_store() and not self.is_told else "")

    def _end(self, got: str) -> None:
        """End this process, with a line about what was got if there is one."""
        if self._ending.is_set():
            return
        if got:
            report(f"Error: {self.lost(got)}")
        if self._store_in_main and self._rank == 0:
            time.sleep(BEAT_EVERY + 1)  # in which the others read in the store that this is said
        os._exit(1)
