"""The main job as other processes run it, small: started, waited for, and what it made."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small",
    "baselines": ["none"],
    "generator": {"channels": [8, 16], "min_steps": 40, "max_steps": 40, "batch_size": 16, "precision": "fp32"},
    "sampler": {"evaluations": 6},
    "synthesis": {"images_per_class": 40, "batch_size": 8, "unit_size": 8},
    "classifier": {"epochs": 4, "batch_size": 16, "checkpoint_every": 1},
    "resources": {"classifier": {"threads": 1}, "max_actors": 1},
    "partition": {"scheme": "skew", "counts": [[40, 0, 10], [0, 25, 0], [0, 15, 30]]},
    "storage": {"checkpoint_seconds": 0.2},
}
LONGEST = 600
"""Seconds after which a test counts as hanging."""
CONTENT = ("modules/**/*.*", "synthetic/**/*.parquet", "manifest.json", "classifier/**/*.*", "partition.*")


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
    """Digests of what the job made, by file. What it printed goes into output.txt."""
    out, _ = job.communicate(timeout=LONGEST)
    assert job.returncode == 0, out
    (folder / "output.txt").write_text(out)
    return digests(folder / "runs" / "small")


def digests(run: Path) -> dict[str, str]:
    """Digests of what a run made, by file."""
    files = [path for pattern in CONTENT for path in run.glob(pattern) if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy_job(origin: Path, folder: Path) -> None:
    """Copy a folder in which a job ran, with its runs and MLflow's store, whose addresses become those of the copy."""
    shutil.copytree(origin, folder)
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("tags", "value"),
        ):
            database.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(origin), str(folder)))
    for settings in folder.glob("runs/*/settings.json"):
        settings.write_text(settings.read_text().replace(f"sqlite:///{origin}", f"sqlite:///{folder}"))


def wait_for(happened: Callable[[], Any], job: subprocess.Popen[str]) -> Any:
    """What `happened` returns, once it is true; fails when the job has ended before."""
    began = time.monotonic()
    while time.monotonic() - began < LONGEST:
        found = happened()
        if found:
            return found
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"it did not happen in {LONGEST} s")
