"""FederatedFactory's main job: python jobs/run.py [--preset NAME] [--config FILE] [--section.field VALUE ...]"""

from __future__ import annotations

import sys

from fedfactory_ray.settings.command_line import exit_status, job_console, parse


def main() -> None:
    """Run the job."""
    config, _ = parse(
        description="Federate generators, draw a balanced data set, fit one classifier or an expert a client."
    )
    # Heavy imports only once the configuration stands.
    from fedfactory_ray.pipeline import phases
    from fedfactory_ray.pipeline.report import report_table

    console = job_console()
    report = phases.run(config, console)
    console.print(report_table(report))
    console.print(f"run folder  {report.storage}", soft_wrap=True, highlight=False)
    for name, uri in report.models.items():
        console.print(f"{name:11} {uri}", soft_wrap=True, highlight=False)
    console.print(f"browse      mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(exit_status(main))
