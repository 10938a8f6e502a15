"""Synthesis on the cluster: Ray Data fans units out to actors that write a Parquet file each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError

from fedfactory_ray.cluster.plan import Worker
from fedfactory_ray.generation.card import ModuleHandle
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.places import WorkerResources
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MANIFEST
from fedfactory_ray.synthesis.plan import Unit, make_units
from fedfactory_ray.synthesis.shard import Shard, verified_digest

KEPT_MODULES = 2
VERIFIED_AT_ONCE = 64


@dataclass(frozen=True)
class Drawn:
    """Progress of synthesis: images there are so far, and where the last unit was drawn (None: it was there)."""

    images: int
    node: str | None
    gpus: tuple[str, ...] = ()


class Synthesizer:
    """An actor that draws units; it keeps the network once and the weights of the few modules used last."""

    def __init__(
        self,
        config: Config,
        resources: WorkerResources,
        storage: Storage,
        modules: dict[tuple[str, int], ModuleHandle],
    ) -> None:
        from fedfactory_ray.cluster.devices import assigned_device, prepare_process

        self.config, self.storage, self.modules = config, storage, modules
        self.device = prepare_process(resources, assigned_device(ray.get_gpu_ids()))
        self.kept: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def denoiser(self, key: tuple[str, int]) -> Any:
        """The verified denoiser of a module, from the object store or, where that lost it, from storage."""
        from fedfactory_ray.generation.module import load_weights, make_denoiser

        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        handle = self.modules[key]
        try:
            weights = None if handle.ref is None else ray.get(handle.ref)
        except (ObjectLostError, RayActorError):
            weights = None
        if weights is None:
            weights = self.storage.read(f"{handle.card.folder}/model.safetensors")
        card, denoiser = handle.card, None
        if len(self.kept) == KEPT_MODULES:
            old, kept = self.kept.popitem(last=False)
            denoiser = kept if self.modules[old].card.same_network(card) else None
        if denoiser is None:
            denoiser = make_denoiser(card)
        load_weights(denoiser, weights, card)
        self.kept[key] = denoiser.to(self.device)
        return self.kept[key]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Draw and write the batch's units; returns the digests of their rows."""
        from fedfactory_ray.cluster.devices import resolve_precision
        from fedfactory_ray.generation.sampling import draw_images
        from fedfactory_ray.synthesis.shard import write_shard

        digests = []
        precision = resolve_precision(self.config.generator.precision, self.device)
        for row in zip(*(batch[name].tolist() for name in Unit.__dataclass_fields__), strict=True):
            unit = Unit(*row)
            images = draw_images(
                self.denoiser((unit.client, unit.label)),
                self.config.sampler,
                unit.n,
                self.config.synthesis.batch_size,
                unit.seed,
                self.device,
                precision,
            )
            digests.append(write_shard(self.storage, unit, images))
        node, gpus = ray.get_runtime_context().get_node_id(), ",".join(map(str, ray.get_gpu_ids()))
        return batch | {
            "rows_sha256": np.array(digests),
            "node": np.full(len(digests), node),
            "gpus": np.full(len(digests), gpus),
        }


@ray.remote
def _verify(storage: Storage, units: list[Unit]) -> dict[str, str]:
    digests = {unit.file: verified_digest(storage, unit) for unit in units}
    return {file: digest for file, digest in digests.items() if digest is not None}


def stored_units(storage: Storage, units: list[Unit]) -> dict[str, str]:
    """Digests by file of the units that an earlier start of the run drew and that verify."""
    there = set(storage.names("synthetic"))
    candidates = [unit for unit in units if unit.file in there]
    chunks = [candidates[start : start + VERIFIED_AT_ONCE] for start in range(0, len(candidates), VERIFIED_AT_ONCE)]
    found: dict[str, str] = {}
    for digests in ray.get([_verify.remote(storage, chunk) for chunk in chunks]):
        found |= digests
    return found


def synthesize(
    config: Config,
    modules: dict[tuple[str, int], ModuleHandle],
    worker: Worker,
    storage: Storage,
    listen: Callable[[Drawn], None],
) -> list[Shard]:
    """Draw the synthetic data set; returns its manifest, which is also written to storage, last.

    `listen` is told of every unit. The manifest's order is the plan's, whatever order units end in.
    """
    units = make_units(
        (handle.card for handle in modules.values()),
        config.synthesis.images_per_class,
        config.synthesis.unit_size,
        config.seed,
    )
    digests = stored_units(storage, units)
    images = sum(unit.n for unit in units if unit.file in digests)
    listen(Drawn(images, None))
    missing = [asdict(unit) for unit in units if unit.file not in digests]
    if missing:
        drawing = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
            Synthesizer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(worker.slots, len(missing))),
            num_cpus=worker.num_cpus,
            num_gpus=worker.num_gpus,
            fn_constructor_args=(config, worker.resources, storage, modules),
        )
        for row in drawing.iter_rows():
            unit = Unit(**{name: row[name] for name in Unit.__dataclass_fields__})
            digests[unit.file] = row["rows_sha256"]
            images += unit.n
            listen(Drawn(images, row["node"], tuple(filter(None, row["gpus"].split(",")))))
    manifest = [
        Shard(unit.file, unit.client, unit.label, unit.index, unit.n, unit.module_sha256, digests[unit.file])
        for unit in units
    ]
    storage.write_json(MANIFEST, [asdict(shard) for shard in manifest])
    return manifest
