"""Search for better settings of one method, on validation images; the same command goes on where it stopped.

    python jobs/tune.py --method fedprox --search federated.fedprox_lr=0.01,0.03,0.1 --search federated.prox_mu=0.001..1
    python jobs/tune.py --method fedfactory --search sampler.evaluations=6,10,20 [settings as for run.py]

A search is field=a,b,c (choices; a list in brackets is one choice) or field=low..high (a range: drawn uniformly, in the
logarithm where it spans a factor of 10 or more). Federated methods are judged by their clients' validation images,
fedfactory and centralised by the data's validation split, which must have real images; no test image is read.
Trials below the median at the same round or epoch are stopped early. The best settings are printed and, as a whole
configuration for --config, in best.yaml.
"""

from __future__ import annotations

import argparse
import sys

from fedfactory_ray.settings.command_line import exit_status, job_console, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument(
        "--method", required=True, help="one of fedavg, fedprox, scaffold, feddyn, centralised, fedfactory"
    )
    parser.add_argument(
        "--search", action="append", default=[], metavar="FIELD=VALUES", help="a setting and what to try; repeatable"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="settings to try; default: all choices, 8 with a range")
    parser.add_argument("--concurrent", type=int, default=1, metavar="N", help="trials at once (default 1)")


def main() -> None:
    """Run the job."""
    config, chosen = parse(description=__doc__ or "", add_arguments=add_arguments)
    # Heavy imports only once the configuration stands.
    from fedfactory_ray.storage.layout import BEST_CONFIG
    from fedfactory_ray.tracking.runs import tracking_uri
    from fedfactory_ray.tuning.report import study_table
    from fedfactory_ray.tuning.study import run_study

    console = job_console()
    study = run_study(config, chosen.method, chosen.search, chosen.trials, chosen.concurrent, console)
    console.print(study_table(study))
    console.print(f"best        {study.best}", soft_wrap=True, highlight=False)
    console.print(f"as a file   --config {study.storage}/{BEST_CONFIG}", soft_wrap=True, highlight=False)
    browse = f"browse      mlflow ui --backend-store-uri {tracking_uri(config)}"
    console.print(browse, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(exit_status(main))
