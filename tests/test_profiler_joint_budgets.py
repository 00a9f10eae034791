"""Budgets with all layers compressed at once: a nested path whose costs are those of the real caches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.joint_budgets import LEVELS, REACH, Allocation, measure_allocations, with_allocations
from flowmm.profiler.joint_costs import JointPrompts
from flowmm.profiler.sensitivity import PROTOCOLS
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.replay import (
    answer_greedily,
    build_trial,
    divergence,
    feed,
    length_of_turn,
    prefill,
    reading_caches,
)
from flowmm.runtime.settings import CompressionSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    method = MethodParameters(merge="evict", proxies="last:4", n_sink=1)
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__, method=method)


@pytest.fixture(scope="module")
def path(model: LoadedModel, plan: Plan) -> tuple[Allocation, ...]:
    prompts = JointPrompts.read(model, plan, load_calibration("pocket", limit=1), protocols=("blind",), hold=True)
    return measure_allocations(prompts, plan)


def test_each_allocation_is_the_next_one_with_one_layer_lowered(path: tuple[Allocation, ...], plan: Plan) -> None:
    assert path[-1] == Allocation((1.0,) * len(plan.layers), 0.0)
    assert path[0].ratios == (LEVELS[-1],) * len(plan.layers)
    for lower, higher in pairwise(path):
        levels = [[LEVELS.index(ratio) for ratio in each.ratios] for each in (lower, higher)]
        steps = [low - high for low, high in zip(*levels, strict=True)]
        assert sorted(steps)[:-1] == [0] * (len(steps) - 1)
        assert 1 <= max(steps) <= REACH


def test_a_cost_is_the_divergence_of_the_cache_that_a_run_would_make(
    model: LoadedModel, plan: Plan, path: tuple[Allocation, ...]
) -> None:
    (sample,) = load_calibration("pocket", limit=1)
    chat = PROTOCOLS["blind"](sample)
    assert chat is not None
    trial = build_trial(model, chat)
    prefilled = prefill(model.model, trial)
    found = path[len(path) // 2]

    def entries(length: int) -> list[int]:
        return [entry_budget(length, ratio) for ratio in found.ratios]

    settings = CompressionSettings(plan.method, prefilled.modes(plan), entries)
    questions = [trial.continuation, *trial.others]
    assert len({tuple(question[0].tolist()) for question in questions}) == 5
    divergences = []
    with reading_caches(model.model):
        for question in questions:
            first = trial.positions[..., :1] + torch.arange(question.shape[1])
            tokens = answer_greedily(model.model, prefilled.full_cache(), question, first, 4).tokens
            count = min(length_of_turn(model.model, tokens[0]) + 1, 4)
            fed = torch.cat([question, tokens[:, : count - 1]], dim=1)
            places = trial.positions[..., :1] + torch.arange(fed.shape[1])
            wanted, given = (
                feed(model.model, cache, fed, places, keep=count)
                for cache in (prefilled.full_cache(), prefilled.cache(settings))
            )
            divergences.append(divergence(wanted, given))
    expected = (torch.cat(divergences, dim=1) / 2).sqrt().clamp(max=1).mean()
    assert found.cost == pytest.approx(float(expected), abs=1e-4)


def test_a_plan_follows_its_allocations_at_any_total(plan: Plan, path: tuple[Allocation, ...]) -> None:
    made = with_allocations(plan, path, ("blind",), 1)
    assert Plan.loads(made.dumps()) == made
    for total in (0.003, 0.02, 0.2, 0.37, 0.9, 1.0):
        ratios = made.layer_budgets(total)
        assert sum(ratios) / len(ratios) == pytest.approx(total, rel=1e-4)
    for allocation in path:
        mean = sum(allocation.ratios) / len(allocation.ratios)
        assert made.layer_budgets(mean) == pytest.approx(allocation.ratios, abs=1e-5)
