"""A run that an earlier version stored (format 0, less its weights) is read, and a line says what is made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.choices import read_partition
from fedfactory_ray.baselines.card import Alone, Federated
from fedfactory_ray.classification.card import Classifier, Expert
from fedfactory_ray.cluster.plan import make_plan
from fedfactory_ray.cluster.stored import look_all
from fedfactory_ray.errors import CardError, RunConflictError
from fedfactory_ray.federation.round import stored_modules
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.pipeline.session import claim
from fedfactory_ray.settings.command_line import stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import look
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.shard import Shard
from fedfactory_ray.unlearning.facts import Facts, alike, read_facts
from fedfactory_ray.unlearning.report import recalls

RUNS = Path(__file__).with_name("format-0")
OLD = Storage(str(RUNS / "run"))


@pytest.fixture(scope="module")
def config() -> Config:
    return stored_config("run", ["--storage.uri", str(RUNS)])


def test_settings_that_moved_are_found_where_they_are_now(config: Config) -> None:
    assert (config.storage.checkpoint_epochs, config.storage.checkpoint_rounds) == (1, 10)
    assert config.resources.in_memory_mb == 4096
    assert config.generator.max_steps == 4


def test_the_run_is_still_that_of_its_settings(config: Config, tmp_path: Path) -> None:
    shutil.copy(RUNS / "run" / "config.json", tmp_path)
    claim(config.determining(), Storage(str(tmp_path)))
    with pytest.raises(RunConflictError, match="seed: there 0, here 1"):
        claim(config.model_copy(update={"seed": 1}).determining(), Storage(str(tmp_path)))


def test_facts_are_read_and_survive_a_certificate() -> None:
    facts = read_facts(OLD)
    assert {card.key: card.n_images for card in facts.cards} == {
        **{("client-000", 0): 40, ("client-000", 2): 10, ("client-001", 1): 25},
        **{("client-002", 1): 15, ("client-002", 2): 30},
    }
    stored = json.loads((RUNS / "run" / "modules" / "client-001" / "class-001" / "card.json").read_text())
    assert facts.cards[2].sha256 == stored["sha256"]
    assert facts.cards[2].files == {"model.safetensors": stored["sha256"]}
    assert {made.canary for made in (*facts.cards, *facts.shards)} == {""}
    assert len(facts.digests()) == 1 + 1 + 5 + 8 + 1 + 3 + 3
    assert Facts(**json.loads(json.dumps(vars(facts)))).digests() == facts.digests()
    # Its scores were told by one rule, the classes alike.
    for method in ("fedfactory", "product", "mixture"):
        assert alike(facts.scores[method]) == facts.scores[method]
        assert set(recalls(facts, method)) == {0, 1, 2}
    # Certificates of that version hold cards as they were then.
    assert replace(facts, modules=[stored]).cards == [facts.cards[2]]
    tree = facts.cards[2].to_tree()
    del tree["canary"]
    assert ModuleCard.from_tree(tree | {"format": 1}) == facts.cards[2]


def test_every_kind_of_card_is_read() -> None:
    classifier = Classifier.read(OLD, "classifier/fedfactory")
    assert (classifier.epoch, classifier.model, classifier.task.classes, len(classifier.history)) == (1, "cnn", 3, 1)
    expert = Expert.read(OLD, "experts/client-001")
    assert (expert.client, expert.n_real, expert.n_drawn) == ("client-001", 25, 40)
    method = Federated.read(OLD, "classifier/scaffold")
    assert (method.method["name"], method.chosen, method.history[0].clients) == ("scaffold", 1, 3)
    assert Alone.read(OLD, "classifier/local-client-000").epoch >= 1
    for kind, place in ((Classifier, "classifier/fedfactory"), (Expert, "experts/client-001")):
        assert look(OLD, kind, place, "f00d").why.startswith("an earlier version made it")


def test_units_hold_what_the_manifest_says(cluster: None) -> None:
    lines = [Shard.from_tree(line) for line in OLD.read_json("manifest.json")]
    with pytest.raises(CardError, match=r"card of a unit[\s\S]*weather"):
        Shard.from_tree(vars(lines[0]) | {"weather": "fine"})
    looked = look_all(OLD, Shard, {line.file: line.fingerprint for line in lines})
    assert [looked[line.file].artefact for line in lines] == lines
    assert (
        look(OLD, Shard, lines[0].file, "f00d").why
        == "an earlier version made it and did not note all that determined it"
    )


def test_modules_are_trained_again_and_a_line_says_why(
    cluster: None, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    partition = read_partition(OLD, 3)
    partition = replace(partition, images_sha256={(client, label): "now" for client, label, _ in partition})
    with caplog.at_level("INFO"):
        assert stored_modules(config, partition, make_plan(config.resources).client, OLD) == {}
    (line,) = [record.message for record in caplog.records]
    assert line == (
        "0 modules there and kept; 5 made again: an earlier version made it and did not note all that determined it"
    )
