"""Every refusal of the package: each class builds its own message from what was found, needed and to be done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class FedFactoryError(Exception):
    """Base of all errors that a user can mend; jobs print it without a traceback."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses build their message from other arguments than they store; workers' errors must still travel.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[FedFactoryError], args: tuple[Any, ...], state: dict[str, Any]) -> FedFactoryError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(FedFactoryError):
    """A setting is unknown, of the wrong type, or impossible together with others."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The configuration cannot be used:\n{lines}\nNothing was started.")


class UsageError(FedFactoryError):
    """A command line has what is no option."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join([*problems, "--help lists every option."]))


class DataMissingError(FedFactoryError):
    """A data file is not there and could not be downloaded."""

    def __init__(self, path: Path | str, checksum: str | None, origin: str) -> None:
        expected = f"\n  expected MD5: {checksum}" if checksum else ""
        super().__init__(
            f"Data file missing: {path}{expected}\n  origin: {origin}\n"
            "Download it elsewhere and put it at that path, or point data.root (or FEDFACTORY_DATA) at its folder."
        )


class DataInvalidError(FedFactoryError):
    """A data file is there, but what it holds cannot be used."""

    def __init__(self, path: Path | str, found: str, needed: str) -> None:
        super().__init__(f"Data refused: {path}\n  found:  {found}\n  needed: {needed}")


class PartitionError(FedFactoryError):
    """The requested partition cannot be made from the labels at hand."""

    def __init__(self, found: str, needed: str, remedy: str) -> None:
        super().__init__(f"Partition impossible: {found}\n  needed: {needed}\n  try:    {remedy}")


class ModuleRefusedError(FedFactoryError):
    """A module failed verification; names the client that it came from."""

    def __init__(self, client: str, label: int, reason: str) -> None:
        self.client = client
        super().__init__(
            f"Module of client {client!r}, class {label}, refused: {reason}\n"
            "Ask the client to upload it again; no image of it was used."
        )


class CardError(FedFactoryError):
    """The card beside an artefact's files cannot be read; `newer`: by this version."""

    def __init__(self, kind: str, found: str, *, newer: bool = False) -> None:
        self.found, self.newer = found, newer
        remedy = "a version of fedfactory_ray that knows it, or another --name" if newer else "the file as it was made"
        super().__init__(f"The card of a {kind} cannot be read.\n  found:  {found}\n  needed: {remedy}")


class ResourcesError(FedFactoryError):
    """The cluster can never run the plan, so it would hang."""

    def __init__(self, found: str, needed: str, remedy: str) -> None:
        super().__init__(
            f"The cluster cannot run this plan.\n  found:  {found}\n  needed: {needed}\n  try:    {remedy}"
        )


class ClusterGoneError(FedFactoryError):
    """No Ray cluster answers where one should be, or no longer."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"The cluster is gone: {found}.\n  try:    {remedy}")


class GpuMemoryError(FedFactoryError):
    """A GPU had no memory left for what somebody computed on it."""

    def __init__(self, who: str, found: str, remedy: str) -> None:
        super().__init__(
            f"A GPU ran out of memory: {who}.\n  found:  {found}\n  try:    {remedy}\n"
            "The same command with the changed setting goes on from what is stored."
        )


class TrainingDivergedError(FedFactoryError):
    """What somebody trained has no finite loss any more."""

    def __init__(self, who: str, found: str) -> None:
        super().__init__(f"A training diverged: {who}.\n  found:  {found}")


class StorageError(FedFactoryError):
    """Nothing can be read or written at an address."""

    def __init__(self, uri: str, found: str, needed: str) -> None:
        self.found = found
        super().__init__(f"Storage refused: {uri}\n  found:  {found}\n  needed: {needed}")


class TrackingError(FedFactoryError):
    """Nothing can be logged at an address."""

    def __init__(self, uri: str, found: str) -> None:
        super().__init__(
            f"MLflow refused: {uri}\n  found:  {found}\n"
            "  needed: a server that answers, or a sqlite file that can be written (--tracking.uri sqlite:///mlflow.db)"
        )


class RunConflictError(FedFactoryError):
    """A folder holds a run, or modules, of another configuration; `another` option would name another folder."""

    def __init__(self, uri: str, differences: Sequence[str], another: str) -> None:
        lines = "\n".join(f"  - {line}" for line in differences)
        super().__init__(
            f"{uri} is of another configuration:\n{lines}\n"
            f"Choose another {another}, or repeat the original command, which goes on from there."
        )


class FolderHeldError(FedFactoryError):
    """Another process writes in the folder."""

    def __init__(self, uri: str, who: str) -> None:
        super().__init__(
            f"{uri} is in use.\n  found:  {who}\n  needed: a folder in which nobody works\n"
            "  try:    wait for it, or end it; or --take-over, which makes it stop at its next heartbeat"
        )


class ForgottenError(FedFactoryError):
    """A run had to forget a client, or is being made from one that has to."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"Run refused: {found}.\n  try: {remedy}")


class UnlearningError(FedFactoryError):
    """A request to forget cannot be fulfilled as it stands; nothing was deleted."""

    def __init__(self, found: str, needed: str) -> None:
        super().__init__(f"Cannot forget: {found}\n  needed: {needed}\nNothing was deleted.")
