"""Cells per minute of the full grid: 5 budgets x 8 methods and controls x 3 protocols, on a few cases of each task.

``python benchmarks/evaluation_grid.py --per-task 4`` prints JSON. The whole grid (``--per-task 200``) is 120 000 cells
with five tasks; ``minutes`` says how long it would take at the measured pace.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.protocols import PROTOCOLS
from flowmm.evaluation.runner import Grid, evaluate, measuring_here
from flowmm.evaluation.suite import pocket_cases
from flowmm.evaluation.workers import measuring_in_processes
from flowmm.models import load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.pocket.tasks import TASKS
from flowmm.runtime.measurements import environment

METHODS = "robust,paper,aware,reuse,same_pivots_evicted,any_pivot,inverted,random_pivots"
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.6)
FULL_GRID_PER_TASK = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan.load(resolve_plan("pocket"))
    grid = Grid(tuple(parse_methods(METHODS, plan.method.theta)), BUDGETS, tuple(PROTOCOLS))
    if arguments.workers > 1:
        measure = measuring_in_processes(arguments.workers, "pocket", "cpu", "fp32", plan)
    else:
        measure = measuring_here(load_model("pocket", device="cpu", dtype="fp32"), plan)
    start = time.perf_counter()
    rows = evaluate(measure, pocket_cases("validation", arguments.per_task), grid)
    seconds = time.perf_counter() - start
    pace = 60 * len(rows) / seconds
    lengths = [row.tokens for row in rows]
    full_grid = len(TASKS) * FULL_GRID_PER_TASK * len(PROTOCOLS) * len(grid.cells())
    result = {
        "environment": environment(arguments.note),
        "workers": arguments.workers,
        "methods": METHODS.split(","),
        "budgets": BUDGETS,
        "protocols": list(PROTOCOLS),
        "cells": len(rows),
        "tokens": {"mean": round(statistics.mean(lengths)), "min": min(lengths), "max": max(lengths)},
        "seconds": round(seconds, 2),
        "cells_per_minute": round(pace),
        "full_grid": {"cells": full_grid, "minutes": round(full_grid / pace, 1)},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
