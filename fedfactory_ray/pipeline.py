"""The main job: partition → modules → synthetic images → classifier → evaluation, logged as it goes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from fedfactory_ray import plots, tracking
from fedfactory_ray.cluster import Plan, connect, make_plan
from fedfactory_ray.config import Config, flatten
from fedfactory_ray.data.partition import Partition, make_partition
from fedfactory_ray.data.sources import DataInfo
from fedfactory_ray.errors import FedFactoryError, RunConflictError
from fedfactory_ray.progress import bars
from fedfactory_ray.storage import Storage

METHOD = "fedfactory"


@dataclass
class Report:
    """What a finished run tells: seconds a phase, images and bytes, and an evaluation for each classifier."""

    name: str
    storage: str
    seconds: dict[str, float] = field(default_factory=dict)
    modules: int = 0
    uploaded_bytes: int = 0
    synthetic_images: int = 0
    evaluations: dict[str, Any] = field(default_factory=dict)
    tracking_uri: str = ""
    model_uri: str = ""


def run_name(config: Config) -> str:
    """The configured name, or one that tells data, scheme and seed and is unique to the settings that matter."""
    if config.name:
        return config.name
    content = hashlib.sha256(json.dumps(config.determining(), sort_keys=True).encode()).hexdigest()
    source = config.data.source.rpartition(":")[2].rstrip("/").rpartition("/")[2].partition(".")[0]
    return f"{source}-{config.partition.scheme}-seed{config.seed}-{content[:8]}"


def claim(config: Config, storage: Storage) -> None:
    """Make the run's folder this configuration's own. Raises RunConflictError where it is another's."""
    wanted = config.determining()
    if storage.exists("config.json"):
        theirs, ours = flatten(storage.read_json("config.json")), flatten(wanted)
        # JSON turns tuples into lists, so compare what both become.
        ours = json.loads(json.dumps(ours))
        differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        if differing:
            raise RunConflictError(
                storage.uri, [f"{k}: there {theirs.get(k)!r}, here {ours.get(k)!r}" for k in differing]
            )
    else:
        storage.write_json("config.json", wanted)


@ray.remote
def _inspect(config: Config) -> tuple[DataInfo, np.ndarray]:
    from fedfactory_ray.data.sources import inspect, open_source

    return inspect(open_source(config.data))


def run(config: Config, console: Console) -> Report:
    """Run FederatedFactory's Architecture I as configured, or go on where an earlier start of the same run stopped.

    Raises FedFactoryError for what the user can mend; then nothing was trained.
    """
    began = time.monotonic()
    name = run_name(config)
    report = Report(name, config.storage.uri, tracking_uri=tracking.tracking_uri(config))
    with ThreadPoolExecutor(1) as background:
        logged: Future[tracking.Run] = background.submit(tracking.start_run, config, name)
        status = "FAILED"
        try:
            connect()
            plan = make_plan(config.resources)
            info, labels = ray.get(_inspect.remote(config))
            config.generator.check_resolution(info.resolution)
            partition = make_partition(config.partition, labels, info.classes, config.seed)
            storage = Storage(config.storage.uri).within(name)
            report.storage = storage.uri
            claim(config, storage)
            _save_partition(storage, partition)
            report.seconds["start"] = time.monotonic() - began
            console.print(partition_table(partition, info))
            _run_phases(config, plan, info, partition, storage, logged, console, report)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except ray.exceptions.RayError as error:
            refusal = find_refusal(error)
            if refusal is None:
                raise
            raise refusal from None
        finally:
            if not logged.cancel() and logged.exception() is None:
                logged.result().end(status)
    report.seconds["total"] = time.monotonic() - began
    return report


