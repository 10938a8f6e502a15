"""The jobs as a person starts them: another process, a terminal or none, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import ray
from conftest import write_npz
from small_runs import LONGEST, wait_for

RUN = Path(__file__).parents[1] / "jobs" / "run.py"
SMALL = """
generator: {channels: [8, 16], min_steps: STEPS, max_steps: STEPS, batch_size: 16}
sampler: {evaluations: 4}
synthesis: {images_per_class: 16, batch_size: 8, unit_size: 8}
classifier: {epochs: 1, batch_size: 16}
resources: {classifier: {threads: 1}}
baselines: [none]
storage: {checkpoint_seconds: 1}
name: small
"""


def start(folder: Path, *arguments: str, steps: int = 10, **variables: str) -> subprocess.Popen[str]:
    (folder / "small.yaml").write_text(SMALL.replace("STEPS", str(steps)))
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")} | variables
    return subprocess.Popen(
        [sys.executable, str(RUN), "--config", "small.yaml", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background jobs
    )


def test_the_job_ends_with_a_table_and_a_line_that_tells_how_to_browse(undisturbed_folder: Path) -> None:
    lines = (undisturbed_folder / "output.txt").read_text().splitlines()
    lines = [line for line in lines if "RAY_BACKEND_LOG_LEVEL" not in line]
    assert lines[0].startswith("images a client and class")
    assert any("accuracy, announced prior" in line for line in lines)
    assert lines[-1] == "browse      mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert len(lines) < 60
    assert (undisturbed_folder / "runs" / "small" / "evaluation.json").exists()


def test_a_missing_file_is_refused_with_its_path_and_checksum(cluster: None, tmp_path: Path) -> None:
    source = ("--data.source", "medmnist:bloodmnist", "--data.root", "here", "--no-data.download")
    job = start(tmp_path, *source, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    _, err = job.communicate(timeout=LONGEST)
    assert job.returncode == 2
    assert "bloodmnist.npz" in err
    assert "expected MD5: 7053d0359d879ad8a5505303e11de1dc" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.cluster
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    write_npz(tmp_path / "stripes.npz", n=30)
    job = start(tmp_path, "--data.source", "stripes.npz", steps=100_000)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    wait_for(lambda: list(tmp_path.glob("runs/small/modules/*/*/checkpoints/*/*/card.json")), job)
    os.kill(job.pid, signal.SIGINT)
    _, err = job.communicate(timeout=LONGEST)
    assert job.returncode == 130
    assert "The same command goes on from here" in err
    assert "Traceback" not in err
    runs = mlflow.MlflowClient(store).search_runs(["1"])
    assert {run.info.status for run in runs} == {"KILLED"}


def test_the_comparison_refuses_what_it_cannot_do_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN.with_name("compare.py")), "--methods", "fedavg", "fedsgd", "--seed", "3"]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONGEST, check=False)
    assert job.returncode == 2
    assert "fedsgd unknown: choose of centralised, local, fedavg" in job.stderr
    assert "Traceback" not in job.stderr
    assert not list(tmp_path.iterdir())


def test_help_needs_no_name_of_the_user(tmp_path: Path) -> None:
    """In a container the user may have a number alone."""
    refuse = "def refuse():\n    raise KeyError('getpwuid(): uid not found')"
    (tmp_path / "sitecustomize.py").write_text(f"import getpass\n{refuse}\ngetpass.getuser = refuse\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    job = [sys.executable, str(RUN.with_name("unlearn.py"))]
    for arguments in (["--help"], ["forget", "--help"], ["verify", "--help"]):
        shown = subprocess.run([*job, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
    assert "forget" in subprocess.run([*job, "--help"], capture_output=True, text=True, check=True).stdout
    ask = "import sys; sys.path.insert(0, sys.argv[1]); import unlearn; print(unlearn.who())"
    found = subprocess.run(
        [sys.executable, "-c", ask, str(RUN.parent)], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"uid {os.getuid()}"
