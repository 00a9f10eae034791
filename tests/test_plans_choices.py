"""Choices of single layers: what they may say, when they apply, and that a run follows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.errors import PlanFormatError
from flowmm.models import fingerprint_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.plans.choices import LayerChoice

TEXT = Path(__file__).with_name("test_plans_sample.json").read_text(encoding="utf-8")
CHOICE = {"merge": "average", "min_sim": 0.8, "tau": "pivot_quantile:0.8", "cost": [0.5, 0.25]}


def with_choice(
    choice: dict[str, Any], layer: int = 2, change: Callable[[dict[str, Any]], object] | None = None
) -> str:
    values = json.loads(TEXT)
    values["layers"][layer]["choice"] = choice
    if change is not None:
        change(values["layers"][layer])
    return json.dumps(values)


def test_a_choice_survives_the_file_and_changes_one_layer() -> None:
    plan = Plan.loads(with_choice(CHOICE))
    assert Plan.loads(plan.dumps()) == plan
    assert plan.as_json()["layers"][2]["choice"] == CHOICE
    expected = plan.method.model_copy(
        update={"merge": "average", "min_sim": 0.8, "gate": True, "tau": "pivot_quantile:0.8"}
    )
    methods = plan.layer_methods(plan.method)
    assert methods[2] == expected
    assert [method for layer, method in enumerate(methods) if layer != 2] == [plan.method] * 5


def test_no_gate_is_a_choice() -> None:
    choice = LayerChoice(tau="none", cost=(1.0, 0.5))
    assert not choice.applied_to(MethodParameters.from_preset("paper")).gate
    assert str(choice) == "tau none"


def test_a_layer_may_choose_its_pivots_its_own_way() -> None:
    choice = {"selector": "kcenter", "keep_proxies": False, "cost": [0.5, 0.25]}
    plan = Plan.loads(with_choice(choice))
    assert plan.as_json()["layers"][2]["choice"] == choice
    assert Plan.loads(plan.dumps()) == plan
    method = plan.layer_methods(plan.method)[2]
    assert (method.selector, method.keep_proxies, method.merge) == ("kcenter", False, plan.method.merge)
    assert str(plan.layers[2].choice) == "selector kcenter, proxies not forced"


def test_choices_belong_to_the_plans_own_method_at_any_budget() -> None:
    plan = Plan.loads(with_choice(CHOICE))
    assert plan.layer_methods(plan.method.model_copy(update={"budget": 0.05}))[2].merge == "average"
    other = plan.method.model_copy(update={"n_sink": 9})
    assert plan.layer_methods(other) == (other,) * 6


def test_a_measured_mode_may_contradict_rho_but_only_for_the_plans_own_method() -> None:
    planned = Plan.loads(TEXT).layers[2].mode
    flipped = "intra" if planned == "cross" else "cross"
    plan = Plan.loads(
        with_choice({"mode": flipped, "cost": [0.5, 0.1]}, change=lambda layer: layer.update(mode=flipped))
    )
    assert plan.layer_modes(plan.method)[2] == flipped
    assert plan.layer_modes(plan.method.model_copy(update={"n_sink": 9}))[2] == planned


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"cost": [0.5, 0.1]}, "at least one"),
        ({"merge": "sum", "cost": [0.5, 0.1]}, "expected one of evict"),
        ({"tau": "loud", "cost": [0.5, 0.1]}, "expected one of"),
        ({"min_sim": 2.0, "cost": [0.5, 0.1]}, "less than or equal to 1"),
        ({"mode": "online", "cost": [0.5, 0.1]}, "'cross' or 'intra'"),
        ({"merge": "evict"}, "required"),
        ({"selector": "best", "cost": [0.5, 0.1]}, "expected one of"),
        ({"selector": "proxy+kcenter+uniform", "cost": [0.5, 0.1]}, "at most two"),
        ({"selector": "kcenter:8\n", "cost": [0.5, 0.1]}, "control characters"),
        ({"selector": "kcenter", "first_share": 0.5, "cost": [0.5, 0.1]}, "first_share is of two selectors"),
        ({"first_share": 1.5, "cost": [0.5, 0.1]}, "less than or equal to 1"),
        ({"keep_proxies": 1, "cost": [0.5, 0.1]}, "valid boolean"),
    ],
)
def test_what_a_choice_may_not_say(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        Plan.loads(with_choice(choice))


def test_a_chosen_mode_is_the_layers() -> None:
    planned = Plan.loads(TEXT).layers[2].mode
    other = "intra" if planned == "cross" else "cross"
    with pytest.raises(PlanFormatError, match=r"choice\.mode"):
        Plan.loads(with_choice({"mode": other, "cost": [0.5, 0.1]}))


@torch.no_grad()
def test_a_run_compresses_each_layer_by_its_choice() -> None:
    """Prefill is exact, so a layer's entries depend on that layer's parameters alone."""
    model, inputs = tiny_model(), tiny_inputs([[8, -16, 12, -9, 10]])
    method = MethodParameters(merge="evict", min_sim=-1.0)
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__, method=method)
    choice = LayerChoice(merge="average", min_sim=0.1, cost=(1.0, 0.5))
    layers = [layer.model_copy(update={"choice": choice} if layer.index == 1 else {}) for layer in plan.layers]
    chosen = plan.model_copy(update={"layers": tuple(layers)})

    def keys(plan: Plan, method: MethodParameters | None = None) -> list[torch.Tensor]:
        with flowmm.compress(model, plan, method=method) as run:
            model(**inputs)
        return [state.keys for state in run.cache.states if state.keys is not None]

    everywhere = keys(plan, choice.applied_to(method))
    nowhere, found = keys(plan), keys(chosen)
    for layer in range(4):
        expected = everywhere if layer == 1 else nowhere
        assert torch.equal(found[layer], expected[layer])
        assert not torch.equal(everywhere[layer], nowhere[layer])
    assert all(
        map(
            torch.equal,
            keys(chosen, method.model_copy(update={"n_sink": 0})),
            keys(plan, method.model_copy(update={"n_sink": 0})),
        )
    )


@torch.no_grad()
def test_a_chosen_selector_gets_the_rotary_embedding_that_the_method_does_without() -> None:
    model, inputs = tiny_model(), tiny_inputs([[8, -16, 12, -9, 10]])
    method = MethodParameters(selector="proxy", merge="evict")
    assert not method.needs_rotary
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__, method=method)
    choice = LayerChoice(selector="kcenter", keep_proxies=False, cost=(1.0, 0.5))
    layers = [layer.model_copy(update={"choice": choice} if layer.index == 1 else {}) for layer in plan.layers]
    positions = []
    for asked, changed in (
        (plan.model_copy(update={"layers": tuple(layers)}), method),
        (plan, choice.applied_to(method)),
    ):
        with flowmm.compress(model, asked, method=changed) as run:
            model(**inputs)
        positions.append([state.positions for state in run.cache.states if state.positions is not None])
    assert torch.equal(positions[0][1], positions[1][1])
    assert not torch.equal(positions[0][2], positions[1][2])
