"""The offline half: calibration prompts in, flow records and a frozen layer plan out."""

from flowmm.profiler.calibration import load_calibration, open_calibration
from flowmm.profiler.profile import profile
from flowmm.profiler.recorder import LayerFlow, PromptFlow, record_flow
from flowmm.profiler.samples import CalibrationSample, UnreadableSample

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
