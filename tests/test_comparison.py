"""The table of a comparison: over seeds, and as a person reads it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedfactory_ray.command_line import make_config
from fedfactory_ray.comparison import Comparison, Line, compare, comparison_table, method_names, over_seeds
from fedfactory_ray.errors import ConfigError
from fedfactory_ray.plots import comparison_plot
from fedfactory_ray.session import run_name


def scores(accuracy: float) -> dict[str, float]:
    interval = {"accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
    return {"accuracy": accuracy, "balanced_accuracy": accuracy, "auroc": 0.9} | interval


def comparison(accuracy: float, rounds: int) -> Comparison:
    lines = [
        Line("centralised", scores(0.9), None, 1e6, 0, 10),
        Line("fedavg", scores(accuracy), rounds, 2e6, 4e6, 20),
    ]
    return Comparison("digits", "runs/digits", lines, {"fedavg": [0.1, 0.2]})


def printed(found: Comparison) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(comparison_table(found))
    return out.getvalue()


def test_one_seed_shows_intervals_and_several_show_deviations() -> None:
    one = printed(comparison(0.2, 10))
    assert "0.2000 [0.1000, 0.3000]" in one
    assert "2.00" in one
    assert "–" in one
    whole = over_seeds([comparison(0.2, 10), comparison(0.3, 20), comparison(0.4, 30)])
    fedavg = whole.lines[1]
    assert fedavg.scores["accuracy"] == pytest.approx(0.3)
    assert fedavg.scores["accuracy_std"] == pytest.approx(0.1)  # n - 1
    assert fedavg.rounds == 20
    assert whole.lines[0].rounds is None
    assert "0.3000 ± 0.1000" in printed(whole)


def test_the_plot_has_a_bar_a_method_and_a_curve_a_federated_one() -> None:
    found = comparison(0.2, 10)
    figure = comparison_plot({line.method: line.scores for line in found.lines}, found.curves)
    bars, curves = figure.axes
    assert [round(bar.get_width(), 3) for bar in bars.patches] == [0.9, 0.2]
    assert len(curves.lines) == 1
    assert len(comparison_plot({line.method: line.scores for line in found.lines}, {}).axes) == 1


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    assert {"centralised", "local", "fedavg", "fedprox", "scaffold", "feddyn", "fedfactory"} == set(method_names())
    with pytest.raises(ConfigError, match=r"fedsgd unknown: choose of centralised, local, fedavg"):
        compare(make_config(), ["fedavg", "fedsgd"], 1, Console(file=io.StringIO()))


def test_the_baselines_settings_leave_the_factorys_run_where_it_is() -> None:
    assert run_name(make_config()) == run_name(make_config(overrides=["--federated.rounds", "3"]))
    assert run_name(make_config()) != run_name(make_config(overrides=["--classifier.norm", "batch"]))
