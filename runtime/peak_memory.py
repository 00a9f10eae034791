"""Peak memory of a block of code, exact: what torch's allocators gave out and took back, not what the system guesses.

Needs torch alone, so that a program without flowmm can measure in the same way.
"""

from __future__ import annotations

import os
from typing import Any

import torch


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``, then ``peak.extra`` bytes beyond what was held at the start.

    On a CPU every allocation of tensor memory is recorded and added up in the order of time, those inside of operators
    included; that slows the block down, so times are taken in another run. On CUDA the allocator's own peak is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.extra = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        # Read when the recorder first starts, which otherwise says so on stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.extra = torch.cuda.max_memory_allocated(self._device) - self._start
            return
        self._profile.__exit__(*error)
        recorded = self._profile.profiler
        if recorded is not None and recorded.kineto_results is not None:
            self.extra = _peak(recorded.kineto_results.events())


def _peak(events: list[Any]) -> int:
    """Highest sum of the allocations (bytes above 0) and releases (below 0) among the events so far."""
    steps = sorted(((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=_time)
    held = peak = 0
    for _, change in steps:
        held += change
        peak = max(peak, held)
    return peak


def _time(step: tuple[int, int]) -> int:
    return step[0]
