"""The Ray cluster: joining it, and planning what runs where before anything starts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.places import ResourcesConfig, WorkerResources
from fedfactory_ray.settings.sections import SiloConfig

DATA_CPUS = 1.0
"""CPUs that Ray Data needs beside the classifier's workers: its tasks ask for one, and with less they wait for ever."""


def connect(num_cpus: int | None = None) -> None:
    """Join the running cluster (a submitted job, RAY_ADDRESS) or start Ray on this machine, without a flood of logs.

    `num_cpus` is for a Ray that is started here; by default it has the machine's.
    """
    if ray.is_initialized():
        pass
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        # Threads that wait shall not burn the cores that others need.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Ray's C++ side writes harmless errors into the terminal, and on few cores warns of many processes.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        # Nobody takes this machine away with notice, so no process of Ray Train has to watch for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        ray.init(num_cpus=num_cpus, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    quiet()


def quiet() -> None:
    """Keep Ray Data and Ray Train from writing progress of their own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Worker:
    """Resolved demands of one actor or worker, and how many of them fit side by side."""

    num_cpus: float
    num_gpus: float
    threads: int
    slots: int

    @property
    def options(self) -> dict[str, float]:
        """Its demands as Ray's options."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


@dataclass(frozen=True)
class Plan:
    """Resources of each phase on the cluster at hand."""

    client: Worker
    synthesis: Worker
    classifier: Worker


def slots(nodes: list[Mapping[str, float]], num_cpus: float, num_gpus: float) -> int:
    """How many workers of these demands fit on the nodes (CPU and GPU totals a node)."""
    fits = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) / num_cpus + 1e-9)
        by_gpu = by_cpu
        if num_gpus >= 1:
            by_gpu = int(node.get("GPU", 0) / num_gpus + 1e-9)
        elif num_gpus > 0:
            by_gpu = int(node.get("GPU", 0)) * int(1 / num_gpus + 1e-9)
        fits += min(by_cpu, by_gpu)
    return fits


def make_plan(config: ResourcesConfig, nodes: list[Mapping[str, float]] | None = None) -> Plan:
    """Resolve the default GPU counts and refuse what could never run (it would hang instead of failing).

    `nodes` are the resources of the living nodes, by default those of the connected cluster.
    """
    if nodes is None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    found = f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs"

    def resolve(name: str, wanted: WorkerResources, needed: int = 1) -> Worker:
        num_gpus = wanted.num_gpus if wanted.num_gpus is not None else float(gpus > 0)
        fits = slots(nodes, wanted.num_cpus, num_gpus)
        if fits < needed:
            raise ResourcesError(
                found,
                f"{needed} × ({wanted.num_cpus:g} CPUs, {num_gpus:g} GPUs) for resources.{name}; room for {fits}",
                f"smaller resources.{name}.num_cpus or .num_gpus"
                + (", or resources.classifier_workers" if needed > 1 else "")
                + ", or larger nodes",
            )
        return Worker(wanted.num_cpus, num_gpus, wanted.threads, min(fits, config.max_actors or fits))

    plan = Plan(
        resolve("client", config.client),
        resolve("synthesis", config.synthesis),
        resolve("classifier", config.classifier, config.classifier_workers),
    )
    left = cpus - config.classifier_workers * plan.classifier.num_cpus
    if left < DATA_CPUS:
        raise ResourcesError(
            found,
            f"{config.classifier_workers} × {plan.classifier.num_cpus:g} CPUs to fit and {DATA_CPUS:g} to read data",
            "a smaller resources.classifier.num_cpus: fractions share a core",
        )
    return plan


def placement(config: Config, client: str) -> dict[str, Any]:
    """Ray options that hold a client's actor and tasks to the nodes that may read its images."""
    for silo in config.partition.silos:
        if silo.name == client:
            return {"resources": silo.resources} | ({"label_selector": silo.labels} if silo.labels else {})
    return {}


def place(config: Config, client: str) -> str:
    """Name of where a client's actor may run: clients of the same place may use the same actor."""
    return json.dumps(placement(config, client), sort_keys=True)


def refuse_unknown_places(silos: Sequence[SiloConfig], nodes: list[dict[str, Any]] | None = None) -> None:
    """Raise ResourcesError where no living node has a silo's labels and resources: its client would wait for ever."""
    nodes = ray.nodes() if nodes is None else nodes
    alive = [node for node in nodes if node["Alive"]]
    for silo in silos:
        if not any(
            silo.labels.items() <= node["Labels"].items()
            and all(node["Resources"].get(name, 0) >= amount for name, amount in silo.resources.items())
            for node in alive
        ):
            raise ResourcesError(
                f"{len(alive)} node(s), none with labels {silo.labels} and resources {silo.resources}",
                f"a node that may read the silo of client {silo.name!r}",
                "ray start --labels or --resources on that node, or another entry in partition.silos",
            )


def start_actor(kind: type, *arguments: Any, **options: Any) -> Any:
    """An actor of the plain class `kind`, made with `arguments`; `options` are Ray's."""
    return ray.remote(kind).options(**options).remote(*arguments)
