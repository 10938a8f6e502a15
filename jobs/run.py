"""FederatedFactory's main job: python jobs/run.py [--preset NAME] [--config FILE] [--seeds N] [--section.field …]"""

from __future__ import annotations

import argparse
import sys

from fedfactory_ray.settings.command_line import exit_status, job_console, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    help = "repeat with N seeds, from --seed on, and tell intervals over them"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=help)
    help = "tell what the run would make and about how long it would take, by a probe of some seconds, and stop"
    parser.add_argument("--plan", action="store_true", help=help)


def main() -> None:
    """Run the job."""
    config, chosen = parse(
        description="Federate generators, draw a balanced data set, fit one classifier or an expert a client.",
        add_arguments=add_arguments,
    )
    # Heavy imports only once the configuration stands.
    from fedfactory_ray.pipeline import phases
    from fedfactory_ray.pipeline.report import report_table
    from fedfactory_ray.pipeline.seeds import run_seeds

    console = job_console()
    if chosen.plan:
        from fedfactory_ray.pipeline.forecast import forecast

        console.print(forecast(config, console))
        return
    if chosen.seeds != 1:
        console.print(run_seeds(config, chosen.seeds, console))
        return
    report = phases.run(config, console)
    console.print(report_table(report))
    console.print(f"run folder  {report.storage}", soft_wrap=True, highlight=False)
    for name, uri in report.models.items():
        console.print(f"{name:11} {uri}", soft_wrap=True, highlight=False)
    console.print(f"browse      mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(exit_status(main))
