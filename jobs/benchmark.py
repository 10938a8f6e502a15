"""Measure what a choice costs and brings: python jobs/benchmark.py samplers RUN_FOLDER [--images N]

`samplers` draws from the modules of a finished run with several solvers and numbers of network evaluations, fits the
run's classifier on each set, and tells its accuracy on the real *validation* split (the test split is not for choices).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import pyarrow as pa
import ray
import torch
from rich.console import Console
from rich.table import Table

from fedfactory_ray.classification.evaluation import evaluate
from fedfactory_ray.classification.models import Task
from fedfactory_ray.classification.prediction import load_network, predict
from fedfactory_ray.classification.rows import Rows
from fedfactory_ray.classification.training import fit
from fedfactory_ray.cluster import connect, make_plan
from fedfactory_ray.config import Config
from fedfactory_ray.data.sources import open_source
from fedfactory_ray.devices import resolve_precision
from fedfactory_ray.generation.card import ModuleCard
from fedfactory_ray.generation.module import load_weights, make_denoiser
from fedfactory_ray.generation.sampling import draw_images
from fedfactory_ray.sections import SamplerConfig
from fedfactory_ray.storage import Storage
from fedfactory_ray.synthesis.plan import make_units
from fedfactory_ray.synthesis.shard import to_table

SETTINGS = [("dpmpp", 6), ("dpmpp", 10), ("dpmpp", 20), ("heun", 11), ("heun", 19), ("heun", 35)]


def draw(storage: Storage, config: Config, sampler: SamplerConfig, images: int) -> pa.Table:
    """`images` rows of each class, drawn in this process from a run's modules."""
    cards = [ModuleCard.from_json(storage.read(n)) for n in storage.names("modules") if n.endswith("card.json")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.generator.precision, device)
    tables, denoisers = [], {}
    for unit in make_units(cards, images, config.synthesis.unit_size, config.seed):
        key = (unit.client, unit.label)
        if key not in denoisers:
            card = next(card for card in cards if card.key == key)
            denoisers = {key: make_denoiser(card)}
            load_weights(denoisers[key], storage.read(f"{card.folder}/model.safetensors"), card)
            denoisers[key].to(device)
        size = config.synthesis.batch_size
        tables.append(to_table(unit, draw_images(denoisers[key], sampler, unit.n, size, unit.seed, device, precision)))
    return pa.concat_tables(tables)


def samplers(folder: str, images: int, console: Console) -> Table:
    """The table of solver and evaluations against seconds of sampling and downstream accuracy."""
    storage = Storage(folder)
    tree = storage.read_json("config.json")
    tree["resources"] = {"classifier": {"threads": tree["resources"]["threads"]["classifier"]}}
    config = Config.model_validate(tree)
    connect()
    worker = make_plan(config.resources).classifier
    source = open_source(config.data)
    real, labels = source.images("val"), source.labels("val")
    task = Task(len(source.class_names), real.shape[3], real.shape[1])
    table = Table("solver", "evaluations", "seconds to draw", "accuracy, real validation split [95 %]")
    for solver, evaluations in SETTINGS:
        began = time.monotonic()
        sampler = config.sampler.model_copy(update={"solver": solver, "evaluations": evaluations})
        drawn = draw(storage, config, sampler, images)
        seconds = time.monotonic() - began
        with tempfile.TemporaryDirectory() as scratch:
            rows = Rows(ray.data.from_arrow(drawn), f"{solver}-{evaluations}", len(drawn), config.synthesis.unit_size)
            classifier = fit(config, rows, task, worker, Storage(scratch), "benchmark", lambda epoch: None)
            network = load_network(config, task, Storage(scratch), classifier.folder)
        result = evaluate(predict(network, real, torch.device("cpu")), labels, config.seed)
        table.add_row(solver, str(evaluations), f"{seconds:.1f}", str(result.accuracy))
        console.print(f"{solver} {evaluations}: {result.accuracy} ({seconds:.1f} s)", highlight=False)
    return table


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["samplers"])
    parser.add_argument("run", help="folder of a finished run, runs/<name>")
    parser.add_argument("--images", type=int, default=500, help="images a class (default 500)")
    options = parser.parse_args()
    console = Console()
    console.print(samplers(options.run, options.images, console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
