"""Fitting a classifier with Ray Train, on any number of workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from pyarrow import fs
from ray.util.queue import Queue
from torch import Tensor, nn

from fedfactory_ray.classification.rows import (
    Batches,
    HeldBatches,
    Rows,
    StreamedBatches,
    keep_side,
    read_table,
)
from fedfactory_ray.cluster import Worker
from fedfactory_ray.config import ClassifierConfig, Config
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.storage import Storage

WARMUP = 0.05


@dataclass(frozen=True)
class Task:
    """What a classifier is made for: its network follows from it and from the configuration."""

    classes: int
    channels: int
    resolution: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.resolution, self.resolution, self.channels


@dataclass(frozen=True)
class Epoch:
    """Progress of a fit."""

    epoch: int
    epochs: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier in storage: `<folder>/model.safetensors`."""

    folder: str
    sha256: str
    epoch: int
    validation_accuracy: float
    history: list[Epoch]


def make_optimizer(config: ClassifierConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)


def fit(
    config: Config,
    rows: Rows,
    task: Task,
    worker: Worker,
    storage: Storage,
    name: str,
    listen: Callable[[Epoch], None],
) -> Classifier:
    """Fit the configured classifier on `rows` and keep it in storage under classifier/`name`.

    A classifier that is there already, fitted on rows of the same digest with the same recipe, is not fitted again;
    a fit that broke off goes on from its last checkpoint. The best epoch by validation loss is kept.
    """
    folder = f"classifier/{name}"
    recipe = [
        rows.digest,
        config.classifier.model_dump(mode="json"),
        config.resources.classifier_workers,
        config.seed,
    ]
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    stored = _stored(storage, folder, fingerprint)
    if stored is not None:
        return stored
    trainer_folder = f"train-{name}-{fingerprint[:16]}"
    fraction = config.classifier.validation_fraction
    held = rows.images * task.channels * task.resolution**2 <= config.classifier.in_memory_mb * 2**20
    datasets = {"rows": rows.dataset}
    if not held:
        sides = {"train": False, "validation": True}
        datasets = {
            name: rows.dataset.map_batches(
                keep_side,
                fn_kwargs={"unit_size": rows.unit_size, "fraction": fraction, "validation": side},
                batch_format="pyarrow",
            )
            for name, side in sides.items()
        }
    queue = Queue(actor_options={"num_cpus": 0})
    settings = {
        "config": config,
        "task": task,
        "resources": worker.resources,
        "held": held,
        "unit_size": rows.unit_size,
        "steps": max(1, int(rows.images * (1 - fraction)) // config.classifier.batch_size),
        "queue": queue,
    }
    trainer = ray.train.torch.TorchTrainer(
        _fit_on_worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.classifier_workers,
            use_gpu=worker.num_gpus > 0,
            resources_per_worker={"CPU": worker.num_cpus} | ({"GPU": worker.num_gpus} if worker.num_gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=trainer_folder,
            storage_path=storage.uri,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=[] if held else ["train"]),
    )
    with _relay(queue, listen):
        checkpoint = trainer.fit().checkpoint
    state = json.loads(_read(checkpoint, "state.json"))
    fs.copy_files(
        f"{checkpoint.path}/model.safetensors",
        storage.path(f"{folder}/model.safetensors.tmp"),
        source_filesystem=checkpoint.filesystem,
        destination_filesystem=_ensure_folder(storage, folder),
    )
    storage.filesystem.move(
        storage.path(f"{folder}/model.safetensors.tmp"), storage.path(f"{folder}/model.safetensors")
    )
    card = {
        "fingerprint": fingerprint,
        "rows": rows.digest,
        "sha256": storage.sha256(f"{folder}/model.safetensors"),
        "epoch": state["best"]["epoch"],
        "validation_accuracy": state["best"]["validation_accuracy"],
        "history": state["history"],
        "task": asdict(task),
        "model": config.classifier.model,
    }
    storage.write_json(f"{folder}/card.json", card)
    storage.filesystem.delete_dir(storage.path(trainer_folder))
    fitted = _stored(storage, folder, fingerprint)
    if fitted is None:
        raise RuntimeError(f"{storage.uri}/{folder} does not verify right after it was written: check the storage")
    return fitted


def _ensure_folder(storage: Storage, folder: str) -> fs.FileSystem:
    storage.filesystem.create_dir(storage.path(folder), recursive=True)
    return storage.filesystem


def _read(checkpoint: Any, name: str) -> bytes:
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{name}") as stream:
        return bytes(stream.read())


def _stored(storage: Storage, folder: str, fingerprint: str) -> Classifier | None:
    """The classifier in `folder`, if it was made by this recipe from these rows and verifies."""
    if not storage.exists(f"{folder}/card.json") or not storage.exists(f"{folder}/model.safetensors"):
        return None
    card = storage.read_json(f"{folder}/card.json")
    if card["fingerprint"] != fingerprint or card["sha256"] != storage.sha256(f"{folder}/model.safetensors"):
        return None
    history = [Epoch(**epoch) for epoch in card["history"]]
    return Classifier(folder, card["sha256"], card["epoch"], card["validation_accuracy"], history)


@contextlib.contextmanager
def _relay(queue: Queue, listen: Callable[[Epoch], None]) -> Iterator[None]:
    """Hand the workers' epochs to `listen` while the block runs."""
    done = threading.Event()

    def relay() -> None:
        while True:
            try:
                listen(queue.get(timeout=0.5))
            except Empty:
                if done.is_set():
                    return

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        queue.shutdown()


def _fit_on_worker(settings: dict[str, Any]) -> None:
    """The training loop of one Ray Train worker."""
    from fedfactory_ray.classification.augment import augment_batch
    from fedfactory_ray.classification.models import make_classifier
    from fedfactory_ray.data.transforms import to_tensor
    from fedfactory_ray.devices import autocast, prepare_process, resolve_precision, seed_process

    config: Config = settings["config"]
    recipe, task = config.classifier, settings["task"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Workers on one node see each other's GPUs, so Ray Train has to tell which one is whose.
    chosen = ray.train.torch.get_device() if settings["resources"].num_gpus else torch.device("cpu")
    device = prepare_process(settings["resources"], chosen)
    precision = resolve_precision(recipe.precision, device)
    seed = derive_seed(config.seed, "classifier")

    training, validation = _batches(config, task, settings, seed, rank, world)
    seed_process(seed)
    network = make_classifier(recipe.model, task.channels, task.classes, task.resolution).to(device)
    optimizer = make_optimizer(recipe, network)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    steps = recipe.epochs * settings["steps"]
    first, step = 0, 0
    best: dict[str, Any] = {"validation_loss": float("inf")}
    best_weights: dict[str, Tensor] = {}
    history: list[dict[str, Any]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), map_location=device, weights_only=True)
            best_weights = safetensors.torch.load_file(Path(folder, "model.safetensors"))
            progress = json.loads(Path(folder, "state.json").read_text())
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first, step, best, history = progress["next"], progress["step"], progress["best"], progress["history"]
    model = ray.train.torch.prepare_model(network, move_to_device=False)

    for epoch in range(first, recipe.epochs):
        # A generator an epoch and rank: a resumed fit draws what an unbroken one draws.
        torch.manual_seed(derive_seed(seed, epoch, rank))
        draw = torch.Generator(device).manual_seed(derive_seed(seed, epoch, rank, "augment"))
        model.train()
        losses = []
        for images, labels in training.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warmup_cosine(step, steps, WARMUP)
            inputs = augment_batch(to_tensor(images, device), recipe, draw)
            with autocast(device, precision):
                logits = model(inputs)
            loss = nn.functional.cross_entropy(
                logits.float(), labels.to(device), label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            step += 1
        loss_sum, right, count = _validate(network, validation, device, lambda: autocast(device, precision), world)
        report: dict[str, Any] = {
            "epoch": epoch + 1,
            "epochs": recipe.epochs,
            "train_loss": float(torch.stack(losses).mean()),
            "validation_loss": loss_sum / count,
            "validation_accuracy": right / count,
        }
        history.append(report)
        if report["validation_loss"] <= best["validation_loss"] or not best_weights:
            best, best_weights = (
                report,
                {k: v.detach().cpu().clone() for k, v in network.state_dict().items()},
            )
        if rank == 0:
            settings["queue"].put(Epoch(**report))
        due = (epoch + 1) % recipe.checkpoint_every == 0 or epoch + 1 == recipe.epochs
        if due and rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                state = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
                torch.save(state, Path(folder, "state.pt"))
                safetensors.torch.save_file(best_weights, Path(folder, "model.safetensors"))
                progress = {"next": epoch + 1, "step": step, "best": best, "history": history}
                Path(folder, "state.json").write_text(json.dumps(progress))
                ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))
        else:
            ray.train.report(report)


