"""The offline half: calibration prompts in, flow records and a frozen layer plan out.

A name loads its module on first use, because comparing records needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "load_calibration": "flowmm.profiler.calibration",
    "open_calibration": "flowmm.profiler.calibration",
    "LayerFlow": "flowmm.profiler.flows",
    "PromptFlow": "flowmm.profiler.flows",
    "profile": "flowmm.profiler.profiling",
    "record_flow": "flowmm.profiler.recorder",
    "CalibrationSample": "flowmm.profiler.samples",
    "UnreadableSample": "flowmm.profiler.samples",
}

__all__ = [
    "CalibrationSample",
    "LayerFlow",
    "PromptFlow",
    "UnreadableSample",
    "load_calibration",
    "open_calibration",
    "profile",
    "record_flow",
]

if TYPE_CHECKING:
    from flowmm.profiler.calibration import load_calibration, open_calibration
    from flowmm.profiler.flows import LayerFlow, PromptFlow
    from flowmm.profiler.profiling import profile
    from flowmm.profiler.recorder import record_flow
    from flowmm.profiler.samples import CalibrationSample, UnreadableSample


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flowmm.profiler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
