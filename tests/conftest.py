"""Shared fixtures: small data, small configurations, one local Ray cluster for all tests."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Several processes share few cores: threads that wait for one another shall not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Every test process has a Ray of its own. A driver joins, or waits for, whatever a head noted in this folder, be it of
# other tests beside these or of some that were killed; so nobody else has ever had it.
RAY_TMPDIR = tempfile.mkdtemp(prefix="ff-")
atexit.register(shutil.rmtree, RAY_TMPDIR, ignore_errors=True)
atexit.register(gc.freeze)  # or torch's and MLflow's objects are searched for cycles, seconds long, as the tests end
os.environ["RAY_TMPDIR"] = RAY_TMPDIR

SHARED_DATA = Path(os.environ.get("FEDFACTORY_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real MedMNIST files."""
    if not (SHARED_DATA / "retinamnist.npz").exists():
        pytest.skip(f"no real images in {SHARED_DATA}: set FEDFACTORY_DATA to a folder with retinamnist.npz")
    return SHARED_DATA


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray of two CPUs."""
    import ray

    from fedfactory_ray.cluster.plan import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect(num_cpus=2)
    yield
    ray.shutdown()


def write_npz(
    path: Path, *, classes: int = 3, n: int = 40, side: int = 8, channels: int = 1, **changes: np.ndarray
) -> Path:
    """A small file in MedMNIST's layout: class y is a bright stripe at row 2y + 1 on noise."""
    draw = np.random.RandomState(0)
    arrays: dict[str, np.ndarray] = {}
    for split, size in (("train", n), ("val", n // 2), ("test", n // 2)):
        labels = np.arange(size * classes) % classes
        images = draw.randint(0, 60, (len(labels), side, side, channels))
        images[np.arange(len(labels)), (2 * labels + 1) % side] += 150
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez_compressed(path, **(arrays | changes))
    return path


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file."""
    return write_npz(tmp_path_factory.mktemp("data") / "stripes.npz")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an empty bucket on a local S3 server, which this process and its children reach."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="fedfactory")
    yield "s3://fedfactory"
    server.stop()


HEAVY = ("test_nodes.py", "test_unlearning.py", "test_pipeline.py", "test_golden.py", "test_unlearning_nodes.py")
ON_RAY = {"cluster", "undisturbed_folder"}
"""Fixtures that start Ray; a test that starts it otherwise is marked where it stands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, so that test processes side by side end together; what uses Ray is marked
    `cluster`."""
    items.sort(key=lambda item: HEAVY.index(item.path.name) if item.path.name in HEAVY else len(HEAVY))
    for item in items:
        if ON_RAY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def undisturbed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small job ran on this machine alone, on stripes.npz there; once for all test processes."""
    from small_runs import finish, start

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    with FileLock(f"{shared}.lock"):
        if not (shared / "digests.json").exists():
            shared.mkdir()
            found = finish(start(shared, write_npz(shared / "stripes.npz")), shared)
            assert len(found) == 5 * 2 + 17 + 1 + 2 + 2
            (shared / "digests.json").write_text(json.dumps(found))
    return shared


@pytest.fixture(scope="session")
def undisturbed(undisturbed_folder: Path) -> dict[str, str]:
    """Digests of what it made."""
    return dict(json.loads((undisturbed_folder / "digests.json").read_text()))
