"""The client's actor: the only place where its images are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from fedfactory_ray.cluster.failures import failures_refused
from fedfactory_ray.cluster.plan import MODULES_AT_ONCE, Worker, placement, start_actor
from fedfactory_ray.data.partition import own_indices
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.generation.card import ModuleCard, module_fingerprint
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.seeds import derive_seed
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.artefact import find, fingerprint, keep
from fedfactory_ray.storage.checkpoints import Checkpoints, scratch_of
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import SNAPSHOT, WEIGHTS, checkpoints_folder, module_folder

if TYPE_CHECKING:
    import torch

    from fedfactory_ray.classification.card import Epoch, Expert
    from fedfactory_ray.data.source import Source
    from fedfactory_ray.federation.expert import Assignment
    from fedfactory_ray.settings.sections import GeneratorConfig

SHARING = "resources.client.num_gpus=1, should others share the GPU"
MODULE_REMEDY = f"{SHARING}, or a smaller generator.images_at_once"
FIT_REMEDY = f"{SHARING}, or a smaller classifier.batch_size"


@dataclass(frozen=True)
class Progress:
    """What a client tells while it trains: scalars. A `resumed` one only tells from which checkpoint it goes on, that
    after `step`; its loss is NaN."""

    client: str
    label: int
    step: int
    steps: int
    loss: float
    resumed: bool = False


@dataclass(frozen=True)
class Upload:
    """Announces that the next object of the stream is the weights of this card."""

    card: ModuleCard
    seconds: float
    node: str
    gpus: tuple[str, ...]


class ClientSlot:
    """An actor in which images of clients are read. Pinned to its resources, it serves one client after the other."""

    def __init__(self, config: Config, threads: int) -> None:
        self.config, self.threads = config, threads
        self.sources: dict[str, Source] = {}
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The device that Ray assigned. Found at the first use: Ray loses what a constructor raises."""
        from fedfactory_ray.cluster.devices import assigned_device, prepare_process

        if self._device is None:
            self._device = prepare_process(self.threads, assigned_device(ray.get_gpu_ids()))
        return self._device

    def source(self, client: str) -> Source:
        """The client's images; of the sources the last one stays open."""
        data = self.config.data_of(client)
        if data.source not in self.sources:
            self.sources = {data.source: open_source(data)}
        return self.sources[data.source]


class ClientActor(ClientSlot):
    """A slot in which the factory's clients train modules and fit experts."""

    def __init__(self, config: Config, threads: int, storage: Storage, modules: int) -> None:
        """On a GPU at most so many `modules` train side by side."""
        super().__init__(config, threads)
        self.storage, self.modules = storage, modules

    @property
    def scratch(self) -> Storage:
        """Where checkpoints lie: those of a natural silo on its own node, those of simulated clients in the run."""
        natural = self.config.partition.scheme == "natural"
        return scratch_of(self.storage, self.config.storage.scratch) if natural else self.storage

    def train(self, client: str, share: dict[int, np.ndarray]) -> Iterator[Progress | Divergence | Upload | bytes]:
        """Train a module for each class of `share` (class → places in the client's training split).

        A stream of Progress; and for each module an Upload followed by its weights as bytes, or a Divergence.
        """
        device, source = self.device, self.source(client)
        node, gpus = ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))
        at_once = min(self.modules, modules_at_once(self.config.generator)) if device.type == "cuda" else 1
        for event in train_share(self.config, source, client, share, device, self.storage, at_once, self.scratch):
            if isinstance(event, Progress | Divergence):
                yield event
            else:
                card, weights, seconds = event
                yield Upload(card, seconds, node, gpus)
                yield weights

    def fit_expert(self, assignment: Assignment) -> Iterator[Epoch | Expert]:
        """Fit the client's expert, see `expert.fit_expert`: a stream of its epochs and, at the end, the expert."""
        from fedfactory_ray.federation.expert import fit_expert

        with failures_refused(f"client {assignment.client!r}, fitting its expert", FIT_REMEDY):
            source = self.source(assignment.client)
            yield from fit_expert(self.config, assignment, source, self.storage, self.device, self.scratch)


def start_client(config: Config, worker: Worker, storage: Storage, client: str) -> Any:
    """A client's actor, where that client's images may be read."""
    options = worker.options | placement(config, client)
    return start_actor(ClientActor, config, worker.threads, storage, worker.modules, **options)


