"""Requests at once, bad names, and tampered runs: what forgetting notes and what `verify` sees, without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import pytest
from made_runs import OUT, config_of, make_run, without_ray
from small_runs import copy_job

from fedfactory_ray.errors import FolderHeldError, UnlearningError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CERTIFICATE, FORGOTTEN, OUTBOX, PENDING
from fedfactory_ray.tracking.outbox import Entry
from fedfactory_ray.unlearning import forget as forgetting
from fedfactory_ray.unlearning.artifacts import Needles
from fedfactory_ray.unlearning.certificate import Certificate
from fedfactory_ray.unlearning.forget import forget, withdraw
from fedfactory_ray.unlearning.verification import verify

NEW = "small-without-client-003"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    copy_job(made, tmp_path / "copy")
    return tmp_path / "copy"


def run_of(folder: Path, name: str = "small") -> Storage:
    return Storage(str(folder / "runs" / name))


def ask(folder: Path, *clients: str) -> Certificate:
    return forget(config_of(folder, "small"), clients, [], OUT, asked_by="somebody")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_two_requests_at_once_one_is_noted_and_it_can_be_withdrawn(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(place / "runs")
    asked: list[str] = []

    def meanwhile(*_: Any) -> None:
        # The first request stands, unchecked, and a second one comes: on this host it finds the folder held, ...
        with pytest.raises(FolderHeldError, match=f"process {os.getpid()} on"):
            ask(place, "client-002")
        # ... and from where nobody sees the lease, the note.
        lease = run_of(place).read("lease.json")
        run_of(place).delete("lease.json")
        with pytest.raises(UnlearningError, match=r"into small-without-client-001[\s\S]*withdraw --run small"):
            ask(place, "client-002")
        run_of(place).write("lease.json", lease)
        asked.append(run_of(place).read_json(PENDING)["successor"])
        raise Killed

    with monkeypatch.context() as patch:
        without_ray(patch)
        patch.setattr(forgetting, "connect", meanwhile)
        with pytest.raises(Killed):
            ask(place, "client-001")
    assert asked == ["small-without-client-001"]
    assert content(place / "runs").keys() - before.keys() == {"small/pending.json"}
    assert withdraw(config_of(place, "small")).clients == ["client-001"]
    assert content(place / "runs") == before
    with pytest.raises(UnlearningError, match="no request is pending for run small"):
        withdraw(config_of(place, "small"))

    # Also with half of the new run made; what another made of that name stays.
    with monkeypatch.context() as patch:
        without_ray(patch)
        patch.setattr(phases, "run_phases", meanwhile)
        with pytest.raises(Killed):
            ask(place, "client-001")
    assert run_of(place, "small-without-client-001").exists("modules/client-000/class-000/model.safetensors")
    assert withdraw(config_of(place, "small")).clients == ["client-001"]
    assert content(place / "runs") == before


def count_down(patch: pytest.MonkeyPatch, moment: float) -> list[str]:
    """Note whatever is written and deleted in storage, and die before the change number `moment`."""
    changes: list[str] = []

    def watch(name: str) -> None:
        change = getattr(Storage, name)

        def watched(storage: Storage, *arguments: Any) -> Any:
            file = str(arguments[-1] if name == "copy" else arguments[0])
            if "lease" not in file:
                if len(changes) == moment:
                    raise Killed
                changes.append(f"{name} {storage.name}/{file}")
            return change(storage, *arguments)

        patch.setattr(Storage, name, watched)

    for name in ("writing", "create", "copy", "delete"):
        watch(name)
    return changes


def test_killed_at_any_moment_the_same_command_finishes_it_or_another_takes_it_back(
    made: Path, forgotten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    wanted = Certificate.from_json(run_of(forgotten, NEW).read(CERTIFICATE))
    copy_job(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        changes = count_down(patch, float("inf"))
        ask(tmp_path / "whole", "client-003")
    # At first changes of a kind in a folder; CHAOS_MOMENTS=1000 kills before every change.
    kinds, number = [change.split("/")[0] for change in changes], int(os.environ.get("CHAOS_MOMENTS", "6"))
    edges = [k for k in range(1, len(changes)) if kinds[k] != kinds[k - 1]]
    moments = random.Random(0).sample(edges, number) if number < len(edges) else range(len(changes))
    withdrawn = 0
    for moment in moments:
        folder = tmp_path / str(moment)
        copy_job(made, folder)
        before = content(folder / "runs")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_down(patch, moment)
            ask(folder, "client-003")
        if moment % 2 and run_of(folder).exists(PENDING) and not run_of(folder).exists(FORGOTTEN):
            withdraw(config_of(folder, "small"))
            assert content(folder / "runs") == before, changes[moment]
            withdrawn += 1
        finished = ask(folder, "client-003")
        assert finished.after.digests() == wanted.after.digests(), changes[moment]
        assert finished.deleted == wanted.deleted, changes[moment]
        assert failing(folder) == [], changes[moment]
    assert 0 < withdrawn < len(moments), [changes[moment] for moment in moments]


@pytest.mark.parametrize("name", ["../../outside", "a/b", "", ".", "a b", "x" * 129, "small", "a\n"])
def test_a_bad_name_is_refused_at_the_door(made: Path, name: str) -> None:
    before = content(made)
    with pytest.raises(UnlearningError, match="--name"):
        forget(config_of(made, "small"), ["client-003"], [], OUT, asked_by="somebody", successor=name)
    assert content(made) == before
    assert not (made.parent / "outside").exists()


def rewrite(file: Path, **changes: Any) -> bytes:
    tree = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(tree, indent=2, sort_keys=True))
    return file.read_bytes()


def edited(old: Path, new: Path, origin: Path) -> None:
    """Certificate and both logs edited together."""
    certificate = new / CERTIFICATE
    digest = hashlib.sha256(certificate.read_bytes()).hexdigest()
    tree = json.loads(certificate.read_text())
    tree["deleted"]["files"] = []
    other = hashlib.sha256(rewrite(certificate, **tree)).hexdigest()
    for run in (old, new):
        (run / "audit.jsonl").write_text((run / "audit.jsonl").read_text().replace(digest, other))


def module(origin: Path) -> bytes:
    return (origin / "modules" / "client-003" / "class-000" / "model.safetensors").read_bytes()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def unsent(client: str) -> bytes:
    """What MLflow did not take: that a client's run begins."""
    return json.dumps(asdict(Entry("0" * 16, "begin", "key", client))).encode() + b"\n"


