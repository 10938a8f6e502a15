"""Exact unlearning: python jobs/unlearn.py --run NAME --client CLIENT …, or: python jobs/unlearn.py verify FILE"""

from __future__ import annotations

import argparse
import getpass
import sys
from typing import TYPE_CHECKING

from rich.table import Table

from fedfactory_ray.command_line import exit_status, job_console, stored_config

if TYPE_CHECKING:
    from fedfactory_ray.unlearning.certificate import Certificate

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
    from fedfactory_ray.storage import Storage
    from fedfactory_ray.unlearning.forget import forget as fulfil

    console = job_console()
    certificate = fulfil(
        config, options.client, options.classes, options.name, options.by, options.allow_inexact, console
    )
    console.print(certificate_table(certificate))
    place = Storage(config.storage.uri).within(certificate.request.successor).within("certificate.json").uri
    console.print(f"certificate  {place}", soft_wrap=True, highlight=False)
    console.print(f"check it     python jobs/unlearn.py verify {place}", soft_wrap=True, highlight=False)


def certificate_table(certificate: Certificate) -> Table:
    """What a person wants to know of a fulfilled request."""
    from fedfactory_ray.unlearning.forget import held_recall

    request, spent, share = certificate.request, certificate.cost["spent"], certificate.cost["share"]
    method = certificate.after.main_method
    table = Table(title=f"forgotten · {', '.join(request.exclude)}", title_justify="left", show_header=False)
    table.add_row("run", f"{request.run} (deleted) → {request.successor}")
    for kind, gone in certificate.deleted.items():
        table.add_row(f"deleted {kind}", str(len(gone)))
    table.add_row("kept", ", ".join(f"{n} {kind}" for kind, n in certificate.kept.items()), end_section=True)
    for name in ("images_drawn", "network_evaluations", "fits", "seconds"):
        part = f" ({share[name]:.1%} of the original run's)" if name in share else ""
        table.add_row(name.replace("_", " "), f"{spent[name]:.0f}{part}")
    if certificate.absent:
        table.add_row("classes that nobody holds now", ", ".join(map(str, certificate.absent)))
    for name, value in (
        ("accuracy", [facts.scores[method]["accuracy"] for facts in (certificate.before, certificate.after)]),
        ("mean recall", [f.scores[method]["balanced_accuracy"] for f in (certificate.before, certificate.after)]),
        (
            "mean recall, classes held",
            [held_recall(f, method, certificate.absent) for f in (certificate.before, certificate.after)],
        ),
    ):
        table.add_row(f"{name}, before → after", f"{value[0]:.4f} → {value[1]:.4f}")
    exact = "; ".join(certificate.inexact) or "yes: equal to a run without them, bit for bit"
    table.add_row("exact", f"not promised: {exact}" if certificate.inexact else exact)
    return table


def verify(arguments: list[str]) -> int:
    """Check a certificate; returns the exit status: 1 where a check fails."""
    options, overrides = make_verify_parser().parse_known_args(arguments)
    from fedfactory_ray.storage import Storage

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
