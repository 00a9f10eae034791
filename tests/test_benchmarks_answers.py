"""Plans are compared by the answers they change: which questions are asked, and what is made of the counts."""

from __future__ import annotations

import numpy as np
import pytest

from flowmm.benchmarks.plan_answers import asking, changed, described, readings
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.joint_costs import Arrangement
from flowmm.profiler.samples import CalibrationSample


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("pocket", dtype="fp32")


@pytest.fixture(scope="module")
def sample() -> CalibrationSample:
    return load_calibration("pocket", limit=1, seed=7)[0]


def test_a_context_is_asked_its_own_question_and_further_ones(sample: CalibrationSample) -> None:
    asked = asking(sample, 3)
    assert asked[0].messages == sample.messages
    assert [each.messages[-1]["content"][-1]["text"] for each in asked[1:]] == list(sample.further[:2])
    assert all(each.messages[-1]["content"][:-1] == sample.messages[-1]["content"][:-1] for each in asked)
    assert not any(each.further for each in asked)


def test_nothing_changes_where_everything_is_kept(model: LoadedModel, sample: CalibrationSample) -> None:
    plan = Plan.load(resolve_plan("pocket"))
    arrangements = [Arrangement.planned(plan, total) for total in (1.0, 0.002)]
    counts = {}
    for protocol in ("aware", "blind"):
        parts = [changed(reading, arrangements) for reading in readings(model, plan, sample, protocol)]
        counts[protocol] = np.concatenate(parts)
    assert [len(found) for found in counts.values()] == [3, 1 + len(sample.further)]
    assert not any(found[:, 0].any() for found in counts.values())
    assert any(found[:, 1].any() for found in counts.values())


def test_plans_are_compared_in_pairs() -> None:
    noise = np.random.default_rng(0).random(400)
    first, second = described(np.stack([noise, noise - 0.1], 1))
    assert first["minus_first"] == first["standard_error_of_difference"] == 0
    assert second["minus_first"] == pytest.approx(-10)
    assert second["standard_error_of_difference"] == pytest.approx(0, abs=0.01)
    assert first["standard_error"] == pytest.approx(100 * noise.std(ddof=1) / 20, abs=0.01)
