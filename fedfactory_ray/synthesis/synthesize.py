"""Synthesis on the cluster: Ray Data fans units out to processes that write a Parquet file each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError

from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.cluster.stored import find_all
from fedfactory_ray.errors import ModuleRefusedError
from fedfactory_ray.generation.card import Modules
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MANIFEST, WEIGHTS
from fedfactory_ray.synthesis.plan import Unit, make_units
from fedfactory_ray.synthesis.shard import Shard, write_shard

if TYPE_CHECKING:
    from fedfactory_ray.generation.sampling import Drawing

KEPT_MODULES = 2
REMEDY = "resources.synthesis.num_gpus=1, should others share the GPU, or a smaller synthesis.batch_size"


@dataclass(frozen=True)
class UnitDrawn:
    """Progress of synthesis: images there are so far, and where the last unit was drawn (None: it was there)."""

    n_images: int
    node: str | None
    gpus: tuple[str, ...] = ()


class Synthesizer:
    """What draws units in a process; it keeps the few modules used last, and one network for all that come after."""

    def __init__(
        self, config: Config, threads: int, storage: Storage, modules: Modules, target: Storage | None = None
    ) -> None:
        """Units are written to `target`, by default the `storage` of the modules."""
        from fedfactory_ray.cluster.devices import assigned_device, prepare_process, resolve_precision

        self.config, self.storage, self.modules, self.target = config, storage, modules, target or storage
        self.device = prepare_process(threads, assigned_device(ray.get_gpu_ids()))
        self.precision = resolve_precision(config.generator.precision, self.device)
        self.kept: OrderedDict[tuple[str, int], Drawing] = OrderedDict()

    def drawing(self, key: tuple[str, int]) -> Drawing:
        """What draws from a module, verified: from the object store or, where that lost it, from storage."""
        from fedfactory_ray.generation.module import load_weights, make_denoiser
        from fedfactory_ray.generation.sampling import Drawing

        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        handle = self.modules[key]
        try:
            weights = None if handle.ref is None else ray.get(handle.ref)
        except (ObjectLostError, RayActorError):
            weights = None
        if weights is None:
            weights = self.storage.read(f"{handle.card.folder}/{WEIGHTS}")
        card, drawing = handle.card, None
        if len(self.kept) == KEPT_MODULES:
            old, kept = self.kept.popitem(last=False)
            drawing = kept if self.modules[old].card.same_network(card) else None
        if drawing is None:
            denoiser, size = make_denoiser(card), self.config.synthesis.batch_size
            drawing = Drawing(denoiser, self.config.sampler, size, self.device, self.precision)
        load_weights(drawing.denoiser, weights, card)
        self.kept[key] = drawing
        return drawing

    def draw(self, unit: Unit) -> Shard:
        """Draw a unit and write its file. Raises ModuleRefusedError where the module draws no images."""
        from fedfactory_ray.generation.canary import canary

        key = (unit.client, unit.label)
        with failures_refused(f"drawing from the module of client {unit.client!r}, class {unit.label}", REMEDY):
            try:
                images = self.drawing(key).draw(unit.n, unit.seed, unit.attempts(self.config))
            except FloatingPointError as error:
                raise ModuleRefusedError(*key, str(error)) from error
        if self.config.modules is not None and images.min() == images.max():
            raise ModuleRefusedError(*key, f"every pixel of the {unit.n} images that it draws first is {images.min()}")
        made_of, made_by = unit.fingerprint(self.config, self.modules[key].card), canary(self.device, self.precision)
        return write_shard(self.target, unit, images, made_of, made_by)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Draw the batch's units, a row each; returns a column a field of their shards, and where they were drawn."""
        rows = zip(*(batch[field.name].tolist() for field in fields(Unit)), strict=True)
        shards = [self.draw(Unit(*row)) for row in rows]
        columns = {f.name: np.array([getattr(shard, f.name) for shard in shards]) for f in fields(Shard)}
        node, gpus = ray.get_runtime_context().get_node_id(), ",".join(map(str, ray.get_gpu_ids()))
        return columns | {"node": np.full(len(shards), node), "gpus": np.full(len(shards), gpus)}


@lru_cache(maxsize=1)
def _synthesizer(arguments: ray.ObjectRef) -> Synthesizer:
    """This process's own, made once for all tasks of a synthesis."""
    return Synthesizer(*ray.get(arguments))


def draw_units(batch: dict[str, np.ndarray], arguments: ray.ObjectRef) -> dict[str, np.ndarray]:
    """Draw the batch's units as a Synthesizer with these `arguments` does."""
    return _synthesizer(arguments)(batch)


def crew(worker: Worker, processes: int, *arguments: Any) -> dict[str, Any]:
    """Who draws units, as arguments of `map_batches`: on GPUs actors, which hold theirs; on CPUs tasks, whose processes
    have imported torch when the fits and the evaluation are next in need of some. Ray ends a task's process that had a
    GPU, and would have to start one a unit."""
    pool: ray.data.ComputeStrategy
    if worker.num_gpus:
        pool = ray.data.ActorPoolStrategy(size=processes)
        return {"fn": Synthesizer, "fn_constructor_args": arguments, "compute": pool, **worker.options}
    pool = ray.data.TaskPoolStrategy(size=processes)
    return {"fn": draw_units, "fn_args": (ray.put(arguments),), "compute": pool, **worker.options}


def synthesize(
    config: Config,
    modules: Modules,
    worker: Worker,
    storage: Storage,
    listen: Callable[[UnitDrawn], None],
) -> list[Shard]:
    """Draw the synthetic data set; returns its manifest, which is also written to storage, last.

    `listen` is told of every unit. The manifest's order is the plan's, whatever order units end in.
    """
    synthesis, cards = config.synthesis, {key: handle.card for key, handle in modules.items()}
    units = make_units(cards.values(), synthesis.images_per_class, synthesis.unit_size, config.seed)
    wanted = {unit.file: unit.fingerprint(config, cards[unit.client, unit.label]) for unit in units}
    shards = find_all(storage, Shard, wanted)
    n_images = sum(shard.n for shard in shards.values())
    listen(UnitDrawn(n_images, None))
    missing = [asdict(unit) for unit in units if unit.file not in shards]
    if missing:
        drawers = crew(worker, min(worker.slots, len(missing)), config, worker.threads, storage, modules)
        rows = ray.data.from_items(missing, override_num_blocks=len(missing))
        drawing = rows.map_batches(**drawers, batch_size=1)
        for row in drawing.iter_rows():
            shard = Shard(**{field.name: row[field.name] for field in fields(Shard)})
            shards[shard.file] = shard
            n_images += shard.n
            listen(UnitDrawn(n_images, row["node"], tuple(filter(None, row["gpus"].split(",")))))
    manifest = [shards[unit.file] for unit in units]
    storage.write_json(MANIFEST, [asdict(shard) for shard in manifest])
    return manifest
