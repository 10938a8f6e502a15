"""The main job over seeds."""

from __future__ import annotations

import io
from pathlib import Path

import mlflow
import numpy as np
import pytest
from rich.console import Console

from fedfactory_ray.classification.evaluation import Judged, judge, paired_difference
from fedfactory_ray.classification.rules import Ruled
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.pipeline import seeds
from fedfactory_ray.pipeline.report import Report
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.settings.config import Config

LABELS = np.arange(100) % 2
PRIOR = np.array([0.5, 0.5])


def ruled(right: int) -> Ruled:
    """A classifier that has the first so many of 100 images right."""
    said = np.where(np.arange(100) < right, LABELS, 1 - LABELS)
    return Ruled.of(np.eye(2)[said], PRIOR)


def judged(right: int) -> Judged:
    return judge(ruled(right), ruled(right), LABELS)


def report(config: Config, right: int, other: int) -> Report:
    evaluations = {"fedfactory": judged(right), "centralised": judged(other)}
    differences = {"fedfactory": {"centralised": paired_difference(ruled(right), ruled(other), LABELS)}}
    texts = ([], [], [])
    return Report(
        *(str(config.name), "runs/x", "", {}, 1, 1, 0, 0, 1, {}, "fedfactory", evaluations, {}, differences, {}), *texts
    )


def test_a_gain_is_told_by_its_variation_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed by itself seems to show a difference, up or down; over seeds there is none."""
    asked: list[Config] = []

    def once(config: Config, console: Console) -> Report:
        asked.append(config)
        return report(config, *[(90, 70), (70, 90), (85, 70)][len(asked) - 1])

    monkeypatch.setattr("fedfactory_ray.pipeline.seeds.phases.run", once)
    monkeypatch.chdir(tmp_path)  # where artifacts go
    store, out = f"sqlite:///{tmp_path}/mlflow.db", io.StringIO()
    config = make_config(overrides=["--seed", "4", "--name", "mine", "--tracking.uri", store])
    table = seeds.run_seeds(config, 3, Console(file=out, width=160))
    Console(file=out, width=160).print(table)
    assert [(c.seed, c.name) for c in asked] == [(4, "mine-seed4"), (5, "mine-seed5"), (6, "mine-seed6")]
    gains = np.array([0.2, -0.2, 0.15])
    half = 4.302653 * gains.std(ddof=1) / 3**0.5
    assert f"{gains.mean():+.4f} [{gains.mean() - half:+.4f}, {gains.mean() + half:+.4f}]" in out.getvalue()
    assert "over 3 seeds, fits included" in out.getvalue()
    assert out.getvalue().count("test sampling only") == 3
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["1"])
    assert run.info.run_name == "mine-seed4-and-2-more-seeds"
    assert run.data.metrics["fedfactory_less_centralised/accuracy"] == pytest.approx(gains.mean())
    low, high = (run.data.metrics[f"fedfactory_less_centralised/accuracy_{end}"] for end in ("low", "high"))
    assert low < 0 < high


def test_no_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seeds: found 0"):
        list(seeds.each_seed(make_config(), 0))
