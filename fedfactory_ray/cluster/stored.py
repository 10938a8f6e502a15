"""What is stored already: artefacts are looked at, and their files hashed, by workers side by side."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import ray

from fedfactory_ray.storage.artefact import Found, K, look
from fedfactory_ray.storage.files import Storage

log = logging.getLogger(__name__)


def find_all(storage: Storage, kind: type[K], wanted: Mapping[str, str]) -> dict[str, K]:
    """The artefacts of an earlier start, or kept of another run, by place: those of `wanted` (place → fingerprint) that
    are there and whole. Tells in a line what is kept, and what is made again and why. Raises CardError."""
    found = look_all(storage, kind, wanted)
    kept = {place: each.artefact for place, each in found.items() if each.artefact is not None}
    reasons = Counter(each.why for each in found.values() if each.why)
    again = "".join(f"; {n} made again: {why}" for why, n in sorted(reasons.items()))
    if found:
        log.info("%d %s%s there and kept%s", len(kept), kind.kind, "" if len(kept) == 1 else "s", again)
    return kept


def look_all(storage: Storage, kind: type[K], wanted: Mapping[str, str]) -> dict[str, Found[K]]:
    """What is there at the places of `wanted`, see `look`; places where nothing is are left out."""
    there = {name for root in {place.partition("/")[0] for place in wanted} for name in storage.names(root)}
    candidates = [place for place in wanted if kind.mark(place) in there]
    tasks = min(len(candidates), max(1, int(ray.cluster_resources().get("CPU", 1))))
    parts = [candidates[start::tasks] for start in range(tasks)]
    looked = ray.get([_look.remote(storage, kind, {place: wanted[place] for place in part}) for part in parts])
    found = {place: each for part in looked for place, each in part.items()}
    return {place: found[place] for place in candidates}


# No CPU, for actors may hold all of them. Spread, else all run on the driver's node, or wait for a trial's own room.
@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
def _look(storage: Storage, kind: type[K], wanted: dict[str, str]) -> dict[str, Found[K]]:
    return {place: look(storage, kind, place, fingerprint) for place, fingerprint in wanted.items()}
