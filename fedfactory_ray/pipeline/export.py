"""Exporting modules: a client trains them where its images are, and writes them as files that can travel."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from fedfactory_ray.data.image_folder import ImageFolder
from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.source import inspect, told_skipped
from fedfactory_ray.errors import DataInvalidError
from fedfactory_ray.federation.client import Progress, train_share
from fedfactory_ray.generation.divergence import Divergence
from fedfactory_ray.pipeline.gpus import modules_here
from fedfactory_ray.pipeline.session import claim
from fedfactory_ray.pipeline.survey import refuse_resolution
from fedfactory_ray.settings.config import Config
from fedfactory_ray.storage.checkpoints import scratch_of
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.storage.layout import MODULES, checkpoints_folder, module_folder
from fedfactory_ray.storage.lease import hold
from fedfactory_ray.tracking.progress import Bars, log_lines

log = logging.getLogger(__name__)


def export_modules(
    config: Config,
    client: str,
    out: str,
    console: Console,
    *,
    classes: Sequence[int] | None = None,
    device: str | None = None,
) -> None:
    """Train the modules of `client`, whose images are `config.data`, into the folder `out`, less those that are there.

    `classes` are those to train, by default all that it holds; where its images are a folder with only some of the data
    set's, `config.data.class_names` has to tell all; `device` is cpu or cuda, by default cuda where there is one. No
    cluster is needed. Raises FedFactoryError for what the user can mend.
    """
    import torch

    from fedfactory_ray.cluster.devices import prepare_process

    source = open_source(config.data)
    if isinstance(source, ImageFolder) and len(source.class_names) < 2:
        found = f"one class, {source.class_names[0]}: which number it has for others cannot be told"
        raise DataInvalidError(source.path, found, "--class-names with all classes of the data set, in order")
    info, labels = inspect(source, trains=False, tests=False)
    refuse_resolution(config, info)
    held = [y for y, n in enumerate(info.counts["train"]) if n]
    chosen = list(classes or held)
    if not set(chosen) <= set(held):
        raise DataInvalidError(source.path, f"training images of the classes {held}", f"--classes {chosen} among them")
    least = config.generator.min_images
    small = [y for y in chosen if info.counts["train"][y] < least]
    counted = ", ".join(f"{y} {info.class_names[y]} ({info.counts['train'][y]} images)" for y in small)
    if small and (classes or small == chosen):
        needed = f"generator.min_images={least}: a module of fewer images is a copy of them"
        raise DataInvalidError(source.path, f"classes {counted}", needed)
    whole = config.determining()
    settings = {name: whole[name] for name in ("seed", "data", "generator")}  # nothing else determines a module
    del settings["data"]["source"]  # a path of the client's own
    settings["generator"].pop("min_images", None)  # tells which there are, and changes none
    settings["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
    storage = Storage(out)
    storage.check()
    share = {y: np.flatnonzero(labels == y) for y in chosen if y not in small}
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    prepare_process(config.resources.client.threads, where)
    at_once = modules_here(config, info, where)
    total = sum(config.generator.steps(len(indices)) for indices in share.values())
    if info.skipped:
        console.print(told_skipped(source.path, info.skipped), markup=False, highlight=False, soft_wrap=True)
    numbered = ", ".join(f"{y} {info.class_names[y]}" for y in chosen)
    if small:
        told = f"classes that stay at home, of fewer than generator.min_images={least}: {counted}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    console.print(f"classes of {client} by number: {numbered}", markup=False, highlight=False, soft_wrap=True)
    done: dict[int, int] = {}
    trained, left_out = set(), list[Divergence]()
    scratch = scratch_of(storage, config.storage.scratch)
    own = storage.within(f"{MODULES}/{client}")
    with (
        hold(own, take_over=config.take_over) as began,
        log_lines(console),
        Bars(console, f"training modules of {client}", total, "steps") as shown,
    ):
        claim(settings, own, part=True, another="--out")
        own.clean(began)
        for y in small:
            storage.delete_folder(module_folder(client, y))  # of an earlier version, or a smaller minimum
        for y in share:
            storage.delete_folder(checkpoints_folder(module_folder(client, y)))  # where an earlier version kept them
        for event in train_share(config, source, client, share, where, storage, at_once, scratch):
            if isinstance(event, Progress) and event.resumed:
                log.info("%s, class %d: goes on from step %d of %d", client, event.label, event.step, event.steps)
            elif isinstance(event, Progress):
                trained.add(event.label)
                done[event.label] = event.step
                shown.update(sum(done.values()), f"class {event.label} loss {event.loss:.3f}")
            elif isinstance(event, Divergence):
                log.warning("left out: %s (%s)", event, event.why)
                left_out.append(event)
            else:
                card, _, _ = event
                done[card.label] = card.steps
    scratch.prune()
    finished = len(share) - len(left_out)
    trained -= {note.label for note in left_out}
    done_now = f"{finished} modules, {len(trained)} of them trained now: {storage.uri}/{MODULES}/{client}"
    console.print(done_now, markup=False, emoji=False)
