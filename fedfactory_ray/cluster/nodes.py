"""The cluster's nodes: which live, which its autoscaler may still start, and how many workers fit on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state

UNBOUNDED = 1000
"""Nodes counted of a kind without an upper bound."""
NODE_TYPE = "ray.io/node-group"
"""Label by which Ray tells a node's kind."""


def alive_nodes() -> list[dict[str, Any]]:
    """The living nodes, as `ray.nodes()` tells them."""
    return [node for node in ray.nodes() if node["Alive"]]


def autoscales() -> bool:
    """Whether the cluster has an autoscaler that tells which kinds of nodes it may start."""
    return state.get_cluster_config() is not None


def startable_nodes() -> list[dict[str, float]]:
    """Resources of each node that the cluster's autoscaler may still start; none where there is no autoscaler.

    It publishes its kinds of nodes and their bounds where Ray Data looks for them too: Ray has no public call for it.
    """
    config = state.get_cluster_config()
    if config is None:
        return []
    there = Counter(node["Labels"].get(NODE_TYPE) for node in alive_nodes())
    found: list[dict[str, float]] = []
    for kind in config.node_group_configs:
        most = UNBOUNDED if kind.max_count < 0 else kind.max_count
        found += [dict(kind.resources)] * max(0, most - there[kind.name])
    return found


def slots(nodes: Sequence[Mapping[str, float]], num_cpus: float, num_gpus: float) -> int:
    """How many workers of these demands fit on the nodes (CPU and GPU totals a node)."""
    fits = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) / num_cpus + 1e-9)
        by_gpu = int(node.get("GPU", 0)) * int(1 / num_gpus + 1e-9) if num_gpus else by_cpu
        fits += min(by_cpu, by_gpu)
    return fits
