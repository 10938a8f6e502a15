"""The forecast: what `--plan` tells of a run, and that it keeps nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import LONGEST, ROOT

from fedfactory_ray.cluster.plan import Plan, Worker
from fedfactory_ray.data.partition import Partition, make_partition
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import DataInfo, inspect
from fedfactory_ray.pipeline import forecast
from fedfactory_ray.pipeline.forecast import Probe, forecast_table, makespan, timed
from fedfactory_ray.settings.config import Config

PROBE = Probe(module_step=2.0, drawn_image=0.5, fit_step=0.25, module_bytes=1_000_000)


def told(config: Config, slots: int = 2) -> dict[str, str]:
    """The table's rows for the digits."""
    info, labels = inspect(open_source(config.data))
    partition: Partition = make_partition(config.partition, labels, info.classes, config.seed)
    table = forecast_table(config, info, partition, plan(slots), PROBE)
    names, values = ([str(cell) for cell in column.cells] for column in table.columns)
    return dict(zip(names, values, strict=True))


def plan(slots: int) -> Plan:
    worker = Worker(1.0, 0.0, 1, slots)
    return Plan(worker, worker, worker)


@pytest.fixture
def digits() -> DataInfo:
    return inspect(open_source(Config().data))[0]


def test_work_is_dealt_to_whom_is_free() -> None:
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([2, 2, 2], 2) == 4
    assert makespan([], 3) == 0


def test_seconds_follow_from_the_probe_and_the_plan(digits: DataInfo) -> None:
    generator, classifier = {"min_steps": 10, "max_steps": 10}, {"epochs": 3, "batch_size": 50}
    settings = {"generator": generator, "classifier": classifier, "synthesis": {"images_per_class": 100}}
    rows = told(Config.model_validate(settings | {"baselines": ["none"]}))
    assert rows["modules, of so many steps"] == "10, 10 to 10"
    assert rows["bytes uploaded, in all"] == "10.0 MB"
    assert rows["synthetic images"] == "1000"
    assert rows["about seconds, modules"] == "100"  # ten of ten steps on two slots, two seconds each
    assert rows["about seconds, synthesis"] == "250"
    assert rows["about seconds, classifier"] == "14"  # 3 epochs of 900 images: 54 steps of a quarter
    assert "about seconds, centralised" not in rows
    assert rows["about seconds, in all, without starts of processes"] == "364"
    alone = told(Config.model_validate(settings), slots=1)
    assert alone["about seconds, modules"] == "200"
    assert float(alone["about seconds, centralised"]) >= 14
    experts = told(Config.model_validate(settings | {"architecture": "decentralised", "baselines": ["none"]}))
    assert "about seconds, classifier" not in experts
    assert experts["about seconds, experts"] == "68"


def test_what_is_timed_leaves_the_first_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: clock[0])
    durations = iter([50.0, 1.0, 3.0, 1.0])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(forecast, "PROBE_SECONDS", 4.5)
    assert timed(work) == 1.0


@pytest.mark.cluster
def test_a_plan_is_printed_and_nothing_is_kept(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    job = [sys.executable, str(ROOT / "jobs" / "run.py"), "--plan", "--data.resolution", "24"]
    done = subprocess.run(
        job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "client-009" in done.stdout
    assert "modules, of so many steps" in done.stdout
    assert re.search(r"about seconds, in all, without starts of processes\s*│\s*\d+", done.stdout)
    assert "images of 24 pixels a side with generator.patch=1" in done.stdout
    assert list(tmp_path.iterdir()) == []
