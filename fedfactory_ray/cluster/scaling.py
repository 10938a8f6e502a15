"""Scaling: asking the cluster's autoscaler for the nodes that a plan lacks, and waiting until they are there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ray.autoscaler.sdk import request_resources

from fedfactory_ray.cluster.nodes import alive_nodes, autoscales, slots, startable_nodes
from fedfactory_ray.errors import ResourcesError

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
TOLD_SECONDS = 30.0
"""How often it is told what is waited for."""
SETTLED_SECONDS = 60.0
"""With room for the workers that must run at once, nobody waits longer than this for the next node."""


@dataclass(frozen=True)
class Crew:
    """Workers of one phase: what each asks for, how many must run at once, and how many may."""

    num_cpus: float
    num_gpus: float
    least: int
    most: int

    def fits(self, nodes: list[dict[str, float]]) -> int:
        """How many of those that may run have room on the nodes."""
        return min(self.most, slots(nodes, self.num_cpus, self.num_gpus))

    @property
    def bundle(self) -> dict[str, float]:
        """What each asks for, as Ray's autoscaler is told."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})

    def __str__(self) -> str:
        return f"{self.most} × ({self.num_cpus:g} CPUs, {self.num_gpus:g} GPUs)"


def scale_up(crews: Mapping[str, Crew], patience: float) -> None:
    """Ask the autoscaler, where there is one, for the nodes that the phases' `crews` lack, and wait for them.

    Waits until all that may come have room; once all that must come have, SETTLED_SECONDS at most for each further
    node. Raises ResourcesError where those have no room after `patience` seconds.
    """

    def nodes() -> list[dict[str, float]]:
        return [node["Resources"] for node in alive_nodes()]

    alive, startable = nodes(), startable_nodes()
    goals = {name: crew.fits([*alive, *startable]) for name, crew in crews.items()}
    lacking = {name: crew for name, crew in crews.items() if crew.fits(alive) < goals[name]}
    if not lacking:
        return
    # One phase follows another, so of those that ask for the same the larger counts.
    asked: dict[tuple[tuple[str, float], ...], int] = {}
    for name, crew in lacking.items():
        bundle = tuple(crew.bundle.items())
        asked[bundle] = max(goals[name], asked.get(bundle, 0))
    request_resources(bundles=[dict(bundle) for bundle, n in asked.items() for _ in range(n)])
    what = "; ".join(f"{crew} for resources.{name}" for name, crew in lacking.items())
    began = changed = time.monotonic()
    told = float("-inf")
    while any(crew.fits(alive) < goals[name] for name, crew in lacking.items()):
        now = time.monotonic()
        enough = all(crew.fits(alive) >= min(crew.least, goals[name]) for name, crew in crews.items())
        if enough and now - changed >= SETTLED_SECONDS:
            log.warning("no further node came for %g s: the job goes on with %d", SETTLED_SECONDS, len(alive))
            return
        if not enough and now - began >= patience:
            request_resources(bundles=[])
            raise ResourcesError(
                f"{len(alive)} node(s), {patience:g} s after the autoscaler was asked for more; `ray status` tells",
                what,
                "a longer resources.scale_up_seconds, or resources.*.num_gpus=0 to compute on CPUs",
            )
        if now - told >= TOLD_SECONDS:
            log.info("waiting for nodes from the autoscaler: %s; %d node(s) so far", what, len(alive))
            told = now
        time.sleep(LOOK_SECONDS)
        seen = nodes()
        changed = time.monotonic() if len(seen) > len(alive) else changed
        alive = seen


def release() -> None:
    """Ask the autoscaler, where there is one, for nothing any more: nodes that idle may go."""
    if autoscales():
        request_resources(bundles=[])
