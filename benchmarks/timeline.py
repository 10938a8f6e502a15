"""The processes of a whole run: when each began, was ready, worked and ended, and what CPU time it took."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.cost import run_quietly
from fedfactory_ray.settings.config import Config

LOOK_SECONDS = 0.1
WORKER, IDLE = "ray::", "ray::IDLE"
COLOURS = {"starts": "tab:orange", "waits": "lightgrey", "works": "tab:blue"}


@dataclass
class Seen:
    """A process: what it was called, when, in seconds from the start."""

    began: float
    cpu: float = 0.0
    ended: float = 0.0
    titles: list[tuple[float, str]] = field(default_factory=list)

    def look(self, now: float, title: str, cpu: float) -> None:
        """Note what the process is now."""
        self.ended, self.cpu = now, cpu
        if not self.titles or self.titles[-1][1] != title:
            self.titles.append((now, title))

    @property
    def spans(self) -> list[tuple[float, float, str]]:
        """From when, until when, and whether a worker of Ray `starts`, `waits` or `works`; other processes `work`."""
        points = [(self.began, self.titles[0][1]), *self.titles[1:], (self.ended, "")]
        worker = any(title.startswith(WORKER) for _, title in self.titles)
        found = []
        for (start, title), (end, _) in pairwise(points):
            state = "waits" if title == IDLE else "works" if title.startswith(WORKER) or not worker else "starts"
            found.append((start, end, state))
        return found

    @property
    def name(self) -> str:
        """What the process did, each once, in order."""
        names = (title.removeprefix(WORKER).split(".")[0] for _, title in self.titles if title != IDLE)
        done = [name for name in dict.fromkeys(names) if name]
        worker = any(title.startswith(WORKER) for _, title in self.titles)
        return ", ".join(done[1:] if worker and len(done) > 1 else done)


def title_of(process: psutil.Process) -> str:
    """A process' title if it has set one, else its program."""
    words = process.cmdline()
    if words and words[0].startswith(WORKER):
        return " ".join(words).strip()
    names = [Path(word).name for word in words if not word.startswith("-")]
    return next((name for name in names[1:] if name.endswith(".py")), names[0] if names else "")


def watch(job: Future[Any]) -> list[Seen]:
    """Look at all processes below this one until `job` is done."""
    zero, seen = time.time(), dict[int, Seen]()
    while not job.done():
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                entry = seen.setdefault(process.pid, Seen(process.create_time() - zero))
                entry.look(time.time() - zero, title_of(process), times.user + times.system)
            except psutil.NoSuchProcess:
                continue
        time.sleep(LOOK_SECONDS)
    return sorted(seen.values(), key=lambda each: each.began)


def picture(processes: Iterable[Seen]) -> Figure:
    """A bar a process, with a colour for whether it starts, waits or works."""
    rows = list(processes)
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for row, process in enumerate(rows):
        for start, end, state in process.spans:
            axis.barh(row, end - start, left=start, color=COLOURS[state])
    for state, colour in COLOURS.items():
        axis.barh(0, 0, color=colour, label=state)
    axis.set_yticks(range(len(rows)), [f"{each.name[:50]} ({each.cpu:.1f} s CPU)" for each in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="seconds")
    axis.legend(fontsize=7)
    return figure


def timeline(config: Config, options: argparse.Namespace) -> Table:
    """A whole run in a process of its own, watched; with --out, a picture of it too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(run_quietly, config)
        processes = watch(job)
        report, _ = job.result()
    table = Table("process", "begins, s", "ready", "ends", "CPU, s")
    for each in processes:
        ready = next((f"{end:.1f}" for _, end, state in each.spans if state == "starts"), "")
        table.add_row(each.name, f"{each.began:.1f}", ready, f"{each.ended:.1f}", f"{each.cpu:.1f}")
    total = sum(each.cpu for each in processes)
    table.add_row(f"{len(processes)} processes", "", "", f"{report.seconds['total']:.1f}", f"{total:.1f}")
    if options.out:
        picture(processes).savefig(options.out, dpi=120)
        table.caption = f"picture: {options.out}"
    return table
