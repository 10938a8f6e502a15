"""The house: imports point one way, no file is in a circle, and the mathematics knows neither Ray nor MLflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fedfactory_ray"
FLOORS = [
    {"jobs", "benchmarks"},
    {"comparison", "tuning", "unlearning"},
    {"pipeline"},
    {"tracking"},
    {"baselines"},
    {"federation"},
    {"classification"},
    {"synthesis"},
    {"generation"},
    {"data", "cluster"},
    {"settings"},
    {"storage"},
    {"errors", "seeds", "schedule"},
]
"""Rooms from the top floor down; a room imports from floors below its own."""
MATHEMATICS = [
    *("generation.edm", "generation.unet", "generation.samplers", "generation.sampling", "generation.training"),
    *("generation.canary", "generation.noise", "classification.intervals", "classification.calibration"),
    *("classification.rules", "classification.sides"),
    *("classification.augment", "classification.batches", "classification.ensemble", "classification.evaluation"),
    *("classification.fitting", "classification.models", "synthesis.plan", "data.partition", "data.transforms"),
    *("baselines.interface", "baselines.fedavg", "baselines.fedprox", "baselines.feddyn", "baselines.scaffold"),
    *("baselines.learner", "seeds", "schedule"),
]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for room in (PACKAGE, "jobs", "benchmarks") for file in (ROOT / room).rglob("*.py")}


@cache
def imported(module: str) -> frozenset[str]:
    """All modules that a file imports, wherever it does and for whatever reason; of ours, the files."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & FILES.keys() or {node.module}
    return frozenset(found)


def room_of(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


def floor_of(module: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def test_every_import_goes_to_the_same_room_or_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imported(module) & FILES.keys()
        if room_of(module) != room_of(other) and floor_of(module) >= floor_of(other) and other != PACKAGE
    ]
    assert wrong == []


def test_no_file_is_in_a_circle() -> None:
    graph = {module: imported(module) & FILES.keys() for module in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_imports_neither_ray_nor_mlflow(module: str) -> None:
    seen: set[str] = set()
    left = [f"{PACKAGE}.{module}"]
    while left:
        each = left.pop()
        seen.add(each)
        left += (imported(each) & FILES.keys()) - seen
    reached = {name.partition(".")[0] for each in seen for name in imported(each)}
    assert not reached & {"ray", "mlflow"}


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(("pipeline.phases", "federation.round"), id="the driver before its clients are at work"),
        pytest.param(("generation.card", "classification.card", "baselines.card", "synthesis.shard"), id="cards"),
    ],
)
def test_what_needs_no_torch_does_not_load_it(modules: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(f'{PACKAGE}.{module}' for module in modules)}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


DIGITS = "data.readers import open_source; from fedfactory_ray.settings.data import DataConfig"
OPTIMIZER = "classification.step import make_optimizer; from fedfactory_ray.settings.sections import ClassifierConfig"


@pytest.mark.parametrize(
    ("code", "spared"),
    [
        pytest.param(f"{DIGITS}; open_source(DataConfig(source='digits')).labels('train')", {"sklearn"}, id="digits"),
        pytest.param(
            "data.transforms import resize_batch; from fedfactory_ray.settings.data import DataConfig; import numpy\n"
            "DataConfig(source='medmnist:bloodmnist'); resize_batch(numpy.zeros((1, 9, 9, 1), 'uint8'), 8)",
            {"torch", "torchvision", "sklearn", "medmnist"},
            id="medmnist, resized",
        ),
        pytest.param("classification.prediction import score", {"sklearn", "scipy.stats", "pandas"}, id="evaluation"),
        pytest.param(
            f"{OPTIMIZER}; import torch; n = torch.nn.Linear(1, 1); n(torch.ones(1)).backward()\n"
            "for kind in ('sgd', 'adamw'):\n"
            "    made = make_optimizer(ClassifierConfig(optimizer=kind), n, torch.device('cpu'))\n"
            "    made.step(); made.zero_grad(set_to_none=False); made.load_state_dict(made.state_dict())",
            {"torch._dynamo", "sympy"},
            id="a fit",
        ),
    ],
)
def test_what_costs_seconds_to_import_is_spared(code: str, spared: set[str]) -> None:
    code = f"from {PACKAGE}.{code}\nimport sys; print(sorted({spared!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["[]"], found.stdout + found.stderr


def test_no_test_module_imports_another() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("test_"), f"{file.name} imports {node.module}"
