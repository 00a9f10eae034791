"""The online check's false alarms, what it catches, and what it costs.

``python benchmarks/online_check.py`` writes ``benchmarks/results/online_check.json``. Prompts are the pocket model's;
the cost is that of a prefill on a random-weight model. ``--cost-only`` takes less than four minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import flowmm
from flowmm.models import LoadedModel, load_model
from flowmm.models.random_weights import image_prompt, random_model
from flowmm.plans import Plan, resolve_plan
from flowmm.pocket.tasks import Sample, sample, samples
from flowmm.runtime import OnlineCheck, cache
from flowmm.runtime.allocator import keep_freed_memory
from flowmm.runtime.bench import fixed_plan
from flowmm.runtime.flow import sampled_rho
from flowmm.runtime.measurements import environment
from flowmm.runtime.online import CheckAction

# Tokens of the prompts whose prefill is timed, and the share of the time that each gets.
SHARES_OF_TIME = {2048: 0.65, 4096: 0.35}
RESULT = Path(__file__).with_name("results") / "online_check.json"


@torch.no_grad()
def online_rho(model: LoadedModel, plan: Plan, prompts: Iterable[Sample]) -> np.ndarray:
    """``[prompts, layers, 2]``: sampled rho and its standard error."""
    rows = []
    for prompt in prompts:
        with flowmm.compress(model.model, plan, budget=1.0, check="adapt") as run:
            model.model(**model.build_inputs(prompt.messages()), logits_to_keep=1)
        rows.append([(layer.rho[0], layer.rho_standard_error[0]) for layer in run.report.layers if layer.rho])  # ty: ignore[not-subscriptable]
    return np.array(rows)


def alarms(rho: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """``[prompts]`` bool: the default check reports at least one layer."""
    check = OnlineCheck("warn", ())
    allowed = np.maximum(check.tolerance, check.sigmas * np.sqrt(std**2 + rho[..., 1] ** 2))
    return (np.abs(rho[..., 0] - mean) > allowed).any(-1)


def reliability(count: int) -> dict[str, Any]:
    """Shares of prompts that the default check reports."""
    model, plan = load_model("pocket"), Plan.load(resolve_plan("pocket"))
    measured = [layer.rho for layer in plan.layers if layer.rho is not None]
    mean, std = (np.array([getattr(layer, name) for layer in measured]) for name in ("mean", "std"))
    clean = online_rho(model, plan, samples("test", count, seed=5))
    foreign = [sample("text_needle", "test", index, images=3, facts=8, fillers=4) for index in range(50)]
    orders = [list(order) for order in itertools.permutations(range(len(mean))) if list(order) != sorted(order)]
    caught = [float(alarms(clean[:50], mean[order], std[order]).mean()) for order in orders]
    swapped = [list(range(len(mean))) for _ in range(len(mean) - 1)]
    for first, order in enumerate(swapped):
        order[first], order[first + 1] = order[first + 1], order[first]
    return {
        "prompts": count,
        "clean_alarms": float(alarms(clean, mean, std).mean()),
        "fewer_images_alarms": float(alarms(online_rho(model, plan, foreign), mean, std).mean()),
        "permuted_plans": len(orders),
        "permuted_plan_alarms_mean": round(float(np.mean(caught)), 4),
        "neighbours_swapped_alarms": [float(alarms(clean[:50], mean[order], std[order]).mean()) for order in swapped],
    }


class _Timed:
    """A function, and the CPU seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = self.function(*args, **kwargs)
        self.seconds += time.process_time() - start
        return result


@torch.no_grad()
def cost(model: Any, length: int, seconds: float) -> dict[str, Any]:
    """CPU time of a full-budget prefill with the check over that of one without, in turns with a control: a second
    prefill without. Medians of paired ratios with 95 % bootstrap intervals; and the time spent in the check's own
    functions as a share of the prefill, which other processes disturb less.
    """
    inputs = image_prompt(model, length)
    plan = fixed_plan(model)
    own = _Timed(sampled_rho)

    def prefill(check: CheckAction | None) -> float:
        with flowmm.compress(model, plan, budget=1.0, check=check), patch.object(cache, "sampled_rho", own):
            start = time.process_time()
            model(**inputs, logits_to_keep=1)
            return time.process_time() - start

    ways: tuple[tuple[str, CheckAction | None], ...] = (("first", None), ("second", None), ("checked", "adapt"))
    until = time.monotonic() + seconds
    for _, check in ways:
        prefill(check)
    # Every order equally often: whichever comes first may find the processor busier.
    orders, taken, shares = list(itertools.permutations(ways)), [], []
    while time.monotonic() < until or not taken:
        own.seconds = 0.0
        times = {name: prefill(check) for name, check in orders[len(taken) % len(orders)]}
        taken.append([times[name] for name, _ in ways])
        shares.append(own.seconds / times["checked"])
    first, second, checked = np.array(taken).T
    return {
        "tokens": length,
        "turns": len(taken),
        "seconds_without": round(float(np.median([first, second])), 3),
        "ratio": _median_with_interval(checked / np.sqrt(first * second)),
        "control": _median_with_interval(second / first),
        "own_share_median": round(statistics.median(shares), 4),
        "target": 1.02,
    }


def _median_with_interval(ratios: np.ndarray) -> dict[str, Any]:
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    quartiles = [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])]
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"median": round(float(np.median(ratios)), 4), "interval": interval, "quartiles": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=3.0, help="for the costs, in all")
    parser.add_argument("--cost-only", action="store_true", help="keep the shares of prompts that are on record")
    parser.add_argument("--note", default="other processes were running on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost_only:
        found = json.loads(RESULT.read_text(encoding="utf-8"))["reliability"]
    else:
        found = reliability(arguments.prompts)
    kept, model = keep_freed_memory(), random_model()
    costs = [cost(model, length, 60 * arguments.minutes * share) for length, share in SHARES_OF_TIME.items()]
    result = {
        "environment": environment(arguments.note),
        "reliability": found,
        "cost": costs,
        "freed_memory_kept": kept,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
