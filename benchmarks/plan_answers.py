"""How often plans change what the model answers, on fresh generated contexts that are asked several questions each.

``python benchmarks/plan_answers.py PLAN [PLAN ...]`` writes ``results/plan_answers.json``. An answer is changed
if any of its greedy tokens is another one than with the full cache. Plans are compared with the first one, in pairs.

One question per context, as in an evaluation of 200 prompts, leaves a standard error of 1.5 to 2 points in ``blind``,
and plans differ by less; several questions on one compression cost little and tell them apart. Contexts come from a
seed that no calibration uses, so that plans may be chosen by this while the test split stays unseen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.joint_costs import Arrangement
from flowmm.profiler.samples import CalibrationSample
from flowmm.profiler.sensitivity import MIXED, ROWS_PER_BATCH, Reading, trials_of
from flowmm.runtime.measurements import environment
from flowmm.runtime.replay import reading_caches

RESULT = Path(__file__).with_name("results") / "plan_answers.json"
# Each needs a prefill of its own in `aware`.
AWARE_QUESTIONS = 3


def asking(sample: CalibrationSample, count: int) -> list[CalibrationSample]:
    """The prompt with its own question and with further ones in its place, `count` in all, at most."""
    *history, last = sample.messages
    *context, question = last["content"]
    others = [
        replace(sample, messages=(*history, {**last, "content": [*context, {**question, "text": text}]}), further=())
        for text in sample.further[: count - 1]
    ]
    return [replace(sample, further=()), *others]


def readings(model: LoadedModel, plan: Plan, sample: CalibrationSample, protocol: str) -> list[Reading]:
    """Prefilled prompts with the full cache's answers: one per question in ``aware``, one for all in ``blind``."""
    samples = asking(sample, AWARE_QUESTIONS) if protocol == "aware" else [sample]
    return [Reading.of(model, plan, trial) for each in samples for trial in trials_of(model, each, (protocol,))]


@torch.no_grad()
def changed(reading: Reading, arrangements: Sequence[Arrangement]) -> np.ndarray:
    """``[answers, arrangements]`` bool: is any token of the answer another one."""
    found = []
    with reading_caches(reading.host):
        for start in range(0, len(arrangements), ROWS_PER_BATCH):
            batch = arrangements[start : start + ROWS_PER_BATCH]
            caches = [reading.cache(one.settings(reading.modes)) for one in batch]
            fed = zip(reading.answers, reading.logits(caches), strict=True)
            others = [(logits.argmax(-1) != answer.wanted.argmax(-1)).any(-1) for answer, logits in fed]
            found.append(torch.stack(others))
    return torch.cat(found, dim=1).cpu().numpy()


def described(shares: np.ndarray) -> list[dict[str, float]]:
    """Of ``[contexts, arrangements]`` shares of changed answers: percent, and the paired difference to the first."""
    apart = shares - shares[:, :1]
    n = max(1, len(shares) - 1) ** 0.5
    return [
        {
            "changed_percent": round(100 * float(own.mean()), 2),
            "standard_error": round(100 * float(own.std()) / n, 2),
            "minus_first": round(100 * float(difference.mean()), 2),
            "standard_error_of_difference": round(100 * float(difference.std()) / n, 2),
        }
        for own, difference in zip(shares.T, apart.T, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--budgets", default="0.05")
    parser.add_argument("--contexts", type=int, default=120)
    parser.add_argument("--seed", type=int, default=901)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, dtype="fp32")
    plans = {name: Plan.load(resolve_plan(name)) for name in arguments.plans}
    for name, plan in plans.items():
        if plan.calibration is not None and plan.calibration.seed == arguments.seed:
            raise SystemExit(f"{name}: calibrated with seed {arguments.seed}; expected contexts that no plan has seen")
    totals = [float(total) for total in arguments.budgets.split(",")]
    cases = [(name, total) for total in totals for name in plans]
    arrangements = [Arrangement.planned(plans[name], total) for name, total in cases]
    shares: dict[str, list[np.ndarray]] = {protocol: [] for protocol in MIXED}
    for sample in load_calibration("pocket", limit=arguments.contexts, seed=arguments.seed):
        for protocol, of in shares.items():
            asked = readings(model, next(iter(plans.values())), sample, protocol)
            of.append(np.concatenate([changed(reading, arrangements) for reading in asked]).mean(0))
    result: dict[str, Any] = {
        "environment": environment(),
        "contexts": arguments.contexts,
        "seed": arguments.seed,
        "cases": [{"plan": plans[name].short_id, "budget": total} for name, total in cases],
        "protocols": {protocol: described(np.array(of)) for protocol, of in shares.items()},
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for (name, total), *of in zip(cases, *result["protocols"].values(), strict=True):
        print(name, total, *(f"{protocol}: {one}" for protocol, one in zip(shares, of, strict=True)), sep="\n  ")


if __name__ == "__main__":
    main()
