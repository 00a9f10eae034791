"""Do other calibration prompts give the same layer budgets and choices?

``python benchmarks/budget_stability.py`` writes ``benchmarks/results/budget_stability.json``. The first set of prompts
is the one that the plan was measured on; choices and budgets are measured once more, from nothing, on the calibration
prompts that come after it. Both plans are then compared: by how much the budgets differ at each total, and by what they
cost on fresh prompts that neither has seen (a bound on how likely the next token is another one, and next-token KL).
What the second plan's budgets cost together with the first one's choices tells budgets from choices.

``--budgets-alone RULE`` keeps the plan's choices and measures budgets on either of two sets, from equal layers: joint
ones, or from sensitivity curves of one layer at a time. It writes ``benchmarks/results/budget_stability_RULE.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.decisions import Budgets, measure_layers
from flowmm.profiler.joint_costs import Arrangement, JointPrompts
from flowmm.profiler.samples import Sample
from flowmm.runtime.measurements import environment

RESULTS = Path(__file__).with_name("results")
TOTALS = (0.05, 0.1, 0.2)
SHARE = 0.1


def without_budgets(plan: Plan) -> Plan:
    """`plan` with nothing of what was measured about its layers but rho and choices."""
    changes = {"curve": None, "budget": plan.method.budget}
    layers = tuple(layer.model_copy(update=changes) for layer in plan.layers)
    return Plan.loads(plan.model_copy(update={"layers": layers, "allocations": None, "budget_rule": None}).dumps())


def remeasured(plan: Plan) -> Plan:
    """`plan` with nothing of what was measured about its layers but rho."""
    bare = without_budgets(plan)
    # Of a method that no choice was measured for: modes by rho.
    modes = plan.layer_modes(plan.method.model_copy(update={"n_sink": plan.method.n_sink + 1}))
    layers = tuple(
        layer.model_copy(update={"choice": None, "mode": mode}) for layer, mode in zip(bare.layers, modes, strict=True)
    )
    return Plan.loads(bare.model_copy(update={"layers": layers, "sensitivity": None}).dumps())


def measured_again(model: LoadedModel, plan: Plan, samples: Sequence[Sample], protocols: Sequence[str]) -> Plan:
    """`plan` as its rules would have made it on these prompts."""
    budgets: Budgets | None = "joint" if plan.allocations else "measured" if plan.layers[0].curve else None
    choices = plan.sensitivity is not None and plan.sensitivity.budgets is not None
    return measure_layers(model, remeasured(plan), samples, budgets=budgets, choices=choices, protocols=protocols)


def described(plans: Sequence[Plan], cost: np.ndarray, divergence: np.ndarray, index: int) -> dict[str, Any]:
    """One total; `cost` and `divergence` are ``[fresh prompts, arrangements, totals]``.

    Arrangements are the first plan, the second, and the second's budgets with the first's choices.
    """
    total = TOTALS[index]
    first, second = (np.array(plan.layer_budgets(total)) for plan in plans)
    apart, budgets_apart = (cost[:, other, index] - cost[:, 0, index] for other in (1, 2))
    n = len(apart) ** 0.5
    errors = cost[:, :, index].std(0, ddof=1) / n
    of_share = np.abs(first - second) / np.maximum(first, second)
    return {
        "total": total,
        "first": first.round(4).tolist(),
        "second": second.round(4).tolist(),
        "difference_of_share": of_share.round(3).tolist(),
        "entries_moved": round(float(np.abs(first - second).sum() / 2 / first.sum()), 4),
        "score": cost[:, :, index].mean(0).round(5).tolist(),
        "standard_error_of_score": errors.round(5).tolist(),
        "second_minus_first": round(float(apart.mean()), 5),
        "standard_error_of_difference": round(float(apart.std(ddof=1) / n), 5),
        "second_budgets_minus_first": round(float(budgets_apart.mean()), 5),
        "standard_error_of_budgets": round(float(budgets_apart.std(ddof=1) / n), 5),
        "kl_nats": divergence[:, :, index].mean(0).round(5).tolist(),
        "within_a_tenth_of_each_share": bool(of_share.max() <= SHARE),
        "within_one_standard_error_of_score": bool(abs(apart.mean()) <= errors[:2].min()),
        "within_one_standard_error_of_difference": bool(abs(apart.mean()) <= apart.std(ddof=1) / n),
        "budgets_within_one_standard_error_of_score": bool(abs(budgets_apart.mean()) <= errors[[0, 2]].min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--plan", default="pocket", help="measured with --sensitivity-prompts of the same number")
    parser.add_argument("--prompts", type=int, default=32, help="of each set")
    parser.add_argument("--budgets-alone", choices=get_args(Budgets), help="two sets' budgets with the plan's choices")
    parser.add_argument("--fresh", type=int, default=64, help="prompts that neither plan has seen")
    parser.add_argument("--second", type=Path, help="where the second plan is kept: read if it is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="other processes were running on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan.load(resolve_plan(arguments.plan))
    model = load_model(arguments.model, dtype="fp32" if plan.model.dtype == "float32" else "auto")
    if plan.sensitivity is None or (plan.sensitivity.n_samples != arguments.prompts and not arguments.budgets_alone):
        raise SystemExit(f"{arguments.plan}: expected a plan whose layers were measured on {arguments.prompts} prompts")
    seen = max(2 * arguments.prompts, plan.calibration.n_samples if plan.calibration else 0)
    seed = plan.calibration.seed if plan.calibration else 0
    samples = load_calibration("pocket", limit=seen + arguments.fresh, seed=seed)
    protocols = plan.sensitivity.protocols
    start = time.process_time()
    known = arguments.second is not None and arguments.second.exists()
    sets = [samples[place * arguments.prompts : (place + 1) * arguments.prompts] for place in (0, 1)]
    if arguments.budgets_alone:
        bare, rule = without_budgets(plan), arguments.budgets_alone
        plans = [measure_layers(model, bare, of, budgets=rule, choices=False, protocols=protocols) for of in sets]
    else:
        plans = [plan, Plan.load(arguments.second) if known else measured_again(model, plan, sets[1], protocols)]
        if arguments.second is not None and not known:
            plans[1].save(arguments.second)
    seconds = time.process_time() - start
    fresh = JointPrompts.read(model, plan, samples[seen:], protocols=protocols, hold=True)
    asked = [Arrangement.planned(each, total) for each in plans for total in TOTALS]
    asked += [replace(Arrangement.planned(plan, total), ratios=plans[1].layer_budgets(total)) for total in TOTALS]
    both = fresh.costs(asked, of=("shift_bound", "nats")).reshape(len(fresh), 2, -1, len(TOTALS))
    cost, divergence = both[:, 0], both[:, 1]
    result = {
        "environment": environment(arguments.note),
        "model": {"source": model.source, "weights_sha256": model.fingerprint().weights_sha256},
        "plan": plan.short_id,
        "prompts_per_set": arguments.prompts,
        "fresh_prompts": len(fresh),
        "cpu_seconds": None if known else round(seconds, 1),
        "choices": [[str(layer.choice) if layer.choice else None for layer in each.layers] for each in plans],
        "totals": [described(plans, cost, divergence, index) for index in range(len(TOTALS))],
    }
    suffix = f"_{arguments.budgets_alone}" if arguments.budgets_alone else ""
    result_file = RESULTS / f"budget_stability{suffix}.json"
    result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"choices": result["choices"], "totals": result["totals"]}, indent=2))


if __name__ == "__main__":
    main()
