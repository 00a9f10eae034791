"""What measuring layers would cost, said beforehand: an upper bound of what it then does."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, unprofiled_plan
from flowmm.profiler import load_calibration, sensitivity
from flowmm.profiler.decisions import Budgets, measure_layers
from flowmm.profiler.forecast import LayerMeasurements
from flowmm.profiler.sensitivity import Reading


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), dtype="fp32")


@pytest.fixture
def plan(model: LoadedModel) -> Plan:
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)


@pytest.mark.parametrize(
    ("budgets", "choices"), [("measured", False), (None, True), ("measured", True), ("joint", False)]
)
def test_no_more_is_asked_of_the_model_than_forecast(
    model: LoadedModel, plan: Plan, budgets: Budgets | None, choices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"prefills": 0, "feeds": 0}

    def counting(name: str, function: Any) -> Any:
        def counted_function(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return counted_function

    monkeypatch.setattr(Reading, "of", counting("prefills", Reading.of))
    monkeypatch.setattr(sensitivity, "feed", counting("feeds", sensitivity.feed))
    samples = load_calibration("pocket", limit=2)
    measure_layers(model, plan, samples, budgets=budgets, choices=choices, protocols=("blind",))
    questions = max(1 + len(sample.further) for sample in samples)
    assert questions == 5
    cost = LayerMeasurements(2, ("blind",), budgets, choices).cost(plan.model, 500.0, questions)
    assert cost is not None
    assert 0 < counted["prefills"] <= cost.prefills
    # Decoding the full cache's answer is forecast, but not counted here.
    assert 0 < counted["feeds"] <= cost.feeds


def test_held_prompts_are_counted_in_memory(plan: Plan) -> None:
    one, many = (LayerMeasurements(n, ("aware", "blind"), "joint", True).cost(plan.model, 500.0) for n in (1, 11))
    streamed = LayerMeasurements(11, ("aware", "blind"), "measured", True).cost(plan.model, 500.0)
    assert one is not None
    assert many is not None
    assert streamed is not None
    heads = plan.model.num_attention_heads + 2 * plan.model.num_kv_heads
    width = plan.model.head_dim * (4 if plan.model.dtype == "float32" else 2)
    assert many.cache_bytes - one.cache_bytes == 20 * 500 * plan.model.num_layers * heads * width
    assert streamed.cache_bytes < one.cache_bytes
    assert LayerMeasurements(11, ("aware",), None, False).cost(plan.model, 500.0) is None
