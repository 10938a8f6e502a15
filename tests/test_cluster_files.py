"""What users hand to cluster launchers: cluster.yaml, and the RayJob of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster_file() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_the_cluster_file_keeps_rays_own_schema(cluster_file: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster_file, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster_file | {"max_worker": 3}, schema)


def test_rays_launcher_takes_the_cluster_file(cluster_file: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(cluster_file)
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["GPU"] == 0
    workers = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    assert all(kind["resources"]["GPU"] >= 1 and kind["min_workers"] == 0 < kind["max_workers"] for kind in workers)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in " ".join(config["head_start_ray_commands"])
    assert any("/shared" in command for command in config["setup_commands"])


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT: dict[str, Any] = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
WHOLE = {"type": "integer", "minimum": 0}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
MOUNT = closed({"name": TEXT, "mountPath": TEXT}, "name", "mountPath")
CONTAINER = closed(
    {
        "name": TEXT,
        "image": TEXT,
        "workingDir": TEXT,
        "resources": closed({"limits": QUANTITIES, "requests": QUANTITIES}),
        "volumeMounts": {"type": "array", "items": MOUNT},
    },
    *("name", "image"),
)
VOLUME = closed({"name": TEXT, "persistentVolumeClaim": closed({"claimName": TEXT}, "claimName")}, "name")
POD = closed(
    {
        "spec": closed(
            {
                "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
                "volumes": {"type": "array", "items": VOLUME},
            },
            "containers",
        )
    },
    "spec",
)
GROUP: dict[str, Any] = {"rayStartParams": TEXTS, "template": POD}
WORKERS = closed(
    GROUP | {"groupName": TEXT, "replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE},
    *("groupName", "maxReplicas", "minReplicas", "template"),
)
# The part that the README uses of KubeRay's ray.io/v1 RayJob, closed: a misspelt field is an error.
RAY_JOB = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": closed({"name": TEXT}, "name"),
        "spec": closed(
            {
                "entrypoint": TEXT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": WHOLE,
                "backoffLimit": WHOLE,
                "rayClusterSpec": closed(
                    {
                        "rayVersion": TEXT,
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "headGroupSpec": closed(GROUP, "template"),
                        "workerGroupSpecs": {"type": "array", "items": WORKERS},
                    },
                    "headGroupSpec",
                ),
            },
            *("entrypoint", "rayClusterSpec"),
        ),
    },
    *("apiVersion", "kind", "metadata", "spec"),
)


def test_the_ray_job_of_the_readme_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(apiVersion: ray\.io.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    job = yaml.safe_load(text)
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert all(g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for g in groups[1:])


def test_the_ray_jobs_command_is_one_that_the_job_takes() -> None:
    from fedfactory_ray.settings.command_line import parse

    (text,) = re.findall(r"```yaml\n(apiVersion: ray\.io.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    program, script, *arguments = yaml.safe_load(text)["spec"]["entrypoint"].split()
    assert (program, script) == ("python", "jobs/run.py")
    config, _ = parse(arguments)
    assert config.storage.uri.startswith("/shared")
