"""Rounds of federated methods: on Ray where it matters, else with references that are values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import write_npz
from in_process import Starts
from small_runs import reads_no_image

from fedfactory_ray.baselines import client as actors
from fedfactory_ray.baselines.card import Round
from fedfactory_ray.baselines.fedavg import FedAvg
from fedfactory_ray.baselines.learner import Learner, from_message
from fedfactory_ray.baselines.methods import METHODS, SHARED
from fedfactory_ray.baselines.rounds import Federation
from fedfactory_ray.classification.models import make_classifier
from fedfactory_ray.cluster.absence import replies_of
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.data.partition import Partition, held_elsewhere, make_partition
from fedfactory_ray.data.source import Task
from fedfactory_ray.errors import PartitionError, ResourcesError
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage

TASK = Task(classes=3, channels=1, resolution=8)
COUNTS = ((12, 12, 0), (0, 20, 11), (15, 0, 0), (4, 3, 5), (0, 0, 20))
FEDERATED = {"rounds": 4, "local_epochs": 1, "client_fraction": 0.6, "feddyn_lr": 0.1, "validation_every": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("data") / "stripes.npz")


def config(data: Path, **federated: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"source": str(data)},
            "partition": {"scheme": "skew", "counts": COUNTS},
            "classifier": {"batch_size": 8, "epochs": 2},
            "synthesis": {"images_per_class": 16, "batch_size": 16, "unit_size": 16},
            "federated": FEDERATED | federated,
            "storage": {"checkpoint_rounds": 2},
        }
    )


def deal(settings: Config, data: Path) -> Partition:
    return make_partition(settings.partition, np.load(data)["train_labels"].ravel(), 3, settings.seed)


# On Ray


class Interrupted(Exception):
    pass


def stop_at(last: int, heard: list[Round], actor: Any = None) -> Any:
    """A listener that kills `actor`, whom Ray starts anew, after the first round, and breaks off after `last`."""

    def listen(done: Round) -> None:
        heard.append(done)
        if done.round == 1 and actor is not None:
            ray.kill(actor, no_restart=False)
        if done.round == last:
            raise Interrupted

    return listen


def test_weights_depend_neither_on_the_number_of_actors_nor_on_deaths_and_breaks(
    cluster: None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data)
    partition = deal(settings, data)

    reads_no_image(monkeypatch)
    found: dict[int, dict[str, Any]] = {1: {}, 2: {}}
    for slots in (2, 1):
        storage = Storage(str(tmp_path / str(slots)))
        with Federation(settings, partition, TASK, Worker(0.5, 0.0, 1, slots), storage) as federation:
            assert len(set(federation.slot.values())) == slots
            for name in METHODS:
                method, heard = METHODS[name](settings.federated), []
                if slots == 1 and name in ("scaffold", "feddyn"):
                    with pytest.raises(Interrupted):
                        federation.run(name, method, stop_at(3, heard, federation.slot["client-000"]))
                    assert storage.names("federated")
                    assert federation.run(name, method, heard.append).history[:2] == heard[:2]
                    assert [r.round for r in heard] == [1, 2, 3, 3, 4]
                else:
                    federation.run(name, method, heard.append)
                    assert [r.round for r in heard] == [1, 2, 3, 4]
                found[slots][name] = federation.run(name, method, stop_at(0, [])).sha256
                assert storage.names("federated") == []
            alone = rounds_of_alone(federation)
            found[slots] |= alone
    assert found[1] == found[2]
    assert len(set(found[1].values())) == len(found[1]) == len(METHODS) + len(COUNTS)


def rounds_of_alone(federation: Federation) -> dict[str, str]:
    from fedfactory_ray.baselines.alone import fit_alone

    told: list[int] = []
    fitted = fit_alone(federation, told.append)
    assert told == [1, 2, 3, 4, 5]
    assert fit_alone(federation, told.append) == fitted
    assert len(told) == len(COUNTS)
    return {alone.client: alone.sha256 for alone in fitted}


@pytest.fixture
def waited() -> Callable[[dict[str, Any]], list[Any]]:
    """Waits for a reply of each named silo; there is no node for the silo "moon"."""

    def wait(replies: dict[str, Any]) -> list[Any]:
        labels = {"moon": {"site": "moon"}}
        silos = [{"name": name, "source": "a.npz", "labels": labels.get(name, {})} for name in replies]
        natural = {"partition": {"scheme": "natural", "silos": silos}, "resources": {"away_seconds": 3.0}}
        config = Config.model_validate(natural)
        return list(replies_of({reply: name for name, reply in replies.items()}, config))

    return wait


@ray.remote(num_cpus=0)
def says(what: Any, after: float = 0.0) -> Any:
    time.sleep(after)
    if isinstance(what, Exception):
        raise what
    return what


@ray.remote(num_cpus=0)
class Somewhere:
    def says(self, what: Any) -> Any:
        return what


def test_a_silo_that_stays_away_is_given_up_and_one_that_replied_may_go(cluster: None, waited: Any) -> None:
    at_moon = Somewhere.options(label_selector={"site": "moon"}).remote()  # type: ignore[attr-defined]
    with pytest.raises(ResourcesError, match="silo of client 'moon'"):
        waited({"earth": says.remote(1), "moon": at_moon.says.remote(2)})
    assert waited({"earth": says.remote(1, after=5.0), "moon": says.remote(2)}) == [2, 1]
    ray.kill(at_moon)


def test_what_a_client_refuses_is_told_while_others_are_at_work_or_away(cluster: None, waited: Any) -> None:
    at_moon = Somewhere.options(label_selector={"site": "moon"}).remote()  # type: ignore[attr-defined]
    replies = {"earth": says.remote(OSError("no such file")), "moon": at_moon.says.remote(2)}
    with pytest.raises(OSError, match="no such file"):
        waited(replies)
    ray.kill(at_moon)


def test_a_method_without_one_of_its_silos_ends(cluster: None, data: Path, tmp_path: Path) -> None:
    from fedfactory_ray.baselines.alone import fit_alone

    silos = [{"name": "moon", "source": "a.npz", "labels": {"site": "moon"}}]
    natural = {"partition": {"scheme": "natural", "silos": silos}, "resources": {"away_seconds": 1.0}}
    settings = Config.model_validate(config(data).model_dump(mode="json") | natural)
    partition = Partition(3, {"moon": {0: np.arange(20)}})
    with Federation(settings, partition, TASK, Worker(1.0, 0.0, 1, 1), Storage(str(tmp_path))) as federation:
        with pytest.raises(ResourcesError, match="silo of client 'moon'"):
            federation.run("fedavg", METHODS["fedavg"](settings.federated), stop_at(0, []))
        with pytest.raises(ResourcesError, match="silo of client 'moon'"):
            fit_alone(federation, lambda done: None)


# With actors of this process


@pytest.fixture
def here(cluster: None) -> Iterator[Starts]:
    threads = torch.get_num_threads()
    yield Starts()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def federation_here(here: Starts, settings: Config, data: Path, folder: Path) -> Federation:
    storage, worker = Storage(str(folder)), Worker(1.0, 0.0, 1, 2)
    return Federation(settings, deal(settings, data), TASK, worker, storage, start=here)


def test_bytes_are_those_of_the_messages(here: Starts, data: Path, tmp_path: Path) -> None:
    settings = config(data, rounds=2)
    federation = federation_here(here, settings, data, tmp_path)
    vector = 4 * sum(p.numel() for p in make_classifier("cnn", TASK).parameters())
    clients, drawn = 5, 3
    expected = {"fedavg": (1, 0), "fedprox": (1, 0), "scaffold": (2, 1), "feddyn": (1, 0)}
    for name, (up, extra) in expected.items():
        first, second = federation.run(name, METHODS[name](settings.federated), lambda _: None).history
        for done, sent in ((first, drawn + clients), (second, clients)):
            assert done.clients == drawn
            assert done.bytes_up == pytest.approx(drawn * up * vector, rel=0.001)
            assert done.bytes_down == pytest.approx((sent + drawn * extra) * vector, rel=0.001)


def test_a_method_ends_when_no_round_is_better_and_keeps_the_best(here: Starts, data: Path, tmp_path: Path) -> None:
    settings = config(data, rounds=50, patience=3, client_fraction=1.0)
    done = federation_here(here, settings, data, tmp_path).run("fedavg", FedAvg(), lambda _: None)
    assert len(done.history) == done.chosen + 3 < 50
    best = max(done.history, key=lambda r: (r.validation_balanced, -r.validation_loss))
    assert done.chosen == best.round


def test_a_method_that_diverges_ends_with_the_weights_from_before(here: Starts, data: Path, tmp_path: Path) -> None:
    settings = config(data)
    done = federation_here(here, settings, data, tmp_path).run("fedavg", FedAvg(client_lr=1e30), lambda _: None)
    assert done.history[-1].diverged
    assert done.chosen == 0
    first = Learner(settings, TASK, torch.device("cpu")).network.state_dict()
    kept = from_message(Storage(str(tmp_path)).read("classifier/fedavg/model.safetensors"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.items())


def test_images_that_were_replaced_in_place_make_a_method_run_again(here: Starts, data: Path, tmp_path: Path) -> None:
    settings, heard = config(data, rounds=1), []
    for content in ("first", "first", "replaced"):
        partition = deal(settings, data)
        partition = replace(partition, images_sha256={(c, y): content for c, y, _ in partition})
        storage = Storage(str(tmp_path))
        federation = Federation(settings, partition, TASK, Worker(1.0, 0.0, 1, 2), storage, start=here)
        federation.run("fedavg", METHODS["fedavg"](settings.federated), lambda _, c=content: heard.append(c))
    assert heard == ["first", "replaced"]


def test_another_setting_makes_a_method_run_again_and_another_methods_does_not(
    here: Starts, data: Path, tmp_path: Path
) -> None:
    heard: dict[str, list[Round]] = {}
    for label, changes in {"first": {}, "lr": {"fedavg_lr": 0.05}, "mu": {"fedavg_lr": 0.05, "prox_mu": 3.0}}.items():
        settings = config(data, rounds=1, **changes)
        heard[label] = []
        method = METHODS["fedavg"](settings.federated)
        federation_here(here, settings, data, tmp_path).run("fedavg", method, heard[label].append)
    assert [len(each) for each in heard.values()] == [1, 1, 0]


def test_every_setting_belongs_to_all_methods_or_to_some(data: Path) -> None:
    settings = config(data).federated
    for name in set(type(settings).model_fields) - SHARED:
        changed = settings.model_copy(update={name: 0.123})
        assert any(make(changed) != make(settings) for make in METHODS.values()), name


def test_every_method_has_a_learning_rate_of_its_own(data: Path) -> None:
    for name in ("fedavg", "fedprox", "scaffold", "feddyn"):
        method = METHODS[name](config(data, **{f"{name}_lr": 0.5}).federated)
        others = [METHODS[other](config(data, **{f"{name}_lr": 0.5}).federated).client_lr for other in METHODS]
        assert method.client_lr == vars(method)["client_lr"] == 0.5  # so that it enters the fingerprint
        assert others.count(0.5) == 1


def test_all_clients_learn_when_labels_are_shared(here: Starts, data: Path, tmp_path: Path) -> None:
    settings = config(data, rounds=12, client_fraction=1.0, local_epochs=2).model_copy(
        update={"partition": config(data).partition.model_copy(update={"counts": ((13, 13, 13),) * 3})}
    )
    done = federation_here(here, settings, data, tmp_path).run("fedavg", FedAvg(), lambda _: None)
    assert done.history[done.chosen - 1].validation_accuracy > 0.9


def test_natural_silos_are_read_where_they_lie(here: Starts, data: Path, tmp_path: Path) -> None:
    """The same images as two clients of one file: the same weights; each silo's actor is held to its place."""
    whole = np.load(data)
    labels = whole["train_labels"].ravel()
    mine = {"north": np.flatnonzero(labels < 2), "south": np.flatnonzero(labels == 2)}
    silos = []
    for name, kept in mine.items():
        file = tmp_path / f"{name}.npz"
        np.savez(file, train_images=whole["train_images"][kept], train_labels=whole["train_labels"][kept])
        silos.append({"name": name, "source": str(file), "labels": {"site": name}})
    tree = config(data, rounds=2, client_fraction=1.0).model_dump(mode="json")
    natural = Config.model_validate(tree | {"partition": {"scheme": "natural", "silos": silos}})
    natural = natural.with_class_names("012")
    shares = {name: {y: np.flatnonzero(labels == y) for y in sorted(set(labels[kept]))} for name, kept in mine.items()}
    counts = {(name, y): len(indices) for name, share in shares.items() for y, indices in share.items()}
    found = {}
    for name, settings, partition in (
        ("apart", natural, held_elsewhere(counts, 3)),
        ("together", Config.model_validate(tree), Partition(3, shares)),
    ):
        storage, worker = Storage(str(tmp_path / name)), Worker(1.0, 0.0, 1, 2)
        federation = Federation(settings, partition, TASK, worker, storage, start=here)
        places = [options.get("label_selector") for options in here.options[-3:-1]]
        assert places == ([{"site": "north"}, {"site": "south"}] if name == "apart" else [None, None])
        found[name] = federation.run("fedavg", METHODS["fedavg"](settings.federated), lambda _: None).sha256
    assert found["apart"] == found["together"]


