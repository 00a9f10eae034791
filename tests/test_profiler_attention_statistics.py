"""Statistics behind budget rules, against eager formulas."""

from __future__ import annotations

import pytest
import torch

from flowmm.errors import InputError
from flowmm.plans import Plan, resolve_plan
from flowmm.profiler.attention_statistics import cross_modal_entropy, received_variance, with_rule_budgets
from flowmm.runtime.prompt import PromptLayout

LENGTH = 90


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, LENGTH, 8), torch.randn(1, 2, LENGTH, 8)


def layout_of(visual: torch.Tensor) -> PromptLayout:
    return PromptLayout.from_masks(visual[None], torch.ones(1, LENGTH, dtype=torch.bool))


def test_cross_modal_entropy_is_that_of_both_restricted_attentions(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = states
    visual = torch.arange(LENGTH) % 3 == 0
    scores = torch.einsum("hid,hjd->hij", query[0].double(), key[0].double().repeat_interleave(2, 0)) / 8**0.5
    expected = 0.0
    for rows in (visual, ~visual):
        weights = scores[:, rows][:, :, ~rows].softmax(-1)
        expected += float(-(weights * weights.log()).sum(-1).mean())
    assert cross_modal_entropy(query, key, layout_of(visual), 8**-0.5) == pytest.approx(expected, rel=1e-5)
    assert cross_modal_entropy(query, key, layout_of(torch.zeros(LENGTH, dtype=torch.bool)), 8**-0.5) == 0


def test_received_variance_is_that_of_column_sums(states: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key = states
    scores = torch.einsum("hid,hjd->hij", query[0].double(), key[0].double().repeat_interleave(2, 0)) / 8**0.5
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    variance = scores.masked_fill(hidden, float("-inf")).softmax(-1).sum(1).var(-1, correction=0)
    normalised = (variance - variance.min()) / (variance.max() - variance.min())
    found = received_variance(query, key, layout_of(torch.arange(LENGTH) < 5), 8**-0.5)
    assert found == pytest.approx(float(normalised.mean()), rel=1e-4)


def test_budgets_by_a_statistic_need_it() -> None:
    plan = Plan.load(resolve_plan("qwen25vl"))
    with pytest.raises(InputError, match="entropy need a statistic"):
        with_rule_budgets(plan, "entropy")
    pyramid = with_rule_budgets(plan, "pyramid")
    assert pyramid.budget_rule == "pyramid"
    assert Plan.loads(pyramid.dumps()) == pyramid
    assert with_rule_budgets(pyramid, "uniform").budget_rule is None
