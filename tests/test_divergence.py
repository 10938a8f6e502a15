"""One client's training diverges: refused by name, or left out and told wherever results are."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_runs
import mlflow
import numpy as np
import pytest
import ray
import torch
from conftest import write_npz
from rich.console import Console
from small_runs import SMALL, Finished, copy_job, file_digests, run_here, small_config

from fedfactory_ray.classification.rules import prior_of
from fedfactory_ray.cluster.failures import find_refusal
from fedfactory_ray.cluster.plan import Worker, make_plan, start_actor
from fedfactory_ray.data.partition import make_partition
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.errors import TrainingDivergedError, UnlearningError
from fedfactory_ray.federation import round as federation_round
from fedfactory_ray.federation.client import ClientActor, Progress, train_share
from fedfactory_ray.federation.round import run_round
from fedfactory_ray.generation.card import read_cards
from fedfactory_ray.generation.divergence import Divergence, read_divergences
from fedfactory_ray.generation.training import Snapshot, Training
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.command_line import stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint, keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CERTIFICATE
from fedfactory_ray.unlearning.forget import forget
from fedfactory_ray.unlearning.verification import verify

COUNTS = [[40, 0, 10], [0, 25, 0], [0, 15, 30]]
QUICK = {
    "generator": SMALL["generator"] | {"min_steps": 8, "max_steps": 8},
    "classifier": SMALL["classifier"] | {"epochs": 1},
}
LEFT_OUT = {"on_divergence": "leave_out", "max_actors": 1, "classifier": {"threads": 1}}
OUT = Console(file=io.StringIO())
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find a test's module


@contextmanager
def diverging(*keys: tuple[str, int]) -> Iterator[None]:
    """In this process the trainings of these clients' classes diverge after their third step."""
    init, descend = Training.__init__, Training.descend
    seeds = {derive_seed(0, "train", client, label) for client, label in keys}

    def marked(self: Training, images: Any, config: Any, device: Any, seed: int) -> None:
        init(self, images, config, device, seed)
        self.doomed = seed in seeds  # type: ignore[attr-defined]

    def doomed(self: Training) -> torch.Tensor:
        loss = descend(self)
        return loss * float("nan") if self.doomed and self.step > 3 else loss  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", marked)
        patch.setattr(Training, "descend", doomed)
        yield


