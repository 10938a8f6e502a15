"""The outbox: what a tracking server did not take is kept in the run's folder, and sent when the server answers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import OUTBOX
from fedfactory_ray.tracking.patience import Patience, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
KEEP_SECONDS, END_SECONDS = 5.0, 10.0
"""How often the file is written anew, at most; how long a job's end waits for the server, at most."""
PARENT = "mlflow.parentRunId"
REFUSED = {
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "BAD_REQUEST",
}
"""Codes of a server that answers and will not take a call, now or later."""


@dataclass(frozen=True)
class Entry:
    """A call that tells MLflow something of a run: that it begins, as a `name` with tags, points (metric, step, value,
    milliseconds since 1970), parameters, a tag, or its end. `store` is the digest of the store's address, `run` a key
    of ours until MLflow has given an id; so is a parent among `texts`."""

    store: str
    call: Literal["begin", "points", "params", "tag", "end"]
    run: str
    name: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, int, float, int]] = field(default_factory=list)
    time: int = 0


class Outbox:
    """What is to be told to MLflow, in order. What waits for another store than the configured one goes on waiting.

    The file in `storage` has a line an entry; it is there only while something waits, and the run's next start reads
    it. Without a storage what waits is kept in memory alone.
    """

    def __init__(
        self, client: MlflowClient, experiment_id: str, store: str = "", storage: Storage | None = None
    ) -> None:
        self.client, self.experiment_id, self.storage, self.patience = client, experiment_id, storage, Patience()
        self.store = hashlib.sha256(store.encode()).hexdigest()[:16]  # an address may hold a password
        self.ids: dict[str, str] = {}
        left = read_outbox(storage) if storage is not None else []
        self.waiting = deque(entry for entry in left if entry.store == self.store)
        self.others = [entry for entry in left if entry.store != self.store]
        self.stored, self.written = bool(left), -math.inf
        self.lock = threading.RLock()

    def begin(self, name: str, tags: dict[str, str]) -> str:
        """Begin a run; returns its key."""
        key = uuid.uuid4().hex
        self.send("begin", key, name=name, texts=tags)
        return key

    def send(self, call: Literal["begin", "points", "params", "tag", "end"], run: str, **what: Any) -> None:
        """Tell something of a run, now or later, after all that waits."""
        self.waiting.append(Entry(self.store, call, run, time=int(time.time() * 1000), **what))
        self.drain()

    def drain(self) -> None:
        """Send what waits while the server takes it."""
        with self.lock:
            while self.waiting:
                if not self.patience.attempt(partial(self._make, self.waiting[0]), otherwise=False):
                    break
                self.waiting.popleft()
            if not self.waiting or time.monotonic() - self.written > KEEP_SECONDS:
                self._keep(list(self.waiting))

    def gather(self) -> None:
        """Ask a server that has failed for nothing more until `conclude`: each call might wait for it."""
        if self.patience.told:
            self.patience.silent_until = math.inf

    def conclude(self) -> None:
        """Try once more at a job's end, which waits for END_SECONDS at most; keep what is left, and tell of it."""
        if self.patience.silent_until == math.inf:
            self.patience.silent_until = -math.inf
        trying = threading.Thread(target=self.drain, daemon=True, name="outbox")
        trying.start()
        trying.join(END_SECONDS)
        left = list(self.waiting)
        self._keep(left)
        if left:
            told = "they are kept in the run's folder, and the same command sends them"
            log.warning("MLflow lacks %d entries of this run: %s", len(left), told if self.storage else "they are lost")
        if trying.is_alive():
            self.storage = None  # the folder is another's when this job has ended
        self.patience.conclude()

    def _keep(self, left: list[Entry]) -> None:
        """Write down what waits, or delete the file where nothing does."""
        lines = self.others + [self._known(entry) for entry in left]
        if self.storage is not None and (lines or self.stored):
            if lines:
                text = "".join(f"{json.dumps(asdict(line), sort_keys=True)}\n" for line in lines)
                self.storage.write(OUTBOX, text.encode())
            else:
                self.storage.delete(OUTBOX)
            self.stored, self.written = bool(lines), time.monotonic()

    def _known(self, entry: Entry) -> Entry:
        """The entry with MLflow's ids of the runs that have begun."""
        texts = {k: self.ids.get(v, v) if k == PARENT else v for k, v in entry.texts.items()}
        return replace(entry, run=self.ids.get(entry.run, entry.run), texts=texts)

    def _make(self, entry: Entry) -> bool:
        """Make a call. True also where the server answers that it will never take it."""
        from mlflow.exceptions import MlflowException

        try:
            found = CALLS[entry.call](self, self._known(entry))
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            log.warning("MLflow refuses an entry of this run: %s", first_line(error))
            return True
        if entry.call == "begin":
            self.ids[entry.run] = found
        return True


def _begin(outbox: Outbox, entry: Entry) -> Any:
    made = outbox.client.create_run(outbox.experiment_id, start_time=entry.time, run_name=entry.name, tags=entry.texts)
    return str(made.info.run_id)


def _points(outbox: Outbox, entry: Entry) -> None:
    from mlflow.entities import Metric

    points = [Metric(name, value, when, step) for name, step, value, when in entry.points]
    outbox.client.log_batch(entry.run, metrics=points)


def _params(outbox: Outbox, entry: Entry) -> None:
    from mlflow.entities import Param

    outbox.client.log_batch(entry.run, params=[Param(name, value) for name, value in entry.texts.items()])


def _tag(outbox: Outbox, entry: Entry) -> None:
    for name, value in entry.texts.items():
        outbox.client.set_tag(entry.run, name, value)


def _end(outbox: Outbox, entry: Entry) -> None:
    outbox.client.set_terminated(entry.run, entry.name, entry.time)


CALLS: dict[str, Callable[[Outbox, Entry], Any]] = {
    "begin": _begin,
    "points": _points,
    "params": _params,
    "tag": _tag,
    "end": _end,
}


def read_outbox(storage: Storage) -> list[Entry]:
    """What waits in a run's folder. Lines that are damaged are told by the file's path, and given up."""
    found, damaged = [], 0
    for line in storage.read(OUTBOX).splitlines() if storage.exists(OUTBOX) else ():
        try:
            found.append(ENTRY.validate_python(json.loads(line)))
        except (ValueError, RecursionError, ValidationError):
            damaged += 1
    if damaged:
        log.warning("%s/%s: %d lines are damaged; MLflow will lack them", storage.uri, OUTBOX, damaged)
    return found


ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