def train_share(
    config: Config,
    source: Source,
    client: str,
    share: dict[int, np.ndarray],
    device: torch.device,
    storage: Storage,
    at_once: int = 1,
    scratch: Storage | None = None,
) -> Iterator[Progress | Divergence | tuple[ModuleCard, bytes, float]]:
    """Train a client's modules where its images are; yields progress, and each module's card, weights and seconds, or
    that its training diverged, where `resources.on_divergence` has it left out.

    Each module is written to storage, the card last, so that it outlives this process; until then its latest
    checkpoint lies in `scratch`, by default there too, from which another process goes on. What is there and whole is
    not trained again. So many modules train side by side, `at_once`, which changes no byte of any.
    """
    waiting = [
        (label, _train_module(config, source, client, label, places, device, storage, scratch or storage))
        for label, places in share.items()
    ]
    running: list[tuple[int, Iterator[Progress | Divergence | tuple[ModuleCard, bytes, float] | None]]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
        for label, module in list(running):
            with failures_refused(f"client {client!r}, class {label}, training its module", MODULE_REMEDY):
                event = next(module)
            if isinstance(event, Divergence | tuple):  # its last
                running.remove((label, module))
            if event is not None:
                yield event


def modules_at_once(generator: GeneratorConfig) -> int:
    """How many modules of a client train side by side on a GPU: small ones leave most of it idle. Dropout draws from a
    generator that they would share."""
    return 1 if generator.dropout else MODULES_AT_ONCE


def _train_module(
    config: Config,
    source: Source,
    client: str,
    label: int,
    places: np.ndarray,
    device: torch.device,
    storage: Storage,
    scratch: Storage,
) -> Iterator[Progress | Divergence | tuple[ModuleCard, bytes, float] | None]:
    """Train one of a client's modules, whose card, weights and seconds, or divergence, come last; None after a step
    that has no news, for others to take a turn."""
    import torch

    from fedfactory_ray.cluster.devices import resolve_precision
    from fedfactory_ray.generation import module
    from fedfactory_ray.generation.canary import canary, joined
    from fedfactory_ray.generation.training import Snapshot, Training, TrainingStep

    began, folder = time.monotonic(), module_folder(client, label)
    generator, precision = config.generator, resolve_precision(config.generator.precision, device)
    pixels = source.images("train", own_indices(config, source, label, places))
    seed, steps = derive_seed(config.seed, "train", client, label), generator.steps(len(pixels))
    made_of = module_fingerprint(
        generator,
        precision=precision,
        threads=config.resources.client.threads,
        seed=seed,
        images_sha256=fingerprint(pixels),
    )
    checkpoints = Checkpoints(scratch, checkpoints_folder(folder), fingerprint(made_of, device.type))
    there = find(storage, ModuleCard, folder, made_of)
    class_name = source.class_names[label]
    if there is not None:
        if there.class_name != class_name:  # the folder's name changed, or an earlier version noted none
            there = replace(there, class_name=class_name)
            keep(storage, there)
        checkpoints.delete()  # of a process that was killed at its very end
        yield there, storage.read(f"{folder}/{WEIGHTS}"), 0.0
        return
    leaves_out = config.resources.on_divergence == "leave_out"
    noted = find(storage, Divergence, folder, made_of) if leaves_out else None
    if noted is not None:
        yield noted
        return
    made_by, newest = canary(device, precision), checkpoints.newest()
    training = Training(torch.from_numpy(pixels), generator, device, seed)
    if newest is not None:
        training.load(checkpoints.read(newest, SNAPSHOT))
        made_by = joined(newest.state.get("canary", ""), made_by)
        yield Progress(client, label, newest.step, steps, float("nan"), resumed=True)
    diverged = ""
    with ThreadPoolExecutor(1) as writer:  # training goes on while a checkpoint is written
        written: Future[None] | None = None
        try:
            for event in training.events(config.storage.checkpoint_seconds):
                if event is None:
                    yield None
                elif isinstance(event, TrainingStep):
                    yield Progress(client, label, event.step, event.steps, event.loss)
                elif isinstance(event, Snapshot):
                    if written is not None:
                        written.result()
                    files, state = {SNAPSHOT: event.content}, {"canary": made_by}
                    written = writer.submit(checkpoints.save, event.step, files, state)
                else:
                    weights = module.pack(event, half=generator.half_precision_upload)
                    channels, resolution, _ = event.image_shape
        except FloatingPointError as error:
            if not leaves_out:
                raise
            diverged = str(error)
        if written is not None:
            written.result()
    if diverged:
        note = Divergence(client, label, len(places), diverged, made_by, fingerprint=made_of, files={})
        keep(storage, note)
        checkpoints.delete()
        yield note
        return
    storage.delete(Divergence.mark(folder))  # of other images or settings
    card = ModuleCard(
        client=client,
        label=label,
        n_images=len(places),
        channels=channels,
        resolution=resolution,
        steps=steps,
        precision=precision,
        generator=generator.of_module(),
        size=len(weights),
        canary=made_by,
        class_name=class_name,
        fingerprint=made_of,
        files={WEIGHTS: storage.write(f"{folder}/{WEIGHTS}", weights)},
    )
    keep(storage, card)
    checkpoints.delete()
    yield card, weights, time.monotonic() - began
