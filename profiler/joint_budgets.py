"""Layer budgets with all layers compressed at once: entries move from layer to layer while their total stays.

Curves of one layer at a time miss that layers stand in for each other: where two can find the same thing, compressing
either alone costs nothing. Cutting one layer after the other, the cheapest cut first, ends where the last cuts are
dear: which of two such layers is given up first is decided while neither costs anything yet. A transfer is measured at
the total it is for, and can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import fsum

import numpy as np

from flowmm.plans import LayerPlan, Plan, SensitivityFingerprint
from flowmm.plans.allocation import along_path
from flowmm.plans.layers import scale_budgets
from flowmm.profiler.joint_costs import BUDGETS, Arrangement, JointPrompts, blocks
from flowmm.profiler.profiling import Progress
from flowmm.profiler.racing import improved, part_ends, winner

Ratios = tuple[float, ...]
"""Of the entries that each layer keeps."""

# No transfer takes a layer below this ratio.
LEAST = 0.005
# What one layer gives to another, in multiples of the total; less is lost in the noise of choosing other entries.
AMOUNTS = (0.25, 0.5, 1.0, 2.0)
# What the layers that keep least give together, of all they can spare.
SHARES = (0.5, 1.0)
# Per total.
RACES = 10


def transfers(ratios: Ratios, total: float) -> list[Ratios]:
    """All layers' ratios after one transfer.

    One block of layers gives to another one, one layer to the rest of its block or the rest to it, and those blocks
    that keep least give together, to another block or to all others. Layers give in proportion to what they can spare,
    and take in proportion to what they keep.
    """
    parts = [list(block) for block in blocks(len(ratios))]
    pairs = [(giver, taker) for giver in parts for taker in parts if giver is not taker]
    for part in parts:
        for layer in part if len(part) > 1 else ():
            rest = [other for other in part if other != layer]
            pairs += [([layer], rest), (rest, [layer])]
    wanted = [(givers, takers, amount * total * len(givers)) for givers, takers in pairs for amount in AMOUNTS]
    rising = sorted(parts, key=lambda part: fsum(ratios[layer] for layer in part) / len(part))
    for count in range(1, len(parts)):
        givers, others = [layer for part in rising[:count] for layer in part], rising[count:]
        spare = _spare(ratios, givers)
        for takers in (*others, [layer for part in others for layer in part]):
            wanted += [(givers, takers, share * spare) for share in SHARES if share * spare >= AMOUNTS[0] * total]
    found = (_transferred(ratios, *each) for each in wanted)
    return list(dict.fromkeys(after for after in found if after is not None))


def _transferred(ratios: Ratios, givers: Sequence[int], takers: Sequence[int], given: float) -> Ratios | None:
    """None where the givers have not so much, or the takers not so much room."""
    spare, kept, after = _spare(ratios, givers), fsum(ratios[layer] for layer in takers), list(ratios)
    if given > spare:
        return None
    for layer in givers:
        after[layer] -= given * (ratios[layer] - LEAST) / spare
    for layer in takers:
        after[layer] += given * ratios[layer] / kept
    return tuple(after) if max(after) <= 1 else None


def _spare(ratios: Ratios, layers: Sequence[int]) -> float:
    return fsum(ratios[layer] - LEAST for layer in layers)


def measure_allocations(
    prompts: JointPrompts, plan: Plan, totals: Sequence[float] = BUDGETS, *, progress: Progress | None = None
) -> tuple[Ratios, ...]:
    """What layers keep of each of the totals :data:`BUDGETS`, and of everything.

    At each total the transfer that gains most is made, as long as one holds (:mod:`flowmm.profiler.racing`). The
    smallest total begins with what `plan` gives its layers, each other one in proportion to what the one before found.

    Args:
        prompts: held in memory, because each transfer asks them again.
        plan: gives each layer's mode and parameters.
        totals: those at which transfers are made.
        progress: called with (races done, races at most).
    """
    path = list[Ratios]()
    for total in BUDGETS:
        start = scale_budgets(path[-1] if path else plan.layer_budgets(total), total)
        path.append(_after_transfers(prompts, plan, total, start, progress) if total in totals else start)
        prompts.forget_shared()
    return (*path, (1.0,) * len(plan.layers))


def _after_transfers(
    prompts: JointPrompts, plan: Plan, total: float, start: Ratios, progress: Progress | None
) -> Ratios:
    planned, before = Arrangement.planned(plan, total), BUDGETS.index(total) * RACES

    def told(done: int) -> None:
        if progress is not None:
            progress(before + done, RACES * len(BUDGETS))

    def race(ratios: Ratios, number: int) -> Ratios | None:
        told(number)
        return _better(prompts.turned(number), planned, total, ratios)

    found = improved(start, race, RACES)
    told(RACES)
    return found


def _better(prompts: JointPrompts, planned: Arrangement, total: float, ratios: Ratios) -> Ratios | None:
    """The transfer that gains most and holds, or ``None``."""

    def measure(part: JointPrompts, proposed: Sequence[Ratios]) -> np.ndarray:
        return part.costs([replace(planned, ratios=one) for one in (ratios, *proposed)], forget=False)

    return winner(transfers(ratios, total), prompts.parts(part_ends(len(prompts))), measure)


def with_budgets_of(plan: Plan, other: Plan) -> Plan:
    """`plan` with the layer budgets of another plan of the same architecture, at every total; its note says so.

    Raises:
        PlanMismatchError: the other plan was made for another architecture.
    """
    other.check_model(plan.model)
    ratios = other.layer_budgets(plan.method.budget)
    layers = tuple(
        layer.model_copy(update={"curve": of.curve, "budget": ratio})
        for layer, of, ratio in zip(plan.layers, other.layers, ratios, strict=True)
    )
    changes = {
        "layers": layers,
        "allocations": other.allocations,
        "sensitivity": other.sensitivity,
        "budget_rule": other.budget_rule,
        "note": f"Layer budgets were measured for plan {other.short_id}, with its layers' choices.",
    }
    return type(plan).model_validate(dict(plan) | changes, by_name=True)


def with_allocations(plan: Plan, path: Sequence[Ratios], protocols: Sequence[str], prompts: int) -> Plan:
    """`plan` with measured allocations, and its budget split along them; curves of single layers are dropped."""
    ratios = along_path(path, plan.method.budget)
    layers = tuple(
        LayerPlan.model_validate(layer.model_dump() | {"curve": None, "budget": ratio})
        for layer, ratio in zip(plan.layers, ratios, strict=True)
    )
    decided = None if plan.sensitivity is None else plan.sensitivity.budgets
    measured = SensitivityFingerprint(protocols=tuple(protocols), n_samples=prompts, budgets=decided)
    changes = {"layers": layers, "sensitivity": measured, "allocations": tuple(path), "budget_rule": None}
    return type(plan).model_validate(dict(plan) | changes, by_name=True)
