"""The Ray cluster: joining it, and planning what runs where before anything starts."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from fedfactory_ray.cluster.joining import refuse_gone
from fedfactory_ray.cluster.nodes import alive_nodes, slots, startable_nodes
from fedfactory_ray.cluster.scaling import Crew, scale_up
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.data import SiloConfig
from fedfactory_ray.settings.places import ResourcesConfig, WorkerResources

DATA_CPUS = 1.0
"""CPUs that Ray Data needs beside the workers of a fit that streams its rows: its tasks ask for one, and with less they
wait for ever."""

MODULES_AT_ONCE = 8
"""Small modules that keep a GPU busy when they train side by side, in one process or in several."""


def connect(num_cpus: int | None = None) -> None:
    """Join the running cluster (a submitted job, RAY_ADDRESS) or start Ray on this machine, without a flood of logs.

    From then on SIGTERM (Kubernetes, `ray job stop`, a batch system) is Ctrl-C.

    `num_cpus` is for a Ray that is started here; by default it has the machine's. Raises ClusterGoneError.
    """
    refuse_gone()
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
    if threading.current_thread() is threading.main_thread():
        # Ray has a handler of its own, under which a job would end as if it had failed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    modules: int = MODULES_AT_ONCE
    """How many modules a client's actor may train side by side on its GPU, or part of one."""

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


@dataclass(frozen=True)
class Demand:
    """What is known of a phase's workers before they start: how many have something to do at once, at most, how many of
    them a GPU may hold, and how many modules each trains side by side there."""

    workers: int
    sharing: int
    modules: int = MODULES_AT_ONCE


def fraction(sharing: int) -> float:
    """What each of so many workers that share a GPU asks for; Ray counts in ten-thousandths."""
    return (10_000 // sharing) / 10_000


def share_gpus(nodes: Sequence[Mapping[str, float]], num_cpus: float, demand: Demand, most: int | None) -> float:
    """The largest fraction of a GPU that lets as many workers run side by side as have something to do, up to `most`,
    and as GPUs and CPUs have room for: Ray fills one GPU before the next, so a smaller one would leave GPUs idle."""
    room = slots(nodes, num_cpus, fraction(demand.sharing))
    wanted = min(room, demand.workers, most or room)
    each = (fraction(sharing) for sharing in range(1, demand.sharing + 1))
    return next(num_gpus for num_gpus in each if slots(nodes, num_cpus, num_gpus) >= wanted)


def make_plan(
    config: ResourcesConfig,
    nodes: Sequence[Mapping[str, float]] | None = None,
    demands: Mapping[str, Demand] | None = None,
    *,
    clients: int = 1,
    streams: bool = False,
) -> Plan:
    """Resolve the default GPU counts and refuse what could never run (it would hang instead of failing).

    `nodes` are the resources of the living nodes, by default those of the connected cluster, whose autoscaler is first
    asked for what so many `clients` and the other phases lack; `demands` are known of `client` and `synthesis`, which
    by default have a GPU each where there are GPUs; `streams` tells that a fit reads rows while it works.
    """
    if nodes is None:
        _scale_up(config, clients)
        nodes = [node["Resources"] for node in alive_nodes()]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    found = f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs"

    def resolve(name: str, wanted: WorkerResources, needed: int = 1) -> Worker:
        demand = (demands or {}).get(name, Demand(workers=1, sharing=1))
        num_gpus = float(gpus > 0) if wanted.num_gpus == "auto" else wanted.num_gpus
        if wanted.num_gpus == "auto" and gpus:
            num_gpus = share_gpus(nodes, wanted.num_cpus, demand, config.max_actors)
        fits = slots(nodes, wanted.num_cpus, num_gpus)
        if fits < needed:
            raise ResourcesError(
                found,
                f"{needed} × ({wanted.num_cpus:g} CPUs, {num_gpus:g} GPUs) for resources.{name}; room for {fits}",
                f"smaller resources.{name}.num_cpus or .num_gpus"
                + (", or resources.classifier_workers" if needed > 1 else "")
                + ", or larger nodes",
            )
        most = min(fits, config.max_actors or fits)
        return Worker(wanted.num_cpus, num_gpus, wanted.threads, most, demand.modules)

    plan = Plan(
        resolve("client", config.client),
        resolve("synthesis", config.synthesis),
        resolve("classifier", config.classifier, config.classifier_workers),
    )
    left = cpus - config.classifier_workers * plan.classifier.num_cpus
    if streams and left < DATA_CPUS:
        raise ResourcesError(
            found,
            f"{config.classifier_workers} × {plan.classifier.num_cpus:g} CPUs to fit and {DATA_CPUS:g} to read data",
            "a larger resources.in_memory_mb, which holds the rows, or a smaller resources.classifier.num_cpus: "
            "fractions share a core",
        )
    return plan


def _scale_up(config: ResourcesConfig, clients: int) -> None:
    able = [*(node["Resources"] for node in alive_nodes()), *startable_nodes()]
    gpus = any(node.get("GPU") for node in able)

    def crew(wanted: WorkerResources, least: int, most: int) -> Crew:
        return Crew(wanted.num_cpus, float(gpus) if wanted.num_gpus == "auto" else wanted.num_gpus, least, most)

    many = min(clients, config.max_actors or clients)
    crews = {
        "client": crew(config.client, 1, many),
        "synthesis": crew(config.synthesis, 1, many),
        "classifier": crew(config.classifier, config.classifier_workers, config.classifier_workers),
    }
    scale_up(crews, config.scale_up_seconds)


def placement(config: Config, client: str) -> dict[str, Any]:
    """Ray options that hold a client's actor and tasks to the nodes that may read its images."""
    for silo in config.partition.silos:
        if silo.name == client:
            return {"resources": silo.resources} | ({"label_selector": silo.labels} if silo.labels else {})
    return {}


def place(config: Config, client: str) -> str:
    """Name of where a client's actor may run: clients of the same place may use the same actor."""
    return json.dumps(placement(config, client), sort_keys=True)


def eligible(node: Mapping[str, Any], silo: SiloConfig) -> bool:
    """Whether a node of Ray has a silo's labels and resources."""
    return silo.labels.items() <= node["Labels"].items() and all(
        node["Resources"].get(name, 0) >= amount for name, amount in silo.resources.items()
    )


def refuse_unknown_places(silos: Sequence[SiloConfig], nodes: list[dict[str, Any]] | None = None) -> None:
    """Raise ResourcesError where no living node has a silo's labels and resources: its client would wait for ever."""
    nodes = ray.nodes() if nodes is None else nodes
    alive = [node for node in nodes if node["Alive"]]
    for silo in silos:
        if not any(eligible(node, silo) for node in alive):
            raise ResourcesError(
                f"{len(alive)} node(s), none with labels {silo.labels} and resources {silo.resources}",
                f"a node that may read the silo of client {silo.name!r}",
                "ray start --labels or --resources on that node, or another entry in partition.silos",
            )


def start_actor(kind: type, *arguments: Any, **options: Any) -> Any:
    """An actor of the plain class `kind`, made with `arguments`; `options` are Ray's."""
    return ray.remote(kind).options(**options).remote(*arguments)
