"""Patience with a tracking server: a failure of it is told once and never costs a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
AGAIN_SECONDS = 60.0
"""How long nothing is sent to a server that failed: each try may wait for a time-out."""
T = TypeVar("T")


def troubles() -> tuple[type[Exception], ...]:
    """What MLflow, its HTTP client and its database raise when they fail. Imports them: call it once something has
    failed."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Patience:
    """Shared by all MLflow runs of a job: whether their server takes calls, and how many files it has missed."""

    def __init__(self) -> None:
        self.silent_until = float("-inf")
        self.told = False
        self.missed = 0

    def attempt(self, call: Callable[[], T], otherwise: T) -> T:
        """The result of `call`; `otherwise` where the server fails, or did so less than AGAIN_SECONDS ago."""
        if time.monotonic() < self.silent_until:
            return otherwise
        try:
            return call()
        except troubles() as error:
            if not self.told:
                log.warning("MLflow takes nothing (%s): the run goes on without it", first_line(error))
            self.told = True
            self.silent_until = time.monotonic() + AGAIN_SECONDS
            return otherwise

    def conclude(self) -> None:
        """Tell at the end which files the log lacks."""
        if self.missed:
            told = "MLflow lacks %d files of this run; nothing else does: the same command logs the results anew"
            log.warning(told, self.missed)
