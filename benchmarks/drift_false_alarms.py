"""How often the drift check is wrong where nothing drifted, and what it finds where something did.

``python benchmarks/drift_false_alarms.py`` profiles 600 generated prompts once, compares a thousand pairs of disjoint
draws from them, and writes ``benchmarks/results/drift_false_alarms.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmm.models import load_model
from flowmm.plans import Plan, diff
from flowmm.profiler import open_calibration, profile
from flowmm.profiler.prompt_rho import PromptRho, redrawn
from flowmm.runtime.measurements import environment

RESULT = Path(__file__).with_name("results") / "drift_false_alarms.json"
SIZES = (16, 32, 64)
# Further prompts than a shipped plan was made from.
SEED = 500


def shares(plan: Plan, rho: np.ndarray, prompts: int, pairs: int) -> dict[str, Any]:
    """Shares of pairs of profiles of so many prompts each, from the same distribution, that raise an alarm."""
    noise = np.random.default_rng(prompts)
    names = ("default", "statistics_alone", "tolerance_alone", "theta_on_a_layer", "shifted_by_two_tolerances")
    alarms = dict.fromkeys(names, 0)
    doubtful = plan.method.model_copy(update={"theta": float(rho[:, 3].mean())})
    near = plan.model_copy(update={"method": doubtful})
    for _ in range(pairs):
        first, second = np.split(noise.permutation(len(rho))[: 2 * prompts], 2)
        one, other = redrawn(plan, rho[first]), redrawn(plan, rho[second])
        moved = rho[second].copy()
        moved[:, 4] += 0.04
        alarms["default"] += diff(one, other).drifted
        alarms["statistics_alone"] += diff(one, other, tol=0).drifted
        alarms["tolerance_alone"] += diff(one, other, alpha=1).drifted
        alarms["theta_on_a_layer"] += diff(redrawn(near, rho[first]), redrawn(near, rho[second])).drifted
        alarms["shifted_by_two_tolerances"] += diff(one, redrawn(plan, moved)).drifted
    return {"prompts": prompts} | {name: round(count / pairs, 4) for name, count in alarms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.parquet"
        samples = open_calibration(["pocket"], limit=arguments.prompts, seed=SEED)
        plan = profile(load_model("pocket"), samples, source="pocket", seed=SEED, records=records)
        rho = PromptRho.of_plan(records, plan).rho
    result = {
        "environment": environment("counts, not times"),
        "drawn_from": arguments.prompts,
        "pairs": arguments.pairs,
        "weights_sha256": plan.model.weights_sha256,
        "alarms": [shares(plan, rho, prompts, arguments.pairs) for prompts in SIZES],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["alarms"], indent=2))


if __name__ == "__main__":
    main()