def scores(old: Path, new: Path, origin: Path) -> None:
    tree = json.loads((new / "evaluation.json").read_text())
    tree["product"]["accuracy"] += 0.01
    rewrite(new / "evaluation.json", **tree)


def logged(folder: Path, run: str) -> Path:
    """Where the artifacts of a run of this name lie."""
    (found,) = [
        each.info.artifact_uri
        for each in mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])
        if each.info.run_name == run
    ]
    return Path(unquote(urlsplit(found).path))


def plant(run: str, file: str, data: Callable[[Path], bytes]) -> Callable[[Path, Path, Path], None]:
    """Puts something that `data` makes of the old run into MLflow."""
    return lambda old, new, origin: put(logged(new.parents[1], run) / file, data(origin))


SHARD = "synthetic/class-000/client-003-00000.parquet"
FILES, RUN, NOTE, PARTITIONS, LOGS = (
    "no file is left of the forgotten",
    "the run is what the certificate says",
    "the old run's note is this request",
    "the partition is what the certificate says",
    "the audit logs name this certificate",
)
ARTIFACTS = "MLflow holds no artifact of the forgotten"
TAMPERED: dict[str, tuple[str, Callable[[Path, Path, Path], Any]]] = {
    "module as a classifier": (FILES, lambda o, n, a: put(n / "classifier/x/model.safetensors", module(a))),
    "module as an expert": (FILES, lambda o, n, a: put(n / "experts/client-000/model.safetensors", module(a))),
    "module as the plot": (FILES, lambda o, n, a: put(n / "comparison.png", module(a))),
    "changed module as a classifier": (
        FILES,
        lambda o, n, a: put(n / "classifier/x/model.safetensors", module(a) + b"!"),
    ),
    "module as the old certificate": (FILES, lambda o, n, a: put(o / CERTIFICATE, module(a))),
    "module as the lease": (FILES, lambda o, n, a: put(n / "lease.json", module(a))),
    "shard under another name": (FILES, lambda o, n, a: put(n / "comparison.png", (a / SHARD).read_bytes())),
    "shard as the old log": (LOGS, lambda o, n, a: put(o / "audit.jsonl", (a / SHARD).read_bytes())),
    "the old partition": (PARTITIONS, lambda o, n, a: shutil.copy(a / "partition.parquet", n)),
    "the old partition in the old run": (FILES, lambda o, n, a: shutil.copy(a / "partition.parquet", o)),
    "changed counts": (PARTITIONS, lambda o, n, a: rewrite(n / "partition.json", counts=[[0, 25, 0], [0, 15, 29]])),
    "changed scores": (RUN, scores),
    "edited together": ("MLflow's copy of the certificate is this one", edited),
    "another request's note": (NOTE, lambda o, n, a: rewrite(o / FORGOTTEN, exclude=["client-001"])),
    "what MLflow lacks of them": (FILES, lambda o, n, a: put(n / OUTBOX, unsent("client-003"))),
    "module as what MLflow lacks": (FILES, lambda o, n, a: put(n / OUTBOX, module(a))),
    "what MLflow lacked, in the old run": (FILES, lambda o, n, a: put(o / OUTBOX, unsent("client-001"))),
    "no note": (NOTE, lambda o, n, a: (o / FORGOTTEN).unlink()),
    "garbage manifest": (RUN, lambda o, n, a: put(n / "manifest.json", b"\xff[")),
    "empty partition": (PARTITIONS, lambda o, n, a: put(n / "partition.json", b"")),
    "rows in MLflow": (ARTIFACTS, plant("small", "notes/x.json", lambda a: b'[{"client": "client-003", "n": 15}]')),
    "its name in MLflow": (ARTIFACTS, plant("client-001", "x.txt", lambda a: b"class-000/client-003: 15 images")),
    "its counts in MLflow": (ARTIFACTS, plant("synthesis", "x.json", lambda a: (a / "partition.json").read_bytes())),
    "its digest in MLflow": (
        ARTIFACTS,
        plant(NEW, "x.json", lambda a: json.dumps([hashlib.sha256(module(a)).hexdigest()]).encode()),
    ),
    "its module in MLflow": (ARTIFACTS, plant(NEW, "x", module)),
    "a false certificate in MLflow": (ARTIFACTS, plant("small", CERTIFICATE, lambda a: b'{"x": "client-003"}')),
    "no partition": (PARTITIONS, lambda o, n, a: (n / "partition.parquet").unlink()),
}


