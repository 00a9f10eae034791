"""flowmm: flow-guided KV cache merging for vision-language models.

Profile a model once (``flowmm profile``), freeze what was measured in a layer plan, and generate on a compressed KV
cache (``flowmm run`` or :func:`compress`). Names below load on first use, so ``import flowmm`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Plan": "flowmm.plans",
    "MethodParameters": "flowmm.plans",
    "compress": "flowmm.runtime",
    "Run": "flowmm.runtime",
    "load_model": "flowmm.models",
    "profile": "flowmm.profiler",
}

__all__ = ["MethodParameters", "Plan", "Run", "__version__", "compress", "load_model", "profile"]

if TYPE_CHECKING:
    from flowmm.models import load_model
    from flowmm.plans import MethodParameters, Plan
    from flowmm.profiler import profile
    from flowmm.runtime import Run, compress


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flowmm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
