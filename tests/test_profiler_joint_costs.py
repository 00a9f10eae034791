"""Costs of whole arrangements: the same held or prefilled again, and what a token costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.errors import InputError
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, unprofiled_plan
from flowmm.profiler import load_calibration
from flowmm.profiler.decisions import blocks
from flowmm.profiler.joint_costs import Arrangement, JointPrompts, shift_bound
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
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)


@pytest.fixture(scope="module")
def prompts(model: LoadedModel, plan: Plan) -> JointPrompts:
    return JointPrompts.read(model, plan, load_calibration("pocket", limit=3), hold=True)


def test_a_token_costs_at_least_how_far_its_distribution_moves_and_at_most_one() -> None:
    """Pinsker: the total variation distance is at most sqrt(KL / 2)."""
    generator = torch.Generator().manual_seed(0)
    full, other = (torch.randn(64, 9, generator=generator).mul(3).softmax(-1) for _ in range(2))
    divergence = (full * (full / other).log()).sum(-1)
    cost = shift_bound(divergence)
    assert (cost >= (full - other).abs().sum(-1) / 2 - 1e-6).all()
    assert cost.max() == 1
    assert shift_bound(torch.zeros(1)) == 0


def test_held_prompts_cost_what_prefilled_ones_do(prompts: JointPrompts, plan: Plan) -> None:
    asked = [Arrangement.planned(plan, total) for total in (0.05, 0.3, 1.0)]
    again = replace(prompts, held=None)
    held = prompts.costs(asked)
    assert held.shape == (3, 3)
    assert np.array_equal(held, again.costs(asked))
    assert np.array_equal(held, prompts.costs(asked))
    assert held[:, 2] == pytest.approx(0.0, abs=2e-3)
    assert (held[:, 0] > held[:, 2]).all()
    nats = prompts.costs(asked, of=("nats",))
    assert not np.array_equal(held, nats)
    assert np.array_equal(prompts.costs(asked, of=("shift_bound", "nats")), np.concatenate([held, nats], axis=1))


def test_a_cost_is_the_divergence_of_the_cache_that_a_run_would_make(model: LoadedModel, plan: Plan) -> None:
    (sample,) = load_calibration("pocket", limit=1)
    chat = PROTOCOLS["blind"](sample)
    assert chat is not None
    trial = build_trial(model, chat)
    prefilled = prefill(model.model, trial)
    asked = replace(Arrangement.planned(plan, 0.2), ratios=(0.1, 0.4, 0.2, 0.1))

    def entries(length: int) -> list[int]:
        return [entry_budget(length, ratio) for ratio in asked.ratios]

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
    prompts = JointPrompts.read(model, plan, [sample], protocols=("blind",))
    assert prompts.costs([asked]) == pytest.approx(float(expected), abs=1e-4)


def test_halves_share_no_prompt(prompts: JointPrompts) -> None:
    first, second = prompts.every(2, 0), prompts.every(2, 1)
    assert (len(first), len(second)) == (2, 1)
    assert set(first.trials) | set(second.trials) == set(prompts.trials)
    assert len(second.every(2, 1)) == 1, "where a half would be empty, all prompts stay"
    parts = prompts.parts((1, 3))
    assert [list(part.trials) for part in parts] == [[0], [1, 2]]
    assert [list(prompts.window(start, 2).trials) for start in (0, 2, 4)] == [[0, 1], [2, 0], [1, 2]]


def test_an_online_layer_has_the_mode_of_the_prompt(plan: Plan) -> None:
    asked = Arrangement.planned(plan, 0.2)
    assert asked.modes == ("online",) * 4
    mixed = replace(asked, modes=("online", "intra", "cross", "online"))
    assert mixed.settings(("cross", "cross", "intra", "intra")).modes == ("cross", "intra", "cross", "intra")


def test_unknown_protocols_are_refused(model: LoadedModel, plan: Plan) -> None:
    with pytest.raises(InputError, match="expected one or more of"):
        JointPrompts.read(model, plan, load_calibration("pocket", limit=1), protocols=("third",))


@pytest.mark.parametrize(("layers", "sizes"), [(1, [1]), (4, [1] * 4), (6, [1] * 6), (28, [4, 5, 5, 4, 5, 5])])
def test_blocks_cover_all_layers_in_order(layers: int, sizes: list[int]) -> None:
    found = blocks(layers)
    assert [len(block) for block in found] == sizes
    assert [layer for block in found for layer in block] == list(range(layers))
