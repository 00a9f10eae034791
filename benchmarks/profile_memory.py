"""Resident memory of a profile of 1,000 generated prompts: it must not grow with their number.

``python benchmarks/profile_memory.py --model pocket`` writes ``benchmarks/results/profile_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from flowmm.models import load_model
from flowmm.profiler import open_calibration, profile
from flowmm.profiler.kernel_caches import bound_kernel_caches
from flowmm.runtime.measurements import environment

RESULT = Path(__file__).with_name("results") / "profile_memory.json"
EVERY = 100
MIB = 2**20


def resident_mib() -> float:
    """Resident set size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--default-kernel-caches", action="store_true", help="without what 'flowmm profile' sets")
    parser.add_argument("--note", default="other processes were running on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.default_kernel_caches:
        bound_kernel_caches()
    model = load_model(arguments.model)
    series: dict[int, float] = {}

    def watch(finished: int, total: int | None) -> None:
        if finished % EVERY == 0:
            series[finished] = round(resident_mib(), 1)

    loaded, start = resident_mib(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.parquet"
        prompts = open_calibration(["pocket"], limit=arguments.prompts)
        plan = profile(model, prompts, source="pocket", records=records, progress=watch)
        size = records.stat().st_size / MIB
    result = {
        "environment": environment(arguments.note),
        "model": {"source": model.source, "layers": len(plan.layers)},
        "prompts": arguments.prompts,
        "seconds": round(time.monotonic() - start, 1),
        "records_mib": round(size, 2),
        "resident_mib": {
            "model_loaded": round(loaded, 1),
            "after_prompts": series,
            "plan_made": round(resident_mib(), 1),
            "growth_after_first_100": round(max(series.values()) - series[EVERY], 1),
        },
    }
    target = RESULT.with_stem(RESULT.stem + "_default_caches") if arguments.default_kernel_caches else RESULT
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["resident_mib"]))


if __name__ == "__main__":
    main()
