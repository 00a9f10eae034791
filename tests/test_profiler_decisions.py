"""Choices by measurement: what is proposed, the rule against noise, and that a plan and its runs follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import SimulatedPrompts
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.cli import main
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.plans.choices import LayerChoice
from flowmm.profiler import decisions, joint_budgets, load_calibration
from flowmm.profiler.decisions import (
    TOGETHER,
    Budgets,
    applied,
    measure_choices,
    measure_layers,
    proposals,
    together,
    with_choices,
)
from flowmm.profiler.joint_costs import Arrangement, JointPrompts
from flowmm.profiler.journal import Journal
from flowmm.profiler.sensitivity import Reading

METHOD = MethodParameters()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(str(checkpoint), dtype="fp32")


@pytest.fixture
def plan(model: LoadedModel) -> Plan:
    plan = unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)
    layers = tuple(
        layer.model_copy(update={"mode": "cross", "forced": True} if layer.index else {}) for layer in plan.layers
    )
    return plan.model_copy(update={"layers": layers})


def few_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "SELECTIONS", ({"selector": "weighted_kcenter", "keep_proxies": False},))
    monkeypatch.setattr(decisions, "OPERATORS", ("evict",))
    monkeypatch.setattr(decisions, "SIMILARITIES", ())
    monkeypatch.setattr(decisions, "GATES", ("none",))


NOTHING: tuple[dict[str, Any], ...] = ({},) * 4


def states(plan: Plan, state: decisions.State) -> list[decisions.State]:
    return [applied(plan, state, [one]) for one in proposals(plan, state)]


def test_proposals_change_something_and_leave_a_persons_mode_alone(plan: Plan) -> None:
    found = states(plan, NOTHING)
    assert len({str(state) for state in found}) == len(found)
    kcenter = {"selector": "weighted_kcenter", "keep_proxies": False}
    assert ({}, kcenter, {}, {}) in found
    assert ({}, {}, {"min_sim": 0.8}, {}) in found
    assert ({}, {}, {"tau": "pivot_quantile:0.8"}, {}) in found
    assert all(
        value != getattr(METHOD, name)
        for state in found
        for one in state
        for name, value in one.items()
        if name != "tau"
    )
    assert not any("mode" in one for state in found for one in state), "forced, or decided per prompt"
    unforced = tuple(layer.model_copy(update={"forced": False}) for layer in plan.layers)
    found = states(plan.model_copy(update={"layers": unforced}), NOTHING)
    assert ({}, {"mode": "intra"}, {}, {}) in found
    assert ({"mode": "intra"}, {}, {}, {}) not in found, "layer 0 decides per prompt"


def test_proposals_add_to_what_was_chosen_and_lead_back(plan: Plan) -> None:
    kcenter = {"selector": "weighted_kcenter"}
    state = ({"selector": "proxy+novelty", "first_share": 0.25}, {"merge": "evict"}, {}, {})
    found = states(plan, state)
    assert state not in found
    assert (state[0], {"merge": "evict"} | kcenter, {}, {}) in found
    assert (state[0], {}, {}, {}) in found, "the method's own operator"
    assert (kcenter, state[1], {}, {}) in found, "one selector has no first share"


def test_the_best_are_tried_together_unless_they_say_the_same_thing() -> None:
    first, second = range(1), range(1, 3)
    selections = {"selector": "weighted_kcenter", "keep_proxies": False}, {"keep_proxies": False}
    best = [(first, selections[0]), (first, selections[1]), (second, selections[1]), (first, {"min_sim": 0.9})]
    assert together(best) == [[best[0]], [best[0], best[2]], [best[0], best[2], best[3]]]
    assert together([]) == []
    assert len(together([(range(layer, layer + 1), {"merge": "evict"}) for layer in range(9)])) == TOGETHER


def cost_of(arrangement: Arrangement) -> float:
    """Layer 1 gains by k-center, layer 2 only if layer 1 does, layer 3 by eviction, the others lose by k-center."""
    kcenter = [method.selector == "weighted_kcenter" for method in arrangement.methods]
    both = 0.1 * kcenter[1] + 0.2 * (kcenter[1] and kcenter[2])
    return 1 - both + 0.05 * (kcenter[0] + kcenter[3]) - 0.1 * (arrangement.methods[3].merge == "evict")


def test_what_holds_on_both_halves_is_chosen_also_where_one_layer_waits_for_another(plan: Plan) -> None:
    prompts: Any = SimulatedPrompts(cost_of, noise=0.05)
    found = measure_choices(prompts, plan)
    assert [choice and choice.selector for choice in found] == [None, "weighted_kcenter", "weighted_kcenter", None]
    assert found[3] is not None
    assert found[3].merge == "evict"
    for choice in filter(None, found):
        assert choice.cost[1] < choice.cost[0]


@pytest.mark.parametrize(("prompts", "shares"), [(20, (1,)), (80, (1, 1 / 2, 1 / 4))])
def test_proposals_race_on_the_proposing_prompts(
    plan: Plan, prompts: int, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def costs(self: SimulatedPrompts, arrangements: Any, **_: Any) -> np.ndarray:
        asked.append((len(self), len(arrangements)))
        return np.ones((len(self), len(arrangements)))

    monkeypatch.setattr(SimulatedPrompts, "costs", costs)
    simulated: Any = SimulatedPrompts(cost_of, 2 * prompts)
    assert measure_choices(simulated, plan) == (None,) * 4
    proposed = len(proposals(plan, ({},) * 4))
    assert [count for _, count in asked] == [1 + math.ceil(proposed * share) for share in shares]
    assert sum(count for count, _ in asked) == prompts


def test_noise_alone_seldom_chooses(plan: Plan) -> None:
    chosen = [any(measure_choices(prompts, plan)) for prompts in _noises(40)]
    assert sum(chosen) / len(chosen) <= 0.5


def _noises(count: int) -> list[Any]:
    return [SimulatedPrompts(lambda _: 1.0, noise=0.5, seed=seed) for seed in range(count)]


def test_one_prompt_chooses_nothing(model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    few_proposals(monkeypatch)
    prompts = JointPrompts.read(model, plan, load_calibration("pocket", limit=1), protocols=("blind",))
    seen: list[tuple[int, int | None]] = []
    found = measure_choices(prompts, plan, progress=lambda done, total: seen.append((done, total)))
    assert found == (None,) * 4
    assert seen[-1][0] == seen[-1][1]


def test_choices_and_their_curves_are_stored(model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = load_calibration("pocket", limit=1)
    choice = LayerChoice(merge="evict", min_sim=0.9, cost=(1.0, 0.5))
    plain = measure_layers(model, plan, samples, budgets="measured", choices=False, protocols=("blind",))
    monkeypatch.setattr(decisions, "measure_choices", lambda *_, **__: (None, choice, None, None))
    decided = measure_layers(model, plan, samples, budgets="measured", choices=True, protocols=("blind",))
    assert Plan.loads(decided.dumps()) == decided
    assert decided.sensitivity is not None
    assert decided.sensitivity.budgets == decisions.BUDGETS
    assert decided.layers[1].choice == choice
    same = [decided.layers[layer].curve == plain.layers[layer].curve for layer in range(4)]
    assert same == [True, False, True, True]


@pytest.mark.parametrize("choices", [False, True])
def test_joint_budgets_go_on_with_the_choices(
    model: LoadedModel, plan: Plan, choices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = LayerChoice(selector="weighted_kcenter", cost=(1.0, 0.5))
    asked: list[Any] = []

    def allocations(_: JointPrompts, plan: Plan, totals: Sequence[float] = decisions.BUDGETS, **__: Any) -> Any:
        asked.append((totals, [layer.choice for layer in plan.layers], plan.allocations is None))
        return (0.1 * len(asked),) * 4, (1.0,) * 4

    monkeypatch.setattr(decisions, "measure_allocations", allocations)
    monkeypatch.setattr(decisions, "measure_choices", lambda *_, **__: (None, choice, None, None))
    samples = load_calibration("pocket", limit=2)
    decided = measure_layers(model, plan, samples, budgets="joint", choices=choices, protocols=("blind",))
    before = (decisions.BUDGETS[:1] if choices else decisions.BUDGETS, [None] * 4, True)
    after = (decisions.BUDGETS, [None, choice, None, None], False)
    assert asked == ([before, after] if choices else [before])
    assert decided.layers[1].choice == (choice if choices else None)
    assert decided.allocations is not None
    assert decided.allocations[0] == (0.1 * len(asked),) * 4
    assert decided.sensitivity is not None
    assert decided.sensitivity.n_samples == 2
    assert decided.sensitivity.budgets == (decisions.BUDGETS if choices else None)


@pytest.mark.parametrize("budgets", ["measured", "joint"])
def test_what_was_measured_before_a_kill_is_not_measured_again(
    model: LoadedModel, plan: Plan, budgets: Budgets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_proposals(monkeypatch)
    monkeypatch.setattr(joint_budgets, "FACTORS", (0.5, 2.0))
    samples = load_calibration("pocket", limit=2)
    compressions: list[int] = []
    divergence = Reading.divergence
    monkeypatch.setattr(
        Reading, "divergence", lambda self, caches: compressions.append(len(caches)) or divergence(self, caches)
    )

    def measured(journal: Journal | None) -> tuple[Plan, int]:
        compressions.clear()
        how: dict[str, Any] = {"budgets": budgets, "choices": True, "protocols": ("blind",), "journal": journal}
        return measure_layers(model, plan, samples, **how), len(compressions)

    path, asked = tmp_path / "layers.jsonl", {"model": "m"}
    whole, cost = measured(Journal(tmp_path / "whole.jsonl", asked))
    assert measured(None)[0].dumps() == whole.dumps()
    left, rest = cost // 2, 0

    def killed(self: Reading, caches: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return divergence(self, caches)

    with monkeypatch.context() as during:
        during.setattr(Reading, "divergence", killed)
        with pytest.raises(KeyboardInterrupt):
            measured(Journal(path, asked))
    resumed, rest = measured(Journal(path, asked))
    assert resumed.dumps() == whole.dumps()
    # Lost is what one question to one prompt costs; what is asked twice is measured once.
    assert 0 < rest < cost * 0.8
    assert measured(Journal(path, asked))[1] == 0


def test_a_measured_mode_is_the_layers(plan: Plan) -> None:
    choice = LayerChoice(mode="intra", cost=(1.0, 0.5))
    decided = with_choices(plan, (None, None, choice, None), ("aware",), 3)
    assert decided.layers[2].mode == "intra"
    assert decided.layers[2].mode_was_measured


def test_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_proposals(monkeypatch)
    out = tmp_path / "plan.json"
    options = ["profile", "--model", str(checkpoint), "--limit", "2", "--out", str(out), "-q", "--json"]
    options += ["--sensitivity-prompts", "1", "--protocol", "aware", "--overwrite"]
    assert main([*options, "--decide", "measured", "--layer-budgets", "uniform"]) == 0
    plan = Plan.load(out)
    assert plan.sensitivity is not None
    assert plan.sensitivity.budgets == decisions.BUDGETS
    for rule in ("pyramid", "entropy", "variance"):
        assert main([*options, "--layer-budgets", rule]) == 0
        plan = Plan.load(out)
        assert plan.budget_rule == rule
        assert len({layer.budget for layer in plan.layers}) > 1
        mean = sum(layer.budget for layer in plan.layers) / len(plan.layers)
        assert mean == pytest.approx(plan.method.budget, rel=1e-5)
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "by variance" in capsys.readouterr().out
    assert main([*options, "--data", "-", "--decide", "measured"]) == 2
    assert "stdin can be read once" in capsys.readouterr().err
