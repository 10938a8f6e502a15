"""A session's phases: what their seconds tell."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedfactory_ray.pipeline import session as sessions
from fedfactory_ray.pipeline.session import Session
from fedfactory_ray.settings.command_line import make_config
from fedfactory_ray.storage.files import Storage


def test_seconds_of_starts_that_broke_off_count_and_of_those_that_found_it_done_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: clock[0])
    nothing: Any = None

    def start(seconds: float, error: type[BaseException] | None = None) -> Session:
        console = Console(file=io.StringIO())
        session = Session(make_config(), "mine", console, nothing, nothing, nothing, Storage(str(tmp_path)), nothing)
        with contextlib.suppress(KeyboardInterrupt, ValueError), session.phase("modules"):
            clock[0] += seconds
            if error is not None:
                raise error
        assert session.seconds == {"modules": seconds}  # this start's own, for its table
        return session

    start(700, KeyboardInterrupt)
    assert "modules" not in start(30, ValueError).worked
    assert start(100).worked == {"modules": 830}
    assert start(1).worked == {"modules": 830}
    assert start(900).worked == {"modules": 900}  # what was there did not verify
