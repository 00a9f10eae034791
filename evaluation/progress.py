"""Progress of a long grid on stderr: one line that renews itself in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

SECONDS_BETWEEN_LINES = 15.0


@dataclass
class ProgressLine:
    """A callback (finished, total) that says how far the work is and how long the rest may take."""

    what: str
    started: float = field(default_factory=time.monotonic)
    _shown: float = float("-inf")

    def __call__(self, finished: int, total: int) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if finished < total and now - self._shown < (0.2 if terminal else SECONDS_BETWEEN_LINES):
            return
        self._shown = now
        left = (now - self.started) * (total - finished) / finished
        line = f"flowmm: {self.what} {finished}/{total}, {_duration(left)} left"
        ending = "\n" if not terminal or finished == total else ""
        print(f"\r{line}\x1b[K" if terminal else line, end=ending, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
