"""Unlearning on small images: real Ray, real MLflow store, real files. Bit for bit what never was."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_npz
from rich.console import Console
from small_runs import SMALL, copy_job, small_config

from fedfactory_ray.classification.rules import prior_of
from fedfactory_ray.errors import ForgottenError, RunConflictError, UnlearningError
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.session import open_session
from fedfactory_ray.settings.command_line import stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.places import TrackingConfig
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CERTIFICATE, FORGETTING, FORGOTTEN, PENDING
from fedfactory_ray.unlearning import forget as forgetting
from fedfactory_ray.unlearning.certificate import Certificate, audit_lines
from fedfactory_ray.unlearning.facts import Facts, read_facts
from fedfactory_ray.unlearning.forget import forget, withdraw
from fedfactory_ray.unlearning.report import held_recall, recalls
from fedfactory_ray.unlearning.request import Request
from fedfactory_ray.unlearning.residue import left_in_new
from fedfactory_ray.unlearning.verification import differences, verify

# Class 0 is held by clients 0 and 3 alone; client 0 holds the quota of it, so its expert never sees the pool's.
COUNTS = [[40, 0, 10], [0, 25, 0], [0, 15, 30], [15, 0, 0]]
OUT = Console(file=io.StringIO())


@dataclass
class Place:
    """A folder with its runs, its MLflow store, and what it held when it was made."""

    folder: Path

    def config(self, run: str = "small") -> Config:
        return stored_config(run, ["--storage.uri", str(self.folder / "runs")])

    def run(self, name: str = "small") -> Storage:
        return Storage(str(self.folder / "runs" / name))

    def forget(self, *clients: str, run: str = "small", classes: tuple[int, ...] = ()) -> Certificate:
        return forget(self.config(run), clients, classes, OUT, asked_by="somebody")

    def facts(self, run: str) -> Facts:
        return read_facts(self.run(run))


@pytest.fixture(scope="module")
def origin(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished run of both architectures, which no test changes."""
    folder = tmp_path_factory.mktemp("origin")
    data = write_npz(folder / "stripes.npz", n=60)
    config = small_config(
        folder, data, baselines=("none",), architecture="both", partition={"scheme": "skew", "counts": COUNTS}
    )
    phases.run(config, OUT)
    return Place(folder)


@pytest.fixture
def place(origin: Place, tmp_path: Path) -> Place:
    return copy_of(origin, tmp_path / "copy")


def copy_of(origin: Place, folder: Path) -> Place:
    copy_job(origin.folder, folder)
    return Place(folder)


def only_experts(place: Place) -> Place:
    """The same run as if it had been made with the decentralised architecture alone: faster to make again."""
    run = place.folder / "runs" / "small"
    shutil.rmtree(run / "classifier")
    for name in ("evaluation.json", "settings.json"):
        tree = json.loads((run / name).read_text())
        tree.pop("fedfactory", None)
        tree.get("predictions_sha256", {}).pop("fedfactory", None)
        tree |= {"architecture": "decentralised"} if "architecture" in tree else {}
        (run / name).write_text(json.dumps(tree))
    return place


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def needles(run: Path, client: str) -> list[bytes]:
    """Bytes that occur only in what has to go: the client's weights, and those of classifier and experts that saw its
    rows; that of client 0 did not."""
    files = [*run.glob(f"modules/{client}/**/*.safetensors"), *run.glob("classifier/*/*.safetensors")]
    files += run.glob("experts/client-00[123]/*.safetensors")
    return [path.read_bytes()[-4096:-3968] for path in files]


