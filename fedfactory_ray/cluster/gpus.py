"""The cluster's GPUs: how large they are, by node, and what is needed of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedfactory_ray.cluster.plan import eligible
from fedfactory_ray.settings.data import SiloConfig

TINY = 0.0001
"""Of a GPU, to look at it: the smallest part that Ray counts."""


@dataclass(frozen=True)
class Gpu:
    """Bytes of a GPU's memory, and what precision `auto` comes to on it."""

    memory: int
    precision: str


@dataclass(frozen=True)
class Need:
    """Bytes of a GPU's memory: `fixed`, and so many for each image that passes through a network at once."""

    fixed: int
    per_image: int

    def of(self, n_images: int) -> int:
        """Bytes while `n_images` pass at once."""
        return self.fixed + n_images * self.per_image


def look_at_gpus(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Gpu]:
    """The GPU of each of these nodes of Ray that has any, by node; those of one node are taken to be alike.

    Raises ResourcesError, as that of the task, where torch cannot use one.
    """
    ids = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    asked = [
        _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in ids
    ]
    return dict(zip(ids, ray.get(asked), strict=True))


@ray.remote(num_cpus=0, num_gpus=TINY)
def _look() -> Gpu:
    from fedfactory_ray.cluster import devices

    return Gpu(*devices.gpu(ray.get_gpu_ids()))


def smallest(nodes: Sequence[Mapping[str, Any]], gpus: Mapping[str, Gpu], silos: Sequence[SiloConfig]) -> Gpu:
    """The smallest GPU on which clients may run: of a node that may read one of the `silos`, or of any if there is no
    such node. Of several arithmetics the one that takes most memory."""
    held = [node["NodeID"] for node in nodes if any(eligible(node, silo) for silo in silos)]
    found = [gpus[node] for node in held if node in gpus] or list(gpus.values())
    precision = "fp32" if any(gpu.precision == "fp32" for gpu in found) else found[0].precision
    return Gpu(min(gpu.memory for gpu in found), precision)
