"""Choices by measurement: how blocks of layers choose and merge entries, all layers compressed together.

Layers stand in for each other, so that what one layer does alone says little. A *proposal* gives a block of
neighbouring layers other parameters while all layers keep what the plan's budgets give them.

The rule against noise: proposals are made on one half of the prompts and must hold on the other. They race on the
first half at the smallest of :data:`BUDGETS` (:mod:`flowmm.profiler.racing`). Of those that are left, the best one, the
best two and so on, as far as they go together, race on the second half, and the largest gain that holds there is taken.
Further races of what the first one left go on from there, until one finds nothing. At last every layer whose choice
does not lower the mean cost over all budgets on the second half goes back to the method's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, MethodParameters, Plan, SensitivityFingerprint
from flowmm.plans.choices import LayerChoice
from flowmm.plans.method import parse_selector
from flowmm.profiler.joint_budgets import measure_allocations, with_allocations
from flowmm.profiler.joint_costs import BUDGETS, Arrangement, JointPrompts
from flowmm.profiler.journal import Journal
from flowmm.profiler.profiling import Progress
from flowmm.profiler.racing import part_ends, survivors, winner
from flowmm.profiler.ranks import Ranks
from flowmm.profiler.samples import Sample
from flowmm.profiler.sensitivity import MIXED, measure_sensitivity, with_measured_budgets

# How entries are chosen; the choice of a preset such as `reuse` is one of these.
SELECTIONS: tuple[dict[str, Any], ...] = (
    {"selector": "weighted_kcenter", "keep_proxies": False},
    {"selector": "weighted_kcenter", "keep_proxies": True},
    {"selector": "proxy"},
    {"selector": "proxy+weighted_kcenter", "first_share": 0.25},
    {"selector": "proxy+weighted_kcenter", "first_share": 0.1},
    {"selector": "proxy+weighted_kcenter", "first_share": 0.1, "keep_proxies": False},
    {"keep_proxies": False},
)
# How they are merged.
OPERATORS = ("evict", "average", "keep_mass", "mass", "tangent")
SIMILARITIES = (-1.0, 0.5, 0.8, 0.9)
GATES = ("none", "pivot_quantile:0.8")
RACES = 6
# Of layers at most: what deciding costs does not grow with depth.
BLOCKS = 6
# Changes made together at most.
TOGETHER = 8

Changes = dict[str, Any]
"""Fields of a :class:`LayerChoice`."""
State = tuple[Changes, ...]
"""Changes of each layer."""
Proposal = tuple[range, Changes]
"""Layers, and what changes in them."""
Budgets = Literal["measured", "joint"]


def blocks(layers: int) -> list[range]:
    """Neighbouring layers in at most :data:`BLOCKS` blocks of about equal size."""
    count = min(BLOCKS, layers)
    return [range(layers * block // count, layers * (block + 1) // count) for block in range(count)]


def proposals(plan: Plan, state: State) -> list[Proposal]:
    """Other selections, other merging, other modes, each for one block and each another state than `state`."""
    seen, found = [state], list[Proposal]()
    wanted = [*SELECTIONS, *_mergings(plan.method), {"mode": "cross"}, {"mode": "intra"}]
    for block in blocks(len(plan.layers)):
        for changes in wanted:
            after = applied(plan, state, [(block, changes)])
            if after not in seen:
                seen.append(after)
                found.append((block, changes))
    return found


def applied(plan: Plan, state: State, proposed: Sequence[Proposal]) -> State:
    """`state` with all that is proposed, one after the other.

    A mode that a person forced, or that each prompt decides, is left alone.
    """
    layers = list(state)
    for block, changes in proposed:
        for layer in block:
            layers[layer] = _changed(plan.layers[layer], layers[layer], changes, plan.method)
    return tuple(layers)


def together(best: Sequence[Proposal]) -> list[list[Proposal]]:
    """The first one, the first two and so on, up to :data:`TOGETHER`; where two say the same thing, the first does."""
    taken = list[Proposal]()
    for block, changes in best:
        said = {name for other, earlier in taken if other == block for name in earlier}
        if said.isdisjoint(changes):
            taken.append((block, changes))
    return [taken[:count] for count in range(1, min(len(taken), TOGETHER) + 1)]


def _mergings(method: MethodParameters) -> list[Changes]:
    operators: list[Changes] = [{"merge": merge} for merge in OPERATORS]
    similarities: list[Changes] = [{"min_sim": min_sim} for min_sim in SIMILARITIES]
    gates: list[Changes] = [{"tau": tau} for tau in dict.fromkeys((*GATES, method.tau))]
    return operators + similarities + gates


def _changed(layer: LayerPlan, own: Changes, changes: Changes, method: MethodParameters) -> Changes:
    """`own` changes of a layer and new ones; what equals the method's own, or has no effect, is left out."""
    if "mode" in changes and (layer.mode == "online" or layer.forced):
        return own
    default = method.model_dump() | {"mode": layer.mode, "tau": method.tau if method.gate else "none"}
    found = own | changes
    if len(parse_selector(found.get("selector", method.selector))) < 2:
        found.pop("first_share", None)
    return {name: value for name, value in found.items() if value != default[name]}


