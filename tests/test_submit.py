"""`ray job submit` as a user runs it: a head with token authentication, the working directory uploaded, the run kept in
a bucket: the same bytes as a run in a folder on one machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from small_runs import ROOT, SMALL

from fedfactory_ray.storage.files import Storage

BIN = Path(sys.executable).parent
MAX_UPLOAD = 2**20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path, bucket: str) -> Iterator[tuple[dict[str, str], Path]]:
    """A head as `ray start --head` makes it; yields the environment of its users, and the folder of its session."""
    address, dashboard = free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTHONPATH"))}
    environment = inherited | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    temporary = Path("/tmp") / f"ff-{os.getpid()}"  # Ray's sockets need a short path
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--num-cpus=2", f"--port={address}"),
            *(f"--dashboard-port={dashboard}", f"--temp-dir={temporary}", "--dashboard-agent-listen-port=0"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}, temporary / "session_latest"
    finally:
        head = psutil.Process(process.pid)
        for each in [*head.children(recursive=True), head]:
            each.kill()  # asked to stop, `ray start --block` takes half a minute
        process.communicate(timeout=120)
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_submitted_job_is_read_back_from_mlflow(
    head: tuple[dict[str, str], Path], bucket: str, stripes: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    environment, session = head
    work = tmp_path / "work"
    shutil.copytree(ROOT, work, ignore=shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__"))
    (work / "runs").mkdir(exist_ok=True)
    (work / "runs" / "big.bin").write_bytes(os.urandom(2 * MAX_UPLOAD))  # ignored by .gitignore
    (work / "small.yaml").write_text(yaml.safe_dump(SMALL | {"data": {"source": str(stripes)}}))
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/run.py", "--config", "small.yaml"]
    places = ["--storage.uri", f"{bucket}/runs", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]

    refused = subprocess.run(
        command, cwd=work, env=environment | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "uthenticat" in refused.stdout + refused.stderr

    submitted = subprocess.run(command + places, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "accuracy, announced prior" in submitted.stdout
    assert "succeeded" in submitted.stdout
    assert "s3://fedfactory/runs/small" in submitted.stdout
    (package,) = (session / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/")
    made_there = {"__pycache__", "mlruns"}
    uploaded = [path for path in package.rglob("*") if path.is_file() and not made_there & set(path.parts)]
    assert package / "jobs" / "run.py" in uploaded
    assert sum(path.stat().st_size for path in uploaded) < MAX_UPLOAD

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = [run for run in client.search_runs(["1"]) if "mlflow.parentRunId" not in run.data.tags]
    assert run.info.status == "FINISHED"
    assert 0 <= run.data.metrics["announced/accuracy"] <= 1
    storage = Storage(f"{bucket}/runs/small")
    found = {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names("")}
    assert {name: found.get(name) for name in undisturbed} == undisturbed
