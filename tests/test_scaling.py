"""Scaling: a cluster whose GPU nodes come when they are asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from clusters import nodes
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from fedfactory_ray.cluster import nodes as cluster_nodes
from fedfactory_ray.cluster import scaling
from fedfactory_ray.cluster.nodes import alive_nodes, startable_nodes
from fedfactory_ray.cluster.plan import connect, make_plan
from fedfactory_ray.cluster.scaling import Crew, release, scale_up
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.places import ResourcesConfig, WorkerResources

GPU_NODE = {"CPU": 2, "GPU": 1}


def asked() -> list[dict[str, float]]:
    """The bundles that the autoscaler was asked for last."""
    return json.loads(_internal_kv_get("autoscaler_resource_request") or b"[]")


@pytest.fixture
def autoscaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head of one CPU that says, as Ray's autoscaler does, that it may start two nodes with a GPU."""
    with nodes(monkeypatch, {"num_cpus": 1}) as cluster:
        connect()
        config = ClusterConfig()
        kind = config.node_group_configs.add(name="gpu", max_count=2)
        kind.resources.update(GPU_NODE)
        _internal_kv_put(
            ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
            config.SerializeToString(),
            namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE,
        )
        yield cluster
        ray.shutdown()


def test_nodes_are_asked_for_waited_for_and_given_back(
    autoscaled: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "LOOK_SECONDS", 0.2)
    assert startable_nodes() == [GPU_NODE, GPU_NODE]
    with ThreadPoolExecutor(1) as job, caplog.at_level(logging.INFO, "fedfactory_ray"):
        planned = job.submit(make_plan, ResourcesConfig(), clients=5)
        while not planned.done():
            if len(asked()) > len(alive_nodes()) - 1:
                label = {cluster_nodes.NODE_TYPE: "gpu"}
                autoscaled.add_node(num_cpus=2, num_gpus=1, labels=label, include_dashboard=False)
            time.sleep(0.1)
    plan = planned.result()
    assert [worker.num_gpus for worker in vars(plan).values()] == [1.0, 1.0, 1.0]
    assert plan.client.slots == 2, "as many as may come, though five would have work"
    assert asked() == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert "waiting for nodes from the autoscaler: 5 × (1 CPUs, 1 GPUs) for resources.client" in caplog.text
    assert startable_nodes() == []
    release()
    assert asked() == []
    caplog.clear()
    assert make_plan(ResourcesConfig(), clients=5) == plan, "what is there is not asked for"
    assert not caplog.text


def test_nodes_that_do_not_come_are_a_refusal(autoscaled: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LOOK_SECONDS", 0.05)
    with pytest.raises(ResourcesError, match=r"0\.2 s after the autoscaler[\s\S]*resources\.client[\s\S]*num_gpus=0"):
        make_plan(ResourcesConfig(scale_up_seconds=0.2))
    assert asked() == []
    cpus = WorkerResources(num_gpus=0)
    plan = make_plan(ResourcesConfig(client=cpus, synthesis=cpus, classifier=cpus))
    assert plan.client.num_gpus == 0, "whoever asks for CPUs gets those that are there"
    monkeypatch.setattr(scaling, "SETTLED_SECONDS", 0.2)
    scale_up({"client": Crew(1, 0, least=1, most=4)}, patience=60)  # room for one: the rest need not come
