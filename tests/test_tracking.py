"""The logged classifier as MLflow's users load it, and curves that grow, in a real store."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from small_runs import LONGEST, ROOT
from torch import nn

from fedfactory_ray.classification.ensemble import Predictor
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import TrackingError
from fedfactory_ray.federation.client import Progress
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import OUTBOX
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.curves import ClientRun
from fedfactory_ray.tracking.outbox import PARENT, Entry, Outbox, read_outbox
from fedfactory_ray.tracking.runs import DESCRIPTION, Run, runs_of, start_run, tracking_client, tracking_uri
from fedfactory_ray.tracking.served_classifier import BATCH_SIZE, _load_pyfunc

TASK = Task(3, 1, 8)
PRIOR = np.array([0.7, 0.2, 0.1])


@pytest.fixture(scope="module")
def ensemble() -> nn.Module:
    return Predictor([make_classifier("cnn", TASK).eval() for _ in range(2)], 1.5).eval()


@pytest.fixture(scope="module")
def uri(ensemble: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where artifacts go
        run = start_run(make_config(overrides=["--tracking.uri", f"sqlite:///{folder}/mlflow.db"]), "served", "here")
        found = run.model("ensemble", ensemble, draw_images(1), ["a", "b", "[c]"], PRIOR, {"experts": 2})
        run.end()
    return found


def draw_images(n: int) -> np.ndarray:
    return np.random.RandomState(n).randint(0, 256, (n, 8, 8, 1)).astype(np.uint8)


@pytest.mark.parametrize("n", [1, 2 * BATCH_SIZE + 3])
def test_any_number_of_images_is_classified_as_by_the_network(ensemble: nn.Module, uri: str, n: int) -> None:
    images = draw_images(n)
    table = mlflow.pyfunc.load_model(uri).predict(images)
    assert list(table.columns) == mlflow.models.get_model_info(uri).signature.outputs.input_names() == ["a", "b", "[c]"]
    found = table.to_numpy()
    with torch.inference_mode():
        alike = ensemble(torch.from_numpy(images)).exp().numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, with_prior(alike, PRIOR), atol=1e-6)


def with_prior(alike: np.ndarray, prior: np.ndarray) -> np.ndarray:
    return np.asarray(alike * prior / (alike * prior).sum(1, keepdims=True))


def test_users_choose_the_prior(ensemble: nn.Module, uri: str) -> None:
    images, model = draw_images(40), mlflow.pyfunc.load_model(uri)
    with torch.inference_mode():
        alike = ensemble(torch.from_numpy(images)).exp().numpy()
    own = np.array([0.1, 0.0, 0.3])
    for params, prior in (
        ({}, PRIOR),
        ({"prior": "announced"}, PRIOR),
        ({"prior": "uniform"}, np.ones(3)),
        ({"prevalence": own.tolist()}, own),
        ({"prevalence": [1, 0, 3]}, own),
    ):
        found = model.predict(images, params=params)
        assert list(found.columns) == ["a", "b", "[c]"]
        np.testing.assert_allclose(found.to_numpy(), with_prior(alike, prior), atol=1e-6)
    assert (model.predict(images, params={"prevalence": own.tolist()})["b"] == 0).all()


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"prior": "flat"}, "needed announced or uniform"),
        ({"prior": "uniform", "prevalence": [0.2, 0.3, 0.5]}, "needed one of them"),
        ({"prevalence": [0.5, 0.5]}, "needed 3 shares"),
        ({"prevalence": [0.5, -0.5, 1.0]}, "none negative"),
        ({"prevalence": [0.0, 0.0, 0.0]}, "needed 3 shares"),
        ({"prevalence": [0.5, float("nan"), 0.5]}, "none negative"),
    ],
)
def test_a_prior_that_is_none_is_refused(uri: str, params: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        mlflow.pyfunc.load_model(uri).predict(draw_images(1), params=params)


def test_weights_and_computation_move_to_the_asked_device(uri: str) -> None:
    """`meta` stands for a GPU here: a program of which a part stayed on the CPU could not run on it."""
    program = f"{mlflow.artifacts.download_artifacts(uri)}/data/model.pt2"
    model = _load_pyfunc(program, {"device": "meta"})
    assert model.classify(torch.from_numpy(draw_images(5)).to("meta")).device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta tensor"):  # so the device is heard through MLflow too
        mlflow.pyfunc.load_model(uri, model_config={"device": "meta"}).predict(draw_images(5))


def test_the_model_brings_its_loader_and_needs_no_package_of_ours(uri: str) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    assert [file.name for file in (folder / "code").iterdir() if file.suffix == ".py"] == ["served_classifier.py"]
    assert "fedfactory" not in (folder / "requirements.txt").read_text()
    assert "fedfactory_ray" not in (folder / "code" / "served_classifier.py").read_text()
    mlflow.pyfunc.load_model(uri)
    assert Path(sys.modules["served_classifier"].__file__ or "").name == "served_classifier.py"


class Broken:
    """A call that fails until it is mended."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.mended = call, False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.mended:
            raise OSError("no network")
        return self.call(*arguments, **named)


