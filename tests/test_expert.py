"""A client's expert, in one process without Ray: what it gets, what it sees, how it goes on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_npz

from fedfactory_ray.classification.batches import BalancedBatches, Group
from fedfactory_ray.classification.card import Epoch, Expert
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import Source, Task
from fedfactory_ray.federation.expert import Assignment, assign, compose, fit_expert, make_batches, real_share
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.artefact import find
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import Shard, write_shard

TASK = Task(classes=3, channels=1, resolution=8)
QUOTA = 40
CPU = torch.device("cpu")


def config(real_share: float = 1.0, **classifier: object) -> Config:
    recipe = {"epochs": 4, "batch_size": 16, "shift": 0.0, **classifier}
    synthesis = {"images_per_class": QUOTA, "batch_size": 8, "unit_size": 16}
    experts, storage = {"real_share": real_share}, {"checkpoint_epochs": 2}
    return Config.model_validate({"classifier": recipe, "synthesis": synthesis, "experts": experts, "storage": storage})


def card(client: str, label: int, images: int) -> ModuleCard:
    generator = GeneratorConfig().model_dump(mode="json")
    files = {"model.safetensors": f"{client}{label}"}
    return ModuleCard(client, label, images, 1, 8, 10, "fp32", generator, 1000 + label, files=files)


CARDS = [card("a", 0, 30), card("a", 1, 10), card("b", 1, 10), card("b", 2, 45), card("c", 2, 5)]
SHARE = {0: np.arange(0, 90, 3), 1: np.arange(1, 31, 3)}  # client a: 30 images of class 0, 10 of class 1


def held(share: dict[int, np.ndarray], content: str = "content") -> Partition:
    """Client a's share, with fingerprints of its images."""
    return Partition(3, {"a": share}, {("a", label): f"{content}{label}" for label in share})


def stored_expert(config: Config, assignment: Assignment, storage: Storage) -> Expert | None:
    """The expert of an earlier start, as the round of experts looks for it."""
    return find(storage, Expert, f"experts/{assignment.client}", assignment.fingerprint(config))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    config = Config.model_validate({"data": {"source": str(write_npz(tmp_path / "stripes.npz"))}})
    return open_source(config.data)


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Storage, list[Shard]]:
    """A run's storage with synthetic stripes, brighter than the real ones."""
    storage = Storage(str(tmp_path / "run"))
    manifest = []
    for unit in make_units(CARDS, QUOTA, 16, 0):
        images = np.random.RandomState(unit.seed % 2**32).randint(60, 90, (unit.n, 8, 8, 1)).astype(np.uint8)
        images[:, 2 * unit.label + 1] += 150
        manifest.append(write_shard(storage, unit, images))
    return storage, manifest


def is_real(images: torch.Tensor) -> torch.Tensor:
    return images.amin((1, 2, 3)) < 60


def test_a_client_gets_the_classes_of_which_it_has_too_few_and_the_others_modules_of_these(
    pool: tuple[Storage, list[Shard]],
) -> None:
    manifest = pool[1]
    found = assign(config(), "a", held(SHARE), manifest, CARDS, TASK)
    assert found.shards == tuple(manifest)
    others = [card for card in CARDS if card.client != "a"]
    assert found.downlink_bytes == sum(card.size + len(card.to_json()) for card in others)
    rich = {0: np.arange(QUOTA), 1: np.arange(10)}
    found = assign(config(), "a", held(rich), manifest, CARDS, TASK)
    assert {shard.label for shard in found.shards} == {1, 2}
    assert assign(config(real_share=0.5), "a", held(rich), manifest, CARDS, TASK).shards == tuple(manifest)


def test_every_class_is_shown_alike_and_real_images_as_often_as_they_are_held(
    source: Source, pool: tuple[Storage, list[Shard]]
) -> None:
    storage, manifest = pool
    assignment = assign(config(), "a", held(SHARE), manifest, CARDS, TASK)
    training, validation = make_batches(config(), assignment, source, storage)
    assert training.steps == 3 * 36 // 16
    images, labels = (torch.cat(part) for part in zip(*training.epoch(None), strict=True))
    assert labels.bincount().tolist() == [36, 36, 36]
    assert labels[is_real(images)].bincount().tolist() == [27, 9]  # 30/40 and 10/40 of 36
    images, labels = (torch.cat(part) for part in zip(*validation.epoch(None), strict=True))
    assert labels.bincount().tolist() == [4, 4, 4]
    assert labels[is_real(images)].bincount().tolist() == [3, 1]


def test_training_and_validation_share_no_image(source: Source, pool: tuple[Storage, list[Shard]]) -> None:
    storage, manifest = pool
    batches = make_batches(config(), assign(config(), "a", held(SHARE), manifest, CARDS, TASK), source, storage)
    training, validation = ({image.numpy().tobytes() for image in side.images} for side in batches)
    assert not training & validation
    assert len(training) + len(validation) == 3 * QUOTA + 40
    own = source.images("train", SHARE[0])
    assert [image.tobytes() in validation for image in own] == [i % 10 == 9 for i in range(30)]


