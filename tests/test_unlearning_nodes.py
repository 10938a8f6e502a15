"""Unlearning of a run on handwritten digits, on clusters of several nodes, killed on the way: the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import nodes
from small_runs import LONGEST, ROOT, SMALL, wait_for

from fedfactory_ray.storage.files import Storage
from fedfactory_ray.unlearning.facts import read_facts

pytestmark = pytest.mark.cluster
DIGITS: dict[str, Any] = SMALL | {
    "name": "digits",
    "architecture": "both",
    "resources": {"classifier": {"threads": 1}, "max_actors": 2},
    "data": {"source": "digits"},
    # Several classes each: nobody else holds them.
    "partition": {
        "scheme": "skew",
        "counts": [[30 * (y in own) for y in range(10)] for own in ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))],
    },
    "generator": SMALL["generator"] | {"min_steps": 15, "max_steps": 15},
    "synthesis": {"images_per_class": 32, "batch_size": 16, "unit_size": 16},
    "classifier": {"epochs": 3, "batch_size": 16},
}
NEW = "digits-without-client-001"


def start(folder: Path, job: str, *arguments: str) -> subprocess.Popen[str]:
    """A job of this project, in `folder`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / job), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def output(job: subprocess.Popen[str]) -> str:
    out, _ = job.communicate(timeout=LONGEST)
    assert job.returncode == 0, out
    return out


def test_two_nodes_forget_what_one_never_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "160")  # narrow tables fold what is looked for
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(DIGITS))
    asked = ("forget", "--run", "digits", "--client", "client-001")
    new = tmp_path / "runs" / NEW
    with nodes(monkeypatch, *[{"num_cpus": 1}] * 2) as cluster:
        output(start(tmp_path, "run.py", "--config", "digits.yaml"))
        before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
        # Killed before the classifier is fitted again: the old run is whole.
        job = start(tmp_path, "unlearn.py", *asked)
        wait_for(lambda: list(new.glob("synthetic/**/*.parquet")), job)
        job.kill()
        job.communicate()
        assert {path: path.read_bytes() for path in before} == before
        assert not (new / "certificate.json").exists()
        out = output(start(tmp_path, "unlearn.py", *asked))
        # The run without the client, from nothing, on one node of one core.
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node)
        table = output(start(tmp_path, "unlearn.py", "verify", f"runs/{NEW}/certificate.json", "--retrain"))
    assert "classes that nobody holds now" in out
    assert "equal to a run without them, bit for bit" in out
    certificate = json.loads((new / "certificate.json").read_text())
    # Nobody else holds its classes, so nothing is drawn.
    assert certificate["cost"]["spent"]["network_evaluations"] == 0
    assert certificate["kept"]["units"] == len(certificate["after"]["manifest"]) == 7 * 2
    assert certificate["absent"] == [4, 5, 6]
    after = certificate["after"]["scores"]["fedfactory"]
    assert [after[f"alike/recall_class_{label}"] for label in certificate["absent"]] == [0, 0, 0]

    found = read_facts(Storage(str(new))).digests()
    assert found["classifier"] != certificate["before"]["classifier"]["sha256"]

    assert "a run from nothing is equal" in table
    assert table.count("yes") == 11
    # A retrained run leaves nothing behind.
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits.yaml",
        "runs",
        "mlflow.db",
        "mlflow.db.lock",
        "mlruns",
    }