def test_curves_that_grow_wait_and_are_whole_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(make_config(overrides=["--tracking.uri", store]), "curves", str(tmp_path / "run"))
    client = mlflow.MlflowClient(store)

    def logged() -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")]

    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 100.0)
    run.grow([("loss", 1, 0.5)])
    assert logged() == []
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", -1.0)
    run.grow([("loss", 2, 0.25)])
    assert logged() == [(1, 0.5), (2, 0.25)]
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 100.0)
    run.grow([("loss", 3, 0.125)])
    broken = Broken(run.client.log_batch)
    monkeypatch.setattr(run.client, "log_batch", broken)
    run.end("FAILED")
    broken.mended = True
    run.patience.silent_until = 0.0
    run.outbox.drain()
    assert logged() == [(1, 0.5), (2, 0.25), (3, 0.125)]


def test_a_clients_curves_begin_before_the_jobs_run_does(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    starting: Future[Run] = Future()
    client_run = ClientRun(starting, "client-000")
    client_run.progress(Progress("client-000", 1, 10, 40, 0.5))
    assert "run" not in vars(client_run)  # nobody waits for MLflow while it starts
    starting.set_result(start_run(make_config(overrides=["--tracking.uri", store]), "job", "here"))
    client_run.progress(Progress("client-000", 1, 20, 40, 0.25))
    client_run.finish([], None)
    client = mlflow.MlflowClient(store)
    points = client.get_metric_history(client_run.run.id, "loss_class_1")
    assert [(point.step, point.value) for point in points] == [(10, 0.5), (20, 0.25)]
    found = client.get_run(client_run.run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == starting.result().id


def test_a_home_in_a_sqlite_address_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for typed, meant in (
        ("sqlite:///~/x/mlflow.db", "sqlite:////home/me/x/mlflow.db"),
        ("sqlite:///a~/mlflow.db", "sqlite:///a~/mlflow.db"),
        ("sqlite:////tmp/~/mlflow.db", "sqlite:////tmp/~/mlflow.db"),
        ("http://host/~x", "http://host/~x"),
    ):
        assert tracking_uri(make_config(overrides=["--tracking.uri", typed])) == meant
        monkeypatch.setenv("MLFLOW_TRACKING_URI", typed)
        assert tracking_uri(make_config()) == meant


# A store that fails


class Away:
    """A client of a store that is away, or is not."""

    def __init__(self) -> None:
        self.away = True
        self.points: list[tuple[str, int, float]] = []

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if self.away:
            raise MlflowException("the store is away\nand a traceback")
        self.points += [(metric.key, metric.step, metric.value) for metric in metrics]

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        if self.away:
            raise ConnectionError("refused")

    def create_run(self, *_: Any, **__: Any) -> Any:
        if self.away:
            raise MlflowException("the store is away")
        return SimpleNamespace(info=SimpleNamespace(run_id="made"))

    def log_text(self, *_: Any) -> None:
        if self.away:
            raise MlflowException("the store is away")


def test_a_store_that_fails_costs_no_run_is_told_once_and_gets_later_what_waited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("fedfactory_ray.tracking.patience.time.monotonic", lambda: clock[0])
    client = Away()
    client.away = False
    outbox = Outbox(client, "0")  # type: ignore[arg-type]
    run = Run(outbox, outbox.begin("job", {}))
    client.away = True
    with caplog.at_level(logging.INFO, "fedfactory_ray"):
        run.grow([("loss", 1, 0.5)])
        run.flush()
        child = run.child("client-000")
        child.metrics({"images": 3})
        run.params({"seed": 1})
        run.text("text", "text.txt")
        assert caplog.messages == ["MLflow takes nothing (the store is away): the run goes on without it"]
        client.away = False
        run.flush()
        assert client.points == [], "nobody asks a store that failed again at once"
        clock[0] += 61
        run.metrics({"accuracy": 0.25})
        assert client.points == [("loss", 1, 0.5), ("images", 0, 3.0), ("accuracy", 0, 0.25)]
        run.end()
    assert len(caplog.messages) == 2
    assert "MLflow lacks 1 files" in caplog.messages[1]


# What waits for a store that is away


def points_of(store: str, folder: str) -> dict[str, Any]:
    """All that a store tells of the runs of a folder, by name, but their times."""
    client = mlflow.MlflowClient(store)
    found = {}
    for parent in runs_of(client, "1", folder):
        for run in [client.get_run(parent), *client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")]:
            curves = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            found[run.info.run_name] = (
                run.info.status,
                {name: value for name, value in run.data.params.items() if name != "tracking.uri"},
                {name: [(point.step, point.value) for point in curve] for name, curve in curves.items()},
                {name: text for name, text in run.data.tags.items() if name in ("late", DESCRIPTION)},
            )
    return found


def job(config: Config, folder: str, away: Callable[[], None] = lambda: None) -> Run:
    """A job's run of which the store may be `away` after the start."""
    run = start_run(config, "job", folder)
    away()
    child = run.child("client-000")
    child.grow([("loss_class_1", step, 1 / step) for step in range(1, 2000)])
    child.metrics({"images": 3, "loss": float("nan")})
    run.metrics({"accuracy": 0.5})
    run.tag("late", "yes")
    run.end("FAILED", "why it failed")
    return run


def test_what_a_store_did_not_take_is_sent_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "run")
    stores = {name: f"sqlite:///{tmp_path}/{name}/store.db" for name in ("whole", "broken")}
    for name in stores:
        (tmp_path / name).mkdir()
    config = {name: Config.model_validate({"tracking": {"uri": store}}) for name, store in stores.items()}
    job(config["whole"], folder)
    expected = points_of(stores["whole"], folder)
    assert expected["job"][0] == "FAILED"
    assert len(expected["client-000"][2]["loss_class_1"]) == 1999

    with monkeypatch.context() as patch:

        def away() -> None:
            for name in ("create_run", "log_batch", "set_tag", "set_terminated"):
                patch.setattr(mlflow.MlflowClient, name, Broken(lambda: None))

        job(config["broken"], folder, away)
    storage = Storage(folder)
    assert storage.exists(OUTBOX)
    assert list(points_of(stores["broken"], folder)) == ["job"]
    start_run(config["whole"], "other store", folder).end()
    assert storage.exists(OUTBOX), "what waits for one store is not sent to another"

    again = start_run(config["broken"], "again", folder)
    assert not storage.exists(OUTBOX)
    again.end()
    found = points_of(stores["broken"], folder)
    assert str({name: found[name] for name in expected}) == str(expected)  # as texts: NaN is not equal to NaN


def test_what_a_store_refuses_is_given_up_and_the_rest_is_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    config, folder = Config.model_validate({"tracking": {"uri": store}}), str(tmp_path / "run")
    start_run(config, "first", folder).end()
    outbox = Outbox(*tracking_client(config), store, Storage(folder))
    waits = [
        Entry(outbox.store, "tag", "0" * 32, texts={"a": "b"}),
        Entry(outbox.store, "begin", "later", name="begun later", texts={PARENT: "0" * 32}),
        Entry(outbox.store, "points", "later", points=[("loss", 1, 0.5, 1)]),
    ]
    text = "".join(f"{json.dumps(vars(entry))}\n" for entry in waits)
    Storage(folder).write(OUTBOX, f'{text}half a li\n{{"store": "x", "call": "abort", "run": ""}}\n'.encode())
    with caplog.at_level(logging.WARNING, "fedfactory_ray"):
        start_run(config, "second", folder).end()
    assert [message for message in caplog.messages if "2 lines are damaged" in message and OUTBOX in message]
    assert [message for message in caplog.messages if "refuses an entry" in message]
    (found,) = mlflow.MlflowClient(store).search_runs(["1"], "attributes.run_name = 'begun later'")
    assert found.data.metrics == {"loss": 0.5}
    assert not Storage(folder).exists(OUTBOX)


def test_what_waits_is_kept_in_a_bucket_too(bucket: str) -> None:
    client, storage = Away(), Storage(f"{bucket}/run")
    outbox = Outbox(client, "0", "", storage)  # type: ignore[arg-type]
    Run(outbox, outbox.begin("job", {})).end()
    assert [entry.call for entry in read_outbox(storage)] == ["begin", "end"]
    client.away = False
    Outbox(client, "0", "", storage).drain()  # type: ignore[arg-type]
    assert not storage.exists(OUTBOX)


def test_a_jobs_end_waits_ten_seconds_at_most_for_a_store_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    client = Away()
    client.away = False
    outbox = Outbox(client, "0", "", Storage(str(tmp_path)))  # type: ignore[arg-type]
    run = Run(outbox, outbox.begin("job", {}))
    monkeypatch.setattr("fedfactory_ray.tracking.outbox.END_SECONDS", 0.1)
    monkeypatch.setattr(client, "set_terminated", lambda *_: released.wait())
    monkeypatch.setattr(client, "log_batch", Broken(lambda: None))
    run.metrics({"accuracy": 0.5})
    monkeypatch.setattr(client, "log_batch", lambda *_, **__: released.wait())
    run.end()
    assert [(entry.call, entry.name) for entry in read_outbox(Storage(str(tmp_path)))] == [
        ("points", ""),
        ("end", "FINISHED"),
    ]
    released.set()


@pytest.mark.parametrize("kind", ["dead", "scheme", "folder", "deleted", "file", "bracket", "driver"])
def test_a_store_that_cannot_be_used_is_refused_in_a_few_lines(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    uri = {
        "dead": f"http://127.0.0.1:{port}",
        "scheme": "nonsense://x",
        "folder": f"sqlite:///{tmp_path}/text/c.db",
        "deleted": f"sqlite:///{tmp_path}/store.db",
        "file": f"sqlite:///{tmp_path}/file.db",
        "bracket": "http://[::1",
        "driver": "mssql+nobody://x",
    }[kind]
    config = Config.model_validate({"tracking": {"uri": uri}})
    (tmp_path / "text").write_text("a file, no folder")
    if kind == "deleted":
        client, experiment = tracking_client(config)
        client.delete_experiment(experiment)
    if kind == "file":
        (tmp_path / "file.db").write_text("no database at all, but some text that is long enough" * 20)
    with pytest.raises(TrackingError) as refused:
        tracking_client(config)
    assert uri in str(refused.value)
    assert len(str(refused.value).splitlines()) == 3


def test_two_first_starts_on_one_new_store_both_log(tmp_path: Path) -> None:
    code = f"""from fedfactory_ray.settings.config import Config
from fedfactory_ray.tracking.runs import start_run
config = Config.model_validate({{"tracking": {{"uri": "sqlite:///{tmp_path}/store.db"}}}})
print(start_run(config, "a", "folder").id)"""
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [start.communicate(timeout=LONGEST) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], told
    assert len({out.strip() for out, _ in told}) == 2


def test_what_a_killed_start_left_running_is_ended_by_the_next(tmp_path: Path) -> None:
    config = Config.model_validate({"tracking": {"uri": f"sqlite:///{tmp_path}/store.db"}})
    killed = start_run(config, "a", "folder")
    child, other = killed.child("client-000"), start_run(config, "b", "another folder")
    done = start_run(config, "a", "folder")
    done.end()
    start_run(config, "a", "folder")
    client, _ = tracking_client(config)
    status = {run.id: client.get_run(run.id).info.status for run in (killed, child, other, done)}
    assert [status[run.id] for run in (killed, child, other, done)] == ["KILLED", "KILLED", "RUNNING", "FINISHED"]
