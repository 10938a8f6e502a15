"""The main job on clusters of several nodes, some of which die: the same bytes as on one machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
import yaml
from conftest import write_npz
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small",
    "baselines": ["none"],
    "generator": {"channels": [8, 16], "min_steps": 60, "max_steps": 60, "batch_size": 16, "precision": "fp32"},
    "sampler": {"evaluations": 4},
    "synthesis": {"images_per_class": 48, "batch_size": 8, "unit_size": 8},
    "classifier": {"epochs": 4, "batch_size": 16, "checkpoint_every": 1},
    "resources": {"classifier": {"threads": 1}},
    "partition": {"scheme": "skew", "counts": [[30, 0, 10], [0, 25, 0], [10, 15, 30]]},
    "storage": {"checkpoint_seconds": 0.2},
}
CONTENT = ("modules/**/*.*", "synthetic/**/*.parquet", "manifest.json", "classifier/**/*.*", "partition.*")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "stripes.npz")


@contextmanager
def nodes(monkeypatch: pytest.MonkeyPatch, *each: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster whose workers can import the package and the tests' hooks; this process does not join it."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    cluster = Cluster()
    try:
        for node in each:
            cluster.add_node(**{"include_dashboard": False, **node})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def start(folder: Path, data: Path, **changes: Any) -> subprocess.Popen[str]:
    """jobs/run.py on the cluster that RAY_ADDRESS names, else on this machine."""
    config = SMALL | {"data": {"source": str(data)}} | changes
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "run.py"), "--config", "small.yaml"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background jobs
    )


def finish(job: subprocess.Popen[str], folder: Path) -> dict[str, str]:
    """Digests of what the job made, by file."""
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    run = folder / "runs" / "small"
    files = [path for pattern in CONTENT for path in run.glob(pattern) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for(happened: Callable[[], Any], job: subprocess.Popen[str]) -> Any:
    """What `happened` returns, once it is true; fails when the job has ended before."""
    for _ in range(6000):
        found = happened()
        if found:
            return found
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("it did not happen in 120 s")


def workers(title: str) -> list[psutil.Process]:
    """Ray's worker processes by what they do."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith(f"ray::{title}"):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = finish(start(folder, data), folder)
    assert len(found) == 6 * 2 + 21 + 1 + 2 + 2
    return found


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
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    monkeypatch.setenv("HOOK_LOG", str(tmp_path / "hooks.jsonl"))
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"worker_process_setup_hook": "hooks.watch"}})
    )
    resources = {
        "client": {"num_gpus": 1},
        "synthesis": {"num_gpus": 0.5},
        "classifier": {"num_gpus": 0, "threads": 1},
    }
    with nodes(monkeypatch, {"num_cpus": 3}, {"num_cpus": 2, "num_gpus": 2}):
        made = finish(start(tmp_path, data, resources=resources), tmp_path)
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
        without_cuda = start(tmp_path, data, resources=resources, name="without-cuda")
        out, _ = without_cuda.communicate(timeout=100)
    if not torch.cuda.is_available():
        assert without_cuda.returncode == 2
        assert "assigned by Ray, and torch" in out
    assert made == undisturbed
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
    assert sum(units_by_node(tmp_path).values()) == 21
    assert all(place.split(" gpu ")[1] in ("0", "1") for place in units_by_node(tmp_path))


def test_four_nodes_share_the_work_and_make_the_same_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    with nodes(monkeypatch, {"num_cpus": 2}, *[{"num_cpus": 1}] * 3):
        made = finish(start(tmp_path, data), tmp_path)
    assert made == undisturbed
    runs = children(tmp_path)
    assert len({runs[name].data.tags["node"] for name in ("client-000", "client-001", "client-002")}) >= 2
    assert len(units_by_node(tmp_path)) >= 2


