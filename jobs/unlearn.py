"""Exact unlearning: python jobs/unlearn.py forget --run NAME --client CLIENT …, withdraw --run NAME, verify FILE"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Callable

from rich.text import Text

from fedfactory_ray.settings.command_line import exit_status, job_console, stored_config

Command = Callable[[argparse.Namespace, list[str]], int]
OTHERS = "Other settings (--storage.uri, --tracking.uri, --resources.…) as for jobs/run.py; the rest is the run's own."


def make_parser() -> argparse.ArgumentParser:
    """The job's commands and their options."""
    parser = argparse.ArgumentParser(description="Exact unlearning, and the check of its certificates.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, fulfil: Callable[[argparse.Namespace, list[str]], int], help: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, epilog=OTHERS, allow_abbrev=False)
        made.set_defaults(command=fulfil)
        return made

    help = "make a finished run one in which clients never took part, bit for bit, and delete the old one"
    forgetting = command("forget", forget_command, help)
    forgetting.add_argument("--run", required=True, metavar="NAME", help="the finished run, a folder of --storage.uri")
    forgetting.add_argument("--client", required=True, nargs="+", metavar="CLIENT", help="whom to forget")
    forgetting.add_argument(
        "--classes", nargs="+", type=int, default=[], metavar="Y", help="only these of their classes"
    )
    forgetting.add_argument("--name", help="name of the new run; default: NAME-without-CLIENT")
    forgetting.add_argument("--by", metavar="WHO", help="who asks, for the audit log; default: you")
    forgetting.add_argument(
        "--allow-inexact",
        action="store_true",
        help="go on though the run was made on other hardware or versions; the certificate then says so",
    )
    help = "take back a request while the old run is whole, with all that was made for it"
    withdrawing = command("withdraw", withdraw_command, help)
    withdrawing.add_argument("--run", required=True, metavar="NAME", help="the run that had to forget")
    checking = command("verify", verify_command, "check a certificate against storage and MLflow")
    checking.add_argument("certificate", help="path or address of certificate.json in its run's folder")
    checking.add_argument(
        "--retrain", action="store_true", help="also make the run without the client from nothing, and compare digests"
    )
    return parser


def forget_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Fulfil a request; returns the exit status."""
    config = stored_config(options.run, overrides)
    from fedfactory_ray.storage.files import Storage
    from fedfactory_ray.storage.layout import CERTIFICATE
    from fedfactory_ray.unlearning.forget import forget
    from fedfactory_ray.unlearning.report import certificate_table

    console = job_console()
    certificate = forget(
        config,
        options.client,
        options.classes,
        console,
        asked_by=options.by or who(),
        successor=options.name,
        allow_inexact=options.allow_inexact,
    )
    console.print(certificate_table(certificate))
    place = Storage(config.storage.uri).within(certificate.request.successor).within(CERTIFICATE).uri
    console.print(f"certificate  {place}", soft_wrap=True, highlight=False)
    console.print(f"check it     python jobs/unlearn.py verify {place}", soft_wrap=True, highlight=False)
    return 0


def withdraw_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Take back a request; returns the exit status."""
    config = stored_config(options.run, overrides)
    from fedfactory_ray.unlearning.forget import withdraw

    request = withdraw(config)
    whom = ", ".join(request.exclude)
    told = f"withdrawn: run {request.run} keeps {whom}; what was made of {request.successor} is deleted"
    job_console().print(told, soft_wrap=True, highlight=False)
    return 0


def who() -> str:
    """The user's name, or number where the machine has no name for it, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def verify_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Check a certificate; returns the exit status: 1 where a check fails."""
    from fedfactory_ray.storage.files import Storage

    run = Storage(options.certificate).parent
    config = stored_config(run.name, ["--storage.uri", run.parent.uri, *overrides])
    from fedfactory_ray.tracking.table import PlainTable
    from fedfactory_ray.unlearning.verification import verify

    console = job_console()
    _, checks = verify(options.certificate, config, console, retrain=options.retrain)
    table = PlainTable(title=f"certificate · {run.name}", title_justify="left", show_header=False)
    for each in checks:
        no = Text.assemble(("no", "red"), ": ", ", ".join(each.wrong[:5]))
        table.add_row(each.name, no if each.wrong else Text("yes", "green"))
    console.print(table)
    return int(any(each.wrong for each in checks))


def main() -> None:
    """Run the job."""
    options, overrides = make_parser().parse_known_args()
    raise SystemExit(options.command(options, overrides))


if __name__ == "__main__":
    sys.exit(exit_status(main))
