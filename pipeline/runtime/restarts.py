"""What a job of torchrun remembers while it restarts its workers (`--max-restarts`)."""

import hashlib
import os

from .meeting import ROOM, open_store, read_launch


class JobMemory:
    """Remembers keys for as long as the job of torchrun that started this process, over restarts of its workers.

    All workers of the job share it. It is kept in the store that the agent of the first machine hosts, and is lost with
    that. Without torchrun it remembers nothing and costs nothing; otherwise a call takes one message to the store.

    A job may run several commands, so a key should name what it is about: a folder, say. (What trains twice into one
    folder within a job, from Python, is then taken for a restart.)

    Raises:
        InputError: the store cannot be reached.
    """

    def __init__(self) -> None:
        launch = read_launch(least=1) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        self._store = None if launch is None else open_store(launch)

    def note(self, key: str) -> None:
        """Remember `key` from now on."""
        if self._store is not None:
            self._store.set(_name(key), "")

    def knows(self, key: str) -> bool:
        """Return whether a process of this job has noted `key`, in this attempt or an earlier one."""
        return self._store is not None and self._store.check([_name(key)])


def _name(key: str) -> str:
    return f"{ROOM}/job/{hashlib.sha256(os.fsencode(key)).hexdigest()}"  # the store takes no bytes that are not UTF-8