def test_checkpoints_of_a_start_that_was_killed_at_its_very_end_go(here: Starts, data: Path, tmp_path: Path) -> None:
    settings, storage = config(data, rounds=1), Storage(str(tmp_path))
    federation = federation_here(here, settings, data, tmp_path)
    first = federation.run("fedavg", FedAvg(), lambda _: None)
    storage.write(f"federated/fedavg/{federation.fingerprint(FedAvg())[:16]}/00000001/card.json", b"{}")
    assert federation.run("fedavg", FedAvg(), lambda _: None) == first
    assert storage.names("federated") == []


def test_a_refused_device_is_told_at_the_first_use(cluster: None, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the actor's constructor, where Ray would make a dead actor of it."""

    def refuse(_: Any) -> Any:
        raise ResourcesError("GPU 0, assigned by Ray", "a torch that sees it", "another torch")

    monkeypatch.setattr("fedfactory_ray.cluster.devices.assigned_device", refuse)
    actor = actors.FederatedClient(config(data), TASK, 1, {}, np.ones(3))
    with pytest.raises(ResourcesError, match="assigned by Ray"):
        actor.validate("client-000", b"")


def test_a_partition_too_thin_to_validate_is_refused(here: Starts, data: Path, tmp_path: Path) -> None:
    settings = config(data, validation_every=21)
    with pytest.raises(PartitionError, match="validation_every"):
        federation_here(here, settings, data, tmp_path)


def test_participants_are_drawn_anew_and_alike_for_all_methods(here: Starts, data: Path, tmp_path: Path) -> None:
    federation = federation_here(here, config(data), data, tmp_path)
    drawn = [tuple(federation.participants(number)) for number in range(1, 40)]
    assert {len(clients) for clients in drawn} == {3}
    assert len(set(drawn)) > 5
    assert {client for clients in drawn for client in clients} == set(federation.partition.clients)
    assert all(list(clients) == sorted(clients) for clients in drawn)
