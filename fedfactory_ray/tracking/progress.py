"""What a person sees while a job runs: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15.0


class Bars:
    """The bars of one phase of `total` units of work, which show while the block runs: one for the whole and, on a
    terminal, one for each part that is at work."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.started = self.printed = time.monotonic()
        self.parts: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.whole = self.progress.add_task(f"{title} ({unit})", total=total, note="")

    def __enter__(self) -> Self:
        if not self.console.is_terminal:
            self._line(f"{self.title} ({self.total} {self.unit})")
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, done: int, note: str = "") -> None:
        """Set how much of the phase is done; elsewhere than on a terminal, print it when the last line is old."""
        self.progress.update(self.whole, completed=done, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed > LINE_SECONDS:
            seconds = now - self.started
            self._line(f"  {self.title}: {done}/{self.total} {self.unit} in {seconds:.0f} s {note}")
            self.printed = now

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False)

    def part(self, name: str, done: int, total: int, note: str = "") -> None:
        """Set a part's progress; a finished part leaves the screen."""
        if name not in self.parts:
            self.parts[name] = self.progress.add_task(f"  {name}", total=total, note="")
        self.progress.update(self.parts[name], completed=done, total=total, note=note, visible=done < total)


class Lines(logging.Handler):
    """Prints what the package's loggers tell, a line each."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self.console.print(self.format(record), markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """Show retries, resumes, reuse and givings up while the block runs."""
    logger, lines = logging.getLogger(__name__.partition(".")[0]), Lines(console)
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
