"""The main job as other processes run it, small: started, waited for, and what it made."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fedfactory_ray.data import readers
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.report import Report, report_table
from fedfactory_ray.settings.config import Config

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small",
    "baselines": ["none"],
    "generator": {
        **{"channels": [8, 16], "min_steps": 40, "max_steps": 40, "batch_size": 16, "precision": "fp32"},
        "min_images": 1,
    },
    "sampler": {"evaluations": 6},
    "synthesis": {"images_per_class": 40, "batch_size": 8, "unit_size": 8},
    "classifier": {"epochs": 4, "batch_size": 16},
    "resources": {"classifier": {"threads": 1}, "max_actors": 1},
    "partition": {"scheme": "skew", "counts": [[40, 0, 10], [0, 25, 0], [0, 15, 30]]},
    "storage": {"checkpoint_seconds": 0.2, "checkpoint_epochs": 1},
}
LONGEST = 600
"""Seconds after which a test counts as hanging."""
CONTENT = ("modules/**/*.*", "synthetic/**/*.parquet", "manifest.json", "classifier/**/*.*", "partition.*")


@dataclass
class Finished:
    """A run that this process made: its configuration, report and folder, and what was printed."""

    config: Config
    report: Report
    folder: Path
    printed: str


def small_config(folder: Path, data: Path, **changes: Any) -> Config:
    """The small job's configuration, its runs and MLflow's store in `folder`."""
    places = {
        "data": {"source": str(data)},
        "storage": SMALL["storage"] | {"uri": str(folder / "runs")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    return Config(**(SMALL | places | changes))


def run_here(config: Config, folder: Path) -> Finished:
    """Run the small job in this process."""
    out = io.StringIO()
    report = phases.run(config, Console(file=out, width=140))
    Console(file=out, width=140).print(report_table(report))
    return Finished(config, report, folder / "runs" / "small", out.getvalue())


SOURCES = (readers.Digits, readers.ArrayFile, readers.Cifar10, readers.ImageFolder)
"""Every kind of source that `open_source` makes."""


def reads_no_image(patch: pytest.MonkeyPatch) -> None:
    """From now on this process may read no image of a source, of whatever kind."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the driver read images")

    for kind in SOURCES:
        for name in {"images", "try_images"} & set(vars(kind)):
            patch.setattr(kind, name, forbidden)


def file_digests(folder: Path, pattern: str) -> dict[str, str]:
    """Digests of the files that match, by file."""
    found = [path for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


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
    assert "DeprecationWarning" not in out
    (folder / "output.txt").write_text(out)
    return digests(folder / "runs" / "small")


def digests(run: Path) -> dict[str, str]:
    """Digests of what a run made, by file."""
    return {name: digest for pattern in CONTENT for name, digest in file_digests(run, pattern).items()}


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
        time.sleep(0.1)  # looking costs CPU that the job needs
    raise AssertionError(f"it did not happen in {LONGEST} s")