def arranged(plan: Plan, state: State, total: float) -> Arrangement:
    """What a run of `plan` would do with these choices in its layers."""
    own = Arrangement.planned(plan, total)
    choices = [LayerChoice(**changes, cost=(0.0, 0.0)) if changes else None for changes in state]
    methods = tuple(plan.method if choice is None else choice.applied_to(plan.method) for choice in choices)
    modes = tuple(changes.get("mode", mode) for changes, mode in zip(state, own.modes, strict=True))
    return Arrangement(methods, modes, own.ratios)


@dataclass
class _Asked:
    """Counts prompts over several questions, for a progress that ends with the last one."""

    total: int
    progress: Progress | None
    finished: int = field(default=0, init=False)

    def costs(self, prompts: JointPrompts, arrangements: Sequence[Arrangement], **how: Any) -> np.ndarray:
        """``[prompts, arrangements]``."""
        before = self.finished

        def told(done: int, _: int | None) -> None:
            self.finished = before + done
            if self.progress is not None:
                self.progress(min(self.finished, self.total), self.total)

        return prompts.costs(arrangements, progress=told, **how)


def measure_choices(
    prompts: JointPrompts, plan: Plan, *, progress: Progress | None = None
) -> tuple[LayerChoice | None, ...]:
    """Choices of `plan`'s layers by the rule against noise; those it has are forgotten first.

    Args:
        prompts: at least two; every other one proposes, the others confirm.
        plan: gives each layer's mode, the method, and what layers keep of the totals :data:`BUDGETS`.
        progress: called with (finished prompts, prompts at most).
    """
    asked = _Asked((RACES + 1) * len(prompts), progress)
    first, second = prompts.every(2, 0), prompts.every(2, 1)
    state: State = ({},) * len(plan.layers)
    proposed = proposals(plan, state)
    for number in range(RACES):
        start = number * (-(-len(first) // 3))
        proposed, best = _promising(asked, first.window(start, len(first)), plan, state, proposed)
        better = _confirmed(asked, second, plan, state, together(best))
        if better is None:
            break
        state = better
    choices = _worthwhile(asked, second, plan, state)
    if progress is not None:
        progress(asked.total, asked.total)
    return choices


def _promising(
    asked: _Asked, prompts: JointPrompts, plan: Plan, state: State, proposed: Sequence[Proposal]
) -> tuple[list[Proposal], list[Proposal]]:
    """What a race leaves of the proposals, and those of them that gain, best first."""

    def measure(part: JointPrompts, some: Sequence[Proposal]) -> np.ndarray:
        states = [state, *(applied(plan, state, [one]) for one in some)]
        return _mean_cost(asked, part, plan, states, BUDGETS[:1])

    left, cost = survivors(proposed, prompts.parts(part_ends(len(prompts))), measure)
    gain = (cost[:, :1] - cost[:, 1:]).mean(0)
    return left, [left[place] for place in np.argsort(-gain, kind="stable") if gain[place] > 0]


def _confirmed(
    asked: _Asked, prompts: JointPrompts, plan: Plan, state: State, tried: Sequence[Sequence[Proposal]]
) -> State | None:
    """Of `state` with the proposals that are tried together, what gains most and holds, or ``None``."""

    def measure(part: JointPrompts, states: Sequence[State]) -> np.ndarray:
        return _mean_cost(asked, part, plan, [state, *states], BUDGETS[:1])

    states = [applied(plan, state, proposed) for proposed in tried]
    return winner(states, prompts.parts(part_ends(len(prompts))), measure)


def _mean_cost(
    asked: _Asked, prompts: JointPrompts, plan: Plan, states: Sequence[State], totals: Sequence[float], **how: Any
) -> np.ndarray:
    """``[prompts, states]``: mean over the totals; of several measures, one after the other."""
    arrangements = [arranged(plan, state, total) for total in totals for state in states]
    cost = asked.costs(prompts, arrangements, **how)
    return cost.reshape(len(cost), -1, len(totals), len(states)).mean(2).reshape(len(cost), -1)


def _worthwhile(asked: _Asked, prompts: JointPrompts, plan: Plan, state: State) -> tuple[LayerChoice | None, ...]:
    """Choices of the layers whose own lower the cost, given the others', each with what it costs in nats."""
    chosen, cost, nats = _alone(asked, prompts, plan, state)
    idle = [layer for layer in chosen if cost[1 + chosen.index(layer)] <= cost[0]]
    if idle:
        state = tuple({} if layer in idle else changes for layer, changes in enumerate(state))
        chosen, _, nats = _alone(asked, prompts, plan, state)
    costs = {layer: (float(nats[1 + place]), float(nats[0])) for place, layer in enumerate(chosen)}
    return tuple(LayerChoice(**changes, cost=costs[layer]) if changes else None for layer, changes in enumerate(state))


def _alone(asked: _Asked, prompts: JointPrompts, plan: Plan, state: State) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Layers with a choice; the state's mean cost, then that without each of them; and the same in nats."""
    chosen = [layer for layer, changes in enumerate(state) if changes]
    states = [state, *((*state[:layer], {}, *state[layer + 1 :]) for layer in chosen)]
    if not chosen:
        return chosen, np.zeros(1), np.zeros(1)
    both = _mean_cost(asked, prompts, plan, states, BUDGETS, of=("shift_bound", "nats")).mean(0)
    cost, nats = np.split(both, 2)
    return chosen, cost, nats


def with_choices(plan: Plan, choices: Sequence[LayerChoice | None], protocols: Sequence[str], prompts: int) -> Plan:
    """`plan` with measured choices; curves and budgets are left as they are."""
    layers = tuple(
        layer.model_copy(update={"choice": choice, "mode": (choice and choice.mode) or layer.mode})
        for layer, choice in zip(plan.layers, choices, strict=True)
    )
    decided = SensitivityFingerprint(protocols=tuple(protocols), n_samples=prompts, budgets=BUDGETS)
    return type(plan).model_validate(dict(plan) | {"layers": layers, "sensitivity": decided}, by_name=True)


def measure_layers(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    budgets: Budgets | None,
    choices: bool,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    progress: Callable[[str, str], Progress | None] = lambda _, __: None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> Plan:
    """`plan` with what calibration prompts say about its layers.

    Args:
        budgets: ``measured``: one layer compressed at a time gives each a curve, and the plan's budget is split by
            them; ``joint``: all layers are compressed together; ``None``: budgets stay.
        choices: measure proposals, and store those that hold. Joint budgets are measured before, to choose by, and go
            on from there afterwards; the curves of layers with a choice are measured once more.
        progress: asked once for each measurement, with what is done and in which unit, for the progress of it.
        journal: of the same model, plan, prompts and protocols; what it knows is not measured again.
        ranks: processes that share the prompts, each calling this; all return the same plan.
        model, samples, limit, protocols: as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.

    Raises:
        InputError: an unknown protocol, or no prompt that fits any of the protocols.
    """
    how: dict[str, Any] = {"limit": limit, "protocols": protocols, "journal": journal, "ranks": ranks}
    curves = None
    if budgets == "measured":
        curves = measure_sensitivity(model, plan, samples, progress=progress("measured layers on", "prompts"), **how)
        plan = with_measured_budgets(plan, curves, protocols)
    if budgets != "joint" and not choices:
        return plan
    # Who paid in memory for joint budgets pays for choices along them.
    hold = budgets == "joint" or plan.allocations is not None
    prompts = JointPrompts.read(model, plan, samples, hold=hold, **how)
    if budgets == "joint":
        # Choices are proposed at the smallest total; the others follow once choices are made.
        totals = BUDGETS[:1] if choices else BUDGETS
        path = measure_allocations(prompts, plan, totals, progress=progress("moved entries between layers in", "steps"))
        plan = with_allocations(plan, path, protocols, len(prompts))
    if choices:
        found = measure_choices(prompts, plan, progress=progress("compared choices on", "prompts"))
        plan = with_choices(plan, found, protocols, len(prompts))
        changed = [layer.index for layer in plan.layers if layer.choice is not None]
        if curves is not None and changed:
            again = measure_sensitivity(
                model, plan, samples, layers=changed, progress=progress("measured chosen layers on", "prompts"), **how
            )
            plan = with_measured_budgets(plan, curves.with_layers(changed, again), protocols)
        if budgets == "joint":
            path = measure_allocations(prompts, plan, progress=progress("moved entries once more in", "steps"))
            plan = with_allocations(plan, path, protocols, len(prompts))
    return plan
