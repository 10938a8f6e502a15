"""A cluster whose GPU nodes come when they are asked for, in a process of its own: what jobs make of it, as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from fedfactory_ray.cluster import scaling
from fedfactory_ray.cluster.nodes import NODE_TYPE, alive_nodes, startable_nodes
from fedfactory_ray.cluster.plan import make_plan
from fedfactory_ray.cluster.scaling import Crew, release, scale_up
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.settings.places import ResourcesConfig, WorkerResources

GPU_NODE = {"CPU": 2, "GPU": 1}


def asked() -> list[dict[str, float]]:
    """The bundles that the autoscaler was asked for last."""
    found: list[dict[str, float]] = json.loads(_internal_kv_get("autoscaler_resource_request") or b"[]")
    return found


def publish() -> None:
    """Say, as Ray's autoscaler does, that two nodes with a GPU may be started."""
    config = ClusterConfig()
    config.node_group_configs.add(name="gpu", max_count=2).resources.update(GPU_NODE)
    _internal_kv_put(
        ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
        config.SerializeToString(),
        namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE,
    )


def refused() -> dict[str, object]:
    """Nodes that do not come, for whoever needs them and whoever does not."""
    told = ""
    try:
        make_plan(ResourcesConfig(scale_up_seconds=0.2))
    except ResourcesError as refusal:
        told = str(refusal)
    cpus = WorkerResources(num_gpus=0)
    plan = make_plan(ResourcesConfig(client=cpus, synthesis=cpus, classifier=cpus))
    left = asked()
    usual, scaling.SETTLED_SECONDS = scaling.SETTLED_SECONDS, 0.2
    scale_up({"client": Crew(1, 0, least=1, most=4)}, patience=60)
    scaling.SETTLED_SECONDS = usual
    return {"refusal": told, "left": left, "num_gpus": plan.client.num_gpus}


def grown(cluster: Cluster) -> dict[str, object]:
    """Nodes that come as they are asked for."""
    with ThreadPoolExecutor(1) as job:
        planned = job.submit(make_plan, ResourcesConfig(), clients=5)
        while not planned.done():
            if len(asked()) > len(alive_nodes()) - 1:
                cluster.add_node(num_cpus=2, num_gpus=1, labels={NODE_TYPE: "gpu"}, include_dashboard=False)
            time.sleep(0.1)
    plan, wanted = planned.result(), asked()
    release()
    again = make_plan(ResourcesConfig(), clients=5)
    return {
        "asked": wanted,
        "num_gpus": [worker.num_gpus for worker in vars(plan).values()],
        "slots": plan.client.slots,
        "startable": startable_nodes(),
        "left": asked(),
        "again": again == plan,
    }


def main() -> None:
    """Print what came of all."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    scaling.LOOK_SECONDS = 0.1
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        publish()
        found = {"startable": startable_nodes(), "refused": refused(), "grown": grown(cluster)}
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
