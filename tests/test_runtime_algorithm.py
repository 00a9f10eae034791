"""Properties of budgets, pivots, matching and merging that must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from flowmm.plans import MethodParameters
from flowmm.plans.method import MERGE_OPERATORS
from flowmm.runtime import matching
from flowmm.runtime.budgets import entry_budget, layer_entries
from flowmm.runtime.compression import compress_layer, forced_entries
from flowmm.runtime.importance import proxy_importance, rows_attention
from flowmm.runtime.matching import NO_TARGET, _nearest_of_all, assign, nearest_pivot, tau_threshold, unit_rows
from flowmm.runtime.merging import OPERATORS, Weights, gather_group, merge
from flowmm.runtime.pivots import complement, select_pivots
from flowmm.runtime.prompt import PromptLayout, find_proxies

ANY = settings(max_examples=40, deadline=None)


@ANY
@given(
    shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=12),
    length=st.integers(1, 500),
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(1, 600)),
)
def test_layer_entries_sum_exactly(shares: list[float], length: int, budget: float | int) -> None:
    counts = layer_entries(shares, length, budget)
    assert sum(counts) == len(shares) * entry_budget(length, budget)
    assert all(1 <= count <= length for count in counts)
    by_share = [count for _, count in sorted(zip(shares, counts, strict=True))]
    assert all(small <= large + 1 for small, large in pairwise(by_share))


def test_equal_shares_are_uniform() -> None:
    assert layer_entries([0.2] * 5, 103, 0.2) == [20] * 5
    assert layer_entries([1.0, 3.0], 100, 0.5) == [25, 75]
    assert layer_entries([1.0, 30.0], 100, 0.75) == [50, 100], "what a full layer cannot take goes to the others"


def a_layer(seed: int, length: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PromptLayout]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, length, 8, generator=generator)
    key, value = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(2))
    visual = torch.rand(1, length, generator=generator) < 0.6
    valid = (torch.arange(length) >= padding)[None]
    return query, key, value, PromptLayout.from_masks(visual, valid)


@ANY
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(4, 60),
    padding=st.integers(0, 3),
    share=st.floats(0.02, 1.0),
    operator=st.sampled_from(MERGE_OPERATORS),
    cross=st.booleans(),
    gate=st.sampled_from(["none", "pivot_quantile:0.8", "pivot_quantile:0.2", "mass:0.5", "mean_mult:2", "abs:0.1"]),
    action=st.sampled_from(["reroute", "drop"]),
    fallback=st.sampled_from(["drop", "relax_tau", "any_modality"]),
)
def test_a_compressed_layer_keeps_its_contract(
    seed: int,
    length: int,
    padding: int,
    share: float,
    operator: str,
    cross: bool,
    gate: str,
    action: str,
    fallback: str,
) -> None:
    query, key, value, layout = a_layer(seed, length, padding)
    count = max(1, math.floor(share * layout.lengths[0]))
    options = {"merge": operator, "tau": gate, "gate_action": action, "fallback": fallback, "proxies": "last_text:4"}
    method = MethodParameters.from_preset("paper", keep_proxies=True, n_sink=4, **options)
    proxies = find_proxies(layout, method.proxies)
    compressed = compress_layer(query, key, value, layout, proxies, (count,), torch.tensor([cross]), method, 8**-0.5)
    assignment, entries = compressed.assignment, compressed.entries
    assert entries.keys.shape == (1, 2, count, 8)
    assert entries.keys.isfinite().all()
    assert entries.values.isfinite().all()
    ascending = compressed.positions.diff(dim=-1)
    assert (ascending > 0).all()
    assert (compressed.positions >= padding).all()
    everyone = torch.cat([compressed.positions, assignment.evicted], -1).sort(-1).values
    assert torch.equal(everyone, torch.arange(padding, length).expand(1, 2, -1)), "every entry stays or leaves, once"
    merged_into = assignment.target[assignment.merged]
    assert ((merged_into >= 0) & (merged_into < count)).all()
    if fallback != "relax_tau":
        protected = assignment.protected.gather(2, assignment.target.clamp(min=0))
        assert not (protected & assignment.merged).any(), "a protected pivot absorbs nothing"
    if not cross and fallback != "any_modality":
        visual = layout.visual[:, None].expand(-1, 2, -1)
        own = visual.gather(2, assignment.evicted)
        other = visual.gather(2, compressed.positions).gather(2, assignment.target.clamp(min=0))
        assert ((own == other) | ~assignment.merged).all()
    untouched = (
        torch.zeros(1, 2, count, dtype=torch.long).scatter_add_(
            2, assignment.target.clamp(min=0), assignment.merged.long()
        )
        == 0
    )
    original = key.gather(2, compressed.positions[..., None].expand(-1, -1, -1, 8))
    assert torch.equal(entries.keys[untouched], original[untouched]), "bit for bit"
    if entries.bias is not None:
        assert (entries.bias >= -1e-6).all()


@ANY
@given(seed=st.integers(0, 2**20), evicted=st.integers(0, 90), kept=st.integers(1, 40), ties=st.booleans())
@pytest.mark.parametrize("nearest", [nearest_pivot, _nearest_of_all])
def test_blocked_matching_equals_the_dense_argmax(
    nearest: Callable[..., Any], seed: int, evicted: int, kept: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(1, 2, n, 4, generator=generator) for n in (evicted, kept))
    if ties:
        left, right = left.sign(), right.sign()
    left, right = unit_rows(left), unit_rows(right)
    classes = torch.randint(0, 2, (1, 2, evicted), generator=generator)
    admissible = torch.rand(1, 2, 2, kept, generator=generator) < 0.7
    allowed = torch.rand(1, 2, evicted, generator=generator) < 0.9
    target, similarity = nearest(left, right, admissible, classes, allowed)
    mask = admissible.gather(2, classes[..., None].expand(-1, -1, -1, kept))
    dense = (left @ right.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    best = dense.max(-1)
    none = ~allowed | (best.values == float("-inf"))
    assert torch.equal(target, torch.where(none, NO_TARGET, best.indices))
    torch.testing.assert_close(similarity, best.values.masked_fill(none, float("-inf")))


@pytest.mark.parametrize("nearest", [nearest_pivot, _nearest_of_all])
def test_matching_runs_in_several_blocks(nearest: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "PRODUCTS_AT_A_TIME", 300 * 100)
    left, right = unit_rows(torch.randn(1, 1, 500, 4)), unit_rows(torch.randn(1, 1, 300, 4))
    everything = torch.ones(1, 1, 2, 300, dtype=torch.bool)
    classes = torch.zeros(1, 1, 500, dtype=torch.long)
    target, _ = nearest(left, right, everything, classes, torch.ones_like(classes, dtype=torch.bool))
    assert torch.equal(target, (left @ right.transpose(-1, -2)).argmax(-1))


def test_an_intra_layer_compares_entries_of_one_modality_only() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (unit_rows(torch.randn(1, 2, count, 4, generator=generator)) for count in (500, 300))
    classes, visual = (torch.arange(count).expand(1, 2, -1) % 5 // 2 for count in (500, 300))
    classes, visual = classes.clamp(max=1), visual > 0
    same = torch.stack([~visual, visual], dim=2)
    allowed = torch.ones_like(classes, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        target, _ = nearest_pivot(left, right, same, classes, allowed)
    assert visual.gather(2, target).equal(classes == 1)
    pairs = 2 * (200 * 120 + 300 * 180)
    assert counter.get_total_flops() == 2 * 4 * pairs


def a_group(seed: int, members: int, alike: bool = False) -> tuple[torch.Tensor, ...]:
    """Key, value, importance of one pivot at position 0 and its members behind it."""
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, 1, members + 1, 6, generator=generator) for _ in range(2))
    if alike:
        key, value = (tensor[:, :, :1].expand_as(tensor).contiguous() for tensor in (key, value))
    return key, value, torch.rand(1, 1, members + 1, generator=generator) + 0.05


def merged_group(
    operator: str, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Weights]:
    length = key.shape[2]
    valid = torch.ones(1, length, dtype=torch.bool)
    pivots = select_pivots(torch.arange(length, 0, -1.0)[None, None], ~valid, valid, torch.tensor([1]), 1)
    evicted = complement(pivots, valid, length - 1)

    assignment = assign(
        key,
        ~valid,
        importance,
        pivots,
        evicted,
        ~valid,
        torch.tensor([False]),
        torch.zeros(1, 1, 1),
        MethodParameters(min_sim=-1.0),
    )
    weights = OPERATORS[operator](gather_group(key, value, importance, assignment))
    entries = merge(operator, key, value, importance, assignment)
    return entries.keys[0, 0, 0], entries.values[0, 0, 0], weights


SHRINKING = {"weighted"}


@ANY
@given(seed=st.integers(0, 2**20), members=st.integers(1, 12), operator=st.sampled_from(MERGE_OPERATORS))
def test_weights_sum_to_one_and_do_not_depend_on_order(seed: int, members: int, operator: str) -> None:
    key, value, importance = a_group(seed, members)
    new_key, new_value, weights = merged_group(operator, key, value, importance)
    for pivot, member in ((weights.key_pivot, weights.key_member), (weights.value_pivot, weights.value_member)):
        total = (pivot.sum() + member.sum()).item()
        assert total <= 1 + 1e-5 if operator in SHRINKING else total == pytest.approx(1, abs=1e-5)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(members)])
    shuffled = merged_group(operator, key[:, :, order], value[:, :, order], importance[:, :, order])
    torch.testing.assert_close(new_key, shuffled[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_value, shuffled[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", MERGE_OPERATORS)
def test_members_equal_to_the_pivot_leave_it_unchanged(operator: str) -> None:
    key, value, importance = a_group(1, 5, alike=True)
    new_key, new_value, _ = merged_group(operator, key, value, importance)
    torch.testing.assert_close(new_key, key[0, 0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_value, value[0, 0, 0], atol=1e-5, rtol=1e-5)


def test_registry_and_option_list_agree() -> None:
    assert tuple(OPERATORS) == MERGE_OPERATORS


@pytest.mark.parametrize("operator", ["tangent", "keep_mass_bias"])
def test_one_proxy_row_is_reproduced(operator: str) -> None:
    """Decoding with the proxy's own query over the merged layer gives its full attention output."""
    query, key, value, layout = a_layer(7, 50)
    query[:, 1::2] = query[:, ::2]  # one query per KV head, so that the head mean is that head
    method = MethodParameters.from_preset("aware", merge=operator, proxies="last:1", n_sink=0, flow="off:any")
    proxies = find_proxies(layout, method.proxies)
    compressed = compress_layer(query, key, value, layout, proxies, (9,), torch.tensor([True]), method, 8**-0.5)
    entries = compressed.entries
    assert entries.bias is not None
    assert compressed.assignment.merged.all()
    proxy = query[:, ::2, -1:]
    full = (proxy @ key.transpose(-1, -2) * 8**-0.5).softmax(-1) @ value
    logits = proxy @ entries.keys.transpose(-1, -2) * 8**-0.5 + entries.bias[:, :, None]
    torch.testing.assert_close(logits.softmax(-1) @ entries.values, full, atol=1e-6, rtol=1e-5)