def test_the_result_is_the_run_in_which_the_client_never_took_part(place: Place) -> None:
    before, sought = content(place.folder / "runs" / "small"), needles(place.folder / "runs" / "small", "client-003")
    drawn = {shard.file for shard in place.facts("small").shards if shard.client == "client-003"}
    assert drawn
    assert len(sought) == 1 + 1 + 3
    certificate = place.forget("client-003")
    new = place.folder / "runs" / "small-without-client-003"

    # Bit for bit the run without the client, made from nothing.
    checked, checks = verify(f"{new}/{CERTIFICATE}", place.config("small-without-client-003"), OUT, retrain=True)
    assert {check.name: check.wrong for check in checks} == {check.name: [] for check in checks}
    assert len(checks) == 11
    assert checked == certificate
    assert len(certificate.after.digests()) == 1 + 1 + 5 + len(certificate.after.shards) + 1 + 3 + 3

    # The announced prior is that of those who are left.
    counts = json.loads((new / "partition.json").read_text())["counts"]
    prior = json.loads((new / "evaluation.json").read_text())["prior"]
    np.testing.assert_allclose(prior, prior_of(np.sum(counts, axis=0)))
    assert not np.allclose(prior, json.loads(before["evaluation.json"])["prior"])

    # Without the deletion the digests differ: the comparison can fail.
    changed = differences(certificate.before, certificate.after)
    assert {"partition", "rows", "classifier", "expert of client-001", "predictions, fedfactory"} <= set(changed)

    # What did not depend on the client is kept; the expert that never saw its rows is not fitted again.
    assert "expert of client-000" not in changed
    assert certificate.kept["experts"] == 1
    assert certificate.kept["modules"] == 5
    kept = [name for name in before if (new / name).exists() and name.split("/")[0] in ("modules", "synthetic")]
    assert [name for name in kept if (new / name).read_bytes() != before[name]] == [
        "synthetic/class-000/client-000-00003.parquet"
    ]
    assert certificate.cost["spent"]["fits"] == 1 + 2
    assert certificate.cost["spent"]["modules_trained"] == 0
    assert certificate.cost["share"]["network_evaluations"] < 0.25

    # Deleted is deleted.
    assert {entry["client"] for entry in certificate.deleted["modules"]} == {"client-003"}
    assert drawn < {entry["file"] for entry in certificate.deleted["units"]}
    assert {path.name for path in (place.folder / "runs" / "small").iterdir()} == {
        *("forgotten.json", "audit.jsonl", "settings.json")
    }
    for name, data in content(place.folder).items():
        assert not any(needle in data for needle in sought), name
        if name.endswith(".parquet") and "synthetic" in name:
            rows = pq.read_table(place.folder / name, columns=["client"])["client"].unique().to_pylist()
            assert "client-003" not in rows, name

    # Again: the same certificate, and nothing is made.
    stamps = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    assert place.forget("client-003") == certificate
    assert {path: path.stat().st_mtime_ns for path in stamps if path.suffix != ".db"} == {
        path: stamp for path, stamp in stamps.items() if path.suffix != ".db"
    }

    # The old run is refused; so are clients that are gone and those that nobody knows.
    with pytest.raises(ForgottenError, match=r"to forget client-003[\s\S]*small-without-client-003"):
        place.forget("client-000")
    with pytest.raises(ForgottenError, match="its successor small-without-client-003"):
        phases.run(place.config(), OUT)
    with pytest.raises(UnlearningError, match="client-003 is already gone"):
        place.forget("client-003", run="small-without-client-003")

    (line,) = audit_lines(place.run())
    assert audit_lines(place.run("small-without-client-003")) == [line]
    assert line["request"]["asked_by"] == "somebody"
    assert line["request"]["exclude"] == ["client-003"]

    # A row of the client, a changed byte and an unknown file are found.
    name = sorted(drawn)[0]
    (new / name).write_bytes(before[name])
    _, checks = verify(f"{new}/{CERTIFICATE}", place.config("small-without-client-003"), OUT)
    assert [check.name for check in checks if check.wrong] == ["no file is left of the forgotten"]
    (new / name).unlink()
    weights = new / "experts" / "client-001" / "model.safetensors"
    *rest, last = weights.read_bytes()
    weights.write_bytes(bytes([*rest, last ^ 1]))
    _, checks = verify(f"{new}/{CERTIFICATE}", place.config("small-without-client-003"), OUT)
    assert [check.name for check in checks if check.wrong] == ["weights are whole", "no file is left of the forgotten"]


@pytest.fixture(scope="module")
def both_gone(origin: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Certificate]:
    """A run of experts that forgot clients 3 and 0 at once."""
    place = only_experts(copy_of(origin, tmp_path_factory.mktemp("both") / "copy"))
    return place, place.forget("client-003", "client-000")


@pytest.fixture(scope="module")
def one_gone(origin: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Certificate]:
    """The same run, which forgot client 3, undisturbed."""
    place = only_experts(copy_of(origin, tmp_path_factory.mktemp("one") / "it's a copy"))
    return place, place.forget("client-003", classes=(0,))


