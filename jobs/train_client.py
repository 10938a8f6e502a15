"""Train a client's modules where its images are, and write them as files that can travel: no cluster is needed.

    python jobs/train_client.py --client hospital-a --data a.npz --out exchange [--preset NAME] [--section.field ...]

Whoever draws from them runs `python jobs/run.py --modules exchange --data.source test.npz` with the same preset.
The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import sys

from pydantic import ValidationError

from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.command_line import exit_status, job_console, parse
from fedfactory_ray.settings.data import NAME, DataConfig, PartitionConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument("--client", required=True, help="the client's name; it is written into every module's card")
    parser.add_argument("--data", required=True, help="the client's images, as for data.source, with a train split")
    parser.add_argument("--out", required=True, help="folder for modules/<client>/class-<y>/")
    parser.add_argument("--classes", type=int, nargs="+", help="classes to train, by index (default: all it holds)")
    parser.add_argument(
        "--class-names",
        nargs="+",
        help="data.class_names: all classes of the data set, in order, where an image folder holds only some of them",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where to train (default: cuda where there is one)")


def main() -> None:
    """Run the job."""
    config, options = parse(description=__doc__ or "", add_arguments=add_arguments)
    if not re.fullmatch(NAME, options.client):
        raise ConfigError([f"--client {options.client!r}: needed letters, digits and ._- (it names a folder)"])
    names = {"class_names": options.class_names} if options.class_names else {}
    try:
        data = DataConfig.model_validate(config.data.model_dump() | {"source": options.data} | names)
    except ValidationError as error:
        problems = [f"--data or --class-names: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(problems) from error
    config = config.model_copy(update={"data": data, "partition": PartitionConfig(), "modules": None})
    from fedfactory_ray.pipeline.export import export_modules

    export_modules(
        config,
        options.client,
        options.out,
        job_console(),
        classes=options.classes,
        device=options.device,
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
