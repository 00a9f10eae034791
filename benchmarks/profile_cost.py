"""What profiling a prompt costs over a plain prefill: interleaved runs, medians.

``python benchmarks/profile_cost.py`` writes ``benchmarks/results/profile_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowmm.models.random_weights import image_prompt, random_model
from flowmm.profiler import record_flow
from flowmm.runtime.measurements import environment

RESULT = Path(__file__).with_name("results") / "profile_cost.json"
# Length in tokens to the largest acceptable ratio.
TARGETS = {2048: 1.3, 8192: 1.6}


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@torch.no_grad()
def compare(model: Any, length: int, repeats: int) -> dict[str, float]:
    """Medians over interleaved runs, so that other load on the machine falls on both alike."""
    inputs = image_prompt(model, length)
    runs = [
        (
            seconds(lambda: model(**inputs, use_cache=False, logits_to_keep=1)),
            seconds(lambda: record_flow(model, inputs)),
        )
        for _ in range(repeats + 1)
    ]
    plain, recorded = zip(*runs[1:], strict=True)
    pairs = [one / other for one, other in zip(recorded, plain, strict=True)]
    return {
        "tokens": length,
        "prefill_seconds": round(statistics.median(plain), 4),
        "record_seconds": round(statistics.median(recorded), 4),
        "ratio": round(statistics.median(recorded) / statistics.median(plain), 3),
        "ratio_of_pairs_median": round(statistics.median(pairs), 3),
        "target": TARGETS[length],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="other processes were running on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = random_model()
    rows = [compare(model, length, arguments.repeats) for length in TARGETS]
    shape = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    result = {"environment": environment(arguments.note), "model": shape, "repeats": arguments.repeats, "rows": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