def test_mlflow_shows_before_and_after_and_no_longer_the_client(
    both_gone: tuple[Place, Certificate], origin: Place
) -> None:
    place, certificate = both_gone
    models = mlflow.MlflowClient(f"sqlite:///{origin.folder}/mlflow.db").search_logged_models(["1"])
    assert len(models) == 2
    store = mlflow.MlflowClient(f"sqlite:///{place.folder}/mlflow.db")
    runs = store.search_runs(["1"])
    old = next(run for run in runs if run.info.run_name == "small")
    new = next(run for run in runs if run.info.run_name == certificate.request.successor)
    assert new.data.tags["mlflow.parentRunId"] == old.info.run_id
    assert new.info.status == "FINISHED"
    assert new.data.tags["forgotten"] == "client-000, client-003"
    for when, facts in (("before", certificate.before), ("after", certificate.after)):
        assert new.data.metrics[f"{when}/announced/accuracy"] == facts.scores["product"]["announced/accuracy"]
    assert {"recall.png", CERTIFICATE} <= {file.path for file in store.list_artifacts(new.info.run_id)}
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == old.info.run_id]
    names = {run.info.run_name for run in below}
    assert {"client-001", "expert-client-001", "synthesis"} <= names
    assert not names & {"client-000", "client-003", "expert-client-000", "expert-client-003"}
    left = {model.model_id for model in store.search_logged_models(["1"])}
    assert not left & {model.model_id for model in models}
    assert len(left) == 1
    for model in models:
        assert Path(model.artifact_location.removeprefix("file://")).exists()
        copied = model.artifact_location.replace(str(origin.folder), str(place.folder))
        assert not Path(copied.removeprefix("file://")).exists()

    # Class 0 has no holder any more: it is named, its recall is 0, that of the others is not.
    assert certificate.absent == [0]
    after = recalls(certificate.after, "product")
    assert recalls(certificate.before, "product")[0] > 0.5
    assert after[0] == 0
    assert held_recall(certificate.after, "product", certificate.absent) > 0.6
    assert len(after) == 3
    # Nobody else holds class 0, so nothing of it is drawn; class 2 grows by what client 0 had of it.
    assert {shard.label for shard in certificate.after.shards} == {1, 2}


def test_the_order_of_requests_does_not_matter(
    both_gone: tuple[Place, Certificate], one_gone: tuple[Place, Certificate], origin: Place, tmp_path: Path
) -> None:
    a_then_b, b_then_a = copy_of(one_gone[0], tmp_path / "ab"), only_experts(copy_of(origin, tmp_path / "ba"))
    a_then_b.forget("client-000", run="small-without-client-003")
    b_then_a.forget("client-000")
    b_then_a.forget("client-003", run="small-without-client-000")
    found = [
        a_then_b.facts("small-without-client-003-without-client-000").digests(),
        b_then_a.facts("small-without-client-000-without-client-003").digests(),
    ]
    assert found[0] == found[1] == both_gone[1].after.digests()
    last = "small-without-client-003-without-client-000"
    assert len(audit_lines(a_then_b.run(last))) == 2
    # MLflow's runs of both are gone, also those of the first run, from which only one was forgotten directly.
    store = mlflow.MlflowClient(f"sqlite:///{a_then_b.folder}/mlflow.db")
    names = {run.info.run_name for run in store.search_runs(["1"])}
    assert {"client-001", "expert-client-001"} <= names
    assert not names & {"client-000", "client-003", "expert-client-000", "expert-client-003"}
    # The first request again tells what became of it; its cost and the second's are shares of the same run.
    first, second = (Certificate.from_json(a_then_b.run(name).read(CERTIFICATE)) for name in (last[:24], last))
    assert a_then_b.forget("client-003") == first
    assert first.cost["original_run"] == second.cost["original_run"]
    with pytest.raises(ForgottenError, match=f"its successor {last}"):
        verify(f"{a_then_b.run(last[:24]).uri}/{CERTIFICATE}", a_then_b.config(last[:24]), OUT)
    # What jobs/compare.py adds to the new run is no residue; what it would add of the forgotten is.
    new = a_then_b.run(last)
    theirs = ("classifier/local-client-000", "experts/client-000")
    for folder in ("classifier/fedfactory", "classifier/fedavg", "classifier/local-client-001", *theirs):
        new.write(f"{folder}/model.safetensors", b"")
    new.write("comparison.png", b"")
    found = [f"{new.uri}/{folder}/model.safetensors" for folder in theirs]
    assert left_in_new(new, second.after) == found


