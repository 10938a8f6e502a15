"""The factory beside its baselines: python jobs/compare.py [--methods NAME ...] [--seeds N] [settings as for run.py]"""

from __future__ import annotations

import argparse
import sys

import yaml
from rich.console import Console

from fedfactory_ray.command_line import parse
from fedfactory_ray.errors import FedFactoryError
from fedfactory_ray.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="of centralised, local, fedavg, fedprox, scaffold, feddyn, fedfactory; default: all",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds, from --seed on")


def main() -> int:
    """Run the job; returns the exit status."""
    console = Console(stderr=False)
    try:
        description = "Compare methods on one partition and with one recipe; what is done is not done again."
        config, chosen = parse(description=description, add_arguments=add_arguments)
        if chosen.print_config:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if not PRESETS[chosen.preset].verified:
            console.print(f"note: preset {chosen.preset} has not been run on its hardware yet", highlight=False)
        # Heavy imports only once the configuration stands.
        from fedfactory_ray import comparison, tracking

        methods = chosen.methods or comparison.method_names()
        found = comparison.compare(config, methods, chosen.seeds, console)
    except FedFactoryError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The same command goes on from here.")
        return 130
    if chosen.seeds > 1:
        console.print(comparison.comparison_table(found))
    console.print(f"run folder  {found.storage}", soft_wrap=True, highlight=False)
    browse = f"browse      mlflow ui --backend-store-uri {tracking.tracking_uri(config)}"
    console.print(browse, soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
