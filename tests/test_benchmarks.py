"""The benchmarks: that they measure the work that they say, and read the runs that they are given."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import choices, cost, device, timeline
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.generation import sampling, training
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import GeneratorConfig, SamplerConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(stripes: Path) -> Config:
    return Config.model_validate(
        {
            "data": {"source": str(stripes)},
            "generator": {"channels": [8], "min_steps": 3, "max_steps": 3, "batch_size": 4},
            "sampler": {"evaluations": 2},
            "synthesis": {"images_per_class": 20, "batch_size": 10, "unit_size": 10},
            "classifier": {"epochs": 2, "batch_size": 16},
        }
    )


def test_bare_loops_train_every_module_and_draw_every_image(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, drawn = [], []
    descend, draw = training.Training.descend, sampling.Drawing.draw
    monkeypatch.setattr(training.Training, "descend", lambda self: steps.append(1) or descend(self))
    monkeypatch.setattr(sampling.Drawing, "draw", lambda self, n, seed: drawn.append(n) or draw(self, n, seed))
    shares = [("a", 0, np.arange(0, 12, 3)), ("b", 1, np.arange(1, 12, 3))]
    assert cost.bare_modules(config, shares) > 0
    assert len(steps) == 2 * 3
    assert cost.bare_drawing(config, (8, 8, 1), [10, 7]) > 0
    assert drawn == [10, 7]
    assert cost.bare_fit(config, (8, 8, 1), 3, 60) > 0


def test_a_device_is_told_whether_it_repeats(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    bench = device.Bench(torch.device("cpu"), 60, file)
    tiny = {"channels": (8,), "batch_size": 4, "min_steps": 4, "max_steps": 4}
    device.repeated(bench, device.Network("tiny", GeneratorConfig(**tiny), SamplerConfig(evaluations=2), 8, 1), 4)
    (row,) = json.loads(file.read_text())
    assert row.pop("what") == "repeated, tiny"
    assert len(row.pop("digest")) == 16
    assert row == dict.fromkeys(("again", "interrupted", "beside another", "drawn again"), True)


def test_the_devices_benchmark_names_what_no_time_was_left_for(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "device", "--parts", "digits", "--seconds", "0", "--out", str(file)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = [row["what"] for row in json.loads(file.read_text())]
    assert told == ["environment", "limits"] + ["digits: left out, time is over"] * 4


def test_an_expert_is_fitted_from_a_runs_synthetic_images(undisturbed_folder: Path) -> None:
    storage, stored = choices.stored_run(argparse.Namespace(run=str(undisturbed_folder / "runs" / "small")))
    assert stored.generator.min_steps == 40
    logits = choices.expert_logits(stored, storage.uri, "client-000")
    labels = open_source(stored.data).labels("val")
    assert logits.shape == (len(labels), 3)
    assert (logits.argmax(1).numpy() == labels).mean() > 0.4


def test_a_benchmark_of_choices_asks_for_a_run() -> None:
    command = [sys.executable, "-m", "benchmarks", "samplers"]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert "samplers needs --run" in job.stderr


def test_a_timeline_tells_when_a_process_starts_waits_and_works() -> None:
    worker = timeline.Seen(began=1.0)
    for now, title in (
        (1.1, "default_worker.py"),
        (3.0, "ray::IDLE"),
        (4.0, "ray::fit_classifier"),
        (5.0, "ray::IDLE"),
    ):
        worker.look(now, title, now / 2)
    worker.look(6.0, "ray::IDLE", 2.5)
    assert worker.spans == [(1.0, 3.0, "starts"), (3.0, 4.0, "waits"), (4.0, 5.0, "works"), (5.0, 6.0, "waits")]
    assert (worker.name, worker.cpu) == ("fit_classifier", 2.5)
    other = timeline.Seen(began=0.0)
    other.look(0.5, "raylet", 0.1)
    assert other.spans == [(0.0, 0.5, "works")]
    assert [text.get_text() for text in timeline.picture([other, worker]).axes[0].get_yticklabels()] == [
        "raylet (0.1 s CPU)",
        "fit_classifier (2.5 s CPU)",
    ]


def test_processes_below_are_watched_until_the_job_is_done() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "watched"])
    with ThreadPoolExecutor(1) as pool:
        found = timeline.watch(pool.submit(time.sleep, 0.5))
    child.kill()
    child.wait()
    assert any(each.name.startswith("python") and each.ended > each.began for each in found)
