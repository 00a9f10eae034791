"""The method's test vectors: exact numbers for flow, importance, pivots, tau, matching and merge operators."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flowmm.models import known_models
from flowmm.plans import MethodParameters
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.compression import compress_layer, cross_rows
from flowmm.runtime.flow import (
    RowSample,
    attention_with_class_mass,
    rho_per_head,
    rho_without_sinks,
    sampled_rho,
    uniform_rho,
)
from flowmm.runtime.importance import reduce_group
from flowmm.runtime.matching import Assignment, assign, tau_threshold, unit_rows
from flowmm.runtime.merging import OPERATORS, gather_group, merge
from flowmm.runtime.pivots import Pivots, complement, select_pivots
from flowmm.runtime.prompt import PromptLayout, Proxies
from flowmm.runtime.rotary import Rotary

VECTORS = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "vectors" / "methods.json").read_text())["cases"]
}
FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def vector(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return VECTORS[name]["input"], VECTORS[name]["expected"]


def layout_of(modality: list[str]) -> PromptLayout:
    visual = torch.tensor([[kind == "V" for kind in modality]])
    return PromptLayout.from_masks(visual, torch.ones_like(visual))


def query_and_key(attention: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose causal softmax (scaling 1) is the given ``[H, L, L]`` attention: keys one-hot."""
    rows = torch.tensor(attention, dtype=torch.float64)[None]
    key = torch.eye(rows.shape[-1], dtype=torch.float64).expand(1, rows.shape[1], -1, -1)
    return rows.clamp(min=1e-300).log().float(), key.float()


@pytest.mark.parametrize("name", ["rho_basic", "rho_from_class_mass", "rho_sink_artifact", "rho_single_modality"])
def test_rho(name: str) -> None:
    given, expected = vector(name)
    attention = torch.tensor(given["A"], dtype=torch.float64)
    attention = attention if attention.ndim == 3 else attention[None]
    layout = layout_of(given["modality"])
    mass = (attention * layout.visual[0]).sum(-1)[None]
    per_head = rho_per_head(mass, layout)
    assert per_head.mean().item() == pytest.approx(expected["rho"], abs=1e-12)
    if name == "rho_basic":
        assert per_head[0].tolist() == pytest.approx(expected["per_head"], abs=1e-12)
        assert uniform_rho(layout).item() == pytest.approx(expected["rho_uniform_causal_baseline"], abs=1e-12)
        lift = per_head.mean() / uniform_rho(layout)
        assert lift.item() == pytest.approx(expected["rho_lift"], abs=1e-12)
    if "rho_exclude_1_sink" in expected:
        without = rho_without_sinks(mass, attention[None, ..., 0], layout, 1)
        assert without.mean().item() == pytest.approx(expected["rho_exclude_1_sink"], abs=1e-12)
    if name == "rho_single_modality":
        cross = cross_rows("online", per_head.mean(-1), layout, MethodParameters(theta=0.0))
        assert expected["mode"] == ("cross" if cross.item() else "intra")


def test_class_mass_from_one_attention_call() -> None:
    given, expected = vector("rho_from_class_mass")
    query, key = query_and_key(given["A"])
    visual = layout_of(given["modality"]).visual
    _, mass = attention_with_class_mass(query, key, key, torch.stack([~visual, visual], -1), None, 1.0)
    torch.testing.assert_close(mass[0], torch.tensor(expected["class_mass"]), **FP32)


def test_rho_equal_to_theta_is_intra() -> None:
    given, expected = vector("rho_equal_theta_is_intra")
    layout = layout_of(["T", "V"])
    cross = cross_rows("online", torch.tensor([given["rho"]]), layout, MethodParameters(theta=given["theta"]))
    assert expected["mode"] == ("cross" if cross.item() else "intra")


def test_rho_of_sampled_rows() -> None:
    given, expected = vector("rho_sampled_rows")
    query, key = query_and_key(given["A"])
    rows = [torch.tensor([given[name]]) for name in ("rows_visual", "rows_text")]
    layout = layout_of(given["modality"])
    drawn = RowSample.of(layout, *((index, torch.ones_like(index, dtype=torch.bool)) for index in rows))
    estimate = sampled_rho(query, key, layout, drawn, 1.0)
    assert estimate.rho.item() == pytest.approx(expected["rho_hat"], abs=1e-6)


def test_importance() -> None:
    given, expected = vector("importance_proxy")
    attention = torch.tensor(given["A"], dtype=torch.float64)
    per_head = attention[:, given["proxies"]].sum(1)
    assert per_head.tolist() == expected["I_per_head"]
    grouped = per_head[None, None]
    for reduce in ("mean", "max", "sum"):
        assert reduce_group(grouped, reduce)[0].tolist() == expected[f"gqa_group2_{reduce}"]