def test_killed_workers_and_nodes_cost_no_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "small"
    with nodes(monkeypatch, {"num_cpus": 2}, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        job = start(tmp_path, data)
        # A client's actor in the middle of a module, behind a checkpoint; then a whole node while clients train.
        wait_for(lambda: list(run.glob("modules/*/*/checkpoint.safetensors")), job)
        wait_for(lambda: workers("ClientActor.train"), job)[0].kill()
        wait_for(lambda: list(run.glob("modules/*/*/card.json")), job)
        doomed = next(iter(cluster.worker_nodes))
        cluster.remove_node(doomed, allow_graceful=False)
        # A synthesis actor between its files.
        wait_for(lambda: len(list(run.glob("synthetic/**/*.parquet"))) > 2, job)
        drawing = workers("MapWorker")
        assert drawing
        drawing[0].kill()
        # The trainer's worker between two checkpoints.
        wait_for(lambda: list(run.glob("train-fedfactory-*/checkpoint_*/fit.json")), job)
        wait_for(lambda: workers("RayTrainWorker"), job)[0].kill()
        made = finish(job, tmp_path)
    assert made == undisturbed
    assert not list(run.glob("**/*.tmp"))


def test_a_driver_that_is_killed_or_stopped_in_each_phase_is_started_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "small"
    moments: list[tuple[Callable[[], Any], signal.Signals, int]] = [
        (lambda: list(run.glob("modules/*/*/checkpoint.safetensors")), signal.SIGKILL, -9),
        (lambda: len(list(run.glob("synthetic/**/*.parquet"))) > 2, signal.SIGINT, 130),
        (lambda: list(run.glob("train-fedfactory-*/checkpoint_*/fit.json")), signal.SIGKILL, -9),
        (lambda: (run / "classifier" / "fedfactory" / "model.safetensors").exists(), signal.SIGKILL, -9),
    ]
    with nodes(monkeypatch, {"num_cpus": 2}):
        for moment, kill, status in moments:
            job = start(tmp_path, data)
            wait_for(moment, job)
            before = {path: path.stat().st_mtime_ns for path in run.glob("modules/*/*/model.safetensors")}
            job.send_signal(kill)
            out, _ = job.communicate(timeout=60)
            assert job.returncode == status, out
        made = finish(start(tmp_path, data), tmp_path)
        # What stood when the driver died for the last time was not made again.
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
    natural = {"partition": {"scheme": "natural", "silos": silos}}
    each = [
        {"num_cpus": 2},
        {"num_cpus": 1, "labels": {"site": "north"}},
        {"num_cpus": 1, "resources": {"south": 1}},
    ]
    with nodes(monkeypatch, *each) as cluster:
        ids = [cluster.head_node.node_id, *(node.node_id for node in cluster.worker_nodes)]
        made = finish(start(tmp_path, files["test"], **natural), tmp_path)
        missing = [{**silos[0], "labels": {"site": "west"}}]
        job = start(tmp_path, files["test"], partition={"scheme": "natural", "silos": missing}, name="refused")
        out, _ = job.communicate(timeout=100)
    assert job.returncode == 2
    assert "'site': 'west'" in out
    assert "client 'north'" in out
    notes = [json.loads(line) for line in (tmp_path / "hooks.jsonl").read_text().splitlines()]
    readers = {
        name: {entry["node"] for entry in notes if entry.get("opened") == str(path)} for name, path in files.items()
    }
    assert len(readers["north"]) == len(readers["south"]) == 1
    assert readers["north"] != readers["south"]
    assert readers["north"] | readers["south"] <= set(ids[1:])
    runs = children(tmp_path)
    assert {runs["north"].data.tags["node"]} == readers["north"]

    # The same silos apart, without a cluster: the same modules, which then travel as files.
    for name in ("north", "south"):
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "jobs" / "train_client.py"), "--config", "small.yaml"),
                *("--client", name, "--data", str(files[name]), "--out", "exchange"),
            ],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            check=True,
        )
    for name, digest in made.items():
        if name.startswith("modules/"):
            assert hashlib.sha256((tmp_path / "exchange" / name).read_bytes()).hexdigest() == digest, name
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.delenv("RAY_ADDRESS")
    assert finish(start(again, files["test"], modules=str(tmp_path / "exchange")), again) == made
