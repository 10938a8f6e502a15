"""Doubts: why what forgetting makes might not be equal, bit for bit, to a run without the client.

Claimed is equality with that run made from nothing by the workers that are here now. So what is kept has to be what
they would make. Of modules and units that is told by their canaries, each by its own, wherever and whenever it was
made; of the classifier and of experts by the environments in which the run was evaluated. Modules that came as files
are given, as images are: that run would take the same files, so it does not matter who made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ray

from fedfactory_ray.cluster.absence import gather
from fedfactory_ray.cluster.plan import make_plan, place, placement, refuse_unknown_places
from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.settings.config import Config
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.unlearning.facts import Facts
from fedfactory_ray.unlearning.request import Request
from fedfactory_ray.unlearning.reuse import divergences_left, modules_left, units_left

SYNTHESIS = ""
"""Stands among clients for the workers that draw."""
NAMED = 5


def find_doubts(
    config: Config, request: Request, before: Facts, environments: list[dict[str, str]], here: dict[str, str]
) -> list[str]:
    """All doubts before anything is made: of `environments` another is here, what is kept has another canary than
    `here` (see `ask_canaries`), or the order of rows is not promised to repeat."""
    left = modules_left(request, before)
    kept = [shard for _, shard in units_left(config, left, before) if shard is not None]
    made: list[ModuleCard | Divergence] = [*left, *divergences_left(request, before)]
    doubts = _differences(config, environments) + canary_doubts(config, made, kept, here)
    card, n_images = before.cards[0], sum(shard.n for shard in before.shards)
    shape = (card.resolution, card.resolution, card.channels)
    if before.classifier and not config.resources.holds(n_images, shape):
        doubts.append(f"a training set above resources.in_memory_mb={config.resources.in_memory_mb} is streamed")
    return doubts


def doubts_of_new(config: Config, before: Facts, after: Facts, here: dict[str, str]) -> list[str]:
    """Doubts when all is made: another node made some of what is new than the one that told what is `here`."""
    there, shards = [*before.cards, *before.divergences], set(before.shards)
    made: list[ModuleCard | Divergence] = [*after.cards, *after.divergences]
    new = [each for each in made if each not in there]
    return canary_doubts(config, new, [shard for shard in after.shards if shard not in shards], here)


def refuse_doubts(config: Config, doubts: Sequence[str], *, allowed: bool) -> None:
    """Raise UnlearningError for any doubt, unless they are `allowed`."""
    if doubts and not allowed:
        raise UnlearningError(
            f"run {config.name} cannot be made again here bit for bit: {'; '.join(doubts)}",
            "the hardware and versions that made it, or --allow-inexact",
        )


def canary_doubts(
    config: Config, cards: Iterable[ModuleCard | Divergence], shards: Iterable[Shard], here: dict[str, str]
) -> list[str]:
    """Which modules and units were made by processes of another canary than `here`, or of one that nobody noted."""
    made = [("modules", f"{c.client}/{c.label}", c.canary, here[c.client]) for c in cards if config.modules is None]
    made += [("units", shard.file, shard.canary, here[SYNTHESIS]) for shard in shards]
    found: dict[tuple[str, str, str], list[str]] = {}
    for kind, name, theirs, ours in made:
        if theirs != ours:
            found.setdefault((kind, theirs, ours), []).append(name)
    return [
        f"{kind} {', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' * (len(names) > NAMED)} were made with "
        f"canary {_short(theirs)}, here it is {_short(ours)}"
        for (kind, theirs, ours), names in sorted(found.items())
    ]


def _short(canary: str) -> str:
    return " + ".join(f"{each[:12]}…" if each else "unknown" for each in canary.split("+"))


def ask_canaries(config: Config, clients: Iterable[str]) -> dict[str, str]:
    """The canaries of workers as they would train modules of `clients`, by client, and as they would draw (SYNTHESIS).

    One worker of each kind and place is asked: where a place has nodes of several kinds, any of them may answer.
    """
    plan = make_plan(config.resources)
    if config.modules is not None:
        clients = ()
    workers = dict.fromkeys(clients, plan.client) | {SYNTHESIS: plan.synthesis}
    refuse_unknown_places([silo for silo in config.partition.silos if silo.name in workers])
    keys = {name: (worker, place(config, name)) for name, worker in workers.items()}
    names = {key: name for name, key in keys.items()}
    asked = {
        _canary.options(**worker.options, **placement(config, name)).remote(config, worker.threads): name
        for (worker, _), name in names.items()
    }
    told = dict(zip(names, gather(asked, config), strict=True))
    return {name: told[key] for name, key in keys.items()}


@ray.remote
def _canary(config: Config, threads: int) -> str:
    from fedfactory_ray.cluster.devices import assigned_device, prepare_process, resolve_precision
    from fedfactory_ray.generation.canary import canary

    device = prepare_process(threads, assigned_device(ray.get_gpu_ids()))
    return canary(device, resolve_precision(config.generator.precision, device))


def _differences(config: Config, environments: list[dict[str, str]]) -> list[str]:
    """What of the hardware and versions that evaluated a run is another here."""
    worker = make_plan(config.resources).classifier
    here = ray.get(_environment.options(**worker.options).remote(worker.threads))
    return sorted(
        {
            f"{name} {there.get(name)!r}, here {here.get(name)!r}"
            for there in environments
            for name in there.keys() | here.keys()
            if there.get(name) != here.get(name)
        }
    )


@ray.remote
def _environment(threads: int) -> dict[str, str]:
    from fedfactory_ray.cluster.devices import assigned_device, prepare_process
    from fedfactory_ray.cluster.environment import environment

    return environment(prepare_process(threads, assigned_device(ray.get_gpu_ids())))
