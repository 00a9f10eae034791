"""Sensitivity curves: zero where nothing is lost, larger where more is, and budgets that follow them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import tiny_image, write_checkpoint

import flowmm
from flowmm.errors import InputError
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.profiler import load_calibration, sensitivity
from flowmm.profiler.samples import CalibrationSample
from flowmm.profiler.sensitivity import (
    Reading,
    Sensitivity,
    blind,
    measure_sensitivity,
    trials_of,
    with_measured_budgets,
)
from flowmm.runtime.replay import reading_caches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    method = MethodParameters(merge="evict", proxies="last:4", n_sink=1)
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__, method=method)


def test_curves_have_a_row_per_prompt_and_fall_to_nothing(model: LoadedModel, plan: Plan) -> None:
    samples = load_calibration("pocket", limit=3)
    seen: list[tuple[int, int | None]] = []
    measured = measure_sensitivity(
        model, plan, samples, ratios=(0.9999, 0.05, 0.5), limit=2, progress=lambda *step: seen.append(step)
    )
    assert seen == [(1, 2), (2, 2)]
    assert measured.cost.shape == (2, len(plan.layers), 3)
    assert measured.ratios == (0.05, 0.5, 0.9999)
    assert (measured.cost >= 0).all()
    assert measured.cost[..., 0].mean() > measured.cost[..., 1].mean() > measured.cost[..., 2].mean()


def _of_one_question() -> list[CalibrationSample]:
    return [replace(sample, further=()) for sample in load_calibration("pocket", limit=1)]


def test_one_layer_alone_is_compressed(model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, ...]] = []
    original = flowmm.runtime.FlowCache.stack

    def watch(caches: Any) -> Any:
        kept.extend(tuple(state.kept for state in cache.states) for cache in caches)
        return original(caches)

    monkeypatch.setattr("flowmm.profiler.sensitivity.FlowCache.stack", watch)
    measure_sensitivity(model, plan, _of_one_question(), ratios=(0.1,), protocols=("blind",))
    assert len(kept) == len(plan.layers)
    for layer, counts in enumerate(kept):
        full = max(counts)
        assert counts[layer] == int(0.1 * full)
        assert all(count == full for other, count in enumerate(counts) if other != layer)


def test_questions_fed_together_are_answered_as_one_by_one(
    model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = load_calibration("pocket", limit=1)[0]
    (trial,) = trials_of(model, sample, ("blind",))
    reading = Reading.of(model, plan, trial)
    lengths = {answer.forced.shape[1] for answer in reading.answers}
    assert len(reading.answers) > 2 < sum(answer.wanted.shape[1] for answer in reading.answers)
    assert len(lengths) > 1, "or nothing is fed behind a shorter one"

    def measured() -> torch.Tensor:
        with reading_caches(model.model), torch.no_grad():
            return reading.divergence([reading.cache(settings) for settings in compressions])

    compressions = [reading.prefilled.settings(plan, plan.method, budget) for budget in (0.05, 0.2)]
    together = measured()
    monkeypatch.setattr(sensitivity, "ROWS_PER_BATCH", 1)
    torch.testing.assert_close(together, measured(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("protocol", ["aware", "blind"])
def test_other_layers_stay_whole_while_the_answer_is_fed(
    model: LoadedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    stacks: list[tuple[int, Any]] = []
    original = flowmm.runtime.FlowCache.stack

    def watch(caches: Any) -> Any:
        # Only the compressed layer knows the columns of its entries.
        layer = next(index for index, state in enumerate(caches[0].states) if state.positions is not None)
        stacks.append((layer, original(caches)))
        return stacks[-1][1]

    monkeypatch.setattr("flowmm.profiler.sensitivity.FlowCache.stack", watch)
    measure_sensitivity(model, plan, _of_one_question(), ratios=(0.1,), protocols=(protocol,))
    whole = {state.kept for layer, cache in stacks for other, state in enumerate(cache.states) if other != layer}
    compressed = [cache.states[layer].kept for layer, cache in stacks]
    assert len(whole) == 1, "every full layer holds the prompt and all that was fed"
    assert max(compressed) < whole.pop() / 2


def test_budgets_follow_the_curves_and_survive_the_file(plan: Plan) -> None:
    layers = len(plan.layers)
    cost = np.zeros((2, layers, 2))
    cost[:, 0] = [[3.0, 0.5], [1.0, 0.5]]
    measured = with_measured_budgets(plan, Sensitivity((0.05, 0.4), cost), ("aware",))
    assert measured.layers[0].curve == ((0.05, 2.0), (0.4, 0.5))
    assert measured.layers[0].budget > 0.2 > measured.layers[1].budget
    assert sum(layer.budget for layer in measured.layers) / layers == pytest.approx(0.2, rel=1e-4)
    assert Plan.loads(measured.dumps()) == measured
    for ratio in (0.03, 0.1, 0.37, 1.0):
        assert sum(measured.layer_budgets(ratio)) / layers == pytest.approx(ratio)
    assert measured.layer_budgets(0.2) == pytest.approx([layer.budget for layer in measured.layers], abs=1e-5)


def test_measured_budgets_are_used_by_a_run(model: LoadedModel, plan: Plan) -> None:
    cost = np.zeros((1, len(plan.layers), 1))
    cost[0, 1] = 2.0
    measured = with_measured_budgets(plan, Sensitivity((0.05,), cost), ("aware",))
    inputs = model.build_inputs(load_calibration("pocket", limit=1)[0].messages)
    with flowmm.compress(model.model, measured, budget=0.1) as run:
        model.model(**inputs)
    kept = [layer.entries_after for layer in run.report.layers]
    assert kept[1] == max(kept) > min(kept)
    assert run.report.kept_tokens == int(0.1 * inputs["input_ids"].shape[1] + 1e-9)


def test_prompts_without_a_question_behind_the_context_have_no_blind_protocol(model: LoadedModel, plan: Plan) -> None:
    alone = CalibrationSample("text", [{"role": "user", "content": "hello"}])
    image_last = [{"type": "text", "text": "look"}, {"type": "image", "image": tiny_image()}]
    assert blind(alone) is None
    assert blind(CalibrationSample("image", [{"role": "user", "content": image_last}])) is None
    with pytest.raises(InputError, match="blind"):
        measure_sensitivity(model, plan, [alone], protocols=("blind",))
    with pytest.raises(InputError, match="expected one or more of aware, blind"):
        measure_sensitivity(model, plan, [alone], protocols=("second",))