@pytest.fixture(scope="module")
def forgotten(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the run forgot client-003."""
    folder = tmp_path_factory.mktemp("forgotten") / "it's here"
    copy_job(made, folder)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        certificate = ask(folder, "client-003")
    assert {entry["file"] for entry in certificate.deleted["files"]} >= {SHARD, "partition.parquet"}
    assert failing(folder) == []
    # In MLflow no artifact tells of all clients any more; another client's own are whole.
    assert [path for path in logged(folder, "small").rglob("*") if path.is_file()] == []
    assert [path for path in logged(folder, "synthesis").rglob("*") if path.is_file()] == []
    assert json.loads((logged(folder, "client-001") / "modules.json").read_text()) == [{"client": "client-001"}]
    return folder


def failing(folder: Path) -> list[str]:
    """The checks that fail."""
    _, checks = verify(f"{folder}/runs/{NEW}/{CERTIFICATE}", config_of(folder, NEW), OUT)
    return [each.name for each in checks if each.wrong]


def test_what_mlflow_lacks_of_the_forgotten_goes_and_of_others_is_no_residue(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    put(place / "runs" / "small" / OUTBOX, unsent("client-003"))
    ask(place, "client-003")
    assert not list(place.rglob(OUTBOX))
    put(place / "runs" / NEW / OUTBOX, unsent("client-001"))
    assert failing(place) == []


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_hides_nothing(made: Path, forgotten: Path, tmp_path: Path, what: str) -> None:
    check, tamper = TAMPERED[what]
    copy_job(forgotten, tmp_path / "copy")
    runs = tmp_path / "copy" / "runs"
    tamper(runs / "small", runs / NEW, made / "runs" / "small")
    assert check in failing(tmp_path / "copy")
    if check == ARTIFACTS:  # earlier versions left such: the same command again takes them away
        ask(tmp_path / "copy", "client-003")
        assert failing(tmp_path / "copy") == []


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b"[]", b'{"request": {"exclude": []}}']
)
def test_a_damaged_certificate_is_a_verdict(made: Path, tmp_path: Path, text: bytes) -> None:
    run = Storage(str(tmp_path)).within("run")
    run.write(CERTIFICATE, text)
    certificate, (check,) = verify(f"{run.uri}/{CERTIFICATE}", config_of(made, "small"), OUT)
    assert certificate is None
    assert check.name == "the certificate can be read"
    assert check.wrong


def test_a_name_is_a_value_of_json_or_a_word_and_a_digest_is_one_anywhere() -> None:
    digest = "ab" * 32
    needles = Needles(frozenset({"label", "site-1"}), frozenset({digest}))
    assert needles.found_in(b'{"runs": ["site-1"]}')
    assert needles.found_in(b"modules/site-1/class-000, of site-2")
    assert needles.found_in(b"site-1.")
    assert needles.found_in(b"\xff\x00" + digest.encode() + b"\x00")
    assert Needles(frozenset(), frozenset({hashlib.sha256(b"weights").hexdigest()})).found_in(b"weights")
    for other in (b'{"label": 1}', b'{"client": "site-10"}', b"site-11, my-site-1", b"\xffsite-1"):
        assert not needles.found_in(other), other
