"""Measure what the main job costs here and what a choice brings: python -m benchmarks WHAT [--section.field ...]

    overhead    a whole run against bare loops of the same work on the same cores; bytes against one round of FedAvg
    clients     time from 5 to 10 to 20 clients, from 1 to 2 actors, and the overhead a client at 100 tiny ones
    timeline    all processes of a whole run: when each begins, is ready and ends, and the CPU time it takes
    memory      the driver's peak memory with 10 times the images and 10 times the clients
    samplers    solver and evaluations against accuracy on the real validation split, from the modules in --run
    device      speed and repeatability of networks and fits on the first GPU here, or on the CPU
    experts     the share of real images that an expert sees against accuracy there, from the images in --run

Read the ratios: seconds differ from machine to machine.
"""

from __future__ import annotations

import argparse
import sys

from fedfactory_ray.errors import ConfigError
from fedfactory_ray.settings.command_line import exit_status, job_console, parse

COST = ("overhead", "clients", "memory")
CHOICES = ("samplers", "experts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this job."""
    parser.add_argument("what", choices=(*COST, *CHOICES, "device", "timeline"))
    parser.add_argument("--run", help="samplers, experts: folder of a finished run, runs/<name>")
    parser.add_argument("--parts", nargs="+", help="device: only some of digits, short, fit and published")
    parser.add_argument("--seconds", type=float, default=300, help="device: no part begins later (default 300)")
    parser.add_argument("--out", help="device: file for the figures, as JSON; timeline: for the picture")
    parser.add_argument("--images", type=int, default=500, help="samplers: images a class (default 500)")


def main() -> None:
    """Run the benchmark."""
    config, options = parse(description=__doc__ or "", add_arguments=add_arguments)
    if options.what in CHOICES and not options.run:
        raise ConfigError([f"{options.what} needs --run runs/<name>, the folder of a finished run"])
    # Heavy imports only once the configuration stands.
    from benchmarks import choices, cost, device, timeline

    alone = {"device": device, "timeline": timeline}
    module = cost if options.what in COST else choices if options.what in CHOICES else alone[options.what]
    measure = getattr(module, options.what)
    job_console().print(measure(config, options))


if __name__ == "__main__":
    sys.exit(exit_status(main))