def pivots_of(importance: list[float], count: int, forced: list[int] | None = None) -> list[int]:
    scores = torch.tensor(importance)[None, None]
    valid = torch.ones(1, scores.shape[-1], dtype=torch.bool)
    mask = torch.zeros_like(valid)
    mask[0, forced or []] = True
    return select_pivots(scores, mask, valid, torch.tensor([count]), count).index[0, 0].tolist()


def test_pivot_selection() -> None:
    given, expected = vector("pivot_selection")
    heads, proxies = given["I_per_head"], given["proxies"]
    mean = torch.tensor(heads).mean(0).tolist()
    for count in (2, 3, 4):
        assert [pivots_of(head, count) for head in heads] == expected[f"plain_top{count}_per_head"]
        assert [pivots_of(mean, count)] == expected[f"gqa_mean_top{count}"]
    with_sink = [pivots_of(head, 4, [0, *proxies]) for head in heads]
    assert with_sink == expected["B4_keep_proxies_and_1_sink_per_head"]
    assert [pivots_of(head, 4, proxies) for head in heads] == expected["B4_keep_proxies_no_sink_per_head"]


def test_pivot_ties_go_to_the_smaller_position() -> None:
    given, expected = vector("pivot_selection_tie")
    assert pivots_of(given["I"], given["B"]) == expected["pivots"]


def test_budget_rounding() -> None:
    given, expected = vector("budget_rounding")
    assert [entry_budget(length, given["ratio"], given["min_kept"]) for length in given["L"]] == expected["B"]


def test_tau_rules() -> None:
    given, expected = vector("tau_modes")
    importance = torch.tensor(given["pivot_importance"])[None, None]
    free = torch.ones_like(importance, dtype=torch.bool)
    length, proxies = torch.tensor([given["L"]]), torch.tensor([given["n_proxy"]])

    def eligible(rule: str) -> tuple[float, list[int]]:
        tau = tau_threshold(rule, importance, free, length, proxies)
        return tau.item(), (importance <= tau)[0, 0].nonzero().flatten().tolist()

    assert eligible("abs:0.3")[1] == expected["absolute_0.3_eligible"]
    for rule, name in (
        ("mean_mult:2", "mean_multiple_c2"),
        ("pivot_quantile:0.8", "pivot_quantile_0.8_linear"),
        ("mass:0.5", "mass_0.5"),
    ):
        tau, absorbers = eligible(rule)
        assert tau == pytest.approx(expected[name]["tau"], abs=1e-6)
        assert absorbers == expected[name]["eligible"]
    assert eligible("none") == (math.inf, [0, 1, 2, 3, 4])


def matched(scope: str, gate: str, min_sim: float = -1.0) -> Assignment:
    given, _ = vector("matching")
    tau = float(gate.removeprefix("tau_")) if gate != "no_gate" else math.inf
    method = MethodParameters(
        cross_scope="other_only" if scope == "other_only" else "any", gate=gate != "no_gate", min_sim=min_sim
    )
    layout = layout_of(given["modality"])
    index = torch.tensor([[given["pivots"]]])
    pivots = Pivots(index, torch.ones_like(index, dtype=torch.bool))
    return assign(
        torch.tensor(given["K"])[None, None],
        layout.visual,
        torch.tensor(given["I"])[None, None],
        pivots,
        complement(pivots, layout.valid, len(given["nonpivots"])),
        torch.zeros_like(layout.valid),
        torch.tensor([scope != "intra"]),
        torch.tensor([[[tau]]]),
        method,
    )


@pytest.mark.parametrize("scope", ["any", "intra", "other_only"])
@pytest.mark.parametrize("gate", ["no_gate", "tau_0.4", "tau_0.2"])
def test_matching(scope: str, gate: str) -> None:
    check_matching(matched(scope, gate), f"{scope}|{gate}")


def test_matching_with_similarity_floor() -> None:
    check_matching(matched("any", "no_gate", min_sim=0.7), "any|no_gate|min_sim_0.7")


def check_matching(assignment: Assignment, name: str) -> None:
    given, expected = vector("matching")
    for slot, (token, pivot, cosine) in enumerate(expected[name]):
        assert assignment.evicted[0, 0, slot] == token
        target = assignment.target[0, 0, slot].item()
        assert (None if target < 0 else given["pivots"][target]) == pivot
        assert assignment.similarity[0, 0, slot].item() == pytest.approx(cosine or 0.0, abs=1e-6)


def test_cosine_matrix() -> None:
    given, expected = vector("matching")
    unit = unit_rows(torch.tensor(given["K"]))
    cosine = unit[given["nonpivots"]] @ unit[given["pivots"]].T
    wanted = torch.tensor(expected["cosine_rows_nonpivot_1_3_4_cols_pivot_0_2_5"])
    torch.testing.assert_close(cosine, wanted, **FP32)


