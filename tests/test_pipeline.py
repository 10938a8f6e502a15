"""The main job, whole, on small images: real Ray, real MLflow store, real files."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_npz
from rich.console import Console
from small_runs import SMALL, Finished, copy_job, digests, reads_no_image, run_here, small_config

from fedfactory_ray.errors import ConfigError, DataInvalidError, RunConflictError
from fedfactory_ray.federation import round as federation_round
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.session import run_name
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config, merge
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MANIFEST


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_npz(folder / "stripes.npz")


@pytest.fixture(scope="module")
def finished(cluster: None, folder: Path, data: Path) -> Finished:
    """One whole run, during which the driver may not open the data."""
    with pytest.MonkeyPatch.context() as patch:
        reads_no_image(patch)
        resources = SMALL["resources"] | {"max_actors": 2}
        return run_here(small_config(folder, data, baselines=("centralised",), resources=resources), folder)


def test_the_classifier_learns_from_synthetic_images_alone(finished: Finished) -> None:
    evaluations = finished.report.evaluations
    assert evaluations["fedfactory"].announced.n_images == 60
    assert evaluations["fedfactory"].announced.accuracy.value > 0.6 > evaluations["fedfactory"].announced.majority
    assert evaluations["centralised"].announced.accuracy.value > 0.6


def test_the_synthetic_set_is_balanced_mixed_by_count_and_traceable(finished: Finished) -> None:
    table = pq.read_table(finished.folder / "synthetic", columns=["label", "client", "module", "unit", "index"])
    counts = table.group_by(["client", "label"]).aggregate([("index", "count")]).to_pydict()
    found = dict(zip(zip(counts["client"], counts["label"], strict=True), counts["index_count"], strict=True))
    assert found == {
        ("client-000", 0): 40,
        ("client-001", 1): 25,
        ("client-002", 1): 15,
        ("client-000", 2): 10,
        ("client-002", 2): 30,
    }
    modules = {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in finished.folder.glob("modules/**/*.safetensors")
    }
    assert set(table["module"].to_pylist()) == modules
    keys = list(zip(*(table[name].to_pylist() for name in ("client", "label", "unit", "index")), strict=True))
    assert len(set(keys)) == len(keys) == 120


def test_every_module_is_uploaded_once_and_counted(finished: Finished) -> None:
    files = [*finished.folder.glob("modules/**/*.safetensors"), *finished.folder.glob("modules/**/card.json")]
    assert finished.report.modules == 5
    assert finished.report.uploaded_bytes == sum(path.stat().st_size for path in files)


def test_nothing_but_the_run_is_left_in_storage(finished: Finished) -> None:
    top = {path.name for path in finished.folder.iterdir()}
    assert top == {
        *("config.json", "partition.json", "partition.parquet", "manifest.json", "evaluation.json"),
        *("seconds.json", "settings.json", "environment.json"),
        *("modules", "synthetic", "classifier"),
    }
    assert not list(finished.folder.glob("**/*.tmp"))


def test_mlflow_holds_a_parent_run_with_a_child_a_client_and_phase(finished: Finished) -> None:
    client = mlflow.MlflowClient(finished.config.tracking.uri)
    experiment = client.get_experiment_by_name("fedfactory")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_name for r in parents] == ["small"]
    parent = parents[0]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {
        *("client-000", "client-001", "client-002"),
        *("synthesis", "classifier-fedfactory", "classifier-centralised", "evaluation"),
    }
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.params["generator.min_steps"] == "40"
    scalars = finished.report.evaluations["fedfactory"].scalars()
    assert {name: parent.data.metrics[name] for name in scalars} == scalars
    assert parent.data.metrics["uploaded_bytes"] == finished.report.uploaded_bytes
    assert client.get_metric_history(children["client-000"].info.run_id, "loss_class_0")[-1].step == 40
    assert len(client.get_metric_history(children["classifier-fedfactory"].info.run_id, "train_loss")) == 4
    artifacts = {a.path for r in [parent, *children.values()] for a in client.list_artifacts(r.info.run_id)}
    assert {"samples.png", "confusion-fedfactory.png", "manifest.json", "partition.json", "modules.json"} <= artifacts


def test_the_logged_model_predicts_uint8_images_of_any_number(finished: Finished, data: Path) -> None:
    mlflow.set_tracking_uri(finished.config.tracking.uri)
    model = mlflow.pyfunc.load_model(finished.report.models["classifier"])
    arrays = np.load(data)
    probabilities = model.predict(arrays["test_images"]).to_numpy()
    assert probabilities.shape == (60, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(1) == arrays["test_labels"].ravel()).mean()
    evaluation = finished.report.evaluations["fedfactory"]
    assert accuracy == pytest.approx(evaluation.announced.accuracy.value)
    picked = probabilities[np.arange(60), arrays["test_labels"].ravel()]
    assert -np.log(picked).mean() == pytest.approx(evaluation.announced.nll, rel=1e-4)
    alike = model.predict(arrays["test_images"], params={"prior": "uniform"}).to_numpy()
    assert (alike.argmax(1) == arrays["test_labels"].ravel()).mean() == pytest.approx(evaluation.alike.accuracy.value)
    np.testing.assert_allclose(model.metadata.metadata["prior"], np.array([40, 40, 40]) / 120)
    assert model.predict(arrays["test_images"][:1]).shape == (1, 3)


def test_a_logged_model_holds_no_real_image(finished: Finished, data: Path) -> None:
    mlflow.set_tracking_uri(finished.config.tracking.uri)
    uri = finished.report.models["classifier"]
    example = mlflow.models.Model.load(uri).load_input_example(mlflow.artifacts.download_artifacts(uri))
    arrays, drawn = np.load(data), pq.read_table(finished.folder / "synthetic", columns=["image"])["image"]
    real = {bytes(image) for split in ("train", "val", "test") for image in arrays[f"{split}_images"]}
    images = {np.asarray(image, np.uint8).tobytes() for image in example}
    assert images <= {np.asarray(image, np.uint8).tobytes() for image in drawn.to_pylist()}
    assert not images & real
    assert len(example) == 3 * 8


def test_what_a_person_sees(finished: Finished) -> None:
    for part in (
        "client-002",
        "training modules (200 steps)",
        "drawing images",
        "accuracy, announced prior",
        "balanced accuracy, classes alike",
        "test sampling only",
        "seconds, modules",
    ):
        assert part in finished.printed
    assert "\x1b" not in finished.printed


def test_the_same_command_makes_again_what_is_damaged_alone_to_the_same_bytes(finished: Finished, folder: Path) -> None:
    module = next(finished.folder.glob("modules/client-001/**/*.safetensors"))
    shard = next(finished.folder.glob("synthetic/class-000/*.parquet"))
    before = {path: path.read_bytes() for path in (module, shard)}
    whole = [*finished.folder.glob("modules/*/*/*.*"), *finished.folder.glob("classifier/*/*.*")]
    whole += finished.folder.glob("synthetic/*/*.parquet")
    stamps = {path: path.stat().st_mtime_ns for path in whole if path.parent != module.parent and path != shard}
    assert len(stamps) == (5 - 1) * 2 + 2 * 2 + 17 - 1
    module.write_bytes(before[module][:-7] + b"damaged")
    shard.write_bytes(before[shard][: len(before[shard]) // 2])
    again = run_here(finished.config, folder)
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert again.report.evaluations == finished.report.evaluations


def test_another_configuration_under_the_same_name_is_refused(finished: Finished, folder: Path, data: Path) -> None:
    with pytest.raises(RunConflictError, match=r"sampler.evaluations: there 6, here 7"):
        phases.run(small_config(folder, data, sampler={"evaluations": 7}), Console(file=io.StringIO()))


def test_bytes_do_not_depend_on_the_number_of_actors(finished: Finished, undisturbed: dict[str, str]) -> None:
    """This run had two actors a phase, the undisturbed one had one."""
    found = digests(finished.folder)
    assert {name: found[name] for name in undisturbed} == undisturbed


def test_units_drawn_in_another_order_by_one_process_have_the_same_rows(finished: Finished, tmp_path: Path) -> None:
    from fedfactory_ray.generation.card import ModuleHandle, read_cards
    from fedfactory_ray.synthesis.plan import make_units
    from fedfactory_ray.synthesis.synthesize import Synthesizer

    config, storage = finished.config, Storage(str(finished.folder))
    cards = read_cards(storage)
    modules = {card.key: ModuleHandle(card) for card in cards}
    actor = Synthesizer(config, 1, storage, modules, target=Storage(str(tmp_path)))
    manifest = {line["file"]: line["rows_sha256"] for line in storage.read_json(MANIFEST)}
    for unit in reversed(make_units(cards, 40, 8, config.seed)):
        assert actor.draw(unit).rows_sha256 == manifest[unit.file]
    assert len(actor.kept) <= 2


def test_a_hundred_clients_share_two_slots(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfactory_ray.cluster.plan import Worker, make_plan
    from fedfactory_ray.data.partition import make_partition
    from fedfactory_ray.federation.client import start_client

    source = write_npz(tmp_path / "many.npz", n=120)
    config = small_config(
        tmp_path,
        source,
        partition={"clients": 100, "min_size": 3},
        generator=SMALL["generator"] | {"min_steps": 2, "max_steps": 2},
        resources={},
    )
    labels = np.load(source)["train_labels"].ravel()
    partition = make_partition(config.partition, labels, 3, 0)
    started = []

    def counting(config: Config, worker: Worker, storage: Storage, client: str) -> Any:
        started.append(worker.options)
        return start_client(config, worker, storage, client)

    monkeypatch.setattr(federation_round, "start_client", counting)
    worker = make_plan(config.resources).client
    modules = federation_round.run_round(config, partition, worker, Storage(str(tmp_path / "run")), lambda event: None)
    assert list(modules) == [(client, label) for client, label, _ in partition]
    assert len(modules) == 100
    assert started == [{"num_cpus": 1.0, "num_gpus": 0.0}] * 2
    assert all(handle.ref is not None for handle in modules.values())


def test_too_few_images_to_choose_an_epoch_are_refused_and_the_folder_stays_free(
    cluster: None, data: Path, tmp_path: Path
) -> None:
    changes = {"synthesis": SMALL["synthesis"] | {"images_per_class": 12}}  # of class 1 eight and four
    with pytest.raises(ConfigError, match="at most 8 images of class 1"):
        run_here(small_config(tmp_path, data, **changes), tmp_path)
    assert not (tmp_path / "runs" / "small" / "config.json").exists()


def test_bad_data_is_refused_before_anything_is_made(cluster: None, tmp_path: Path) -> None:
    labels = np.full((120, 1), 2, np.uint8)
    source = write_npz(tmp_path / "gap.npz", train_labels=labels)
    config = small_config(tmp_path, source, partition={})
    with pytest.raises(DataInvalidError, match=r"gap\.npz[\s\S]*no training image of class 0, 1"):
        phases.run(config, Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()
    runs = mlflow.MlflowClient(config.tracking.uri).search_runs(["1"])
    assert not runs, "a refusal leaves none"


def test_run_names_follow_the_settings_that_matter() -> None:
    name = run_name(make_config("bloodmnist-cpu"))
    assert name.startswith("bloodmnist-silos-seed0-")
    assert name == run_name(make_config("bloodmnist-cpu", overrides=["--storage.uri", "elsewhere"]))
    assert name != run_name(make_config("bloodmnist-cpu", overrides=["--generator.epochs", "3"]))


def test_the_comparison_goes_on_from_the_runs_folder(finished: Finished, folder: Path, tmp_path: Path) -> None:
    from fedfactory_ray.comparison.compare import compare
    from fedfactory_ray.comparison.report import ACCURACY, BEST, ENSEMBLE, LONE, MEAN
    from fedfactory_ray.settings.sections import FederatedConfig

    federated = FederatedConfig(rounds=2, local_epochs=1, validation_every=5)
    copy_job(folder, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "small"
    places = {"storage": {"uri": str(run.parent)}, "tracking": {"uri": f"sqlite:///{tmp_path}/copy/mlflow.db"}}
    config = Config.model_validate(merge(finished.config.model_dump(mode="json"), places))
    config = config.model_copy(update={"federated": federated})
    methods, out = ["fedfactory", "fedfactory-ii", "centralised", "local", "scaffold"], io.StringIO()
    patterns = ("modules/**/*", "synthetic/**/*", "classifier/**/*")
    before = {p: p.stat().st_mtime_ns for pattern in patterns for p in run.glob(pattern) if p.is_file()}
    found = compare(config, methods, 1, Console(file=out, width=160))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lines = {line.method: line for line in found.lines}
    assert list(lines) == ["centralised", MEAN, BEST, ENSEMBLE, "scaffold", "fedfactory", LONE, "fedfactory-ii"]
    for method, evaluation in finished.report.evaluations.items():
        assert lines[method].scores == evaluation.scalars()
    assert lines["fedfactory"].bytes_up == finished.report.uploaded_bytes
    experts = sum(path.stat().st_size for path in run.glob("experts/*/model.safetensors"))
    assert lines["fedfactory-ii"].bytes_up == finished.report.uploaded_bytes + experts > lines["fedfactory"].bytes_up
    assert lines["fedfactory-ii"].bytes_down > 0
    assert lines["centralised"].bytes_up == 120 * 64
    alone = sum(path.stat().st_size for path in run.glob("classifier/local-*/model.safetensors"))
    assert lines[ENSEMBLE].bytes_up == alone > lines[MEAN].bytes_up == lines[BEST].bytes_up == 0
    assert lines["scaffold"].rounds == 2
    assert lines["scaffold"].bytes_up > lines["scaffold"].bytes_down / 2 > 0
    assert lines[MEAN].scores[ACCURACY] <= lines[BEST].scores[ACCURACY]
    assert "scaffold" in out.getvalue()
    worked = finished.report.seconds
    assert lines["fedfactory"].seconds >= worked["modules"] + worked["synthesis"]

    client = mlflow.MlflowClient(config.tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("fedfactory").experiment_id])
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == runs_parent(runs)}
    assert set(methods) <= set(children)
    assert {r.info.status for r in children.values()} == {"FINISHED"}
    assert children["fedfactory"].data.metrics[ACCURACY] == lines["fedfactory"].scores[ACCURACY]
    assert len(client.get_metric_history(children["scaffold"].info.run_id, "validation_accuracy")) == 2
    assert "comparison.png" in {a.path for a in client.list_artifacts(runs_parent(runs))}
    assert (run / "comparison.png").read_bytes().startswith(b"\x89PNG")

    after = {p: p.stat().st_mtime_ns for p in run.glob("classifier/**/*") if p.is_file()}
    assert compare(config, methods, 1, Console(file=out, width=160)).lines == found.lines
    assert {path: path.stat().st_mtime_ns for path in after} == after


def runs_parent(runs: list[Any]) -> str:
    """The newest parent run."""
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    return str(max(parents, key=lambda r: r.info.start_time).info.run_id)
