"""Progress on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from flowmm.profiler.profile import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(quiet: bool = False) -> Generator[Progress | None]:
    """A callback for :func:`flowmm.profiler.profile`; None when `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield _Lines()


@contextmanager
def _bar() -> Generator[Progress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("profiling"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("profiling", total=None)
        yield lambda finished, total: bar.update(task, completed=finished, total=total)


class _Lines:
    """A line after the first prompt, the last, and every few seconds in between."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, finished: int, total: int) -> None:
        now = time.monotonic()
        if finished == total or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"flowmm: profiled {finished} of {total} prompts", file=sys.stderr, flush=True)
