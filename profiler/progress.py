"""Progress on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from flowmm.profiler.profiling import Progress

SECONDS_BETWEEN_LINES = 10.0
# Updates that the rate is taken over.
RECENT = 64


@contextmanager
def shown_progress(quiet: bool = False, what: str = "profiled", unit: str = "prompts") -> Generator[Progress | None]:
    """A callback for :func:`flowmm.profiler.profile` and its like; None when `quiet`.

    `what` begins the line, `unit` is what is counted.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(what) as update:
            yield update
    else:
        yield _Lines(what, unit)


@contextmanager
def _bar(what: str) -> Generator[Progress]:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class _RateColumn(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.2g}/s")

    columns = (
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        _RateColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda finished, total: bar.update(task, completed=finished, total=total)


class _Lines:
    """A line after the first prompt, the last, and every few seconds in between."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._last = float("-inf")
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def __call__(self, finished: int, total: int | None) -> None:
        now = time.monotonic()
        self._recent.append((now, finished))
        if finished == total or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            of_all = "" if total is None else f" of {total}"
            print(
                f"flowmm: {self._what} {finished}{of_all} {self._unit}{self._pace(total)}", file=sys.stderr, flush=True
            )

    def _pace(self, total: int | None) -> str:
        """Rate over recent prompts, so that those of an earlier run, which cost nothing, do not count for long."""
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        if end <= start or last <= first:
            return ""
        rate = (last - first) / (end - start)
        left = "" if total is None or last >= total else f", {_duration((total - last) / rate)} left"
        return f", {rate:.2g} per second{left}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
