"""What is written down of a measurement: a figure with its spread, a row per cache, and where it was taken."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers

import flowmm

CacheKind = Literal["dynamic", "static", "flowmm", "flowmm-static"]
CACHE_KINDS: tuple[CacheKind, ...] = get_args(CacheKind)


@dataclass(frozen=True)
class Figure:
    """Several measurements: their median, the quarter that lies below and above, the least and the greatest."""

    median: float
    low: float
    high: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        if len(values) < 2:
            return cls(*[values[0]] * 5)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One cache on one prompt.

    Attributes:
        cache: ``dynamic`` and ``static`` are transformers' own, ``flowmm`` grows, ``flowmm-static`` has a fixed shape.
        method: preset of a flowmm cache; None: the plan's own, or transformers' cache.
        budget: share kept of the prompt.
        compiled: merging, and decoding of a cache of fixed shape, ran as compiled code.
        prefill_s: seconds in the text layers, compression included.
        ttft_s: seconds from prepared inputs (pixels) to the first token on the host.
        token_s: seconds per later token (TPOT).
        prefill_ratio, ttft_ratio, token_ratio: to the dynamic cache, in pairs.
        prefill_cpu_ratio, token_cpu_ratio: of processor time, which other processes disturb less; None on a GPU.
        tokens_per_s: of the whole batch.
        prompt_bytes: keys, values and biases of the entries kept of the prompt, as the tensors hold them.
        contract_bytes: sum over layers of kept x 2 x KV heads x head dimension x item size, from the plan alone.
        reserved_bytes: memory beyond the entries, for tokens to come.
        peak_bytes: most memory that the prefill held beyond what was held before it; the cache it leaves is included.
        peak_over_dynamic_layers: by how much that exceeds the dynamic cache's, in KV bytes of one full layer.
        compile_prefill_s, compile_token_s: what the first call took beyond a later one; None: not compiled.
        roofline_s: bytes that a token must read over the best bandwidth seen, see :mod:`flowmm.runtime.roofline`.
        roofline_ratio: `token_s` over `roofline_s`.
        roofline_paired: the same, each token against a read that was timed with its turn.
    """

    tokens: int
    batch: int
    cache: CacheKind
    method: str | None
    budget: float
    compiled: bool
    prefill_s: Figure
    prefill_ratio: Figure
    ttft_s: Figure
    ttft_ratio: Figure
    token_s: Figure
    token_ratio: Figure
    prefill_cpu_ratio: Figure | None
    token_cpu_ratio: Figure | None
    tokens_per_s: float
    prompt_bytes: int
    contract_bytes: int
    reserved_bytes: int
    peak_bytes: int
    peak_over_dynamic_layers: float
    compile_prefill_s: float | None
    compile_token_s: float | None
    roofline_s: float
    roofline_ratio: float
    roofline_paired: Figure


def environment(note: str = "") -> dict[str, Any]:
    """JSON values: date, machine kind (never its name), threads, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {_processor()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flowmm": flowmm.__version__,
        "note": note,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([*names[:1], platform.machine()])
