"""The logged classifier as MLflow's users load it, and curves that grow, in a real store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from fedfactory_ray.classification.ensemble import Predictor
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.data.source import Task
from fedfactory_ray.federation.client import Progress
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.tracking.runs import ClientRun, Run, start_run, tracking_uri
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
    run = start_run(make_config(overrides=["--tracking.uri", store]), "curves", "here")
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
    with pytest.raises(OSError, match="no network"):
        run.end("FAILED")
    assert client.get_run(run.id).info.status == "FAILED"
    broken.mended = True
    run.flush()
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
