"""What a measurement was made with; the kind of machine, never its name."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import flowmm


def environment(note: str = "") -> dict[str, Any]:
    """JSON values: date, machine kind, threads, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flowmm": flowmm.__version__,
        "note": note,
    }