def test_importance_sums_to_the_number_of_proxies_and_ignores_padding() -> None:
    query, key, _, layout = a_layer(3, 40, padding=6)
    proxies = find_proxies(layout, "last_text:5")
    importance = proxy_importance(query, key, proxies, layout.valid, 8**-0.5)
    assert importance.sum(-1).tolist() == [pytest.approx([5, 5], abs=1e-5)]
    assert (importance[..., :6] == 0).all()
    rows = rows_attention(query, key, proxies.index, layout.valid, 8**-0.5)
    future = torch.arange(40) > proxies.index[..., None]
    assert (rows[future[:, None, None].expand_as(rows)] == 0).all()


def test_proxies_are_the_last_text_tokens() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    valid = torch.ones_like(visual)
    valid[1, 0] = False
    layout = PromptLayout.from_masks(visual, valid)
    proxies = find_proxies(layout, "last_text:2")
    assert proxies.mask(6).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert find_proxies(layout, "last:2").mask(6).int().tolist() == [[0, 0, 0, 0, 1, 1]] * 3


@ANY
@given(length=st.integers(1, 60), count=st.integers(1, 60), sinks=st.integers(0, 8), proxies=st.integers(1, 40))
def test_forced_entries_leave_room_in_the_budget(length: int, count: int, sinks: int, proxies: int) -> None:
    count = min(count, length)
    layout = PromptLayout.from_masks(torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool))
    method = MethodParameters(n_sink=sinks, proxies=f"last:{proxies}")
    forced = forced_entries(layout, find_proxies(layout, method.proxies), torch.tensor([count]), method)
    assert int(forced.sum()) <= max(1, count - 1)
    assert forced[0, -1], "the last token is a proxy and stays"


@pytest.mark.parametrize("rule", ["pivot_quantile:0.5", "mass:0.5"])
def test_tau_without_a_free_pivot_is_not_nan(rule: str) -> None:
    importance = torch.tensor([[[0.3, 0.2]]])
    forced = torch.zeros(1, 1, 2, dtype=torch.bool)
    tau = tau_threshold(rule, importance, forced, torch.tensor([9]), torch.tensor([2]))
    assert not tau.isnan().any()
