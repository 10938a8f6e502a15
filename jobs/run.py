"""FederatedFactory's main job: python jobs/run.py [--preset NAME] [--config FILE] [--section.field VALUE ...]"""

from __future__ import annotations

import sys

import yaml
from rich.console import Console

from fedfactory_ray.command_line import parse
from fedfactory_ray.errors import FedFactoryError
from fedfactory_ray.presets import PRESETS


def main() -> int:
    """Run the job; returns the exit status."""
    console = Console(stderr=False)
    try:
        config, options = parse(
            description="Federate generators, draw a balanced data set, fit one classifier or an expert a client."
        )
        if options.print_config:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if not PRESETS[options.preset].verified:
            console.print(f"note: preset {options.preset} has not been run on its hardware yet", highlight=False)
        # Heavy imports only once the configuration stands.
        from fedfactory_ray import pipeline
        from fedfactory_ray.report import report_table

        report = pipeline.run(config, console)
    except FedFactoryError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The same command goes on from here.")
        return 130
    console.print(report_table(report))
    console.print(f"run folder  {report.storage}", soft_wrap=True, highlight=False)
    for name, uri in report.models.items():
        console.print(f"{name:11} {uri}", soft_wrap=True, highlight=False)
    console.print(f"browse      mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
