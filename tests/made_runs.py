"""Finished runs that nobody trained: every file is there and agrees with the others, its content is a digest's bytes.

What forgetting does with files, notes and certificates needs no more, and so neither Ray nor torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_runs import small_config

from fedfactory_ray.classification.card import Classifier, Expert
from fedfactory_ray.data.partition import Partition, make_partition, partition_summary
from fedfactory_ray.data.partition_files import save_partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.generation.card import ModuleCard, read_cards
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.session import Session, claim
from fedfactory_ray.settings.command_line import stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage import layout
from fedfactory_ray.storage.artefact import keep
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.lease import hold
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import manifest_digest, write_shard
from fedfactory_ray.tracking import runs as tracking
from fedfactory_ray.unlearning import forget as forgetting

COUNTS = [[40, 0, 10], [0, 25, 0], [0, 15, 30], [15, 0, 0]]
OUT = Console(file=io.StringIO())
INFO = DataInfo(["0", "1", "2"], 8, 1, {})


def content(*parts: object, size: int = 3000) -> bytes:
    """Bytes that `parts` determine."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])
    return np.random.RandomState(seed).bytes(size)


def partition_of(config: Config) -> Partition:
    """The partition of a made run."""
    labels = np.arange(180) % 3
    return make_partition(config.partition, labels, 3, config.seed).without(config.partition.exclude)


def fill(config: Config, storage: Storage) -> None:
    """Make all that a run's phases make."""
    partition, weights = partition_of(config), layout.WEIGHTS
    cards = []
    for client, label, indices in partition.offered(config.generator.min_images):
        made = content("module", client, label)
        digest = storage.write(f"{layout.module_folder(client, label)}/{weights}", made)
        settings = config.generator.model_dump(mode="json")
        card = ModuleCard(
            client, label, len(indices), 1, 8, 40, "fp32", settings, len(made), files={weights: digest}
        )  # fmt: skip
        keep(storage, card)
        cards.append(card)
    manifest = []
    for unit in make_units(cards, config.synthesis.images_per_class, config.synthesis.unit_size, config.seed):
        images = np.frombuffer(content(unit.seed, size=64 * 40), np.uint8).reshape(-1, 8, 8, 1)[: unit.n]
        manifest.append(write_shard(storage, unit, images, unit.fingerprint(config, cards[0])))
    storage.write_json(layout.MANIFEST, [vars(shard) for shard in manifest])
    rows = manifest_digest(manifest)
    digest = storage.write(f"{layout.classifier_folder(layout.METHOD)}/{weights}", content("classifier", rows))
    files = {weights: digest}
    keep(storage, Classifier(rows, 1, 0.5, [], INFO.task, "cnn", layout.METHOD, fingerprint=rows, files=files))
    for client in partition.clients:
        digest = storage.write(f"{layout.expert_folder(client)}/{weights}", content("expert", client, rows))
        keep(storage, Expert(client, 1, 1, 1, 1, 0.5, (), fingerprint=rows, files={weights: digest}))
    scores = {"accuracy": int(rows[:4], 16) / 2**16, "balanced_accuracy": 0.5} | {
        f"recall_class_{y}": 0.5 for y in "012"
    }
    figures = dict.fromkeys((layout.METHOD, layout.PRODUCT), scores)
    storage.write_json(layout.EVALUATION, figures | {"predictions_sha256": {name: rows for name in figures}})
    storage.write_json(layout.ENVIRONMENT, [{"torch version": "1"}])


@contextmanager
def session(config: Config, console: Console, *, parent: str | None = None, **_: Any) -> Iterator[Session]:
    """Takes the place of `open_session`."""
    storage = Storage(config.storage.uri).within(str(config.name))
    with hold(storage, take_over=config.take_over) as began:
        claim(config.determining(), storage)
        storage.clean(began)
        storage.write_json(layout.SETTINGS, config.model_dump(mode="json") | {"name": config.name})
        partition = partition_of(config)
        save_partition(storage, partition)
        logged: Future[tracking.Run] = Future()
        logged.set_result(tracking.start_run(config, str(config.name), storage.uri, parent))
        nothing: Any = None
        opened = Session(config, str(config.name), console, nothing, INFO, partition, storage, logged)
        yield opened
        opened.run.end("FINISHED")


def run_phases(opened: Session, *_: Any) -> SimpleNamespace:
    """Takes the place of `phases.run_phases`."""
    with opened.phase("modules"):
        fill(opened.config, opened.storage)
    return SimpleNamespace(missing={})


def make_run(folder: Path, **changes: Any) -> None:
    """A finished run `small` of both architectures in a folder, with its MLflow store."""
    partition = {"scheme": "skew", "counts": COUNTS}
    config = small_config(folder, folder / "none.npz", architecture="both", partition=partition, **changes)
    with session(config, OUT) as opened:
        run_phases(opened)
        opened.run.child("client-003").end("FINISHED")
        opened.run.json(partition_summary(opened.partition), layout.PARTITION)
        opened.run.json([vars(card) for card in read_cards(opened.storage)], "modules.json")
        opened.run.text("a picture with everybody's name", "partition.png")
        for name, file, content in (
            ("synthesis", layout.MANIFEST, opened.storage.read_json(layout.MANIFEST)),
            ("client-001", "modules.json", [{"client": "client-001"}]),
        ):
            child = opened.run.child(name)
            child.json(content, file)
            child.end("FINISHED")


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """From now on forgetting trains nothing and asks no cluster."""
    patch.setattr(forgetting, "connect", lambda: None)
    patch.setattr(forgetting, "refuse_damaged", lambda *_: None)
    patch.setattr(forgetting, "ask_canaries", lambda config, clients: dict.fromkeys([*clients, ""], ""))
    patch.setattr(forgetting, "find_doubts", lambda *_: [])
    patch.setattr(forgetting, "open_session", session)
    patch.setattr(forgetting, "Listeners", lambda *_: None)
    patch.setattr(phases, "run_phases", run_phases)


def config_of(folder: Path, run: str) -> Config:
    """The stored config of a run in a folder."""
    return stored_config(run, ["--storage.uri", str(folder / "runs")])
