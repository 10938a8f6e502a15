"""Files in an S3 bucket, on a local S3 server; test_submit.py keeps a whole run there."""

from __future__ import annotations

import pytest

from fedfactory_ray.errors import StorageError
from fedfactory_ray.storage.files import Storage


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
    storage.clean(storage.written("a/b.bin") + 10**12)
    assert storage.names("") == ["a/b.bin"]
    storage.delete("a/b.bin")
    assert storage.names("") == []


def test_a_bucket_that_is_not_there_is_refused(bucket: str) -> None:
    Storage(f"{bucket}/runs").check()
    with pytest.raises(StorageError, match="no bucket nowhere"):
        Storage("s3://nowhere/runs").check()
