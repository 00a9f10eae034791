"""Choices by measurement: what is compared, the rule against noise, and that a plan and its runs follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.cli import main
from flowmm.models import LoadedModel, load_model
from flowmm.plans import LayerPlan, MethodParameters, Plan, unprofiled_plan
from flowmm.profiler import decisions, load_calibration
from flowmm.profiler.decisions import Comparison, candidates, clear_choices, measure_choices, measure_layers
from flowmm.profiler.decisions import with_choices as chosen_plan

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


def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "OPERATORS", ("evict", "average"))
    monkeypatch.setattr(decisions, "SIMILARITIES", (0.8,))


def row(**changes: Any) -> LayerPlan:
    return LayerPlan.model_validate({"index": 0, "mode": "cross", "budget": 0.2, "rho": None} | changes)


def test_candidates_differ_from_the_method_and_leave_a_persons_mode_alone() -> None:
    found = candidates(row(), METHOD)
    assert {"merge": "evict"} in found
    assert {"tau": "pivot_quantile:0.8"} in found
    assert {"mode": "intra"} in found
    assert {"min_sim": 0.8} in found, "the method's own operator with another min_sim"
    ungated = METHOD.model_copy(update={"tau": "none"})
    assert all(value != getattr(ungated, name, None) for one in found for name, value in one.items())
    assert len({str(one) for one in found}) == len(found)
    for alone in (row(mode="online"), row(forced=True)):
        assert not any("mode" in one for one in candidates(alone, METHOD))


def compared(own: np.ndarray, cost: np.ndarray, layer: int = 0, **changes: Any) -> Comparison:
    return Comparison(layer, changes or {"merge": "evict"}, own, cost)


def test_the_cheapest_clear_candidate_is_chosen() -> None:
    noise = np.random.default_rng(0)
    own = noise.exponential(1.0, 32)
    good, better = own * 0.6 + noise.normal(0, 0.01, 32), own * 0.4 + noise.normal(0, 0.01, 32)
    choices = clear_choices(
        [
            compared(own, good, merge="average"),
            compared(own, better, merge="mass", min_sim=0.8),
            compared(own, own * 1.5, layer=1, merge="mass"),
        ]
    )
    assert set(choices) == {0}
    assert (choices[0].merge, choices[0].min_sim) == ("mass", 0.8)
    assert choices[0].cost == pytest.approx((own.mean(), better.mean()), rel=1e-5)


@pytest.mark.parametrize(
    "saving",
    [0.05, 1.0],
    ids=["less than a tenth", "of layers that cost next to nothing"],
)
def test_small_savings_change_nothing(saving: float) -> None:
    own = np.linspace(1, 2, 32) * (1.0 if saving < 1 else 5e-4)
    assert clear_choices([compared(own, own * (1 - saving))]) == {}


def test_one_prompt_decides_nothing() -> None:
    assert clear_choices([compared(np.array([2.0]), np.array([0.0]))]) == {}


def test_noise_alone_chooses_in_at_most_one_plan_of_twenty() -> None:
    """Candidates that are no better, costs as skewed as KL is: family-wise error over 6 layers x 20 candidates."""
    noise, plans, wrong = np.random.default_rng(1), 60, 0
    for _ in range(plans):
        own = noise.lognormal(-2, 1.2, (6, 32))
        others = own[:, None] * noise.lognormal(0, 0.5, (6, 20, 32))
        others *= (own.mean(-1)[:, None] / others.mean(-1).mean(-1, keepdims=True))[..., None]
        wrong += bool(clear_choices([compared(own[i], others[i, j], layer=i) for i in range(6) for j in range(20)]))
    assert wrong / plans <= 0.05


def test_candidates_are_measured_on_the_same_prompts_at_what_layers_would_keep(
    model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = decisions.measure_costs

    def watch(model: Any, plan: Any, samples: Any, variants: Any, **how: Any) -> Any:
        seen.extend(variants)
        return original(model, plan, samples, variants, **how)

    monkeypatch.setattr(decisions, "measure_costs", watch)
    few_candidates(monkeypatch)
    found = measure_choices(model, plan, load_calibration("pocket", limit=2), limit=2, protocols=("blind",))
    assert {one.layer for one in found} == set(range(4))
    assert all(one.cost.shape == one.own.shape == (2,) for one in found)
    assert {variant.ratio for variant in seen} == set(decisions.BUDGETS)
    own = [variant for variant in seen if variant.layer == 2 and variant.method == plan.method]
    assert len(own) == len(decisions.BUDGETS), "layer 2 is forced, so that only parameters are compared"


def test_choices_and_their_curves_are_stored(model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is always better: the plan must hold it, and a curve measured with it."""
    samples = load_calibration("pocket", limit=1)

    def always(model: Any, plan: Any, *_: Any, **__: Any) -> list[Comparison]:
        own = np.array([1.0, 1.1])
        return [compared(own, own / 2, layer=1, merge="evict", min_sim=0.9)]

    plain = measure_layers(model, plan, samples, budgets=True, choices=False, protocols=("blind",))
    monkeypatch.setattr(decisions, "measure_choices", always)
    decided = measure_layers(model, plan, samples, budgets=True, choices=True, protocols=("blind",))
    assert Plan.loads(decided.dumps()) == decided
    assert decided.sensitivity is not None
    assert decided.sensitivity.budgets == decisions.BUDGETS
    choice = decided.layers[1].choice
    assert choice is not None
    assert choice.merge == "evict"
    same = [decided.layers[layer].curve == plain.layers[layer].curve for layer in range(4)]
    assert same == [True, False, True, True]


def test_a_measured_mode_is_the_layers(plan: Plan) -> None:
    own = np.array([1.0, 1.1, 1.2])
    decided = chosen_plan(plan, [compared(own, own / 2, layer=2, mode="intra")], ("aware",))
    assert decided.layers[2].mode == "intra"
    assert decided.layers[2].mode_was_measured


def test_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_candidates(monkeypatch)
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