class Diverging(ClientActor):
    """An actor in which they do."""

    def __init__(self, keys: list[tuple[str, int]], begun: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.keys, self.begun = keys, begun

    def train(self, client: str, share: dict[int, np.ndarray]) -> Iterator[Any]:
        with self.begun.open("a") as log:
            log.write("".join(f"{client}/{label} " for label in share))
        with diverging(*self.keys):
            yield from super().train(client, share)


@contextmanager
def clients_diverge(begun: Path, *keys: tuple[str, int]) -> Iterator[None]:
    """On the cluster they do; what is begun is noted in a file."""

    def start(config: Config, worker: Worker, storage: Storage, client: str) -> Any:
        arguments = (config, worker.threads, storage, worker.modules)
        return start_actor(Diverging, list(keys), begun, *arguments, **worker.options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation_round, "start_client", start)
        yield


def share_events(folder: Path, stripes: Path, **storage: float) -> list[Any]:
    config = small_config(folder, stripes, resources=LEFT_OUT, storage=storage)
    source, share = open_source(config.data), {1: np.arange(20), 2: np.arange(20, 40)}
    return list(train_share(config, source, "a", share, torch.device("cpu"), Storage(str(folder / "run"))))


def test_a_client_leaves_a_module_out_and_trains_the_others(tmp_path: Path, stripes: Path) -> None:
    with diverging(("a", 1)):
        events = share_events(tmp_path, stripes, checkpoint_seconds=1e-9)
        again = share_events(tmp_path, stripes)
    storage = Storage(str(tmp_path / "run"))
    (note,) = read_divergences(storage)
    assert (note.key, note.n_images, str(note)) == (("a", 1), 20, "a, class 1: training diverged")
    assert "loss nan at step 4 of 40: lower generator.learning_rate" in note.why
    assert note in events
    assert [card.key for card in read_cards(storage)] == [("a", 2)]
    assert not [name for name in storage.names("modules/a/class-001") if "checkpoints" in name]
    assert [event for event in again if isinstance(event, Progress)] == [], "neither is trained again for nothing"
    assert note in again


def test_a_training_that_is_sound_again_takes_its_place(tmp_path: Path, stripes: Path) -> None:
    with diverging(("a", 1)):
        share_events(tmp_path, stripes)
    storage = Storage(str(tmp_path / "run"))
    note = Path(storage.root, "modules/a/class-001/diverged.json")
    note.write_text(note.read_text().replace(read_divergences(storage)[0].fingerprint, "f" * 64))
    share_events(tmp_path, stripes)
    assert read_divergences(storage) == []
    assert [card.key for card in read_cards(storage)] == [("a", 1), ("a", 2)]


def test_no_snapshot_is_of_a_loss_that_nobody_looked_at(stripes: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, stripes)
    with diverging(("a", 1)):
        seed = derive_seed(0, "train", "a", 1)
        training = Training(torch.zeros(9, 8, 8, 1, dtype=torch.uint8), config.generator, torch.device("cpu"), seed)
        steps = []
        with pytest.raises(FloatingPointError, match="step 4 of 40"):
            for event in training.events(checkpoint_seconds=0.0):
                steps += [event.step] if isinstance(event, Snapshot) else []
    assert steps == [1, 2, 3]


def round_of(folder: Path, stripes: Path, **resources: Any) -> tuple[Config, Any, Worker, Storage]:
    config = small_config(folder, stripes, resources=LEFT_OUT | resources)
    partition = make_partition(config.partition, open_source(config.data).labels("train"), 3, 0)
    source, images = open_source(config.data), {}
    for client, label, indices in partition:
        images[client, label] = fingerprint(source.images("train", indices))
    partition = replace(partition, images_sha256=images)
    return config, partition, make_plan(config.resources).client, Storage(str(folder / "run"))


def test_by_default_the_run_ends_with_client_class_and_mend(cluster: None, tmp_path: Path, stripes: Path) -> None:
    arguments = round_of(tmp_path, stripes, on_divergence="refuse")
    with clients_diverge(tmp_path / "begun", ("client-002", 1)), pytest.raises(ray.exceptions.RayError) as caught:
        run_round(*arguments, lambda event: None)
    refusal = find_refusal(caught.value)
    assert isinstance(refusal, TrainingDivergedError)
    assert "'client-002', class 1" in str(refusal)
    assert "lower generator.learning_rate" in str(refusal)
    assert read_divergences(arguments[3]) == []


def test_where_all_diverge_nothing_is_drawn(cluster: None, tmp_path: Path, stripes: Path) -> None:
    arguments = round_of(tmp_path, stripes)
    every = [(client, label) for client, label, _ in arguments[1]]
    with (
        clients_diverge(tmp_path / "begun", *every),
        pytest.raises(TrainingDivergedError, match=r"lower generator\.learning_rate"),
    ):
        run_round(*arguments, lambda event: None)


@pytest.fixture(scope="module")
def place(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of both architectures goes without the only module of class 0, and without one of two of
    class 1."""
    folder = tmp_path_factory.mktemp("left-out")
    write_npz(folder / "stripes.npz", n=60)
    return folder


GONE = (("client-000", 0), ("client-002", 1))


@pytest.fixture(scope="module")
def finished(place: Path) -> Finished:
    partition = {"scheme": "skew", "counts": COUNTS}
    config = small_config(
        place, place / "stripes.npz", architecture="both", partition=partition, resources=LEFT_OUT, **QUICK
    )
    with clients_diverge(place / "begun", *GONE):
        return run_here(config, place)


def test_the_run_goes_on_without_the_module_and_says_so(finished: Finished) -> None:
    storage = Storage(str(finished.folder))
    assert finished.report.modules == 3
    told = ["client-000, class 0: training diverged", "client-002, class 1: training diverged"]
    assert finished.report.left_out == told
    for each in told:
        assert f"left out: {each} (loss nan" in finished.printed
        assert finished.printed.count(each) == 2, "as it happens, and in the table"
    assert "no module of class 0 is left: no image of it is drawn" in finished.printed
    quotas: dict[tuple[str, int], int] = {}
    for line in storage.read_json("manifest.json"):
        key = line["client"], line["label"]
        quotas[key] = quotas.get(key, 0) + line["n"]
    assert quotas == {("client-000", 2): 10, ("client-001", 1): 40, ("client-002", 2): 30}
    evaluation = storage.read_json("evaluation.json")
    assert [(note["client"], note["label"]) for note in evaluation["left_out"]] == list(GONE)
    announced = [sum(card.n_images for card in read_cards(storage) if card.label == y) for y in range(3)]
    np.testing.assert_allclose(evaluation["prior"], prior_of(np.array(announced)))
    assert set(finished.report.experts) == {"client-000", "client-001", "client-002"}
    runs = mlflow.MlflowClient(finished.config.tracking.uri).search_runs(["1"])
    tags = [run.data.tags for run in runs if "left_out.client-002.1" in run.data.tags]
    assert len(tags) == 1
    assert tags[0]["left_out.client-000.0"].startswith("training diverged: loss nan at step")


def test_the_same_command_trains_nothing_again(finished: Finished, place: Path) -> None:
    before, begun = file_digests(finished.folder, "modules/**/*.*"), (place / "begun").read_text()
    with clients_diverge(place / "begun", *GONE):
        again = run_here(finished.config, place)
    assert (place / "begun").read_text() == begun
    assert file_digests(finished.folder, "modules/**/*.*") == before
    assert again.report.left_out == finished.report.left_out
    assert "2 left-out modules there and kept" in again.printed


def test_forgetting_keeps_the_mark_and_a_run_without_it_is_reproducible(finished: Finished, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    copy_job(finished.folder.parents[1], place)
    config = stored_config("small", ["--storage.uri", str(place / "runs")])
    with clients_diverge(place / "begun-again", *GONE):
        certificate = forget(config, ["client-000"], [], OUT, asked_by="x")
        assert not (place / "begun-again").exists(), "what diverged is known, and not trained again"
        new = "small-without-client-000"
        stored = stored_config(new, ["--storage.uri", str(place / "runs")])
        _, checks = verify(f"{place}/runs/{new}/{CERTIFICATE}", stored, OUT, retrain=True)
    assert {check.name: check.wrong for check in checks} == {check.name: [] for check in checks}
    assert [note.key for note in certificate.before.divergences] == list(GONE)
    assert [note.key for note in certificate.after.divergences] == [("client-002", 1)]
    assert certificate.absent == [0]
    assert "no module client-002, class 1" in certificate.after.digests()
    tree = json.loads((place / "runs" / new / CERTIFICATE).read_text())
    assert tree["after"]["left_out"][0]["why"].startswith("loss nan")
    assert not list((place / "runs").rglob("client-000/class-000/diverged.json"))


def test_a_run_is_not_made_one_without_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_runs.without_ray(monkeypatch)
    made_runs.make_run(tmp_path)
    run = Storage(str(tmp_path / "runs" / "small"))
    run.delete_folder("modules/client-001/class-001")
    keep(run, Divergence("client-001", 1, 25, "loss nan", fingerprint="f00d", files={}))
    config = made_runs.config_of(tmp_path, "small")
    with pytest.raises(UnlearningError, match="no module left"):
        forget(config, ["client-000", "client-002", "client-003"], [], OUT, asked_by="x")
    assert not run.exists("pending.json")
    with pytest.raises(UnlearningError, match="no client client-009"):
        forget(config, ["client-009"], [], OUT, asked_by="x")
    certificate = forget(config, ["client-001"], [], OUT, asked_by="x")
    assert certificate.after.left_out == [], "who has no module is forgotten like everybody"