def _batches(
    config: Config, task: Task, settings: dict[str, Any], seed: int, rank: int, world: int
) -> tuple[Batches, Batches]:
    """Training and validation batches of a worker: held where the data sets are not split among workers."""
    size, unit_size, fraction = (
        config.classifier.batch_size,
        settings["unit_size"],
        config.classifier.validation_fraction,
    )
    if settings["held"]:
        table = read_table(ray.train.get_dataset_shard("rows"))
        sides = (keep_side(table, unit_size, fraction, validation) for validation in (False, True))
        training, validation = (HeldBatches(side, task.image_shape, size, seed, rank, world) for side in sides)
        return training, validation
    return (
        StreamedBatches(ray.train.get_dataset_shard("train"), task.image_shape, size // world, seed, settings["steps"]),
        StreamedBatches(ray.train.get_dataset_shard("validation"), task.image_shape, size, seed, settings["steps"]),
    )


@torch.inference_mode()
def _validate(
    network: nn.Module, batches: Batches, device: torch.device, context: Callable[[], Any], world: int
) -> tuple[float, float, float]:
    """Summed loss, right answers and number of validation rows, over all workers."""
    from fedfactory_ray.data.transforms import to_tensor

    network.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in batches.epoch(None):
        with context():
            logits = network(to_tensor(images, device)).float().cpu()
        sums += torch.tensor(
            [
                nn.functional.cross_entropy(logits, labels, reduction="sum"),
                (logits.argmax(1) == labels).sum(),
                len(labels),
            ]
        )
    if world > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    loss, right, count = sums.tolist()
    return loss, right, count
