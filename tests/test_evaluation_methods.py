"""Methods by name on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmm.errors import InputError
from flowmm.evaluation.methods import CONTROLS, FULL, GROUPS, parse_methods
from flowmm.evaluation.plan_kinds import followed_by
from flowmm.plans import PRESETS, MethodParameters, Plan
from flowmm.plans.choices import LayerChoice
from flowmm.plans.method import MERGE_OPERATORS


def parameters(name: str) -> MethodParameters:
    (method,) = parse_methods(name, theta=0.3)
    assert method.parameters is not None
    return method.parameters


def test_full_has_no_parameters() -> None:
    assert parse_methods("full", 0.25)[0].parameters is None


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_the_plans_theta(preset: str) -> None:
    assert parameters(preset) == MethodParameters.from_preset(preset, theta=0.3)


def test_changes_belong_to_the_name_before_them() -> None:
    methods = parse_methods("full,robust:merge=tangent,gate=false,flow=off:any,paper", 0.25)
    assert [method.name for method in methods] == ["full", "robust:merge=tangent,gate=false,flow=off:any", "paper"]
    changed = methods[1].parameters
    assert changed is not None
    assert (changed.merge, changed.gate, changed.flow) == ("tangent", False, "off:any")


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_change_a_preset(control: str) -> None:
    assert parameters(control).preset == "robust"
    assert parameters(f"paper:{control}").preset == "paper"
    changed = [parameters(f"{preset}:{control}") != parameters(preset) for preset in ("paper", "robust")]
    assert any(changed), "a preset that has the idea loses it"


@pytest.mark.parametrize("operator", MERGE_OPERATORS)
def test_every_merge_operator_has_a_short_name(operator: str) -> None:
    names = [method.name for method in parse_methods(f"full,robust,merge={operator}", 0.25)]
    assert names == ["full", "robust", f"merge={operator}"]
    assert parameters(f"merge={operator}").merge == operator


def test_groups_stand_for_their_names_and_count_each_once() -> None:
    names = [method.name for method in parse_methods("robust,controls,full,paper", 0.25)]
    assert names[:3] == ["robust", "full", "random_pivots"]
    assert names == ["robust", *GROUPS["controls"], "paper"]
    assert [method.name for method in parse_methods("presets", 0.25)] == [FULL, *PRESETS]
    of_paper = parse_methods("paper:controls", 0.25)
    assert {method.parameters.preset for method in of_paper if method.parameters is not None} == {"paper"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("best", "best"),
        ("robust:merge=best", "merge"),
        ("robust:colour=red", "colour"),
        ("robust:merge", "merge"),
        ("robust,robust", "twice"),
        ("full:gate=false", "full"),
        ("", "no method"),
    ],
)
def test_mistakes_are_named(text: str, found: str) -> None:
    with pytest.raises(InputError, match=found):
        parse_methods(text, 0.25)


def test_digest_changes_with_parameters_only() -> None:
    names = ("robust:merge=tangent", "merge=tangent", "merge=mass")
    long, short, other = (parse_methods(name, 0.25)[0].digest for name in names)
    assert long == short != other


def test_a_method_may_run_under_another_kind_of_plan() -> None:
    plain, uniform, merged = parse_methods("robust,robust@uniform,robust:merge=mass,min_sim=0.8@uniform", 0.25)
    assert uniform.parameters == plain.parameters
    assert (plain.kind, uniform.kind, merged.kind) == (None, "uniform", "uniform")
    assert uniform.digest != plain.digest, "their rows must not be taken for each other's"
    assert merged.parameters is not None
    assert (merged.parameters.merge, merged.parameters.min_sim) == ("mass", 0.8)
    with pytest.raises(InputError, match="behind the @"):
        parse_methods("robust@best", 0.25)


def test_a_control_keeps_the_choices_of_layers_but_for_what_it_changes() -> None:
    plan = Plan.load(Path(__file__).with_name("test_plans_sample.json"))
    choices = {
        1: LayerChoice(first_share=0.25, merge="average", cost=(1.0, 0.5)),
        2: LayerChoice(tau="pivot_quantile:0.8", cost=(1.0, 0.5)),
    }
    layers = tuple(layer.model_copy(update={"choice": choices.get(layer.index)}) for layer in plan.layers)
    own = MethodParameters.from_preset("robust", theta=0.3)
    plan = plan.model_copy(update={"method": own, "layers": layers})

    def chosen(name: str) -> list[dict[str, Any]]:
        followed = followed_by(parameters(name), plan)
        assert followed.method.budget == own.budget
        found = [followed.layers[layer].choice for layer in (1, 2)]
        return [{} if choice is None else choice.changes for choice in found]

    first, tau = {"first_share": 0.25, "merge": "average"}, {"tau": "pivot_quantile:0.8"}
    assert chosen("robust") == chosen("any_pivot") == [first, tau]
    assert chosen("same_pivots_evicted") == [{"first_share": 0.25}, tau]
    assert chosen("random_pivots") == [{"merge": "average"}, tau]
    assert chosen("robust:gate=true") == [first, {}]
    evicted = followed_by(parameters("same_pivots_evicted"), plan).layer_methods(parameters("same_pivots_evicted"))
    assert (evicted[1].first_share, evicted[1].merge) == (0.25, "evict")
    assert followed_by(parameters("paper"), plan) is plan
    assert plan.layer_methods(parameters("paper"))[1] == parameters("paper")
