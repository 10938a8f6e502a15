"""The lease on a folder, on a disk and in a bucket, with real processes: one holds it, and dead ones are followed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from small_runs import ROOT

from fedfactory_ray.errors import FolderHeldError
from fedfactory_ray.storage import lease
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import DOOR, LEASE
from fedfactory_ray.storage.lease import Holder, hold, holder, refuse_held

HOLDS = """
import sys, time
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.lease import hold
with hold(Storage(sys.argv[1])):
    print("held", flush=True)
    if sys.argv[2] == "error": raise ValueError("broken")
    if sys.argv[2] == "wait": time.sleep(600)
"""


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    place = str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
    return Storage(place).within(tmp_path.name)  # a bucket outlives its server


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "OLD", 2.5)


def process(storage: Storage, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDS, storage.uri, how]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"
    return job


def elsewhere(storage: Storage, **changes: object) -> Holder:
    """A lease of a process on a host that nobody can see from here."""
    other = replace(Holder.me(), place="another boot", host="other", pid=4, **changes)
    storage.write(LEASE, other.to_json())
    return other


def test_one_of_many_creates_a_file(storage: Storage) -> None:
    together = threading.Barrier(6)

    def create(k: int) -> bool:
        together.wait()
        return storage.create("note.json", b"%d" % k)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(create, range(6)))
    assert sum(won) == 1
    assert storage.read("note.json") == b"%d" % won.index(True)
    assert storage.names("") == ["note.json"]
    assert not storage.create("note.json", b"late")
    assert storage.read("note.json") == b"%d" % won.index(True)


def test_where_there_are_no_hard_links_one_creates_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert storage.create("note.json", b"first")
    assert not storage.create("note.json", b"second")
    assert storage.read("note.json") == b"first"
    assert storage.names("") == ["note.json"]


def test_a_zombie_has_ended(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", "pass"])
    born = psutil.Process(job.pid).create_time()
    while psutil.Process(job.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    assert replace(Holder.me(), pid=job.pid, born=born).gone
    job.wait()
    assert not Holder.me().gone


def test_one_of_many_holds_a_folder_and_leaves_nothing(storage: Storage) -> None:
    together, ended, refused = threading.Barrier(4), threading.Barrier(4), []

    def try_it(_: int) -> int:
        together.wait()
        try:
            with hold(storage):
                ended.wait(60)
                return 1
        except FolderHeldError as error:
            refused.append(str(error))
            ended.wait(60)
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(try_it, range(4))) == 1
    assert all(f"process {os.getpid()} on " in text and "--take-over" in text for text in refused)
    assert storage.names("") == []


@pytest.mark.parametrize("end", ["return", "error", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_a_process_ends_the_next_one_on_its_host_begins_at_once(tmp_path: Path, end: object) -> None:
    storage = Storage(str(tmp_path))
    job = process(storage, end if isinstance(end, str) else "wait")
    if isinstance(end, signal.Signals):
        with pytest.raises(FolderHeldError, match=f"process {job.pid} on"):
            refuse_held(storage)
        job.send_signal(end)
    job.communicate(timeout=60)
    assert (storage.names("") != []) is (end in (signal.SIGTERM, signal.SIGKILL))  # these ask nobody
    refuse_held(storage)
    began = time.monotonic()
    with hold(storage):
        found = holder(storage)
    assert found is not None
    assert found.pid == os.getpid()
    assert time.monotonic() - began < lease.BEAT / 2


def test_a_holder_elsewhere_is_refused_by_its_name_once_it_beats(storage: Storage, fast: None) -> None:
    other, ended = elsewhere(storage), threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.3):
            beats += 1
            elsewhere(storage, token=other.token, since=other.since, beats=beats)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(FolderHeldError, match=r"in use[\s\S]*process 4 on other since"), hold(storage):
        pass
    ended.set()
    beating.join()
    refuse_held(storage)  # which does not wait


def test_a_holder_elsewhere_that_does_not_beat_any_more_is_followed(storage: Storage, fast: None) -> None:
    other = elsewhere(storage)
    with hold(storage):
        found = holder(storage)
        assert found is not None
        assert found.token != other.token
    assert storage.names("") == []


def test_a_lease_taken_over_stops_the_start_that_lost_it(tmp_path: Path, fast: None) -> None:
    storage = Storage(str(tmp_path))

    def take() -> None:
        with hold(storage, take_over=True):
            time.sleep(1)

    other = threading.Thread(target=take)
    with pytest.raises(FolderHeldError, match="which took it over"), hold(storage):
        other.start()
        time.sleep(30)
    other.join()
    assert storage.names("") == []


def test_a_heartbeat_goes_on_after_a_failure_and_ends_with_its_block(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, write, failed = Storage(str(tmp_path)), Storage.write, []

    def fails_once(self: Storage, name: str, content: bytes) -> str:
        if b'"beats": 1' in content:
            failed.append(name)
            raise OSError("no network")
        return write(self, name, content)

    monkeypatch.setattr(Storage, "write", fails_once)
    with hold(storage):
        began = time.monotonic()
        while (found := holder(storage)) is None or found.beats < 3:
            assert time.monotonic() - began < 30
            time.sleep(0.05)
    assert failed == [LEASE]
    assert "lease" not in [thread.name for thread in threading.enumerate()]


def test_a_torn_lease_is_followed_when_it_is_old(storage: Storage, fast: None) -> None:
    storage.write(LEASE, b'{"tok')
    began = storage.written(LEASE)
    with hold(storage) as since:
        assert since - began >= 2e9


def test_whoever_was_killed_on_the_threshold_holds_nobody_up(storage: Storage) -> None:
    job = subprocess.Popen([sys.executable, "-c", "pass"])
    job.wait()
    storage.write(DOOR, replace(Holder.me(), pid=job.pid).to_json())
    with hold(storage):
        pass
    assert storage.names("") == []


def test_only_temporary_files_older_than_the_lease_are_cleaned(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/old.tmp", b"left by a killed writer")
    with hold(storage) as began:
        storage.write("a/new.tmp", b"of somebody at work")
        storage.clean(began)
        assert storage.names("a") == ["a/new.tmp"]
