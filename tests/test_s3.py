"""A run kept in an S3 bucket, on a local S3 server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from small_runs import digests, start

from fedfactory_ray.storage import Storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
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


def test_files_appear_whole_and_go_again(bucket: str) -> None:
    storage = Storage(f"{bucket}/runs?region=us-east-1").within("one")
    assert storage.uri == "s3://fedfactory/runs/one?region=us-east-1"
    assert not storage.exists("a/b.bin")
    with pytest.raises(ValueError, match="broken"), storage.writing("a/b.bin") as stream:
        stream.write(b"half")
        raise ValueError("broken")
    assert storage.names("") == []
    storage.write("a/b.bin", b"whole")
    assert storage.read("a/b.bin") == b"whole"
    assert storage.names("") == ["a/b.bin"]
    storage.write(f"a/c.{'0' * 32}.tmp", b"left by a killed writer")
    storage.clean()
    assert storage.names("") == ["a/b.bin"]
    storage.delete("a/b.bin")
    assert storage.names("") == []


def test_a_run_in_a_bucket_is_the_run_in_a_folder(
    bucket: str, stripes: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = start(tmp_path, stripes, storage={"uri": f"{bucket}/runs"})
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert "s3://fedfactory/runs/small" in out
    assert digests(tmp_path / "runs" / "small") == {}
    storage = Storage(f"{bucket}/runs/small")
    assert {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names("")}.items() >= set(
        undisturbed.items()
    )
