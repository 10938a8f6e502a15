"""The GPUs of a run: what its workers need of their memory, and the plan that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from fedfactory_ray.cluster.gpus import Gpu, Need, look_at_gpus, smallest
from fedfactory_ray.cluster.plan import MODULES_AT_ONCE, Demand, Plan, eligible, make_plan
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import ResourcesError
from fedfactory_ray.federation.client import modules_at_once
from fedfactory_ray.settings.config import Config
from fedfactory_ray.synthesis.synthesize import KEPT_MODULES

if TYPE_CHECKING:
    import torch

CONTEXT = 800_000_000
"""Bytes of a process that computes on a GPU: CUDA's context, and what its libraries keep."""
SMALL = 4 * 10**9
"""Bytes up to which a training leaves so much of a GPU idle that others gain by sharing it."""
DRAWING_AT_ONCE = 2
"""Synthesis actors that keep a GPU busy: one makes noise and writes files while the other draws."""
USABLE = 0.95
"""Part of a GPU's memory that workers are to share, for an allocator holds some more than is needed."""


@dataclass(frozen=True)
class Needs:
    """What a run's work takes of a GPU: a module's training, drawing from modules, and an expert's fit."""

    module: Need
    drawing: Need
    fit: Need


def plan_gpus(
    config: Config, plan: Plan, info: DataInfo, partition: Partition, nodes: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Plan, str]:
    """`plan` with GPUs shared as memory allows, and a line that says so; as it was where it asks for no GPU.

    `nodes` are those of `ray.nodes()`, by default of the connected cluster. Raises ResourcesError where a module does
    not fit, or a silo's clients would wait for a GPU for ever.
    """
    clients = plan.client if plan.client.num_gpus and config.modules is None else None
    if clients is None and not plan.synthesis.num_gpus:
        return plan, ""
    alive = [node for node in (ray.nodes() if nodes is None else nodes) if node["Alive"]]
    counted = _count.remote(config, info)  # beside the look at the GPUs: both import torch, seconds each
    gpus = look_at_gpus(alive)
    anywhere, theirs = smallest(alive, gpus, ()), smallest(alive, gpus, config.partition.silos)
    needs = ray.get(counted)[anywhere.precision]
    demands, told = {}, []
    if clients is not None:
        _refuse_silos_without_gpu(config, partition, alive)
        demands["client"], each = client_demand(config, needs, theirs, info, partition)
        told.append(("clients", "client", theirs, each))
    if plan.synthesis.num_gpus:
        each = CONTEXT + needs.drawing.of(config.synthesis.batch_size)
        units = info.classes * -(-config.synthesis.images_per_class // config.synthesis.unit_size)
        demands["synthesis"] = Demand(units, _sharing(each, anywhere, DRAWING_AT_ONCE))
        told.append(("synthesis", "synthesis", anywhere, each))
    made = make_plan(config.resources, [node["Resources"] for node in alive], demands)
    parts = []
    for who, name, gpu, each in told:
        sharing = int(1 / getattr(made, name).num_gpus + 1e-9)
        parts.append(f"{who}: {sharing} a GPU ({each / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB each)")
    return made, "; ".join(parts)


def client_demand(config: Config, needs: Needs, gpu: Gpu, info: DataInfo, partition: Partition) -> tuple[Demand, int]:
    """What clients demand of GPUs like `gpu`, and the bytes that one takes at most. Raises ResourcesError."""
    generator, wanted = config.generator, config.resources.client.num_gpus
    largest = max(len(indices) for _, _, indices in partition)
    # The class's images lie on the GPU as uint8 and as float32.
    images = largest * info.channels * info.resolution**2 * 5
    at_once = min(generator.images_at_once or generator.batch_size, generator.batch_size)
    module, n_clients = needs.module.of(at_once) + images, len(partition.clients)
    sharing = 1 if wanted == "auto" else min(int(1 / wanted + 1e-9), n_clients)
    if sharing * (CONTEXT + module) > gpu.memory:
        free = gpu.memory // sharing - CONTEXT - images - needs.module.fixed
        fits = [n for n in range(1, at_once) if generator.batch_size % n == 0 and n * needs.module.per_image <= free]
        mends = ["resources.client.num_gpus=1"] * (sharing > 1) + [f"generator.images_at_once={max(fits, default=0)}"]
        raise ResourcesError(
            f"a GPU of {gpu.memory / 1e9:.1f} GB, the smallest that clients may get"
            + (f", for {sharing} of them" if sharing > 1 else ""),
            f"{(CONTEXT + module) / 1e9:.1f} GB to train a module, of which {at_once} images pass at once",
            " or ".join(mends if fits else [*mends[:-1], "a smaller network, or larger GPUs"]),
        )
    room = USABLE * gpu.memory * (1 if wanted == "auto" else wanted) - CONTEXT
    held = max(len(share) for share in partition.shares.values())
    modules = max(1, min(modules_at_once(generator), held, int(room // module))) if module <= SMALL else 1
    each = CONTEXT + max(modules * module, needs.fit.of(config.classifier.batch_size))
    small = max(each / modules, CONTEXT + needs.fit.of(config.classifier.batch_size)) <= SMALL
    return Demand(n_clients, _sharing(each, gpu, MODULES_AT_ONCE // modules) if small else 1, modules), each


def modules_here(config: Config, info: DataInfo, device: torch.device) -> int:
    """How many modules a process of its own trains side by side on `device`, as what is free of a GPU allows."""
    import torch

    from fedfactory_ray.cluster.devices import resolve_precision
    from fedfactory_ray.generation.memory import module_need

    if device.type != "cuda":
        return 1
    generator = config.generator
    need = module_need(generator, info.channels, info.resolution, resolve_precision(generator.precision, device))
    each = need.of(min(generator.images_at_once or generator.batch_size, generator.batch_size))
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(modules_at_once(generator), int(USABLE * free / each))) if each <= SMALL else 1


def _sharing(each: int, gpu: Gpu, most: int) -> int:
    """How many processes that take `each` so many bytes may share a GPU: one that is large keeps it busy alone."""
    return max(1, min(most, int(USABLE * gpu.memory / each)))


def _refuse_silos_without_gpu(config: Config, partition: Partition, nodes: Sequence[Mapping[str, Any]]) -> None:
    for silo in config.partition.silos:
        able = [node for node in nodes if eligible(node, silo)]
        if silo.name in partition.clients and not any(node["Resources"].get("GPU") for node in able):
            raise ResourcesError(
                f"no GPU on the {len(able)} node(s) that may read the silo of client {silo.name!r}",
                "one for every client, or for none",
                "resources.client.num_gpus=0",
            )


# No CPU, for it computes little and nobody else is at work yet.
@ray.remote(num_cpus=0)
def _count(config: Config, info: DataInfo) -> dict[str, Needs]:
    """What is needed, by what precision `auto` comes to."""
    from fedfactory_ray.classification.memory import fit_need
    from fedfactory_ray.generation.memory import drawing_need, module_need

    found = {}
    for auto in ("bf16", "fp32"):
        generator, classifier = (
            auto if section.precision == "auto" else section.precision
            for section in (config.generator, config.classifier)
        )
        module = module_need(config.generator, info.channels, info.resolution, generator)
        fit = fit_need(config.classifier, info.task, classifier)
        found[auto] = Needs(module, drawing_need(module, KEPT_MODULES), fit)
    return found
