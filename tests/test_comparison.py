"""The table of a comparison: over seeds, and as a person reads it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from rich.console import Console

from fedfactory_ray.baselines.methods import METHODS
from fedfactory_ray.classification.evaluation import Difference
from fedfactory_ray.classification.intervals import Interval
from fedfactory_ray.comparison.compare import compare, method_names
from fedfactory_ray.comparison.report import (
    ACCURACY,
    AUROC,
    BALANCED,
    ECE,
    LONE,
    NLL,
    Comparison,
    MethodLine,
    comparison_table,
    over_seeds,
)
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.pipeline.session import run_name
from fedfactory_ray.settings.command_line import job_console, make_config
from fedfactory_ray.settings.config import Config
from fedfactory_ray.tracking.plots import comparison_plot


def scores(accuracy: float) -> dict[str, float]:
    interval = {f"{ACCURACY}_low": accuracy - 0.1, f"{ACCURACY}_high": accuracy + 0.1}
    return {ACCURACY: accuracy, BALANCED: accuracy, AUROC: 0.9, NLL: 0.5, ECE: 0.25} | interval


def comparison(accuracy: float, rounds: int) -> Comparison:
    lines = [
        MethodLine("centralised", scores(0.9), None, 1e6, 0, 10),
        MethodLine("fedavg", scores(accuracy), rounds, 2e6, 4e6, 20),
    ]
    return Comparison("digits", "runs/digits", lines, {"fedavg": [0.1, 0.2]})


def printed(found: Comparison) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(comparison_table(found))
    return out.getvalue()


def test_one_seed_shows_intervals_of_the_test_and_several_those_over_seeds() -> None:
    one = printed(comparison(0.2, 10))
    assert "0.2000 [0.1000, 0.3000]" in one
    assert "95 % intervals: test sampling only" in one
    assert "0.5000 · 0.2500" in one
    assert "2.00" in one
    assert "–" in one
    whole = over_seeds([comparison(0.2, 10), comparison(0.3, 20), comparison(0.4, 30)])
    fedavg = whole.lines[1]
    assert fedavg.scores[ACCURACY] == pytest.approx(0.3)
    assert fedavg.scores[f"{ACCURACY}_std"] == pytest.approx(0.1)  # n - 1
    assert fedavg.rounds == 20
    assert whole.lines[0].rounds is None
    half = 4.302653 * 0.1 / 3**0.5  # Student's, of two degrees of freedom
    assert f"0.3000 [{0.3 - half:.4f}, {0.3 + half:.4f}]" in printed(whole)
    assert "over 3 seeds, fits included" in printed(whole)


def test_what_is_missing_or_diverged_stands_below_the_table() -> None:
    broken = replace(comparison(0.2, 10), missing=("client-003",), diverged=("fedavg",))
    assert "without the experts of client-003" in printed(broken)
    assert "diverged at once, shown untrained: fedavg" in printed(broken)
    assert "fedavg (digits)" in printed(over_seeds([broken, comparison(0.3, 10)]))
    assert "diverged" not in printed(comparison(0.2, 10))


def test_what_architecture_two_gains_stands_below_the_table_and_in_the_file() -> None:
    gain = Difference(Interval(0.01, -0.02, 0.03), Interval(-0.01, -0.04, 0.02))
    found = replace(comparison(0.2, 10), gained={"fedfactory-ii less fedfactory": gain}, missing=("client-003",))
    assert "fedfactory-ii less fedfactory, paired: accuracy +0.0100 [-0.0200, +0.0300]" in printed(found)
    stored = json.loads(json.dumps(found.to_json()))
    assert stored["missing"] == ["client-003"]
    assert stored["gained"]["fedfactory-ii less fedfactory"]["balanced_accuracy_low"] == -0.04
    assert stored["intervals"] == "test sampling only"
    assert stored["lines"][1]["method"] == "fedavg"
    other = replace(gain, accuracy=Interval(0.03, 0.01, 0.05))
    whole = over_seeds([found, replace(found, gained={"fedfactory-ii less fedfactory": other})])
    half = 12.706205 * 0.01  # Student's, of one degree of freedom: only the seeds' own differences count
    accuracy = whole.gained["fedfactory-ii less fedfactory"].accuracy
    assert (accuracy.value, accuracy.high) == (pytest.approx(0.02), pytest.approx(0.02 + half, rel=1e-4))


def test_a_narrow_screen_shows_every_figure_whole() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(comparison_table(comparison(0.2, 10)))
    assert "…" not in out.getvalue()
    assert "[0.1000," in out.getvalue()


def test_a_log_shows_a_method_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    longest = MethodLine(LONE, scores(0.9), 1, 1e9, 1e9, 10_000)
    job_console().print(comparison_table(Comparison("digits", "runs/digits", [longest], {})))
    assert [line for line in capsys.readouterr().out.splitlines() if LONE in line and "0.9000 [0.8000, 1.0000]" in line]


def test_the_plot_has_a_bar_a_method_and_a_curve_a_federated_one() -> None:
    found = comparison(0.2, 10)
    figure = comparison_plot({line.method: line.scores for line in found.lines}, found.curves)
    bars, curves = figure.axes
    assert [round(bar.get_width(), 3) for bar in bars.patches] == [0.9, 0.2]
    assert len(curves.lines) == 1
    assert len(comparison_plot({line.method: line.scores for line in found.lines}, {}).axes) == 1


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    assert method_names() == ["centralised", "local", *METHODS, "fedfactory", "fedfactory-ii"]
    with pytest.raises(ConfigError, match=r"fedsgd unknown: choose of centralised, local, fedavg"):
        compare(make_config(), ["fedavg", "fedsgd"], 1, Console(file=io.StringIO()))


def test_natural_silos_have_no_centralised_fit() -> None:
    natural = {"scheme": "natural", "silos": [{"name": "a", "source": "a.npz"}]}
    with pytest.raises(ConfigError, match="centralised needs all images in one place; try --methods local fedavg"):
        compare(Config.model_validate({"partition": natural}), method_names(), 1, Console(file=io.StringIO()))


def test_the_baselines_settings_leave_the_factorys_run_where_it_is() -> None:
    assert run_name(make_config()) == run_name(make_config(overrides=["--federated.rounds", "3"]))
    assert run_name(make_config()) != run_name(make_config(overrides=["--classifier.norm", "batch"]))


def test_several_seeds_have_runs_of_their_own_and_one_of_their_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Config] = []

    def once(config: Config, methods: list[str], console: Console) -> Comparison:
        asked.append(config)
        return comparison(0.1 * len(asked), 10)

    monkeypatch.setattr("fedfactory_ray.comparison.compare.compare_once", once)
    monkeypatch.chdir(tmp_path)  # where artifacts go
    store = f"sqlite:///{tmp_path}/mlflow.db"
    config = make_config(overrides=["--seed", "4", "--name", "mine", "--tracking.uri", store])
    found = compare(config, ["centralised", "fedavg"], 3, Console(file=io.StringIO()))
    assert [(c.seed, c.name) for c in asked] == [(4, "mine-seed4"), (5, "mine-seed5"), (6, "mine-seed6")]
    assert found.lines[1].scores[ACCURACY] == pytest.approx(0.2)
    client = mlflow.MlflowClient(store)
    runs = {r.info.run_name: r for r in client.search_runs(["1"])}
    parent = runs.pop(found.name)
    assert set(runs) == {"centralised", "fedavg"}
    assert {r.data.tags["mlflow.parentRunId"] for r in runs.values()} == {parent.info.run_id}
    assert runs["fedavg"].data.metrics[f"{ACCURACY}_std"] == pytest.approx(0.1)
    assert {r.info.status for r in (parent, *runs.values())} == {"FINISHED"}
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"comparison.txt", "comparison.json", "comparison.png"}