def test_real_images_are_held_to_their_largest_share() -> None:
    assert real_share(config(), 10) == 0.25
    assert real_share(config(), 400) == 1.0
    assert real_share(config(real_share=0.1), 10) == 0.1
    assert real_share(config(), 0) == 0.0


def test_a_class_is_composed_of_what_there_is() -> None:
    some, none = np.zeros((5, 8, 8, 1), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)
    assert [group.shown for group in compose(0, some, some, 36, 0.25)] == [9, 27]
    assert [group.shown for group in compose(0, some, none, 36, 0.25)] == [36]
    assert [group.shown for group in compose(0, none, some, 36, 0.25)] == [36]
    assert compose(0, none, none, 36, 0.25) == []


def test_a_small_group_is_shown_evenly_and_a_large_one_without_repetition() -> None:
    small, large = (np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) for n in (3, 50))
    batches = BalancedBatches([Group(0, small, 7), Group(1, large, 9)], 4, 5)
    seen = []
    for epoch in range(2):
        images, labels = (torch.cat(part) for part in zip(*batches.epoch(epoch), strict=True))
        assert labels.bincount().tolist() == [7, 9]
        assert sorted(images.flatten()[labels == 0].bincount().tolist()) == [2, 2, 3]
        assert images.flatten()[labels == 1].bincount().max() == 1
        seen.append(images.flatten().tolist())
    assert seen[0] != seen[1]
    again = BalancedBatches([Group(0, small, 7), Group(1, large, 9)], 4, 5)
    assert torch.cat([images for images, _ in again.epoch(1)]).flatten().tolist() == seen[1]


def test_an_expert_learns_all_classes_and_is_not_fitted_again(
    source: Source, pool: tuple[Storage, list[Shard]]
) -> None:
    storage, manifest = pool
    settings = config()
    assignment = assign(settings, "a", held(SHARE), manifest, CARDS, TASK)
    assert stored_expert(settings, assignment, storage) is None
    *epochs, expert = fit_expert(settings, assignment, source, storage, CPU)
    assert isinstance(expert, Expert)
    assert tuple(epochs) == expert.history
    assert expert.validation_accuracy > 0.9
    assert (expert.n_real, expert.n_drawn) == (40, 3 * QUOTA)
    assert storage.names("experts") == ["experts/a/card.json", "experts/a/model.safetensors"]
    assert stored_expert(settings, assignment, storage) == expert
    for changed in (config(0.5), config(learning_rate=1e-3)):
        assert stored_expert(changed, assign(changed, "a", held(SHARE), manifest, CARDS, TASK), storage) is None
    fewer = {0: SHARE[0][1:], 1: SHARE[1]}
    assert stored_expert(settings, assign(settings, "a", held(fewer), manifest, CARDS, TASK), storage) is None
    other = assign(settings, "a", held(SHARE, "replaced in place"), manifest, CARDS, TASK)
    assert stored_expert(settings, other, storage) is None
    storage.write("experts/a/model.safetensors", b"damaged")
    assert stored_expert(settings, assignment, storage) is None


def test_a_fit_that_broke_off_goes_on_to_the_same_bytes(source: Source, pool: tuple[Storage, list[Shard]]) -> None:
    storage, manifest = pool
    settings = config()
    assignment = assign(settings, "a", held(SHARE), manifest, CARDS, TASK)
    *_, whole = fit_expert(settings, assignment, source, storage, CPU)
    storage.filesystem.delete_dir(storage.path("experts"))

    broken = fit_expert(settings, assignment, source, storage, CPU)
    assert [epoch.epoch for epoch in itertools.islice(broken, 3) if isinstance(epoch, Epoch)] == [1, 2, 3]
    broken.close()
    cards = [name for name in storage.names("experts") if name.endswith("card.json")]
    assert [Path(card).parent.name for card in cards] == ["00000002"]
    storage.write(cards[0].replace("00000002/card.json", "00000003/model.safetensors"), b"torn: its card is not there")
    storage.write("experts/a/checkpoints/0123456789abcdef/00000004/card.json", b"of a fit with other settings")

    *epochs, resumed = fit_expert(settings, assignment, source, storage, CPU)
    assert [epoch.epoch for epoch in epochs if isinstance(epoch, Epoch)] == [3, 4]
    assert resumed == whole
    assert storage.names("experts") == ["experts/a/card.json", "experts/a/model.safetensors"]


def test_clients_differ_in_their_seeds(source: Source, pool: tuple[Storage, list[Shard]]) -> None:
    storage, manifest = pool
    settings = config(epochs=1)
    share: dict[int, np.ndarray] = {2: np.arange(2, 60, 3)}
    experts = [
        list(fit_expert(settings, Assignment(client, share, tuple(manifest), 0, TASK), source, storage, CPU))[-1]
        for client in ("b", "c")
    ]
    assert all(isinstance(expert, Expert) for expert in experts)
    assert len({expert.sha256 for expert in experts if isinstance(expert, Expert)}) == 2
