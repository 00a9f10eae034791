"""Do other calibration prompts give the same layer budgets? Curves from two disjoint sets of prompts, compared.

``python benchmarks/budget_stability.py`` writes ``benchmarks/results/budget_stability.json``. For each total budget it
says by how much the budgets of the two sets differ, and what each set's budgets cost on the other set's prompts:
next-token KL with all layers compressed at once, against that of the set's own budgets on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.samples import CalibrationSample
from flowmm.profiler.sensitivity import (
    ANSWER_TOKENS,
    MIXED,
    PROTOCOLS,
    Sensitivity,
    measure_sensitivity,
    with_measured_budgets,
)
from flowmm.runtime.bench import environment
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.replay import answer_greedily, build_trial, divergence, feed, prefill, reading_caches

RESULT = Path(__file__).with_name("results") / "budget_stability.json"
BUDGETS = (0.02, 0.05, 0.1, 0.2)


@torch.no_grad()
def costs(model: LoadedModel, plans: Sequence[Plan], sample: CalibrationSample) -> np.ndarray:
    """``[plans, budgets]``: next-token KL of whole compressed caches on one prompt, mean over protocols."""
    host, rows = model.model, []
    for name in MIXED:
        chat = PROTOCOLS[name](sample.messages)
        if chat is None:
            continue
        trial = build_trial(model, chat)
        prefilled = prefill(host, trial)
        with reading_caches(host):
            full = prefilled.hide_last(prefilled.full_cache(), trial.fed_again)
            tokens = answer_greedily(host, full, trial.continuation, trial.positions, ANSWER_TOKENS).tokens
            forced = torch.cat([trial.continuation, tokens[:, :-1]], dim=1)
            places = trial.positions[..., :1] + torch.arange(forced.shape[1], device=forced.device)
            full = prefilled.hide_last(prefilled.full_cache(), trial.fed_again)
            wanted = feed(host, full, forced, places, keep=ANSWER_TOKENS)
            caches = [
                prefilled.hide_last(prefilled.cache(prefilled.settings(plan, plan.method, budget)), trial.fed_again)
                for plan in plans
                for budget in BUDGETS
            ]
            logits = feed(host, FlowCache.stack(caches), forced.expand(len(caches), -1), places, keep=ANSWER_TOKENS)
        rows.append(divergence(wanted, logits).mean(-1).double().numpy().reshape(len(plans), len(BUDGETS)))
    return np.mean(rows, axis=0)


def described(plans: Sequence[Plan], cost: np.ndarray, index: int) -> dict[str, Any]:
    """One total: `cost` is ``[sets, prompts, plans]``, of each set's prompts under each set's budgets."""
    first, second = (np.array(plan.layer_budgets(BUDGETS[index])) for plan in plans)
    # Foreign budgets minus own, prompt by prompt.
    foreign = np.concatenate([cost[0, :, 1] - cost[0, :, 0], cost[1, :, 0] - cost[1, :, 1]])
    error = float(foreign.std(ddof=1) / len(foreign) ** 0.5)
    return {
        "budget": BUDGETS[index],
        "first": first.round(4).tolist(),
        "second": second.round(4).tolist(),
        "difference_of_share": (2 * np.abs(first - second) / (first + second)).round(3).tolist(),
        "entries_moved": round(float(np.abs(first - second).sum() / 2 / first.sum()), 4),
        "cost_with_own_budgets": round(float((cost[0, :, 0].mean() + cost[1, :, 1].mean()) / 2), 5),
        "foreign_minus_own": round(float(foreign.mean()), 5),
        "standard_error": round(error, 5),
        "within_one_standard_error": bool(foreign.mean() <= error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--plan", default="pocket")
    parser.add_argument("--prompts", type=int, default=32, help="of each set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="other processes were running on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, plan = load_model(arguments.model), Plan.load(resolve_plan(arguments.plan))
    samples = iter(load_calibration("pocket", limit=2 * arguments.prompts))
    sets = [list(islice(samples, arguments.prompts)) for _ in range(2)]
    start = time.monotonic()
    curves: list[Sensitivity] = [measure_sensitivity(model, plan, prompts) for prompts in sets]
    seconds = time.monotonic() - start
    plans = [with_measured_budgets(plan, of_set, MIXED) for of_set in curves]
    cost = np.array([[costs(model, plans, sample) for sample in prompts] for prompts in sets])
    result = {
        "environment": environment(arguments.note),
        "model": {"source": model.source, "weights_sha256": model.fingerprint().weights_sha256},
        "prompts_per_set": arguments.prompts,
        "seconds_per_set": round(seconds / 2, 1),
        "totals": [described(plans, cost[..., index], index) for index in range(len(BUDGETS))],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["totals"], indent=2))


if __name__ == "__main__":
    main()
