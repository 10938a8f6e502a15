"""The watchdog: a busy cluster is told, a dead one ends the job with a refusal and a reason in MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray
from conftest import write_npz
from small_runs import LONGEST, ROOT

from fedfactory_ray.cluster import watchdog
from fedfactory_ray.cluster.watchdog import Watchdog

HASTY = "from fedfactory_ray.cluster import watchdog; watchdog.GONE_SECONDS = watchdog.END_SECONDS = 3.0"


@ray.remote(num_cpus=1)
class Busy:
    def ready(self) -> bool:
        return True


def test_what_a_busy_cluster_lets_wait_is_told_once(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "WAIT_SECONDS", 1.0)
    others = [Busy.remote() for _ in range(2)]
    ray.get([other.ready.remote() for other in others])
    with caplog.at_level(logging.INFO, "fedfactory_ray"), Watchdog(print):
        mine = Busy.remote()
        answer = mine.ready.remote()
        assert ray.wait([answer], timeout=3)[0] == []
        ray.kill(others.pop())
        assert ray.get(answer)
        told = [record.getMessage() for record in caplog.records]
        assert told == ["waiting for 1 CPU: CPU 2 of 2 in use, no GPU"]
    for actor in [mine, *others]:
        ray.kill(actor)


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_job_whose_cluster_dies_says_so(tmp_path: Path, request: pytest.FixtureRequest, victim: str) -> None:
    short = tempfile.mkdtemp(prefix="ff-")  # Ray's sockets need a short path
    request.addfinalizer(lambda: shutil.rmtree(short))
    data = write_npz(tmp_path / "stripes.npz")
    options = ["--data.source", str(data), "--generator.min_steps", "100000", "--generator.max_steps", "100000"]
    code = f"import sys, runpy; {HASTY}; sys.argv[:1] = []; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    # A file, for a pipe would stay open as long as any of Ray's processes lives.
    with (tmp_path / "output.txt").open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT / "jobs" / "run.py"), *options],
            cwd=tmp_path,
            env=environment | {"RAY_TMPDIR": short},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while not _runs(tmp_path / "mlflow.db"):
        assert job.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.2)
    family = psutil.Process(job.pid).children(recursive=True)
    for process in family:
        if process.name() == victim:
            process.kill()
    try:
        job.wait(LONGEST)
    finally:
        for process in family:
            if process.is_running():
                process.kill()
    text = (tmp_path / "output.txt").read_text()
    assert job.returncode == 2, text
    assert "The cluster is gone" in text
    assert "the same command" in text
    assert "Traceback" not in text
    ((status, why),) = _runs(tmp_path / "mlflow.db")
    assert status == "FAILED"
    assert "The cluster is gone" in why


def _runs(store: Path) -> list[tuple[str, str]]:
    """Status and description of the parent runs."""
    query = """select status, coalesce((select value from tags where tags.run_uuid = runs.run_uuid
    and key = 'mlflow.note.content'), '') from runs
    where run_uuid not in (select run_uuid from tags where key = 'mlflow.parentRunId')"""
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store)) as database, contextlib.suppress(sqlite3.OperationalError):
        return list(database.execute(query))
    return []  # its tables are being made