def one_group(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Assignment]:
    key, value = torch.tensor(given["K"])[None, None], torch.tensor(given["V"])[None, None]
    pivots = torch.tensor([[[given["pivot"]]]])
    members = torch.tensor([[given["members"]]])
    ones = torch.ones_like(members, dtype=torch.bool)
    unit = unit_rows(key)[0, 0]
    similarity = (unit[given["members"]] @ unit[given["pivot"]])[None, None]
    chosen = Pivots(pivots, torch.ones_like(pivots, dtype=torch.bool))
    assignment = Assignment(chosen, members, ones, torch.zeros_like(members), similarity, ~chosen.filled)
    return key, value, torch.tensor(given["I"])[None, None], assignment


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("average", "average"),
        ("pivotal", "pivotal"),
        ("weighted", "weighted_lookm"),
        ("weighted_norm", "weighted_normalised"),
        ("mass", "mass"),
        ("keep_mass", "keep_key_mass_value"),
        ("d2o", "d2o_paper_e"),
        ("evict", "evict"),
    ],
)
def test_merge_operators(operator: str, name: str) -> None:
    given, expected = vector("merge_rules")
    merged = merge(operator, *one_group(given))
    torch.testing.assert_close(merged.keys[0, 0, 0], torch.tensor(expected[name]["k"]), **FP32)
    torch.testing.assert_close(merged.values[0, 0, 0], torch.tensor(expected[name]["v"]), **FP32)


def test_merge_operators_with_own_value_rules() -> None:
    given, expected = vector("merge_rules")
    gauss = merge("gauss", *one_group(given))
    torch.testing.assert_close(gauss.keys[0, 0, 0], torch.tensor(expected["kvmerger_gauss_sigma5"]["k"]), **FP32)
    torch.testing.assert_close(gauss.values[0, 0, 0], torch.tensor(expected["kvmerger_gauss_sigma5"]["v_mean"]), **FP32)
    kvpress = merge("kvpress", *one_group(given))
    torch.testing.assert_close(kvpress.keys[0, 0, 0], torch.tensor(expected["kvpress_merging_value_only"]["k"]), **FP32)
    torch.testing.assert_close(
        kvpress.values[0, 0, 0], torch.tensor(expected["kvpress_merging_value_only"]["v"]), **FP32
    )


def test_merge_biases() -> None:
    given, expected = vector("merge_rules")
    for operator, name in (("keep_mass_bias", "log_mass_bias"), ("count_bias", "log_count_bias")):
        bias = merge(operator, *one_group(given)).bias
        assert bias is not None
        assert bias.item() == pytest.approx(expected["mass"][name], abs=1e-6)


def test_pivotal_weights() -> None:
    given, expected = vector("merge_pivotal_weights")
    for n, pivot_weight, member_weight in zip(
        given["n_members"], expected["pivot_weight"], expected["member_weight"], strict=True
    ):
        case = {"K": torch.eye(n + 1).tolist(), "V": torch.eye(n + 1).tolist(), "I": [1.0] * (n + 1)}
        weights = OPERATORS["pivotal"](gather_group(*one_group(case | {"pivot": 0, "members": list(range(1, n + 1))})))
        assert weights.key_pivot.item() == pytest.approx(pivot_weight)
        assert weights.key_member[0, 0].tolist() == pytest.approx([member_weight] * n)


@pytest.mark.parametrize("operator", ["keep_mass_bias", "tangent"])
def test_mass_bias_is_exact_for_one_proxy(operator: str) -> None:
    given, expected = vector("merge_mass_bias_exact_one_proxy")
    query, scale = torch.tensor(given["q"]), 1 / math.sqrt(2)
    case = given | {"I": expected["alpha_full"]}
    key, value, importance, assignment = one_group(case)
    merged = merge(operator, key, value, importance, assignment)
    assert merged.bias is not None
    keys, values, bias = key[0, 0].clone(), value[0, 0].clone(), torch.zeros(key.shape[2])
    keys[given["pivot"]], values[given["pivot"]] = merged.keys[0, 0, 0], merged.values[0, 0, 0]
    bias[given["pivot"]] = merged.bias.item()
    kept = given["kept"]
    output = ((keys[kept] @ query) * scale + bias[kept]).softmax(-1) @ values[kept]
    torch.testing.assert_close(output, torch.tensor(expected["out_full"]), **FP32)
    if operator == "keep_mass_bias":
        assert merged.bias.item() == pytest.approx(expected["bias"], abs=1e-6)


