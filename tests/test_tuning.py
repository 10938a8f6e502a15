"""Tuning: what is tried, what is made once, what goes on after the driver died; the test images are never read."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
import yaml
from conftest import write_npz
from ray import tune
from rich.console import Console
from small_runs import ROOT, SMALL, wait_for

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.errors import DataInvalidError, ResourcesError
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import write_shard
from fedfactory_ray.tuning.drawn import SharedImages, settings_of_images, settings_of_modules
from fedfactory_ray.tuning.record import Record, TrialStep, read_record
from fedfactory_ray.tuning.report import Study, TrialLine, study_table
from fedfactory_ray.tuning.study import make_scheduler, make_trials, run_study, run_trials

# What a trial tells


def report(step: int, accuracy: float, loss: float = 1.0, steps: int = 8, whole: bool = False) -> TrialStep:
    return TrialStep(step, steps, accuracy, loss, accuracy, float(step), whole)


def test_a_record_takes_each_step_once_and_counts_what_the_method_chose(tmp_path: Path) -> None:
    record = Record({"seed": "1"})
    assert record.result is None
    assert [record.add(report(*told)) for told in [(1, 0.5), (2, 0.9), (2, 0.9), (1, 0.5), (3, 0.8)]] == [1, 1, 0, 0, 1]
    assert record.result == report(2, 0.9)
    assert record.add(report(3, 0.7, whole=True))
    assert record.result == report(3, 0.7, whole=True)
    record.outcome = "whole"
    record.write(Storage(str(tmp_path)))
    assert read_record(Storage(str(tmp_path)), {"seed": "1"}) == record
    assert not Record({}, [], "failed").finished


def test_poor_trials_stop_at_the_rungs_and_finished_ones_count() -> None:
    records = [Record({}, [report(step, best) for step in range(1, 9)], "whole") for best in (0.4, 0.5, 0.6)]

    def goes_on(best: float, steps: int = 8) -> int:
        scheduler, trial = make_scheduler(steps, records), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        for step in range(1, steps + 1):
            told = {"step": step, "best": best}
            if scheduler.on_trial_result(None, trial, told) == "STOP":
                return step
        return steps

    assert (goes_on(0.45), goes_on(0.5)) == (2, 8)
    assert goes_on(0.1, steps=1) == 1


def test_lines_are_ranked_by_accuracy_then_loss_whole_trials_first_failures_last() -> None:
    figures = [(0.5, 1.0), (0.9, 2.0), (0.9, 1.0), (0.9, float("nan"))]
    records = [Record({"seed": str(i)}, [report(1, a, loss)], "whole") for i, (a, loss) in enumerate(figures)]
    stopped = Record({"seed": "8"}, [report(1, 0.95, 1.0)], "stopped early")
    lines = [TrialLine.of(record) for record in [Record({"seed": "9"}, [], "failed"), stopped, *records]]
    study = Study("s", "runs/s", "fedavg", "rounds", sorted(lines, key=lambda line: line.rank))
    assert [line.settings["seed"] for line in study.lines] == ["2", "1", "3", "0", "8", "9"]
    out = io.StringIO()
    Console(file=out, width=160).print(study_table(study))
    assert "0.9000" in out.getvalue()
    assert "failed" in out.getvalue()
    assert study.best == "--seed 2"


# What trials share


def test_what_determines_modules_and_images_tells_settings_apart() -> None:
    def keys(*changes: str) -> tuple[str, str]:
        config = make_config(overrides=[f"--{change}" for change in changes])
        return settings_of_modules(config), settings_of_images(config)

    modules, images = keys()
    assert keys("classifier.learning_rate=1", "synthesis.images_per_class=9", "federated.rounds=2") == (modules, images)
    for change in ("sampler.evaluations=6", "synthesis.unit_size=125", "resources.synthesis.threads=2"):
        assert keys(change)[0] == modules
        assert keys(change)[1] != images
    for change in ("generator.ema_decay=0.9", "seed=1", "partition.clients=5", "resources.client.threads=2"):
        assert modules not in keys(change)
        assert images not in keys(change)


def test_fewer_images_a_class_are_the_first_of_each_clients_own(cluster: None, tmp_path: Path) -> None:
    few, many = (
        Config.model_validate({"synthesis": {"images_per_class": n, "batch_size": 4, "unit_size": 8}}) for n in (10, 26)
    )
    cards = [card("a", 0, 30), card("b", 0, 10), card("b", 1, 10)]
    storage, images = Storage(str(tmp_path)), np.random.RandomState(0)
    manifest = []
    for unit in make_units(cards, 26, 8, 0):
        drawn = images.randint(0, 256, (unit.n, 2, 2, 1)).astype(np.uint8)
        manifest.append(write_shard(storage, unit, drawn))
    shared = SharedImages(storage, cards, manifest)
    whole, part = shared.rows(many), shared.rows(few)
    assert (whole.n_images, part.n_images) == (52, 20)
    assert whole.digest != part.digest

    def by_place(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], bytes]:
        return {(r["client"], r["label"], r["unit"], r["index"]): bytes(r["image"]) for r in rows}

    places, kept = by_place(whole.table().to_pylist()), by_place(part.table().to_pylist())
    expected = {(u.client, u.label, u.index, i) for u in make_units(cards, 10, 8, 0) for i in range(u.n)}
    assert set(kept) == expected
    assert all(places[place] == image for place, image in kept.items())
    assert by_place(whole.dataset().take_all()) == places
    assert by_place(part.dataset().take_all()) == kept


def card(client: str, label: int, images: int) -> ModuleCard:
    files = {"model.safetensors": f"{client}{label}"}
    return ModuleCard(client, label, images, 1, 2, 1, "fp32", {}, 1, files=files)


# Whole studies


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file whose test images cannot be read."""
    file = write_npz(tmp_path_factory.mktemp("blind") / "stripes.npz")
    with np.load(file) as arrays:
        held = dict(arrays)
    # Beyond the few kB that are read with the array's header.
    held |= {name: np.concatenate([held[name]] * 20) for name in ("test_images", "test_labels")}
    np.savez(file, **held)
    content, pixels = file.read_bytes(), held["test_images"].tobytes()
    start = content.index(pixels)
    file.write_bytes(content[:start] + bytes(len(pixels)) + content[start + len(pixels) :])
    source = open_source(make_config(overrides=["--data.source", str(file)]).data)
    assert source.images("val").any()
    with pytest.raises(Exception, match="CRC"):
        source.images("test")
    return file


