"""Watchdog: tells what a job waits for on a busy cluster, and ends one whose cluster is gone."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply
from ray.exceptions import LocalRayletDiedError, RpcError

from fedfactory_ray.cluster.joining import ANSWER_SECONDS, answers
from fedfactory_ray.errors import ClusterGoneError

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0
WAIT_SECONDS = 10.0
"""How long something may wait for resources before it is told…"""
AGAIN_SECONDS = 60.0
"""…and after how long it is told again."""
GONE_SECONDS = 30.0
"""How long a cluster may be without a living node, or may not answer, before it counts as gone."""
END_SECONDS = 10.0
"""How long a job whose cluster is gone may take to end by itself."""


class Watchdog:
    """Looks at the connected cluster while the block runs, in a thread of its own.

    Where the cluster is gone it interrupts the main thread, which Ray would let wait for ever, and the block raises
    ClusterGoneError in the place of the KeyboardInterrupt. Where the block does not end, because Ray waits in its
    cleaning up too, `last_words` are spoken and the process ends with status 2.
    """

    def __init__(self, last_words: Callable[[ClusterGoneError], None]) -> None:
        self.address: str = ray.get_runtime_context().gcs_address
        self.last_words = last_words
        self.gone: ClusterGoneError | None = None
        self._waiting_since: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._alone_since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is not None and issubclass(kind, LocalRayletDiedError):
            self.gone = self.gone or _refusal("Ray's daemon on this machine ended")
        if self.gone is not None and kind is not None:
            raise self.gone

    def _watch(self) -> None:
        client, reply = GcsClient(address=self.address), GetClusterResourceStateReply()
        while not self._over.wait(LOOK_SECONDS):
            state = None
            if answers(self.address):
                # What Ray's SDK for its autoscaler asks, but with an end: one that dies meanwhile would not reply.
                with contextlib.suppress(RpcError):
                    reply.ParseFromString(client.get_cluster_resource_state(timeout_s=ANSWER_SECONDS))
                    state = reply.cluster_resource_state
            now = time.monotonic()
            lonely = self.lonely(state)
            if not lonely:
                self._alone_since = None
                self.tell(state, now)
            elif self._alone_since is None:
                self._alone_since = now
            elif now - self._alone_since >= GONE_SECONDS and not self._over.is_set():
                self.gone = _refusal(f"{lonely} for {GONE_SECONDS:g} s")
                _thread.interrupt_main()
                if not self._over.wait(END_SECONDS):
                    self.last_words(self.gone)
                    os._exit(2)
                return

    def lonely(self, state: Any) -> str:
        """What tells that nobody can serve, of a look at the cluster (None: no answer); empty if somebody can."""
        if state is None:
            return f"nothing answered at {self.address}"
        return "" if any(node.total_resources for node in state.node_states) else "no node lived"

    def tell(self, state: Any, now: float) -> None:
        """Say what has waited for WAIT_SECONDS without a break."""
        asked = {request_text(pending.request.resources_bundle) for pending in state.pending_resource_requests}
        self._waiting_since = {what: self._waiting_since.get(what, now) for what in asked}
        for what, since in self._waiting_since.items():
            if now - since >= WAIT_SECONDS and now - self._told.get(what, float("-inf")) >= AGAIN_SECONDS:
                self._told[what] = now
                log.info("waiting for %s: %s", what, in_use(state))


def _refusal(found: str) -> ClusterGoneError:
    return ClusterGoneError(found, "the same command on a living cluster, which goes on from what is stored")


def request_text(bundle: Any) -> str:
    """What somebody asks for: `1 CPU, 1 GPU`."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(bundle.items())) or "a place"


def in_use(state: Any) -> str:
    """How much of the cluster's CPUs and GPUs is in use: `CPU 2 of 2 in use`."""
    told = []
    for kind in ("CPU", "GPU"):
        total = sum(node.total_resources.get(kind, 0) for node in state.node_states)
        free = sum(node.available_resources.get(kind, 0) for node in state.node_states)
        told += [f"{kind} {total - free:g} of {total:g} in use"] if total else [f"no {kind}"]
    return ", ".join(told)