@pytest.mark.parametrize(
    ("exclude", "clients", "classes", "asked"),
    [
        (("a",), ["a"], [], True),
        (("a",), ["a"], [1], True),  # all of its classes
        (("a/2",), ["a"], [2], True),
        (("a/2",), ["a"], [1, 2], False),
        (("a/2",), ["a"], [], False),
        (("a", "b/1"), ["b", "a"], [1], True),
        (("a",), ["a", "b"], [], False),
    ],
)
def test_a_request_is_recognised_by_all_that_it_asks_for(
    exclude: tuple[str, ...], clients: list[str], classes: list[int], asked: bool
) -> None:
    assert Request("run", exclude, "new", "somebody", "now").asks(clients, classes) is asked


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_anywhere_the_same_command_finishes_it(
    one_gone: tuple[Place, Certificate], origin: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = one_gone[1]
    place = only_experts(copy_of(origin, tmp_path / "killed"))
    old, new = place.run(), place.run("small-without-client-003")
    before = content(place.folder / "runs" / "small")
    assert undisturbed.request.exclude == ("client-003",)  # all of its classes are the client

    def die_at(module: Any, name: str, when: Callable[..., bool]) -> None:
        function = getattr(module, name)

        def dies(*arguments: Any, **keywords: Any) -> Any:
            if when(*arguments):
                monkeypatch.setattr(module, name, function)
                raise Killed
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, dies)
        with pytest.raises(Killed):
            place.forget("client-003")
        monkeypatch.undo()

    copies: list[str] = []
    die_at(Storage, "copy", lambda _, __, file: copies.append(file) or len(copies) > 4)
    die_at(phases, "draw_data_set", lambda *_: True)
    die_at(phases, "fit_experts", lambda *_: True)
    die_at(forgetting, "read_facts", lambda storage: storage.uri == new.uri)
    # One expert that cannot be fitted is one too many.
    with monkeypatch.context() as patch:
        patch.setattr(phases, "run_phases", lambda *_: SimpleNamespace(missing={"client-002": "no memory"}))
        with pytest.raises(UnlearningError, match="no expert of client-002 could be fitted: no memory"):
            place.forget("client-003")
    # Until then the old run is whole but for a note, and neither half is taken for a result.
    assert content(place.folder / "runs" / "small").keys() - before.keys() == {PENDING}
    assert content(place.folder / "runs" / "small").items() >= before.items()
    assert new.exists("evaluation.json")
    assert not new.exists(CERTIFICATE)
    with pytest.raises(ForgottenError, match="is not finished: it is made from small to forget client-003"):
        phases.run(place.config(new.uri.rpartition("/")[2]), OUT)
    with pytest.raises(UnlearningError, match="no certificate of a finished request"):
        verify(f"{new.uri}/{CERTIFICATE}", place.config(new.uri.rpartition("/")[2]), OUT)
    # What another request made meanwhile would never be finished, nor deleted.
    for successor in ("small-without-client-003", None):
        with pytest.raises(UnlearningError, match="is being made into small-without-client-003"):
            forget(place.config(), ["client-002"], [], OUT, asked_by="somebody", successor=successor)

    # Should another's note be there at the last moment all the same, the old run is not given up.
    with monkeypatch.context() as patch:
        ours, theirs = old.read(PENDING), old.read_json(PENDING) | {"exclude": ["client-002"], "successor": "theirs"}
        patch.setattr(forgetting, "files_to_go", lambda *_: old.write_json(PENDING, theirs) or [])
        with pytest.raises(UnlearningError, match="is being made into theirs, to forget client-002"):
            place.forget("client-003")
    old.write(PENDING, ours)
    assert content(place.folder / "runs" / "small").items() >= before.items()
    assert not old.exists(FORGOTTEN)

    die_at(Storage, "delete", lambda storage, name: storage.uri == old.uri and name.startswith("modules/client-002"))
    with pytest.raises(UnlearningError, match="client-003 from run small can no longer be withdrawn"):
        withdraw(place.config())
    assert old.exists(FORGOTTEN)
    assert 0 < len(content(place.folder / "runs" / "small")) < len(before)
    with pytest.raises(ForgottenError), open_session(place.config(), OUT):
        pass
    die_at(forgetting, "delete_traces", lambda *_: True)
    die_at(forgetting, "note", lambda *_: True)
    assert new.exists(CERTIFICATE)
    assert new.exists(FORGETTING)
    finished = place.forget("client-003")
    assert not new.exists(FORGETTING)
    assert finished.after.digests() == undisturbed.after.digests()
    assert finished.deleted == undisturbed.deleted
    _, checks = verify(f"{new.uri}/{CERTIFICATE}", place.config(new.uri.rpartition("/")[2]), OUT)
    assert [check for check in checks if check.wrong] == []
    assert len(audit_lines(new)) == 1