def test_pivots_from_attention_rows() -> None:
    given, expected = vector("flowmm_end_to_end")
    query, key = query_and_key(given["A"])
    proxies = torch.tensor([given["proxies"]])
    compressed = compress_layer(
        query,
        key[:, :1],
        torch.tensor(given["V"])[None, None],
        layout_of(given["modality"]),
        Proxies(proxies, torch.ones_like(proxies, dtype=torch.bool)),
        (given["B"],),
        torch.tensor([True]),
        MethodParameters.from_preset("paper", keep_proxies=given["keep_proxies"], n_sink=given["n_sink"]),
        1.0,
    )
    assert compressed.positions[0, 0].tolist() == expected["pivots"]


@pytest.mark.parametrize(
    ("result", "cross", "gate"),
    [("result_cross", True, True), ("result_intra_if_rho_below", False, True), ("result_cross_no_gate", True, False)],
)
@pytest.mark.parametrize("operator", ["average", "mass"])
def test_end_to_end_groups(result: str, cross: bool, gate: bool, operator: str) -> None:
    given, expected = vector("flowmm_end_to_end")
    layout, wanted = layout_of(given["modality"]), expected[result]
    importance = torch.tensor(expected["I"])[None, None]
    nothing_forced = torch.zeros_like(layout.valid)
    pivots = select_pivots(importance, nothing_forced, layout.valid, torch.tensor([given["B"]]), given["B"])
    evicted = complement(pivots, layout.valid, len(expected["I"]) - given["B"])
    key, value = torch.tensor(given["K"])[None, None], torch.tensor(given["V"])[None, None]
    assignment = assign(
        key,
        layout.visual,
        importance,
        pivots,
        evicted,
        nothing_forced,
        torch.tensor([cross]),
        torch.tensor([[[given["tau_absolute"]]]]),
        MethodParameters(gate=gate),
    )
    groups: dict[str, list[int]] = {str(pivot): [] for pivot in expected["pivots"]}
    for token, target in zip(assignment.evicted[0, 0].tolist(), assignment.target[0, 0].tolist(), strict=True):
        if target >= 0:
            groups[str(expected["pivots"][target])].append(token)
    assert groups == wanted["groups"]
    assert assignment.evicted[~assignment.merged].tolist() == wanted["dropped"]
    merged = merge(operator, key, value, importance, assignment)
    torch.testing.assert_close(merged.keys[0, 0], torch.tensor(wanted[f"K_{operator}"]), **FP32)
    torch.testing.assert_close(merged.values[0, 0], torch.tensor(wanted[f"V_{operator}"]), **FP32)


def test_keys_are_compared_and_averaged_after_rope() -> None:
    _, expected = vector("rope_space")
    keys = torch.tensor(expected["post_keys"])
    unit = unit_rows(keys)
    assert (unit[0] @ unit[1]).item() == pytest.approx(expected["cos_post"], abs=1e-6)
    case = {"K": expected["post_keys"], "V": expected["post_keys"], "I": [1.0, 1.0], "pivot": 0, "members": [1]}
    merged = merge("average", *one_group(case)).keys[0, 0, 0]
    torch.testing.assert_close(merged, torch.tensor(expected["average_post"]), **FP32)
    assert merged.norm().item() == pytest.approx(expected["norm_average_post"], abs=1e-6)


def test_keys_are_compared_and_averaged_with_rotation_undone() -> None:
    given, expected = vector("rope_space")
    angles = torch.tensor(given["positions"])[None, :, None] * given["angle_per_position"]
    rotary = Rotary(angles.expand(1, 2, 2).cos(), angles.expand(1, 2, 2).sin())
    content = rotary.undo(torch.tensor(expected["post_keys"])[None, None])
    unit = unit_rows(content)[0, 0]
    assert (unit[0] @ unit[1]).item() == pytest.approx(expected["cos_pre"], abs=1e-6)
    case = {"K": content[0, 0].tolist(), "V": content[0, 0].tolist(), "I": [1.0, 1.0], "pivot": 0, "members": [1]}
    merged = merge("average", *one_group(case)).keys
    turned = rotary.redo(merged, torch.zeros(1, 1, 1, dtype=torch.long))[0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor(expected["average_pre_then_rotate_to_pivot_pos0"]), **FP32)


def test_kv_bytes_of_the_7b_model() -> None:
    given, expected = vector("kv_bytes")
    card = next(card for card in known_models() if card.alias == "qwen25vl")
    assert (card.num_layers, card.num_kv_heads, card.head_dim) == (28, 4, 128)
    assert card.kv_bytes(1, given["bytes"]) == expected["bytes_per_token"]
    assert card.kv_bytes(given["L"]) == expected["full_bytes"]
    kept = entry_budget(given["L"], given["ratio"])
    assert kept == expected["B"]
    assert card.kv_bytes(kept + given["generated"]) == expected["compressed_bytes_after_decode"]
