"""The main job on clusters of several nodes, some of which die: the same bytes as on one machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from clusters import nodes, workers
from conftest import write_npz
from PIL import Image
from ray.cluster_utils import Cluster
from small_runs import LONGEST, ROOT, SMALL, finish, start, wait_for

pytestmark = pytest.mark.cluster
SPREAD: dict[str, Any] = {"classifier": {"threads": 1}, "max_actors": 3}
"""An actor a client, on nodes of their own."""


def node_of(cluster: Cluster, title: str) -> Any:
    """A node, not the head, on which such a worker runs; None where there is none."""
    raylets = {worker.ppid() for worker in workers(title)}
    for node in cluster.worker_nodes:
        if node.all_processes["raylet"][0].process.pid in raylets:
            return node
    return None


def children(folder: Path) -> dict[str, Any]:
    """MLflow's child runs by name."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs(["1"])
    return {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}


def units_by_node(folder: Path) -> dict[str, int]:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    path = client.download_artifacts(children(folder)["synthesis"].info.run_id, "units_by_node.json", str(folder))
    return dict(json.loads(Path(path).read_text()))


def test_logical_gpus_on_two_nodes_are_pinned_shared_and_queued_for(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    monkeypatch.setenv("HOOK_LOG", str(tmp_path / "hooks.jsonl"))
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"worker_process_setup_hook": "hooks.watch"}})
    )
    resources = {"classifier": {"num_gpus": 0, "threads": 1}}
    with nodes(monkeypatch, {"num_cpus": 3}, {"num_cpus": 2, "num_gpus": 2}):
        made = finish(start(tmp_path, stripes, resources=resources), tmp_path)
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
        without_cuda = start(tmp_path, stripes, resources=resources, name="without-cuda")
        out, _ = without_cuda.communicate(timeout=LONGEST)
    if not torch.cuda.is_available():
        assert without_cuda.returncode == 2
        assert "assigned by Ray, and torch" in out
    assert made == undisturbed
    # Of a GPU two actors have one each, for the node's two CPUs take no more.
    assert "clients: 1 a GPU (0.8 of 80 GB each); synthesis: 1 a GPU" in (tmp_path / "output.txt").read_text()
    runs = children(tmp_path)
    clients = [runs[name].data.tags for name in ("client-000", "client-001", "client-002")]
    assert {tags["gpus"] for tags in clients} == {"0", "1"}  # three clients, two devices: one queued
    assert len({tags["node"] for tags in clients}) == 1
    notes = [json.loads(line) for line in (tmp_path / "hooks.jsonl").read_text().splitlines()]
    asked = [entry for entry in notes if "gpus" in entry]
    for entry in asked:
        assert entry["visible"] == (",".join(entry["gpus"]) or entry["visible"])
        assert len(entry["gpus"]) <= 1
    with_gpu = {entry["pid"]: entry["gpus"][0] for entry in asked if entry["gpus"]}
    assert len(with_gpu) == 4  # two clients' actors, two synthesis actors for the two CPUs
    assert {entry["node"] for entry in asked if entry["gpus"]} == {clients[0]["node"]}
    assert sum(units_by_node(tmp_path).values()) == 17
    assert all(place.split(" gpu ")[1] in ("0", "1") for place in units_by_node(tmp_path))


