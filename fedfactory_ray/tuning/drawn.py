"""What the factory's trials share: modules and synthetic images are made once for all settings that agree on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from fedfactory_ray.generation.card import ModuleCard, Modules
from fedfactory_ray.pipeline.listeners import Listeners
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import fingerprint
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import WEIGHTS, shared_folder
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import Shard, manifest_digest

if TYPE_CHECKING:
    from fedfactory_ray.classification.rows import Rows
    from fedfactory_ray.pipeline.session import Session
    from fedfactory_ray.tracking.runs import Run


@dataclass(frozen=True)
class SharedImages:
    """Synthetic images in storage, as many a class as the greediest of the trials that share them asks for."""

    storage: Storage
    cards: Sequence[ModuleCard]
    manifest: Sequence[Shard]

    def rows(self, config: Config) -> Rows:
        """The rows that `config` asks for: those that a run of it would draw, for quotas are prefix-extending."""
        from fedfactory_ray.classification.rows import shard_rows

        synthesis = config.synthesis
        units = make_units(self.cards, synthesis.images_per_class, synthesis.unit_size, config.seed)
        wanted = {unit.file: unit.n for unit in units}
        shards = [replace(shard, n=wanted[shard.file]) for shard in self.manifest if shard.file in wanted]
        whole = all(shard.n == wanted.get(shard.file, shard.n) for shard in self.manifest)
        names = [[shard.rows_sha256, shard.n] for shard in shards]
        digest = manifest_digest(shards) if whole else fingerprint(names)
        rows = shard_rows(self.storage, shards, digest, synthesis.unit_size)
        if whole:
            return rows
        sizes = {(shard.client, shard.label, shard.unit): shard.n for shard in shards}
        return replace(
            rows, table=partial(_first_read, rows.table, sizes), dataset=partial(_first_streamed, rows.dataset, sizes)
        )


UnitSizes = Mapping[tuple[str, int, int], int]
"""Number of images by unit: (client, label, index of the unit)."""


def _first_read(table: Callable[[], pa.Table], sizes: UnitSizes) -> pa.Table:
    return _first(table(), sizes)


def _first_streamed(dataset: Callable[[], ray.data.Dataset], sizes: UnitSizes) -> ray.data.Dataset:
    return dataset().map_batches(_first, fn_args=[sizes], batch_format="pyarrow")


def _first(table: pa.Table, sizes: UnitSizes) -> pa.Table:
    """The first rows of each unit, as many as `sizes` tells."""
    rows = zip(*(table[name].to_pylist() for name in ("client", "label", "unit", "index")), strict=True)
    return table.filter(pa.array([index < sizes[client, label, unit] for client, label, unit, index in rows]))


def settings_of_modules(config: Config) -> str:
    """A short name for all settings that determine the modules."""
    tree = config.determining()
    return short({name: tree[name] for name in ("seed", "data", "partition", "generator")} | _threads(tree, "client"))


def settings_of_images(config: Config) -> str:
    """A short name for all settings that determine the synthetic images, but for their number."""
    tree = config.determining()
    del tree["synthesis"]["images_per_class"]
    drawing = {name: tree[name] for name in ("sampler", "synthesis")} | _threads(tree, "synthesis")
    return short({"modules": settings_of_modules(config)} | drawing)


def _threads(tree: dict[str, Any], phase: str) -> dict[str, Any]:
    return {"threads": tree["resources"]["threads"][phase]}


def short(settings: Mapping[str, Any]) -> str:
    """A short name for settings."""
    return fingerprint(settings)[:12]


def make_drawn(sessions: Sequence[Session]) -> dict[str, SharedImages]:
    """Train the modules and draw the images for these sessions, one a trial, all with the same storage; returns them by
    `settings_of_images`. What several share is made once, and what is there and verifies is not made."""
    from fedfactory_ray.pipeline.phases import draw_data_set

    modules: dict[str, Modules] = {}
    drawn: dict[str, SharedImages] = {}
    for session in sorted(sessions, key=lambda session: -session.config.synthesis.images_per_class):
        by_modules, by_images = settings_of_modules(session.config), settings_of_images(session.config)
        if by_modules not in modules:
            modules[by_modules] = share_modules(session, shared_folder("modules", by_modules))
        if by_images not in drawn:
            inner = _within(session, shared_folder("images", by_images))
            manifest = draw_data_set(inner, Listeners(inner.console, inner.logged), modules[by_modules])
            inner.run.end()
            drawn[by_images] = SharedImages(inner.storage, [h.card for h in modules[by_modules].values()], manifest)
    return drawn


def share_modules(session: Session, name: str) -> Modules:
    """The session's modules, in the folder `name` of its storage, with references that outlive their clients."""
    from fedfactory_ray.pipeline.phases import train_modules

    inner = _within(session, name)
    listeners = Listeners(inner.console, inner.logged)
    modules = train_modules(inner, listeners)
    listeners.end_clients()
    inner.run.end()
    # Images go to another folder, so whoever draws them finds no module there, should Ray lose one: it is read again.
    files = {key: f"{handle.card.folder}/{WEIGHTS}" for key, handle in modules.items()}
    return {key: replace(handle, ref=_read.remote(inner.storage, files[key])) for key, handle in modules.items()}


@ray.remote
def _read(storage: Storage, name: str) -> bytes:
    return storage.read(name)


def _within(session: Session, name: str) -> Session:
    """The session with a folder and an MLflow run of its own."""
    logged: Future[Run] = Future()
    logged.set_result(session.run.child(name))
    return session.other(storage=session.storage.within(name), logged=logged)
