"""The factory beside its baselines: python jobs/compare.py [--methods NAME ...] [--seeds N] [settings as for run.py]"""

from __future__ import annotations

import argparse
import sys

from fedfactory_ray.settings.command_line import exit_status, job_console, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="of centralised, local, fedavg, fedprox, scaffold, feddyn, fedfactory, fedfactory-ii, or one added; "
        "default: all",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds, from --seed on")


def main() -> None:
    """Run the job."""
    description = "Compare methods on one partition and with one recipe; what is done is not done again."
    config, chosen = parse(description=description, add_arguments=add_arguments)
    # Heavy imports only once the configuration stands.
    from fedfactory_ray.comparison.compare import compare, method_names
    from fedfactory_ray.comparison.report import comparison_table
    from fedfactory_ray.storage.layout import PLOT
    from fedfactory_ray.tracking import runs as tracking

    console = job_console()
    found = compare(config, chosen.methods or method_names(), chosen.seeds, console)
    if chosen.seeds > 1:
        console.print(comparison_table(found))
    console.print(f"run folder  {found.storage}", soft_wrap=True, highlight=False)
    console.print(f"plot        {PLOT}, there and in MLflow", highlight=False)
    browse = f"browse      mlflow ui --backend-store-uri {tracking.tracking_uri(config)}"
    console.print(browse, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(exit_status(main))
