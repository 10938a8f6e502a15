"""Both architectures from the same modules, whole, on small images: real Ray, real MLflow store, real files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
from small_runs import Finished, copy_job, file_digests, reads_no_image, run_here, small_config

from fedfactory_ray.cluster.plan import Worker, start_actor
from fedfactory_ray.data.source import Task
from fedfactory_ray.federation import experts
from fedfactory_ray.generation.card import ModuleHandle, read_cards
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import Unit, make_units
from fedfactory_ray.synthesis.synthesize import Synthesizer

CLIENTS = ["client-000", "client-001", "client-002"]
MADE = ("modules/**/*", "synthetic/**/*", "classifier/**/*")


@dataclass
class Both:
    centralised: Finished
    finished: Finished
    stamps: dict[Path, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures") / "job"


@pytest.fixture(scope="module")
def data(undisturbed_folder: Path) -> Path:
    return undisturbed_folder / "stripes.npz"


@pytest.fixture(scope="module")
def both(cluster: None, undisturbed_folder: Path, folder: Path, data: Path) -> Both:
    """A finished run of Architecture I, the same command again, then with both architectures, during which the driver
    may not open the data."""
    copy_job(undisturbed_folder, folder)
    made = [p for pattern in MADE for p in (folder / "runs" / "small").glob(pattern) if p.is_file()]
    stamps = {p: p.stat().st_mtime_ns for p in made}
    centralised = run_here(small_config(folder, data, baselines=("none",)), folder)
    with pytest.MonkeyPatch.context() as patch:
        reads_no_image(patch)
        finished = run_here(small_config(folder, data, baselines=("none",), architecture="both"), folder)
    return Both(centralised, finished, stamps)


def without_experts(both: Both, folder: Path) -> None:
    """A copy of the run below `folder`, as if only its modules and synthetic images had been made."""
    kept = shutil.ignore_patterns("experts", "classifier", "evaluation.json")
    shutil.copytree(both.finished.folder, folder / "runs" / "small", ignore=kept)


def test_a_run_goes_on_with_the_same_or_both_architectures_and_makes_nothing_again(both: Both) -> None:
    assert both.stamps
    assert {path: path.stat().st_mtime_ns for path in both.stamps} == both.stamps
    before, after = both.centralised.report, both.finished.report
    assert after.name == before.name
    assert after.evaluations["fedfactory"] == before.evaluations["fedfactory"]
    assert (before.experts, before.differences, before.downlink_bytes, before.expert_bytes) == ({}, {}, 0, 0)


def test_experts_alone_and_together_are_evaluated_beside_the_classifier(both: Both) -> None:
    report = both.finished.report
    assert list(report.evaluations) == ["fedfactory", "product", "mixture"]
    assert list(report.experts) == CLIENTS
    assert report.missing == {}
    assert report.main == "fedfactory"
    product, classifier = (report.evaluations[name].announced for name in ("product", "fedfactory"))
    assert product.n_images == 60
    assert product.accuracy.value > 0.6
    gain = product.accuracy.value - classifier.accuracy.value
    assert report.differences["product"]["fedfactory"].accuracy.value == pytest.approx(gain)
    stored = Storage(str(both.finished.folder)).read_json("evaluation.json")
    assert stored["product"] == report.evaluations["product"].scalars()
    assert stored["experts"]["client-001"] == report.experts["client-001"].scalars()
    for part in ("product of 3 experts", "lone experts, mean", "product less fedfactory", "downlinks"):
        assert part in both.finished.printed
    assert "MISSING" not in both.finished.printed


def test_a_downlink_is_the_other_clients_modules_and_is_counted(both: Both) -> None:
    files = {path: path.stat().st_size for path in both.finished.folder.glob("modules/**/*") if path.is_file()}
    expected = sum(size for client in CLIENTS for path, size in files.items() if client not in path.parts)
    # client-000 holds 40 images of class 0, its quota, but no other client has a module of that class.
    assert both.finished.report.downlink_bytes == expected == (len(CLIENTS) - 1) * sum(files.values())


def test_experts_have_runs_with_curves(both: Both) -> None:
    client = mlflow.MlflowClient(both.finished.config.tracking.uri)
    experiment = client.get_experiment_by_name("fedfactory")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    newest = next(run for run in runs if run.data.params.get("architecture") == "both")
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == newest.info.run_id]
    children = {run.info.run_name: run for run in below}
    assert len(children) == len(below)
    for name in CLIENTS:
        child = children[f"expert-{name}"]
        points = client.get_metric_history(child.info.run_id, "validation_loss")
        assert sorted(point.step for point in points) == [1, 2, 3, 4]
        assert child.info.status == "FINISHED"
    assert {children[f"expert-{name}"].data.metrics["real"] for name in CLIENTS} == {50, 25, 45}
    assert newest.data.metrics["downlink_bytes"] == both.finished.report.downlink_bytes
    evaluation = children["evaluation"]
    assert evaluation.data.metrics["expert_mean/announced/accuracy"] == pytest.approx(
        np.mean([e.announced.accuracy.value for e in both.finished.report.experts.values()])
    )
    assert "confusion-product.png" in {a.path for a in client.list_artifacts(evaluation.info.run_id)}


def test_the_ensemble_is_one_model_for_uint8_images_of_any_number(both: Both, data: Path) -> None:
    mlflow.set_tracking_uri(both.finished.config.tracking.uri)
    uri = both.finished.report.models["ensemble"]
    model, arrays = mlflow.pyfunc.load_model(uri), np.load(data)
    probabilities = model.predict(arrays["test_images"]).to_numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(1) == arrays["test_labels"].ravel()).mean()
    assert accuracy == pytest.approx(both.finished.report.evaluations["product"].announced.accuracy.value)
    np.testing.assert_allclose(model.predict(arrays["test_images"][:1]), probabilities[:1], rtol=1e-3, atol=1e-5)
    assert list(model.metadata.metadata["experts"]) == CLIENTS
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 8, 8, 1)


def test_experts_do_not_depend_on_the_number_of_actors_nor_on_the_classifier(
    both: Both, data: Path, tmp_path: Path
) -> None:
    without_experts(both, tmp_path)
    resources = {"max_actors": 2, "classifier": {"threads": 1}}
    config = small_config(tmp_path, data, resources=resources, baselines=("none",), architecture="decentralised")
    alone = run_here(config, tmp_path)
    fitted = file_digests(both.finished.folder, "experts/**/*.*")
    assert len(fitted) == 6
    assert file_digests(alone.folder, "experts/**/*.*") == fitted
    assert not (alone.folder / "classifier").exists()
    assert list(alone.report.evaluations) == ["product", "mixture"]
    assert alone.report.main == "product"
    assert list(alone.report.models) == ["ensemble"]
    for method in ("product", "mixture"):
        assert alone.report.evaluations[method] == both.finished.report.evaluations[method]


def test_a_client_that_draws_a_unit_itself_gets_the_bytes_of_the_pool(both: Both, tmp_path: Path) -> None:
    config, pool = both.finished.config, Storage(str(both.finished.folder))
    cards = read_cards(pool)
    received = {
        card.key: ModuleHandle(card, ray.put(pool.read(f"{card.folder}/model.safetensors")))
        for card in cards
        if card.client != "client-001"
    }

    def draw(modules: dict[tuple[str, int], ModuleHandle], units: list[Unit]) -> list[str]:
        own = Synthesizer(config, 1, Storage(str(tmp_path)), modules)
        columns = {name: np.array([getattr(unit, name) for unit in units]) for name in Unit.__dataclass_fields__}
        return list(own(columns)["rows_sha256"])

    units = [
        unit
        for unit in make_units(cards, config.synthesis.images_per_class, config.synthesis.unit_size, config.seed)
        if unit.client != "client-001"
    ]
    ray.get(ray.remote(num_cpus=1)(draw).remote(received, units[::-1]))
    drawn = file_digests(tmp_path, "synthetic/**/*.parquet")
    there = file_digests(both.finished.folder, "synthetic/**/*.parquet")
    assert len(drawn) == len(units)
    assert drawn == {file: digest for file, digest in there.items() if "client-001" not in file}


def start_frail(folder: Path) -> Any:
    """Starts actors in which client-000 fails once, client-001 always kills its process, client-002 dies once."""

    class Frail:
        def __init__(self, config: Config, storage: Storage) -> None:
            from fedfactory_ray.cluster.devices import assigned_device, prepare_process
            from fedfactory_ray.data.readers import open_source

            self.config, self.storage, self.source = config, storage, open_source(config.data)
            self.device = prepare_process(1, assigned_device([]))

        def fit_expert(self, assignment: Any) -> Iterator[Any]:
            from fedfactory_ray.federation.expert import fit_expert

            mark = folder / f"{assignment.client}-failed"
            first = not mark.exists()
            mark.write_text("x" * (1 + (0 if first else mark.stat().st_size)))
            if assignment.client == "client-000" and first:
                raise RuntimeError("frail")
            for event in fit_expert(self.config, assignment, self.source, self.storage, self.device):
                yield event
                if assignment.client == "client-001" or (assignment.client == "client-002" and first):
                    os._exit(1)

    def start(config: Config, worker: Worker, storage: Storage, client: str) -> Any:
        return start_actor(Frail, config, storage, **worker.options)

    return start


def test_a_missing_expert_is_named_and_the_others_are_multiplied(
    both: Both, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_experts(both, tmp_path)
    config = small_config(tmp_path, data, baselines=("none",), architecture="decentralised")
    with monkeypatch.context() as patch:
        patch.setattr(experts, "start_client", start_frail(tmp_path))
        found = run_here(config, tmp_path)
    attempts = {client: (tmp_path / f"{client}-failed").stat().st_size for client in CLIENTS}
    assert attempts == {"client-000": 2, "client-001": config.resources.attempts, "client-002": 2}
    assert list(found.report.missing) == ["client-001"]
    assert list(found.report.experts) == ["client-000", "client-002"]
    assert "expert of client-001 is missing, the product is without it" in found.printed
    assert "  product of 2 experts, 1 MISSING" in found.printed
    assert "client-000 is tried again, attempt 2 of 3: RuntimeError: frail" in found.printed
    assert "expert of client-002: goes on from epoch 1 of 4" in found.printed
    assert list(Storage(str(found.folder)).read_json("evaluation.json")["missing_experts"]) == ["client-001"]
    model = mlflow.pyfunc.load_model(found.report.models["ensemble"])
    assert list(model.metadata.metadata["missing"]) == ["client-001"]
    whole = file_digests(both.finished.folder, "experts/**/*.safetensors")
    present = file_digests(found.folder, "experts/*/model.safetensors")
    assert present == {file: digest for file, digest in whole.items() if "client-001" not in file}


def test_no_expert_at_all_is_an_error(both: Both, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfactory_ray.cluster.plan import make_plan
    from fedfactory_ray.federation.expert import Assignment

    class Broken:
        def fit_expert(self, assignment: Any) -> Iterator[Any]:
            raise RuntimeError("out of memory")
            yield

    monkeypatch.setattr(experts, "start_client", lambda config, worker, *_: start_actor(Broken, **worker.options))
    config = small_config(tmp_path, data)
    assignment = Assignment("client-000", {0: np.arange(3)}, (), 0, Task(3, 1, 8))
    worker = make_plan(config.resources).client
    with pytest.raises(ray.exceptions.RayTaskError, match="out of memory"):
        experts.collect_experts(config, [assignment], worker, Storage(str(tmp_path)), lambda *_: None)