def test_what_cannot_be_promised_is_refused_before_anything_is_touched(place: Place) -> None:
    before = content(place.folder / "runs")
    for clients, classes, reason in (
        (["client-009"], (), "no client client-009[\\s\\S]*client-000, client-001, client-002, client-003"),
        (["client-000", "client-001", "client-002", "client-003"], (), "no client left"),
        (["client-001"], (0,), "client-001 holds no class 0"),
    ):
        with pytest.raises(UnlearningError, match=reason):
            place.forget(*clients, classes=classes)
    with pytest.raises(RunConflictError, match="seed: there 0, here 5"):
        forget(place.config().model_copy(update={"seed": 5}), ["client-001"], [], OUT, asked_by="somebody")
    elsewhere = TrackingConfig(uri=f"sqlite:///{place.folder}/other.db")
    with pytest.raises(UnlearningError, match=r"other\.db knows nothing of"):
        forget(place.config().model_copy(update={"tracking": elsewhere}), ["client-001"], [], OUT, asked_by="x")
    environment = place.folder / "runs" / "small" / "environment.json"
    here = environment.read_text()
    environment.write_text(here.replace('"torch version": "', '"torch version": "0.'))
    with pytest.raises(UnlearningError, match="torch version '0"):
        place.forget("client-001")
    environment.write_text(here)
    # One module alone was made elsewhere; whoever evaluated the run could not see that.
    card = place.folder / "runs" / "small" / "modules" / "client-002" / "class-001" / "card.json"
    as_made = card.read_text()
    canary = json.loads(as_made)["canary"]
    card.write_text(as_made.replace(canary, "f00d" * 16))
    told = f"modules client-002/1 were made with canary f00df00df00d…, here it is {canary[:12]}…"
    with pytest.raises(UnlearningError, match=re.escape(f"bit for bit: {told}\n")):
        place.forget("client-001")
    card.write_text(as_made)
    assert content(place.folder / "runs") == before
    shard = next((place.folder / "runs" / "small").glob("synthetic/class-002/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UnlearningError, match="does not verify: synthetic/class-002"):
        place.forget("client-001")
    (place.folder / "runs" / "small" / "evaluation.json").unlink()
    with pytest.raises(UnlearningError, match=r"holds no finished run, evaluation\.json is missing"):
        place.forget("client-001")


def test_another_machines_run_is_forgotten_only_inexactly(place: Place) -> None:
    run = place.folder / "runs" / "small"
    environment = run / "environment.json"
    environment.write_text(environment.read_text().replace('"torch version": "', '"torch version": "0.'))
    # There `auto` came to fp32. Whatever it comes to here: what is kept is not made again, the rest is made as there.
    for name in ("config.json", "settings.json"):
        tree = json.loads((run / name).read_text())
        tree["generator"]["precision"] = "auto"
        (run / name).write_text(json.dumps(tree))
    certificate = forget(only_experts(place).config(), ["client-002"], [2], OUT, asked_by="x", allow_inexact=True)
    assert [reason[:16] for reason in certificate.inexact] == ["torch version '0"]
    assert certificate.request.exclude == ("client-002/2",)
    assert {(card.client, card.label) for card in certificate.after.cards if card.client == "client-002"} == {
        ("client-002", 1)
    }
    assert SMALL["synthesis"]["images_per_class"] == sum(s.n for s in certificate.after.shards if s.label == 2)
    assert place.config(certificate.request.successor).generator.precision == "fp32"
    kept = [shard for shard in certificate.after.shards if shard in certificate.before.shards]
    assert (certificate.kept["modules"], certificate.cost["spent"]["modules_trained"]) == (5, 0)
    assert certificate.kept["units"] == len(kept) > 0
    assert {shard.label for shard in certificate.after.shards if shard not in kept} == {2}