def test_three_nodes_share_the_work_and_whatever_dies_costs_no_row(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "small"

    def drawn() -> int:
        return len(list(run.glob("synthetic/**/*.parquet")))

    def on_several_nodes(title: str) -> bool:
        return len({worker.ppid() for worker in workers(title)}) > 1

    def end(job: subprocess.Popen[str], kill: signal.Signals, status: int) -> None:
        job.send_signal(kill)
        out, _ = job.communicate(timeout=LONGEST)
        assert job.returncode == status, out

    with nodes(monkeypatch, *[{"num_cpus": 1}] * 3) as cluster:
        # The driver, in the middle of a module.
        job = start(tmp_path, stripes, resources=SPREAD)
        wait_for(lambda: list(run.glob("modules/*/*/checkpoints/*/*/card.json")), job)
        end(job, signal.SIGKILL, -9)
        # A client's actor, then a whole node.
        job = start(tmp_path, stripes, resources=SPREAD)
        wait_for(lambda: on_several_nodes("ClientActor"), job)
        wait_for(lambda: workers("ClientActor.train"), job)[0].kill()
        wait_for(lambda: list(run.glob("modules/*/*/card.json")), job)
        cluster.remove_node(wait_for(lambda: node_of(cluster, "ClientActor"), job), allow_graceful=False)
        # A process that draws; then the end that schedulers bring, between synthetic files.
        wait_for(lambda: on_several_nodes("MapBatches"), job)
        workers("MapBatches")[0].kill()
        wait_for(lambda: drawn() > 2, job)
        end(job, signal.SIGTERM, 130)
        # The driver between two checkpoints of the fit.
        job = start(tmp_path, stripes, resources=SPREAD)
        wait_for(lambda: list(run.glob("classifier/fedfactory/checkpoints/**/fit.json")), job)
        before = {path: path.stat().st_mtime_ns for path in run.glob("modules/*/*/model.safetensors")}
        end(job, signal.SIGKILL, -9)
        # The trainer's worker.
        job = start(tmp_path, stripes, resources=SPREAD)
        wait_for(lambda: workers("fit_classifier"), job)[0].kill()
        made = finish(job, tmp_path)
    # What stood when the driver died for the last time was not made again.
    assert len(before) == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made == undisturbed
    assert not list(run.glob("**/*.tmp"))


def silo_files(folder: Path) -> dict[str, Path]:
    import numpy as np

    whole = dict(np.load(write_npz(folder / "whole.npz")))
    labels = whole["train_labels"].ravel()
    silos = {}
    for name, classes in {"north": [0, 1], "south": [1, 2]}.items():
        mine = np.flatnonzero(np.isin(labels, classes))[:: 2 if name == "north" else 1]
        silos[name] = folder / f"{name}.npz"
        np.savez(silos[name], train_images=whole["train_images"][mine], train_labels=whole["train_labels"][mine])
    np.savez(folder / "test.npz", **{key: value for key, value in whole.items() if key.startswith("test_")})
    return silos | {"test": folder / "test.npz"}


def test_natural_silos_are_read_on_their_own_nodes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_LOG", str(tmp_path / "hooks.jsonl"))
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"worker_process_setup_hook": "hooks.watch"}})
    )
    files = silo_files(tmp_path)
    silos = [
        {"name": "north", "source": str(files["north"]), "labels": {"site": "north"}},
        {"name": "south", "source": str(files["south"]), "resources": {"south": 0.01}},
    ]
    scratch = tmp_path / "scratch"
    natural = {
        "partition": {"scheme": "natural", "silos": silos},
        "storage": SMALL["storage"] | {"scratch": str(scratch)},
    }
    each = [
        {"num_cpus": 2},
        {"num_cpus": 1, "labels": {"site": "north"}},
        {"num_cpus": 1, "resources": {"south": 1}},
    ]
    with nodes(monkeypatch, *each) as cluster:
        ids = [cluster.head_node.node_id, *(node.node_id for node in cluster.worker_nodes)]
        made = finish(start(tmp_path, files["test"], architecture="both", **natural), tmp_path)
        assert len(list((tmp_path / "runs" / "small").glob("experts/*/model.safetensors"))) == len(silos)
        runs = children(tmp_path)
        notes = [json.loads(line) for line in (tmp_path / "hooks.jsonl").read_text().splitlines()]
        compared = subprocess.run(
            [
                *(sys.executable, str(ROOT / "jobs" / "compare.py"), "--config", "small.yaml", "--methods", "fedavg"),
                *("local", "--federated.rounds", "2", "--federated.local_epochs", "1"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert compared.returncode == 0, compared.stdout + compared.stderr
        lines = json.loads((tmp_path / "runs" / "small" / "comparison.json").read_text())["lines"]
        assert [line["method"] for line in lines][2:] == ["local, ensemble", "fedavg"]
        # The same silos apart, without a cluster: the same modules, which then travel as files.
        apart = [
            subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "jobs" / "train_client.py"), "--config", "small.yaml"),
                    *("--client", name, "--data", str(files[name]), "--out", "exchange"),
                ],
                cwd=tmp_path,
                env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            )
            for name in ("north", "south")
        ]
        assert [job.wait() for job in apart] == [0, 0]
        for name, digest in made.items():
            if name.startswith("modules/"):
                assert hashlib.sha256((tmp_path / "exchange" / name).read_bytes()).hexdigest() == digest, name
        # Pictures of natural silos show no real image.
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        picture = client.download_artifacts(runs["north"].info.run_id, "samples.png", str(tmp_path))
        assert Image.open(picture).width < 700
        again = tmp_path / "again"
        again.mkdir()
        assert finish(start(again, files["test"], modules=str(tmp_path / "exchange")), again) == made
    # All files that leave the silos' nodes: finished modules and experts. Checkpoints stay there, until it is finished.
    ours = {e["pid"]: name for e in notes for name in ("north", "south") if e.get("opened") == str(files[name])}
    wrote = [(ours[e["pid"]], e["node"], e["wrote"]) for e in notes if "wrote" in e and e["pid"] in ours]
    inside = [(who, node, name.split("/")) for who, node, name in wrote if name.startswith(f"{scratch}/")]
    outside = {name.removeprefix(f"{tmp_path}/runs/small/") for _, _, name in wrote if f"{scratch}/" not in name}
    folders = [f"modules/{who}/class-{label:03d}" for who, label in (("north", 0), ("south", 1), ("south", 2))]
    folders += ["experts/north", "experts/south"]
    assert outside == {f"{folder}/{name}" for folder in folders for name in ("model.safetensors", "card.json")}
    for silo in ("north", "south"):
        kinds = {
            (node, parts[-6] if parts[-6] == "experts" else parts[-7]) for who, node, parts in inside if who == silo
        }
        (node,) = {node for node, _ in kinds}
        assert kinds == {(node, "modules"), (node, "experts")}
        assert node == runs[silo].data.tags["node"]
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    notes = [json.loads(line) for line in (tmp_path / "hooks.jsonl").read_text().splitlines()]
    assert len({entry["pid"] for entry in notes if entry.get("opened") == str(files["north"])}) >= 2  # both jobs
    readers = {
        name: {entry["node"] for entry in notes if entry.get("opened") == str(path)} for name, path in files.items()
    }
    assert len(readers["north"]) == len(readers["south"]) == 1
    assert readers["north"] != readers["south"]
    assert readers["north"] | readers["south"] <= set(ids[1:])
    assert {runs["north"].data.tags["node"]} == readers["north"]