def tree(folder: Path, blind: Path, **changes: Any) -> dict[str, Any]:
    federated = {"rounds": 6, "local_epochs": 1, "validation_every": 5}
    storage = SMALL["storage"] | {"uri": str(folder / "runs"), "checkpoint_rounds": 1}
    places = {"storage": storage, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    return SMALL | {"data": {"source": str(blind)}, "federated": federated} | places | changes


def times(folder: Path, *patterns: str) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern) if path.is_file()
    }


def quietly(config: Config, method: str, *search: str, trials: int | None = None, concurrent: int = 1) -> Study:
    return run_study(config, method, search, trials, concurrent, Console(file=io.StringIO()))


def test_a_study_goes_on_after_the_driver_was_killed_and_is_logged_as_nested_runs(
    cluster: None, tmp_path: Path, blind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where artifacts go
    partition = {"scheme": "skew", "counts": [[13, 13, 13]] * 3}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree(tmp_path, blind, partition=partition)))
    search = ("federated.fedprox_lr=0.1,1e-6",)
    options = ("--config", "small.yaml", "--method", "fedprox", "--search", *search)
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "tune.py"), *options],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    config = make_config(file="small.yaml")
    study = tmp_path / "runs" / "tune-fedprox-small"
    folders = [study / trial.name for trial in make_trials(config, "fedprox", search, None)]
    wait_for(lambda: (folders[1] / "trial.json").exists(), job)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    first = times(folders[0], "**/*")
    broken = read_record(Storage(str(folders[1])), {})
    assert read_record(Storage(str(folders[0])), {}).outcome == "whole"

    found = quietly(config, "fedprox", *search)
    assert times(folders[0], "**/*") == first
    again = read_record(Storage(str(folders[1])), {})
    assert again.reports[: len(broken.reports)] == broken.reports
    assert [r.step for r in again.reports if not r.whole] == list(range(1, len(again.reports) + 1))[: again.last.step]
    assert (again.outcome, again.last.step in (2, 4)) == ("stopped early", True)  # at a rung, poor as it is
    assert times(folders[1], "**/*").keys() == {str(folders[1] / "trial.json")}
    assert [line.outcome for line in found.lines] == ["whole", "stopped early"]
    assert found.lines[0].accuracy > found.lines[-1].accuracy
    assert not (study / "tune").exists()

    best = make_config(file=str(study / "best.yaml"))
    assert best.federated.fedprox_lr == float(found.lines[0].settings["federated.fedprox_lr"])
    assert best.name is None

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs(["1"], order_by=["start_time DESC"])
    parent = next(run for run in runs if run.info.run_name == "tune-fedprox-small")
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {"trial-1", "trial-2"}
    assert children["trial-2"].data.params == {"federated.fedprox_lr": "1e-6"}
    assert children["trial-2"].data.tags["outcome"] == "stopped early"
    for name, place in (("trial-1", 0), ("trial-2", 1)):
        curve = client.get_metric_history(children[name].info.run_id, "validation_accuracy")
        record = read_record(Storage(str(folders[place])), {})
        assert [(m.step, m.value) for m in curve] == [(r.step, r.accuracy) for r in record.reports if not r.whole]
    assert {children[name].info.status for name in children} | {parent.info.status} == {"FINISHED"}
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"trials.txt", "trials.json", "best.yaml"}

    before = times(study, "trial-*/**/*")
    assert quietly(config, "fedprox", *search).lines == found.lines
    assert times(study, "trial-*/**/*") == before


