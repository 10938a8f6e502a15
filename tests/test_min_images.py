"""A share of too few images trains no module: a module of it would be a copy of them. Everything agrees on that."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_npz
from made_modules import write_module
from made_runs import OUT, config_of, make_run, session
from rich.console import Console
from small_runs import SMALL, run_here, small_config

from fedfactory_ray.baselines.centralised import baseline_steps
from fedfactory_ray.cluster.plan import Plan, Worker
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import ConfigError, DataInvalidError, ModuleRefusedError, PartitionError, UnlearningError
from fedfactory_ray.federation.exchange import offered_cards
from fedfactory_ray.generation.card import module_fingerprint
from fedfactory_ray.pipeline import phases
from fedfactory_ray.pipeline.export import export_modules
from fedfactory_ray.pipeline.forecast import Probe, forecast_table
from fedfactory_ray.pipeline.listeners import Listeners
from fedfactory_ray.pipeline.report import absent_classes, partition_table, told_at_home
from fedfactory_ray.pipeline.survey import check_offered
from fedfactory_ray.settings.command_line import make_config, stored_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.presets import PRESETS
from fedfactory_ray.settings.sections import GeneratorConfig
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import CERTIFICATE
from fedfactory_ray.synthesis.plan import check_validation
from fedfactory_ray.tuning.drawn import settings_of_modules
from fedfactory_ray.unlearning.facts import classes_held, read_facts
from fedfactory_ray.unlearning.forget import forget
from fedfactory_ray.unlearning.verification import verify

INFO = DataInfo(["cat", "dog", "eel"], 8, 1, {})
HELD = {"north": {0: 40, 1: 19}, "south": {1: 5, 2: 20}, "east": {0: 1}}
PARTITION = Partition(3, {c: {y: np.arange(n) for y, n in share.items()} for c, share in HELD.items()})


def printed(table: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_small_shares_are_held_and_not_offered() -> None:
    offered = PARTITION.offered(20)
    assert [(client, label, len(i)) for client, label, i in offered] == [("north", 0, 40), ("south", 2, 20)]
    assert PARTITION.at_home(20) == [("north", 1, 19), ("south", 1, 5), ("east", 0, 1)]
    assert len(list(PARTITION)) == 5
    assert PARTITION.offered(1).sha256 == PARTITION.sha256
    assert GeneratorConfig().min_images == 20


def test_the_setting_changes_no_module_and_at_its_default_no_run() -> None:
    some: dict[str, Any] = {"precision": "fp32", "threads": 1, "seed": 0, "images_sha256": "x"}
    low, high = GeneratorConfig(min_images=1), GeneratorConfig()
    assert module_fingerprint(low, **some) == module_fingerprint(high, **some)
    assert low.of_module() == high.of_module()
    assert len({settings_of_modules(Config.model_validate({"generator": {"min_images": n}})) for n in (1, 20)}) == 2
    assert "min_images" not in Config().determining()["generator"]
    assert Config.model_validate({"generator": {"min_images": 3}}).determining()["generator"]["min_images"] == 3
    assert {make_config(name).generator.min_images for name in PRESETS} == {20}


def test_a_person_is_told_who_keeps_what_and_which_class_nobody_offers(caplog: pytest.LogCaptureFixture) -> None:
    shown = printed(partition_table(PARTITION, INFO, 20))
    assert "(19)" in shown
    assert " 40 " in shown
    assert "3 of 5 shares, 25 images stay at home" in " ".join(shown.split())
    assert told_at_home(PARTITION, INFO, 20) == ["north class dog (19)", "south class dog (5)", "east class cat (1)"]
    assert absent_classes([(client, label) for client, label, _ in PARTITION.offered(20)], INFO) == ["dog"]
    with caplog.at_level(logging.WARNING):
        check_offered(Config(), PARTITION, INFO.class_names)
    assert "nobody may offer class dog" in caplog.text
    with pytest.raises(PartitionError, match=r"no client holds 41 images of a class[\s\S]*generator\.min_images=41"):
        check_offered(Config.model_validate({"generator": {"min_images": 41}}), PARTITION, INFO.class_names)


def test_quotas_steps_and_the_forecast_are_of_what_is_offered() -> None:
    tree = {"synthesis": {"images_per_class": 9}, "generator": {"min_steps": 7, "max_steps": 7}}
    with pytest.raises(ConfigError, match=r"(?s)class 0 (?!.*class 1)"):
        check_validation(Config.model_validate(tree), PARTITION)
    config = Config.model_validate(tree | {"synthesis": {"images_per_class": 100}, "baselines": ["none"]})
    worker = Worker(1.0, 0.0, 1, 2)
    table = forecast_table(config, INFO, PARTITION, Plan(worker, worker, worker), Probe(1, 1, 1, 1_000_000))
    names, values = ([str(cell) for cell in column.cells] for column in table.columns)
    rows = dict(zip(names, values, strict=True))
    assert rows["modules, of so many steps"] == "2, 7 to 7"
    assert rows["synthetic images"] == "200"
    assert rows["clients, side by side"] == "3, 2"
    recipe = config.classifier
    assert baseline_steps(config, PARTITION) == recipe.epochs * (180 // recipe.batch_size)


def test_a_card_below_the_receivers_minimum_is_refused_by_client_and_class(tmp_path: Path) -> None:
    write_module(tmp_path, "north", 1)  # of 5 images
    info = DataInfo(["a", "b"], 8, 1, {})
    assert len(offered_cards(str(tmp_path), info, 5)) == 1
    with pytest.raises(ModuleRefusedError, match=r"client 'north', class 1, .*5 images of class 'b', needed .*=6"):
        offered_cards(str(tmp_path), info, 6)


def test_a_client_that_exports_keeps_small_classes_and_takes_back_what_it_once_offered(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [4, 25, 30])
    source = write_npz(tmp_path / "x.npz", train_labels=labels[:, None], train_images=np.zeros((59, 8, 8, 1), np.uint8))
    generator = {"channels": [8], "min_steps": 2, "max_steps": 2, "batch_size": 4}

    def export(min_images: int, *classes: int) -> str:
        out = io.StringIO()
        tree = {"data": {"source": str(source)}, "generator": generator | {"min_images": min_images}}
        there, console = str(tmp_path / "out"), Console(file=out, width=200)
        export_modules(Config.model_validate(tree), "north", there, console, classes=classes or None, device="cpu")
        return out.getvalue()

    folder = tmp_path / "out" / "modules" / "north"
    assert "3 modules, 3 of them trained now" in export(1)
    told = export(20)
    assert "classes that stay at home, of fewer than generator.min_images=20: 0 0 (4 images)" in told
    assert "2 modules, 0 of them trained now" in told
    assert sorted(path.name for path in folder.glob("class-*")) == ["class-001", "class-002"]
    with pytest.raises(DataInvalidError, match=r"0 0 \(4 images\)[\s\S]*generator\.min_images=20"):
        export(20, 0, 1)


def test_a_run_keeps_small_shares_at_home_and_forgets_a_client_that_has_no_other(cluster: None, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "stripes.npz", n=60)
    counts = [[40, 0, 10], [0, 25, 0], [0, 15, 30], [5, 0, 0]]
    config = small_config(
        tmp_path,
        data,
        architecture="both",
        baselines=("centralised",),
        generator=SMALL["generator"] | {"min_images": 20},
        partition={"scheme": "skew", "counts": counts, "min_size": 5},
    )
    done = run_here(config, tmp_path)
    storage = Storage(str(done.folder))
    facts = read_facts(storage)
    offered = {("client-000", 0): 40, ("client-001", 1): 25, ("client-002", 2): 30}
    assert {card.key: card.n_images for card in facts.cards} == offered
    assert {(shard.client, shard.label) for shard in facts.shards} == offered.keys()
    assert done.report.modules == 3
    assert done.report.at_home == ["client-000 class 2 (10)", "client-002 class 1 (15)", "client-003 class 0 (5)"]
    assert "stay at home, too small for a module: 3" in done.printed
    np.testing.assert_allclose(storage.read_json("evaluation.json")["prior"], np.array([40, 25, 30]) / 95)
    # At home they are used: by every client's expert, and by the reference.
    experts = {c: storage.read_json(f"experts/{c}/card.json")["n_real"] for c in classes_held(storage)}
    assert experts == {"client-000": 50, "client-001": 25, "client-002": 45, "client-003": 5}
    certificate = forget(stored_config("small", ["--storage.uri", str(tmp_path / "runs")]), ["client-003"], [], OUT,
                         asked_by="somebody")  # fmt: skip
    assert certificate.deleted["modules"] == []
    assert {entry["file"] for entry in certificate.deleted["weights"]} == {"experts/client-003/model.safetensors"}
    new = certificate.request.successor
    stored = stored_config(new, ["--storage.uri", str(tmp_path / "runs")])
    _, checks = verify(f"{tmp_path}/runs/{new}/{CERTIFICATE}", stored, OUT)
    assert [check for check in checks if check.wrong] == []


def test_what_an_earlier_version_made_of_a_small_share_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    storage = Storage(str(tmp_path / "runs" / "small"))
    before = set(storage.names("modules")) | set(storage.names("synthetic"))
    with session(config_of(tmp_path, "small"), OUT) as opened:
        generator = opened.config.generator.model_copy(update={"min_images": 20})
        plan: Any = SimpleNamespace(client=None)
        smaller = opened.other(config=opened.config.model_copy(update={"generator": generator}), plan=plan)
        asked: list[Partition] = []
        monkeypatch.setattr(phases, "run_round", lambda config, partition, *_: asked.append(partition) or {})
        phases.train_modules(smaller, Listeners(OUT, opened.logged))
    assert [(client, label) for client, label, _ in asked[0]] == [
        ("client-000", 0),
        ("client-001", 1),
        ("client-002", 2),
    ]
    gone = before - set(storage.names("modules")) - set(storage.names("synthetic"))
    small = [("client-000", 2), ("client-002", 1), ("client-003", 0)]
    assert gone == {
        name
        for name in before
        for client, label in small
        if name.startswith((f"modules/{client}/class-{label:03d}/", f"synthetic/class-{label:03d}/{client}-"))
    }
    assert len(gone) > 2 * len(small)


def test_a_request_that_would_leave_no_module_is_refused_before_anything_is_noted(tmp_path: Path) -> None:
    make_run(tmp_path, generator=SMALL["generator"] | {"min_images": 40})
    before = Storage(str(tmp_path / "runs" / "small")).names("")
    assert [card.key for card in read_facts(Storage(str(tmp_path / "runs" / "small"))).cards] == [("client-000", 0)]
    with pytest.raises(UnlearningError, match="no module left"):
        forget(config_of(tmp_path, "small"), ["client-000"], [0], OUT, asked_by="somebody")
    assert Storage(str(tmp_path / "runs" / "small")).names("") == before
