"""The online half: compress a prompt's KV cache layer by layer and decode on what is left."""

from flowmm.runtime.cache import FlowCache
from flowmm.runtime.compiled import NoCompilerWarning
from flowmm.runtime.context import PlanFitWarning, Run, compress
from flowmm.runtime.online import FlowDriftWarning, OnlineCheck
from flowmm.runtime.report import LayerReport, RunReport
from flowmm.runtime.settings import CompressionSettings

__all__ = [
    "CompressionSettings",
    "FlowCache",
    "FlowDriftWarning",
    "LayerReport",
    "NoCompilerWarning",
    "OnlineCheck",
    "PlanFitWarning",
    "Run",
    "RunReport",
    "compress",
]
