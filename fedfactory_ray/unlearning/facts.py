"""Facts: what a finished run holds, by digests, so that runs can be compared after one of them is deleted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fedfactory_ray.classification.card import Classifier, Expert
from fedfactory_ray.classification.rules import ALIKE
from fedfactory_ray.cluster.stored import look_all
from fedfactory_ray.errors import UnlearningError
from fedfactory_ray.generation.card import ModuleCard, read_cards
from fedfactory_ray.generation.divergence import Divergence, read_divergences
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage import layout
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import Shard, manifest_digest, read_manifest

AT_ONCE = 16


@dataclass(frozen=True)
class Facts:
    """What a run holds. `modules` are cards, `left_out` notes of the modules that it goes without, `manifest` the units
    in order; of classifier and experts there are the fingerprint (what determines them) and the SHA-256 of the weights;
    `predictions` and `scores` are those of the test split by evaluation, `seconds` those of each phase."""

    partition_sha256: str
    modules: list[dict[str, Any]]
    manifest: list[dict[str, Any]]
    rows_sha256: str
    classifier: dict[str, str] | None
    experts: dict[str, dict[str, str]]
    predictions: dict[str, str]
    scores: dict[str, dict[str, float]]
    seconds: dict[str, float]
    left_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cards(self) -> list[ModuleCard]:
        """The modules' cards."""
        return [ModuleCard.from_tree(card) for card in self.modules]

    @property
    def divergences(self) -> list[Divergence]:
        """The notes of the modules that the run goes without."""
        return [Divergence.from_tree(note) for note in self.left_out]

    @property
    def shards(self) -> list[Shard]:
        """The manifest's lines."""
        return [Shard.from_tree(line) for line in self.manifest]

    @property
    def main_method(self) -> str:
        """The method that the run is about, among its evaluations."""
        return layout.METHOD if layout.METHOD in self.scores else layout.PRODUCT

    @property
    def architecture(self) -> str:
        """The architecture that was evaluated."""
        return "centralised" if not self.experts else "both" if self.classifier else "decentralised"

    def digests(self) -> dict[str, str]:
        """All that two equal runs have alike, by name."""
        found = {"partition": self.partition_sha256, "rows": self.rows_sha256}
        found |= {f"module {card.client}, class {card.label}": card.sha256 for card in self.cards}
        found |= {f"no module {note.client}, class {note.label}": note.fingerprint for note in self.divergences}
        found |= {f"unit {shard.file}": shard.rows_sha256 for shard in self.shards}
        if self.classifier:
            found["classifier"] = self.classifier["sha256"]
        found |= {f"expert of {client}": expert["sha256"] for client, expert in self.experts.items()}
        # Skip the reference: unlearning does not refit it.
        ours = {k: v for k, v in self.predictions.items() if k != layout.CENTRALISED}
        return found | {f"predictions, {name}": digest for name, digest in ours.items()}


def read_facts(storage: Storage) -> Facts:
    """The facts of a finished run. Raises UnlearningError where it is not finished, UnlearningError, StorageError or
    CardError where a file is damaged."""
    for name in (layout.CONFIG, layout.PARTITION, layout.MANIFEST, layout.EVALUATION, layout.ENVIRONMENT):
        if not storage.exists(name):
            raise UnlearningError(f"{storage.uri} holds no finished run, {name} is missing", "jobs/run.py to its end")
    try:
        return _facts(storage)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnlearningError(
            f"{storage.uri} holds damaged records ({type(error).__name__}: {error})"[:300],
            "the files as they were made; the command that made the run makes them again",
        ) from error