def test_the_factorys_trials_share_modules_and_images(
    cluster: None, tmp_path: Path, blind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {
        "generator": SMALL["generator"] | {"min_steps": 5, "max_steps": 5},
        "classifier": SMALL["classifier"] | {"epochs": 2},
    }
    config = Config.model_validate(tree(tmp_path, blind, **short))
    found = quietly(config, "fedfactory", "synthesis.images_per_class=16,48")
    study = tmp_path / "runs" / "tune-fedfactory-small"
    made = times(study, "modules-*/modules/**/*", "images-*/synthetic/**/*")
    assert sum("model.safetensors" in file for file in made) == 5
    assert sum(".parquet" in file for file in made) == 20
    assert len({file.split("/modules/")[0] for file in made if "/modules/" in file}) == 1
    assert {line.steps for line in found.lines} == {2}
    assert all(0 <= line.accuracy <= 1 for line in found.lines)

    best = f"synthesis.images_per_class={found.lines[0].settings['synthesis.images_per_class']}"
    more = quietly(config, "fedfactory", best, "classifier.learning_rate=0.002")
    assert more.lines[0].accuracy == found.lines[0].accuracy
    assert times(study, "modules-*/modules/**/*", "images-*/synthetic/**/*") == made


@pytest.mark.parametrize("concurrent", [1, 3])
def test_no_more_trials_run_at_once_than_asked_for(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int
) -> None:
    """Trials themselves take no CPU, so nothing else would hold them back."""

    class Counting(tune.Callback):
        records = [Record({}, outcome="whole")] * 4
        running = most = 0

        def on_trial_start(self, *_: Any, **__: Any) -> None:
            self.running += 1
            self.most = max(self.most, self.running)

        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            self.running -= 1

    def trial(chosen: Any, jobs: Any) -> None:
        for step in (1, 2):
            time.sleep(0.3)
            tune.report({"step": step, "best": 0.5})

    monkeypatch.setattr("fedfactory_ray.tuning.study.run_trial", trial)
    session: Any = SimpleNamespace(storage=Storage(str(tmp_path)), config=make_config())
    watch: Any = Counting()
    jobs: Any = dict.fromkeys(range(4))
    run_trials(session, watch, jobs, 2, concurrent)
    assert (watch.running, watch.most) == (0, concurrent)


def test_a_study_that_cannot_run_is_refused_before_it_starts(cluster: None, tmp_path: Path) -> None:
    empty = {"val_images": np.zeros((0, 8, 8, 1), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)}
    file = write_npz(tmp_path / "no-val.npz", **empty)
    config = Config.model_validate(tree(tmp_path, file))
    with pytest.raises(DataInvalidError, match="no val images"):
        quietly(config, "centralised", "classifier.learning_rate=0.1,0.01")
    with pytest.raises(ResourcesError, match="smaller --concurrent"):
        quietly(config, "fedavg", "federated.fedavg_lr=0.1,0.01", concurrent=3)
    with pytest.raises(ResourcesError, match=r"resources\.classifier"):
        quietly(config, "centralised", "classifier.learning_rate=0.1,0.01", concurrent=3)
    assert not list((tmp_path / "runs").glob("*/trial-*"))
