"""What a user's text says is shown as it is: no square bracket, colon or dollar sign is parsed, whoever's console."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import fedfactory_ray
from fedfactory_ray.comparison.report import Comparison, comparison_table
from fedfactory_ray.data.partition import Partition
from fedfactory_ray.data.source import DataInfo
from fedfactory_ray.errors import DataInvalidError
from fedfactory_ray.pipeline.report import partition_table
from fedfactory_ray.settings.command_line import exit_status, job_console
from fedfactory_ray.tracking import plots
from fedfactory_ray.tracking.progress import Bars
from fedfactory_ray.tracking.table import PlainTable

ODD = ["[benign]", "[/x]", "[red]a[/red]", ":x:", "a\\[b]", "$a_$"]
PACKAGE = Path(fedfactory_ray.__file__).parent
JOBS = PACKAGE.parent / "jobs"


def shown(*what: object, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=terminal)
    for each in what:
        console.print(each)
    return out.getvalue()


def test_tables_show_names_as_they_are() -> None:
    partition = Partition(len(ODD), {name: {y: np.arange(3)} for y, name in enumerate(ODD)})
    text = shown(partition_table(partition, DataInfo(ODD, 8, 1, {})))
    for name in ODD:
        assert text.count(name) == 2  # a client's and a class's

    table = PlainTable(*ODD, title=ODD[0])
    table.add_row(*ODD, end_section=True)
    text = shown(table)
    assert all(text.count(name) >= 2 for name in ODD), text

    table.add_row(None, "second")
    assert [str(column._cells[-1]) for column in table.columns[:2]] == ["", "second"]  # a blank cell keeps its place

    found = Comparison("[run]", "x", [], {}, missing=("[a]",), diverged=("[/b]",))
    text = shown(comparison_table(found))
    assert all(name in text for name in ("[run]", "[a]", "[/b]")), text


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_show_names_as_they_are(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=terminal)
    for name in ODD:
        with Bars(console, f"training {name}", 2, "steps") as bars:
            bars.printed -= 60
            bars.part(f"part {name}", 1, 2, f"note {name}")
            bars.update(1, f"note {name}")
        assert f"training {name}" in out.getvalue()
        assert f"note {name}" in out.getvalue()


def test_refusals_and_jobs_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        for name in ODD:
            job_console().print(f"run folder {name}")
        raise DataInvalidError("[data]/:x:", f"folders {ODD[:2]}", "[/y]")

    assert exit_status(job) == 2
    printed = capsys.readouterr()
    assert all(f"run folder {name}" in printed.out for name in ODD)
    assert "error: Data refused: [data]/:x:\n  found:  folders ['[benign]', '[/x]']\n  needed: [/y]" in printed.err


def test_pictures_show_names_as_they_are() -> None:
    names = ["$a$", "$\\frac{$", "a_$b", "[c]"]
    images = {y: np.zeros((1, 4, 4, 1), np.uint8) for y in range(4)}
    counts = np.eye(4, dtype=np.int64)
    scores = {name: {"announced/accuracy": 0.5} for name in names}
    figures: list[Figure] = [
        plots.sample_grid(images, images, names, "$c$"),
        plots.confusion_plot(counts.tolist(), names, "$t$"),
        plots.partition_plot(counts, names, names),
        plots.comparison_plot(scores, {"$m$": [0.5]}),
        plots.recall_plot({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, names),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="svg")  # a parsed "$\frac{$" is an error


def test_only_plain_tables_are_made() -> None:
    """rich parses a table's texts, unless told not to."""
    wrong = [
        file.name
        for file in [*PACKAGE.rglob("*.py"), *JOBS.glob("*.py")]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table" and file.name != "table.py"
    ]
    assert wrong == []


def test_many_clients_have_a_picture_of_the_same_size() -> None:
    few, many, more = (
        plots.partition_plot(np.eye(n, 4), [f"client-{k}" for k in range(n)], ODD[:4]) for n in (4, 101, 3000)
    )
    assert few.get_size_inches()[1] < many.get_size_inches()[1] == more.get_size_inches()[1]
    more.savefig(io.BytesIO(), format="png")
