"""What a choice brings: accuracy on the real validation split, from the modules or images of a finished run."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.cost import with_sections
from fedfactory_ray.settings.config import Config, upgraded
from fedfactory_ray.storage import layout

SOLVERS = [(solver, n) for solver in ("dpmpp", "dpmpp3m") for n in (6, 8, 10, 20)]
SOLVERS += [("heun", n) for n in (11, 19, 35)]
SHARES = (1.0, 0.25, 0.0)


def stored_run(options: argparse.Namespace) -> tuple[Any, Config]:
    """The storage of the run in --run, and the configuration of its last start, but for the cluster it had."""
    from fedfactory_ray.storage.files import Storage

    storage = Storage(options.run)
    tree = upgraded(storage.read_json(layout.SETTINGS))
    threads = {name: {"threads": tree["resources"][name]["threads"]} for name in ("client", "synthesis", "classifier")}
    return storage, Config.model_validate(tree | {"resources": threads})


def read_partition(storage: Any, classes: int) -> Any:
    """The partition that a run keeps."""
    import pyarrow.parquet as pq

    from fedfactory_ray.data.partition import Partition

    table = pq.read_table(storage.path(layout.INDICES), filesystem=storage.filesystem)
    return Partition.from_table(table, classes)


def expert_logits(config: Config, uri: str, client: str) -> Any:
    """Logits on the real validation split of a client's expert, fitted here from a run's synthetic images."""
    import safetensors.torch
    import torch

    from fedfactory_ray.classification.models import make_classifier
    from fedfactory_ray.classification.prediction import predict_logits
    from fedfactory_ray.cluster.devices import prepare_process
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import Task
    from fedfactory_ray.federation.expert import assign, fit_expert
    from fedfactory_ray.storage.files import Storage
    from fedfactory_ray.synthesis.shard import read_manifest

    device = prepare_process(config.resources.client.threads, torch.device("cpu"))
    storage, source = Storage(uri), open_source(config.data)
    real = source.images("val")
    task = Task(len(source.class_names), real.shape[3], real.shape[1])
    partition = read_partition(storage, task.classes)
    manifest = read_manifest(storage)
    network = make_classifier(config.classifier.model, task, config.classifier.norm)
    with tempfile.TemporaryDirectory() as scratch:
        os.symlink(storage.path(layout.SYNTHETIC), f"{scratch}/{layout.SYNTHETIC}")
        fitted = Storage(scratch)
        for _ in fit_expert(config, assign(config, client, partition, manifest, [], task), source, fitted, device):
            pass
        network.load_state_dict(safetensors.torch.load(fitted.read(f"{layout.expert_folder(client)}/{layout.WEIGHTS}")))
    return predict_logits(network.eval(), real, device)


def experts(config: Config, options: argparse.Namespace) -> Table:
    """How many real images among those of its own classes an expert should see, on the real validation split."""
    import torch

    from fedfactory_ray.classification.ensemble import mixture, product
    from fedfactory_ray.classification.evaluation import evaluate
    from fedfactory_ray.data.readers import open_source

    storage, stored = stored_run(options)
    stored = with_sections(stored, classifier={"epochs": config.classifier.epochs})
    labels = open_source(stored.data).labels("val")
    clients = storage.read_json(layout.PARTITION)["clients"]
    table = Table("real_share", "lone experts, mean", "mixture", "product [95 %]")
    for share in SHARES:
        chosen = with_sections(stored, experts={"real_share": share})
        with ProcessPoolExecutor(multiprocessing.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            fitted = [pool.submit(expert_logits, chosen, storage.uri, client) for client in clients]
            logits = torch.stack([each.result() for each in fitted])
        lone = np.mean([(each.argmax(1).numpy() == labels).mean() for each in logits])
        together = [evaluate(combine(logits).numpy(), labels).accuracy for combine in (mixture, product)]
        table.add_row(f"{share:g}", f"{lone:.4f}", f"{together[0].value:.4f}", str(together[1]))
        print(f"real_share {share:g}: {lone:.4f} {together[0]} {together[1]}", flush=True)
    return table


def samplers(config: Config, options: argparse.Namespace) -> Table:
    """Solver and evaluations against seconds of sampling and accuracy downstream."""
    import pyarrow as pa
    import ray
    import torch

    from fedfactory_ray.classification.evaluation import evaluate
    from fedfactory_ray.classification.prediction import load_network, predict_logits
    from fedfactory_ray.classification.rows import Rows
    from fedfactory_ray.classification.training import fit
    from fedfactory_ray.cluster.devices import resolve_precision
    from fedfactory_ray.cluster.plan import connect, make_plan
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import Task
    from fedfactory_ray.generation.card import read_cards
    from fedfactory_ray.generation.module import load_weights, make_denoiser
    from fedfactory_ray.generation.sampling import Drawing
    from fedfactory_ray.storage.files import Storage
    from fedfactory_ray.synthesis.plan import make_units
    from fedfactory_ray.synthesis.shard import to_table

    storage, config = stored_run(options)
    cards = read_cards(storage)
    units = make_units(cards, options.images, config.synthesis.unit_size, config.seed)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    precision = resolve_precision(config.generator.precision, device)
    connect()
    worker = make_plan(config.resources).classifier
    source = open_source(config.data)
    real, labels = source.images("val"), source.labels("val")
    task = Task(len(source.class_names), real.shape[3], real.shape[1])
    table = Table("solver", "evaluations", "seconds to draw", "accuracy, real validation split [95 %]")
    for solver, evaluations in SOLVERS:
        sampler = config.sampler.model_copy(update={"solver": solver, "evaluations": evaluations})
        began, tables = time.monotonic(), []
        for card in cards:
            denoiser = make_denoiser(card)
            load_weights(denoiser, storage.read(f"{card.folder}/{layout.WEIGHTS}"), card)
            drawing = Drawing(denoiser, sampler, config.synthesis.batch_size, device, precision)
            for unit in units:
                if (unit.client, unit.label) == card.key:
                    tables.append(to_table(unit, drawing.draw(unit.n, unit.seed, unit.attempts(config))))
        seconds, drawn = time.monotonic() - began, pa.concat_tables(tables)
        with tempfile.TemporaryDirectory() as scratch:
            name, unit_size = f"{solver}-{evaluations}", config.synthesis.unit_size
            rows = Rows(lambda: drawn, lambda: ray.data.from_arrow(drawn), name, len(drawn), unit_size)  # noqa: B023
            classifier = fit(config, rows, task, worker, Storage(scratch), "benchmark", lambda epoch: None)
            network = load_network(config, task, Storage(scratch), classifier.folder)
        result = evaluate(predict_logits(network, real, torch.device("cpu")).numpy(), labels)
        table.add_row(solver, str(evaluations), f"{seconds:.1f}", str(result.accuracy))
        print(f"{solver} {evaluations}: {result.accuracy} ({seconds:.1f} s)", flush=True)
    return table
