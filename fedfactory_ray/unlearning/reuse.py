"""Reuse: what of the old run did not depend on what is forgotten, and so is kept byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedfactory_ray.classification.training import fit_fingerprint
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import Task
from fedfactory_ray.federation.expert import assign
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CARD, METHOD, WEIGHTS, classifier_folder, expert_folder
from fedfactory_ray.synthesis.plan import Unit, make_units
from fedfactory_ray.synthesis.shard import Shard, manifest_digest
from fedfactory_ray.unlearning.facts import AT_ONCE, Facts
from fedfactory_ray.unlearning.request import Request


@dataclass(frozen=True)
class Reuse:
    """What is kept of a run, and what it goes without; of `experts` the clients."""

    left_out: list[Divergence]
    modules: list[ModuleCard]
    units: list[Shard]
    classifier: bool
    experts: list[str]

    @property
    def files(self) -> list[str]:
        """Names of the files to copy."""
        folders = [card.folder for card in self.modules]
        folders += [classifier_folder(METHOD)] * self.classifier + [expert_folder(client) for client in self.experts]
        # A card goes last, as always: it says that the weights are there.
        notes = [note.mark(note.folder) for note in self.left_out]
        return notes + [unit.file for unit in self.units] + [f"{f}/{name}" for f in folders for name in (WEIGHTS, CARD)]


def modules_left(request: Request, before: Facts) -> list[ModuleCard]:
    """The modules of a run that a request does not ask to forget."""
    return [card for card in before.cards if not request.forgets(card.client, card.label)]


def divergences_left(request: Request, before: Facts) -> list[Divergence]:
    """The notes of left-out modules of a run whose images a request does not ask to forget."""
    return [note for note in before.divergences if not request.forgets(note.client, note.label)]


def clients_left(request: Request, before: Facts) -> list[str]:
    """Whose modules, or notes of left-out ones, a request does not ask to forget."""
    left_out = [note.client for note in divergences_left(request, before)]
    return [card.client for card in modules_left(request, before)] + left_out


def units_left(config: Config, left: Sequence[ModuleCard], before: Facts) -> list[tuple[Unit, Shard | None]]:
    """The units that are drawn from the modules `left`, each with the old run's where that has as many images."""
    units = make_units(left, config.synthesis.images_per_class, config.synthesis.unit_size, config.seed)
    old = {(shard.file, shard.n, shard.module_sha256): shard for shard in before.shards}
    return [(unit, old.get((unit.file, unit.n, unit.module_sha256))) for unit in units]


def plan_reuse(config: Config, partition: Partition, task: Task, before: Facts) -> Reuse:
    """What the run of `config`, in which `partition` is left, may keep of the run with the facts `before`.

    A unit stays if it has as many images as before. A classifier or expert stays only if its fingerprint can be
    computed before anything is drawn, and is what it was: then it saw no row that goes.
    """
    offered = partition.offered(config.generator.min_images).shares
    left = [card for card in before.cards if card.label in offered.get(card.client, {})]
    left_out = [note for note in before.divergences if note.label in offered.get(note.client, {})]
    found = units_left(config, left, before)
    kept = [shard for _, shard in found if shard is not None]
    new_labels = {unit.label for unit, shard in found if shard is None}

    held = config.resources.holds(sum(shard.n for shard in kept), task.image_shape)
    made_of = fit_fingerprint(config, manifest_digest(kept), held=held)
    classifier = not new_labels and _same(before.classifier, made_of)
    experts = []
    for client in partition.clients:
        assignment = assign(config, client, partition, kept, left, task)
        whole = not new_labels & assignment.needed(config)
        if whole and _same(before.experts.get(client), assignment.fingerprint(config)):
            experts.append(client)
    return Reuse(left_out, left, kept, classifier, experts)


def _same(fitted: dict[str, str] | None, made_of: str) -> bool:
    return fitted is not None and fitted["fingerprint"] == made_of


def copy_files(origin: Storage, target: Storage, names: Sequence[str]) -> None:
    """Copy files, several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(target.copy, origin, name) for name in names]:
            done.result()
