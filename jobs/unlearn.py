"""Exact unlearning: python jobs/unlearn.py --run NAME --client CLIENT …, or: python jobs/unlearn.py verify FILE"""

from __future__ import annotations

import argparse
import getpass
import sys
from typing import TYPE_CHECKING

from rich.table import Table

from fedfactory_ray.settings.command_line import exit_status, job_console, stored_config
from fedfactory_ray.unlearning.report import certificate_table

if TYPE_CHECKING:
    pass

SETTINGS = (
    "Other settings (--storage.uri, --tracking.uri, --resources.…) as for jobs/run.py; the rest is the run's own."
)


def make_parser() -> argparse.ArgumentParser:
    """The options of both forms of this job."""
    parser = argparse.ArgumentParser(
        description="Make a finished run one in which clients never took part, bit for bit, and delete the old one.",
        epilog=f"{SETTINGS} `unlearn.py verify --help` explains the check of a certificate.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="NAME", help="the finished run, a folder below --storage.uri")
    parser.add_argument("--client", required=True, nargs="+", metavar="CLIENT", help="whom to forget")
    parser.add_argument("--classes", nargs="+", type=int, default=[], metavar="Y", help="only these classes of theirs")
    parser.add_argument("--name", help="name of the new run; default: NAME-without-CLIENT")
    parser.add_argument("--by", default=getpass.getuser(), metavar="WHO", help="who asks, for the audit log")
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="go on though the run was made on other hardware or versions; the certificate then says so",
    )
    return parser


def make_verify_parser() -> argparse.ArgumentParser:
    """The options of `verify`."""
    parser = argparse.ArgumentParser(
        prog="unlearn.py verify",
        description="Check a certificate against storage and MLflow.",
        epilog=SETTINGS,
        allow_abbrev=False,
    )
    parser.add_argument("certificate", help="path or address of certificate.json in its run's folder")
    parser.add_argument(
        "--retrain", action="store_true", help="also make the run without the client from nothing, and compare digests"
    )
    return parser


def forget(arguments: list[str]) -> None:
    """Fulfil a request."""
    options, overrides = make_parser().parse_known_args(arguments)
    config = stored_config(options.run, overrides)
    from fedfactory_ray.storage.files import Storage
    from fedfactory_ray.unlearning.forget import forget as fulfil

    console = job_console()
    certificate = fulfil(
        config, options.client, options.classes, options.name, options.by, options.allow_inexact, console
    )
    console.print(certificate_table(certificate))
    place = Storage(config.storage.uri).within(certificate.request.successor).within("certificate.json").uri
    console.print(f"certificate  {place}", soft_wrap=True, highlight=False)
    console.print(f"check it     python jobs/unlearn.py verify {place}", soft_wrap=True, highlight=False)


def verify(arguments: list[str]) -> int:
    """Check a certificate; returns the exit status: 1 where a check fails."""
    options, overrides = make_verify_parser().parse_known_args(arguments)
    from fedfactory_ray.storage.files import Storage

    run = Storage(options.certificate).parent
    config = stored_config(run.name, ["--storage.uri", run.parent.uri, *overrides])
    from fedfactory_ray.unlearning.verification import verify as check

    console = job_console()
    _, checks = check(options.certificate, config, options.retrain, console)
    table = Table(title=f"certificate · {run.name}", title_justify="left", show_header=False)
    for each in checks:
        table.add_row(each.name, "[red]no[/red]: " + ", ".join(each.wrong[:5]) if each.wrong else "[green]yes[/green]")
    console.print(table)
    return int(any(each.wrong for each in checks))


def main() -> None:
    """Run the job."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["verify"]:
        raise SystemExit(verify(arguments[1:]))
    forget(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(main))
