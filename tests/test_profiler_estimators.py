"""Every estimator against a float64 reference made from eager attention, by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model

from flowmm.models import visual_mask
from flowmm.profiler import LayerFlow, record_flow
from flowmm.profiler.sinks import SINK_MASS, sink_candidates
from flowmm.runtime.flow import rho_without, rho_without_sinks
from flowmm.runtime.prompt import PromptLayout

PROMPTS = [[[5, -16, 7, -25, 9, -9, 40]], [[1, -4, 2]], [[30, -4, 12, -36]], [[25]]]


def model_with_sinks() -> Any:
    """All queries point the same way in the one direction that rotation by position hardly turns, so that the same few
    keys draw much of every row's mass."""
    model = tiny_model(3)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            slowest = layer.self_attn.head_dim // 2 - 1
            layer.self_attn.q_proj.bias.view(-1, layer.self_attn.head_dim)[:, slowest] = 14.0
    return model


@pytest.fixture(scope="module", params=[tiny_model, model_with_sinks])
def model(request: pytest.FixtureRequest) -> Any:
    """4 query heads on 2 KV heads."""
    return request.param()


def eager_attention(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """``[Hq, L, L]`` fp64 of every layer, rows and columns of padding cut off."""
    model.set_attn_implementation({"text_config": "eager"})
    rows = torch.where(inputs["attention_mask"][0].bool())[0]
    try:
        with torch.no_grad():
            layers = model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    return [layer[0].double()[:, rows][:, :, rows] for layer in layers]


def crossing_share(attention: torch.Tensor, visual: torch.Tensor, deleted: torch.Tensor) -> torch.Tensor:
    """``[Hq]``: eq. 6-7 of the attention left after deleting rows and columns, each row renormalised."""
    left = attention[:, ~deleted][:, :, ~deleted]
    mass = left.sum(-1, keepdim=True)
    left = torch.where(mass > 1e-6, left / mass.clamp(min=1e-6), 0.0)
    kind = visual[~deleted]
    crossing = left[:, kind][:, :, ~kind].sum((1, 2)) + left[:, ~kind][:, :, kind].sum((1, 2))
    return crossing / max(1, int((~deleted).sum()))


def mean_mass(attention: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return attention[:, rows][:, :, columns].sum(-1).sum(-1) / max(1, int(rows.sum()))


def assert_equals_reference(layer: LayerFlow, attention: torch.Tensor, visual: torch.Tensor, sinks: int) -> None:
    place = torch.arange(len(visual))
    column_mass = attention.mean((0, 1))
    columns = [column for column in place.tolist() if column_mass[column] > SINK_MASS]
    assert layer.sink_columns == columns
    assert layer.sink_column_masses == pytest.approx(column_mass[columns].tolist(), abs=1e-6)
    expected = {
        "rho": crossing_share(attention, visual, place < 0),
        "rho_nosink": crossing_share(attention, visual, place < sinks),
        "rho_nosink_auto": crossing_share(attention, visual, torch.isin(place, torch.tensor(columns))),
        "text_mass_of_visual": mean_mass(attention, visual, ~visual),
        "visual_mass_of_text": mean_mass(attention, ~visual, visual),
        "sink_mass": mean_mass(attention, place >= 0, place < sinks),
    }
    for name, reference in expected.items():
        # What fp32 masses leave of a row that lies almost wholly on sinks is renormalised, errors included.
        tolerance = 2e-5 if "nosink" in name else 2e-6
        assert getattr(layer, name) == pytest.approx(reference.tolist(), abs=tolerance), name


@pytest.mark.parametrize("rows", PROMPTS, ids=str)
@pytest.mark.parametrize("padding", [0, 70])
def test_every_estimator_equals_eager_attention(model: Any, rows: list[list[int]], padding: int) -> None:
    inputs = tiny_inputs(rows)
    if padding:
        padded = tiny_inputs([*rows, [inputs["input_ids"].shape[1] + padding]])
        inputs |= {name: padded[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    flow = record_flow(model, inputs)
    own = inputs["attention_mask"][0].bool()
    visual = visual_mask(model.config, inputs["input_ids"])[0][own]
    for layer, attention in zip(flow.layers, eager_attention(model, inputs), strict=True):
        assert_equals_reference(layer, attention, visual, flow.sinks)


def test_the_model_with_sinks_has_sinks() -> None:
    """The comparison above would prove little about sinks if there were none."""
    flow = record_flow(model_with_sinks(), tiny_inputs(PROMPTS[0]))
    assert any(layer.sink_columns for layer in flow.layers)
    assert any(layer.rho_nosink_auto != layer.rho for layer in flow.layers)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(40, 300), place=st.floats(0, 0.5), strength=st.floats(2, 8))
def test_a_planted_sink_is_a_candidate(seed: int, length: int, place: float, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(1, 4, length, 8, generator=generator), torch.randn(1, 2, length, 8, generator=generator)
    column = int(place * length)
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :, column, 0] = strength * 8**0.5
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")
    )
    mass = scores.softmax(-1).mean((0, 1, 2))
    layout = PromptLayout.from_masks(torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.bool))
    found = sink_candidates(query, key, layout, 8**-0.5, 6)[0].tolist()
    for sink in torch.where(mass > SINK_MASS)[0].tolist():
        assert sink in found


def test_deleting_the_first_tokens_is_a_case_of_deleting_any() -> None:
    generator = torch.Generator().manual_seed(0)
    visual = torch.tensor([[False] * 3 + [True] * 5 + [False] * 4])
    layout = PromptLayout.from_masks(visual, torch.ones_like(visual))
    attention = torch.rand(1, 2, 12, 12, generator=generator, dtype=torch.float64).tril()
    attention /= attention.sum(-1, keepdim=True)
    to_visual, to_first = attention[..., 3:8].sum(-1), attention[..., :2].sum(-1)
    assert torch.equal(
        rho_without_sinks(to_visual, to_first, layout, 2), rho_without(to_visual, to_first, layout, layout.rank < 2)
    )


def test_sampled_rows_are_recorded_with_their_error() -> None:
    model, inputs = tiny_model(), tiny_inputs(PROMPTS[0])
    exact = record_flow(model, inputs)
    assert {layer.sampled_rho for layer in exact.layers} == {None}
    every, some = record_flow(model, inputs, sampled_rows=10_000), record_flow(model, inputs, sampled_rows=12)
    for layer, all_rows, few in zip(exact.layers, every.layers, some.layers, strict=True):
        rho = sum(layer.rho) / len(layer.rho)
        assert all_rows.sampled_rho == pytest.approx(rho, abs=1e-5)
        assert all_rows.sampled_error == pytest.approx(0, abs=1e-6)
        assert few.sampled_rho is not None
        assert few.sampled_error is not None
        assert few.sampled_error > 0
        assert few.sampled_rho == pytest.approx(rho, abs=5 * few.sampled_error)
        assert few.rho == layer.rho