def _facts(storage: Storage) -> Facts:
    manifest = read_manifest(storage)
    evaluation = storage.read_json(layout.EVALUATION)
    # What was evaluated counts: jobs/compare.py may have fitted more in the same folder.
    found = map(layout.EXPERT_CARD.fullmatch, storage.names(layout.EXPERTS))
    experts = sorted(card["client"] for card in found if card) if layout.PRODUCT in evaluation else []
    classifier = layout.classifier_folder(layout.METHOD)
    return Facts(
        partition_sha256=storage.read_json(layout.PARTITION)["sha256"],
        modules=[card.to_tree() for card in read_cards(storage)],
        manifest=[vars(shard) for shard in manifest],
        rows_sha256=manifest_digest(manifest),
        classifier=_fitted(storage, Classifier, classifier) if layout.METHOD in evaluation else None,
        experts={client: _fitted(storage, Expert, layout.expert_folder(client)) for client in experts},
        predictions=evaluation["predictions_sha256"],
        scores={name: scores for name, scores in evaluation.items() if "accuracy" in alike(scores)},
        seconds=storage.read_json(layout.SECONDS),
        left_out=[note.to_tree() for note in read_divergences(storage)],
    )


def classes_held(storage: Storage) -> dict[str, list[int]]:
    """The clients of a run and the classes of each, also those of which they offer no module. Raises UnlearningError
    where the partition's file is damaged."""
    summary = storage.read_json(layout.PARTITION)
    try:
        rows = zip(summary["clients"], summary["counts"], strict=True)
        return {client: [label for label, n in enumerate(row) if n] for client, row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise UnlearningError(
            f"{storage.uri}/{layout.PARTITION} is damaged ({error})"[:300], "the file as it was"
        ) from error


def alike(scores: Any) -> dict[str, float]:
    """Of an evaluation's scores those of the rule with the classes alike, by their bare names. Earlier versions told
    the factory's by that rule alone."""
    if not isinstance(scores, dict):
        return {}
    prefix = f"{ALIKE}/"
    found = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    return found or scores


def _fitted(storage: Storage, kind: type[Classifier | Expert], folder: str) -> dict[str, str]:
    card = kind.read(storage, folder)
    return {"fingerprint": card.fingerprint, "sha256": card.sha256}


def weights(facts: Facts) -> dict[str, str]:
    """SHA-256 of every file of weights, by its name in storage."""
    found = {f"{card.folder}/{layout.WEIGHTS}": card.sha256 for card in facts.cards}
    if facts.classifier:
        found[f"{layout.classifier_folder(layout.METHOD)}/{layout.WEIGHTS}"] = facts.classifier["sha256"]
    return found | {
        f"{layout.expert_folder(client)}/{layout.WEIGHTS}": e["sha256"] for client, e in facts.experts.items()
    }


def differing_weights(storage: Storage, facts: Facts) -> list[str]:
    """Names of files of weights that are missing or are not what the facts say."""

    def differs(item: tuple[str, str]) -> bool:
        return not storage.exists(item[0]) or storage.sha256(item[0]) != item[1]

    wanted = weights(facts)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [name for name, bad in zip(wanted, pool.map(differs, wanted.items()), strict=True) if bad]


def refuse_damaged(config: Config, storage: Storage, facts: Facts) -> None:
    """Raise UnlearningError where files of a run are not what they were when it was finished. Needs Ray."""
    damaged = differing_weights(storage, facts)
    units = make_units(facts.cards, config.synthesis.images_per_class, config.synthesis.unit_size, config.seed)
    rows = {shard.file: shard.rows_sha256 for shard in facts.shards}
    looked = look_all(storage, Shard, {shard.file: shard.fingerprint for shard in facts.shards})
    found = {file: each.artefact.rows_sha256 for file, each in looked.items() if each.artefact is not None}
    damaged += [file for file, digest in rows.items() if found.get(file) != digest]
    damaged += [unit.file for unit in units if unit.file not in rows]
    if damaged:
        raise UnlearningError(
            f"{storage.uri} does not verify: {', '.join(damaged[:5])}" + ", …" * (len(damaged) > 5),
            "the files as they were made; the command that made the run mends it",
        )
