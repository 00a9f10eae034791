"""The offline half: calibration prompts in, flow records and a frozen layer plan out."""

from flowmm.profiler.calibration import CalibrationSample, load_calibration
from flowmm.profiler.profile import profile
from flowmm.profiler.recorder import LayerFlow, PromptFlow, record_flow

__all__ = ["CalibrationSample", "LayerFlow", "PromptFlow", "load_calibration", "profile", "record_flow"]
