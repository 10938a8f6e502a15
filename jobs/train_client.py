"""Train a client's modules where its images are, and write them as files that can travel: no cluster is needed.

    python jobs/train_client.py --client hospital-a --data a.npz --out exchange [--preset NAME] [--section.field ...]

Whoever draws from them runs `python jobs/run.py --modules exchange --data.source test.npz` with the same preset.
The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys

import numpy as np
from rich.console import Console

from fedfactory_ray.errors import ConfigError, DataInvalidError
from fedfactory_ray.settings.command_line import exit_status, job_console, parse
from fedfactory_ray.settings.config import Config
from fedfactory_ray.settings.sections import NAME, PartitionConfig
from fedfactory_ray.storage.files import Storage
from fedfactory_ray.tracking.progress import bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument("--client", required=True, help="the client's name; it is written into every module's card")
    parser.add_argument("--data", required=True, help="the client's images, as for data.source, with a train split")
    parser.add_argument("--out", required=True, help="folder for modules/<client>/class-<y>/")
    parser.add_argument("--classes", type=int, nargs="+", help="classes to train, by index (default: all it holds)")
    parser.add_argument(
        "--class-names",
        nargs="+",
        help="all classes of the data set, in order: for an image folder that holds only some of them",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where to train (default: cuda where there is one)")


def main() -> None:
    """Run the job."""
    config, options = parse(description=__doc__ or "", add_arguments=add_arguments)
    if not re.fullmatch(NAME, options.client):
        raise ConfigError([f"--client {options.client!r}: needed letters, digits and ._- (it names a folder)"])
    data = config.data.model_copy(update={"source": options.data})
    config = config.model_copy(update={"data": data, "partition": PartitionConfig(), "modules": None})
    train(config, options, job_console())


def train(config: Config, options: argparse.Namespace, console: Console) -> None:
    """Train what is not there yet. Raises FedFactoryError for what the user can mend."""
    import torch

    from fedfactory_ray.cluster.devices import prepare_process
    from fedfactory_ray.data.readers import open_source
    from fedfactory_ray.data.source import inspect
    from fedfactory_ray.federation.client import Progress, train_modules
    from fedfactory_ray.federation.round import stored_module
    from fedfactory_ray.pipeline.session import claim

    source = open_source(config.data, options.class_names)
    info, labels = inspect(source, trains=False, tests=False)
    config.generator.check_resolution(info.resolution)
    held = [y for y, n in enumerate(info.counts["train"]) if n]
    classes = options.classes or held
    if not set(classes) <= set(held):
        raise DataInvalidError(source.path, f"training images of the classes {held}", f"--classes {classes} among them")
    settings = config.determining() | {"labels": hashlib.sha256(labels.tobytes()).hexdigest()}
    del settings["data"]["source"]  # a path of the client's own
    storage = Storage(options.out)
    claim(settings, storage.within(f"modules/{options.client}"))
    share = {y: np.flatnonzero(labels == y) for y in classes}
    todo = {y: i for y, i in share.items() if stored_module(storage, options.client, y, len(i)) is None}
    chosen = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", 0) if chosen == "cuda" else torch.device("cpu")
    prepare_process(config.resources.client, device)
    total = sum(config.generator.steps(len(indices)) for indices in todo.values())
    done: dict[int, int] = {}
    with bars(console, f"training modules of {options.client}", total, "steps") as shown:
        for event in train_modules(config, source, options.client, todo, device, storage):
            if isinstance(event, Progress):
                done[event.label] = event.step
                shown.update(sum(done.values()), f"class {event.label} loss {event.loss:.3f}")
    console.print(f"{len(share)} modules, {len(todo)} of them trained now: {storage.uri}/modules/{options.client}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