def find_refusal(error: BaseException | None) -> FedFactoryError | None:
    """The refusal of a task or actor inside Ray's wrappings of it, if there is one."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(cause, FedFactoryError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
        error = cause
    return None


def _save_partition(storage: Storage, partition: Partition) -> None:
    import pyarrow.parquet as pq

    with storage.writing("partition.parquet") as stream:
        pq.write_table(partition.to_table(), stream)
    summary = {
        "sha256": partition.sha256,
        "clients": partition.clients,
        "counts": partition.matrix().tolist(),
    }
    storage.write_json("partition.json", summary)


def _run_phases(
    config: Config,
    plan: Plan,
    info: DataInfo,
    partition: Partition,
    storage: Storage,
    logged: Future[tracking.Run],
    console: Console,
    report: Report,
) -> None:
    from fedfactory_ray.baselines.centralised import real_rows
    from fedfactory_ray.classification.prediction import evaluate_on_test, load_network
    from fedfactory_ray.classification.rows import Rows, shard_rows
    from fedfactory_ray.classification.training import Classifier, Epoch, Task, fit
    from fedfactory_ray.federation.client import Progress, Upload
    from fedfactory_ray.federation.round import run_round
    from fedfactory_ray.synthesis.previews import previews
    from fedfactory_ray.synthesis.synthesize import synthesize

    @contextmanager
    def phase(title: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        report.seconds[title] = time.monotonic() - started

    # 1. Every client trains its modules and uploads each once.
    steps = {(c, y): config.generator.steps(len(i)) for c, y, i in partition}
    done: dict[tuple[str, int], int] = {}
    client_runs: dict[str, _ClientRun] = {}
    with phase("modules"), bars(console, "training modules", sum(steps.values()), "steps") as shown:

        def on_client(event: Progress | Upload) -> None:
            if isinstance(event, Upload):
                client_runs[event.card.client].upload(event)
                return
            done[event.client, event.label] = event.step
            if event.client not in client_runs:
                client_runs[event.client] = _ClientRun(logged, event.client)
            client_runs[event.client].progress(event)
            shown.part(f"{event.client} class {event.label}", event.step, event.steps, f"loss {event.loss:.3f}")
            shown.update(sum(done.values()))

        modules = run_round(config, partition, plan.client, storage, on_client)
        shown.update(sum(steps.values()))
    run = logged.result()
    report.modules = len(modules)
    report.uploaded_bytes = sum(handle.card.size + len(handle.card.to_json()) for handle in modules.values())
    cards = [handle.card for handle in modules.values()]

    # 2. A class-balanced data set is drawn from the modules.
    with (
        phase("synthesis"),
        bars(console, "drawing images", config.synthesis.images_per_class * info.classes, "images") as shown,
    ):
        manifest = synthesize(config, modules, plan.synthesis, storage, lambda n, _: shown.update(n))
    report.synthetic_images = sum(shard.n for shard in manifest)

    # 3. The classifier is fitted on it, and its references on theirs, with one recipe.
    task = Task(info.classes, info.channels, info.resolution)
    digest = hashlib.sha256("".join(shard.rows_sha256 for shard in manifest).encode()).hexdigest()
    rows: dict[str, Rows] = {METHOD: shard_rows(storage, manifest, digest, config.synthesis.unit_size)}
    if "centralised" in config.baselines:
        rows["centralised"] = real_rows(config, partition, info)
    classifiers: dict[str, Classifier] = {}
    for method, its_rows in rows.items():
        with (
            phase(f"classifier ({method})"),
            bars(console, f"fitting {method}", config.classifier.epochs, "epochs") as shown,
        ):

            def on_epoch(epoch: Epoch) -> None:
                shown.update(epoch.epoch, f"validation accuracy {epoch.validation_accuracy:.3f}")

            classifiers[method] = fit(config, its_rows, task, plan.classifier, storage, method, on_epoch)
            child = run.child(f"classifier-{method}")
            for epoch in classifiers[method].history:
                values = {k: v for k, v in vars(epoch).items() if k not in ("epoch", "epochs")}
                child.metrics(values, step=epoch.epoch)
            child.metrics({"images": its_rows.images, "chosen_epoch": classifiers[method].epoch})
            child.tag("sha256", classifiers[method].sha256)
            child.end()

    # 4. The test split is read once, for all classifiers.
    with phase("evaluation"):
        worker = plan.classifier
        reference = evaluate_on_test.options(num_cpus=worker.num_cpus, num_gpus=worker.num_gpus).remote(
            config,
            task,
            worker.resources,
            storage,
            {m: c.folder for m, c in classifiers.items()},
            plots.GRID_COLUMNS,
        )
        drawn = ray.get(previews.remote(storage, manifest, task.image_shape, plots.GRID_COLUMNS))
        result = ray.get(reference)
    report.evaluations = result.evaluations
    storage.write_json("evaluation.json", {m: e.scalars() for m, e in result.evaluations.items()})

    # 5. The driver logs what there is to see.
    with phase("logging"):
        matrix = partition.matrix()
        run.figure(plots.partition_plot(matrix, partition.clients, info.class_names), "partition.png")
        for client in partition.clients:
            child_run = client_runs.setdefault(client, _ClientRun(logged, client))
            synthetic = {label: images for (c, label), images in drawn.items() if c == client}
            child_run.finish(
                [card for card in cards if card.client == client],
                plots.sample_grid(synthetic, result.examples, info.class_names, client),
            )
        synthesis_run = run.child("synthesis")
        synthesis_run.json([vars(shard) for shard in manifest], "manifest.json")
        seconds = report.seconds["synthesis"]
        synthesis_run.metrics(
            {
                "images": report.synthetic_images,
                "seconds": seconds,
                "images_per_second": report.synthetic_images / seconds,
            }
        )
        synthesis_run.end()
        evaluation_run = run.child("evaluation")
        for method, evaluation in result.evaluations.items():
            evaluation_run.metrics({f"{method}/{k}": v for k, v in evaluation.scalars().items()})
            title = f"{method}: accuracy {evaluation.accuracy.value:.3f}"
            evaluation_run.figure(
                plots.confusion_plot(evaluation.confusion, info.class_names, title), f"confusion-{method}.png"
            )
        evaluation_run.end()
        run.json(json.loads(storage.read("partition.json")), "partition.json")
        run.json([vars(card) for card in cards], "modules.json")
        from fedfactory_ray.classification.models import Predictor

        network = Predictor(load_network(config, task, storage, classifiers[METHOD].folder))
        examples = np.concatenate(list(result.examples.values()))
        report.model_uri = run.model(network.eval(), examples, result.probabilities)
        run.metrics(result.evaluations[METHOD].scalars())
        run.metrics(
            {
                "uploaded_bytes": report.uploaded_bytes,
                "synthetic_images": report.synthetic_images,
                "modules": report.modules,
            }
        )
    run.metrics({f"seconds/{k}".replace("(", "").replace(")", ""): v for k, v in report.seconds.items()})


class _ClientRun:
    """The MLflow run of one client: loss curves while it trains, its modules and its picture at the end."""

    FLUSH_SECONDS = 5.0

    def __init__(self, parent: Future[tracking.Run], client: str) -> None:
        self.parent, self.client = parent, client
        self.run: tracking.Run | None = None
        self.points: list[tuple[str, int, float]] = []
        self.flushed = time.monotonic()

    def progress(self, event: Any) -> None:
        self.points.append((f"loss_class_{event.label}", event.step, event.loss))
        if self.parent.done() and time.monotonic() - self.flushed > self.FLUSH_SECONDS:
            self.flush()

    def upload(self, event: Any) -> None:
        self.points.append((f"seconds_class_{event.card.label}", event.card.steps, event.seconds))

    def flush(self) -> tracking.Run:
        if self.run is None:
            self.run = self.parent.result().child(self.client)
        self.run.curves(self.points)
        self.points, self.flushed = [], time.monotonic()
        return self.run

    def finish(self, cards: list[Any], grid: Any) -> None:
        run = self.flush()
        run.metrics(
            {
                "images": sum(c.images for c in cards),
                "uploaded_bytes": sum(c.size for c in cards),
                "modules": len(cards),
            }
        )
        run.json([vars(card) for card in cards], "modules.json")
        run.figure(grid, "samples.png")
        run.end()


def partition_table(partition: Partition, info: DataInfo, most: int = 20) -> Table:
    """The client × class table of image counts, its first `most` clients."""
    table = Table(title=f"images a client and class (partition {partition.sha256[:12]})", title_justify="left")
    table.add_column("client")
    for class_name in info.class_names:
        table.add_column(class_name[:12], justify="right")
    for client, row in list(zip(partition.clients, partition.matrix(), strict=True))[:most]:
        table.add_row(client, *(str(n) if n else "·" for n in row))
    if len(partition.clients) > most:
        table.add_row(f"… {len(partition.clients) - most} more")
    return table


def report_table(report: Report) -> Table:
    """The table at the end: results first, then what they cost."""
    table = Table(title=f"FederatedFactory · {report.name}", title_justify="left", show_header=False)
    for method, evaluation in report.evaluations.items():
        table.add_row(f"accuracy, {method}", str(evaluation.accuracy))
    first = next(iter(report.evaluations.values()))
    table.add_row("  balanced accuracy", str(first.balanced_accuracy))
    table.add_row("  AUROC · macro F1", f"{first.auroc:.4f} · {first.macro_f1:.4f}")
    table.add_row("majority class", f"{first.majority:.4f}", end_section=True)
    table.add_row("modules uploaded, once", f"{report.modules} ({report.uploaded_bytes / 1e6:.2f} MB)")
    table.add_row("synthetic images", str(report.synthetic_images), end_section=True)
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds, {phase}", f"{seconds:.1f}")
    return table
