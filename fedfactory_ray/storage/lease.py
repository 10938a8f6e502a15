"""The lease on a run's folder: one process at a time writes there, and a killed one is followed at once.

Its holder writes the lease anew every few seconds, on whatever storage the folder lies. Who finds one that is not
written any more, or whose process is gone from this machine, takes it over.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from fedfactory_ray.errors import FolderHeldError, StorageError
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import DOOR, LEASE

BEAT, OLD = 10.0, 60.0
"""Seconds between two heartbeats; age, in seconds, of a heartbeat whose process is taken for dead."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder: a process of a host. `place` are the machine's boot and its namespace of processes, in which
    `pid` and `born` (seconds since 1970) tell the process for good; `beats` counts heartbeats."""

    token: str
    host: str
    place: str
    pid: int
    born: float
    since: str
    beats: int = 0

    @classmethod
    def me(cls) -> Holder:
        """This process, now."""
        pid, now = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(uuid.uuid4().hex, socket.gethostname(), _place(), pid, psutil.Process(pid).create_time(), now)

    @property
    def here(self) -> bool:
        """Whether it is, or was, a process that this one can see."""
        return self.place == _place()

    @property
    def gone(self) -> bool:
        """Whether its process has ended, as far as can be seen from here."""
        if not self.here:
            return False
        try:
            process = psutil.Process(self.pid)
            # A zombie has ended; its parent has not looked yet.
            return abs(process.create_time() - self.born) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def to_json(self) -> bytes:
        """As a file."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def _place() -> str:
    """The boot of this machine and the namespace in which it numbers processes; elsewhere than on Linux its name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def holder(storage: Storage, name: str = LEASE) -> Holder | None:
    """Who holds a folder, by its lease; None where nobody does, or where the file could not be read just now: object
    stores give half of one that is written anew at the same time."""
    try:
        return Holder(**storage.read_json(name))
    except (OSError, StorageError, TypeError):
        return None


def refuse_held(storage: Storage) -> None:
    """Raise FolderHeldError where a living process of this machine holds the folder: a look that writes nothing."""
    found = holder(storage)
    if found is not None and found.here and not found.gone:
        raise FolderHeldError(storage.uri, str(found))


@contextmanager
def hold(storage: Storage, *, take_over: bool = False) -> Iterator[int]:
    """Hold a folder while the block runs; gives the time of its lease (see Storage.written).

    A holder on another host is watched until its next heartbeat, or until the last one is old. Raises FolderHeldError
    where it lives, unless `take_over`: then it is told to stop; and where another start takes this one's lease over.
    """
    mine = _acquire(storage, take_over=take_over)
    began, ended, lost = storage.written(LEASE), threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(storage, mine, ended, lost), daemon=True, name="lease")
    beating.start()
    try:
        yield began
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise FolderHeldError(storage.uri, f"{holder(storage)}, which took it over") from None
    finally:
        ended.set()
        beating.join()
        found = holder(storage)
        if found is not None and found.token == mine.token:
            storage.delete(LEASE)


def _beat(storage: Storage, mine: Holder, ended: threading.Event, lost: threading.Event) -> None:
    """Write the lease anew until `ended`, and stop the main thread where another holds it."""
    beats = 0
    while not ended.wait(BEAT):
        beats += 1
        with suppress(OSError, StorageError):  # the next beat tries again
            found = holder(storage)
            if found is not None and found.token != mine.token:
                lost.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
                return
            storage.write(LEASE, replace(mine, beats=beats).to_json())


def _acquire(storage: Storage, *, take_over: bool) -> Holder:
    mine, seen = Holder.me(), None
    while True:
        with _door(storage, mine):
            found = holder(storage)
            free = found.gone if found else not storage.exists(LEASE)
            free = free or storage.age(LEASE) > OLD
            if free or take_over:
                storage.write(LEASE, mine.to_json())
        if not free and take_over:
            time.sleep(BEAT)  # its next heartbeat tells it
        if free or take_over:
            return mine
        if found and (found.here or (seen and found != seen)):
            raise FolderHeldError(storage.uri, str(found))
        seen = found or seen
        time.sleep(BEAT / 10)


@contextmanager
def _door(storage: Storage, mine: Holder) -> Iterator[None]:
    """One at a time may look at a lease and write it."""
    while not storage.create(DOOR, mine.to_json()):
        before = holder(storage, DOOR)
        if (before is not None and before.gone) or storage.age(DOOR) > OLD:
            storage.delete(DOOR)  # it was killed on the threshold
        time.sleep(0.05)
    try:
        yield
    finally:
        storage.delete(DOOR)
