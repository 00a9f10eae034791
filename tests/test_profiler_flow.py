"""rho against eager attention, with padding and GQA; records and plans that survive interruption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model

from flowmm.models import visual_mask
from flowmm.profiler import record_flow
from flowmm.profiler.recorder import PromptFlow
from flowmm.runtime import flow
from flowmm.runtime.flow import RowSample, rho_per_head, sample_rows, sampled_rho, uniform_rho
from flowmm.runtime.prompt import PromptLayout

PROMPT = [[5, -16, 7, -25, 9, -9, 40]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def eager_attention(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """``[B, Hq, L, L]`` fp64 of every layer, from transformers' own eager attention."""
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            return [layer.double() for layer in model(**inputs, output_attentions=True, use_cache=False).attentions]
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


def reference_rho(attention: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Eq. 6-7 by definition, one row: ``[Hq]``."""
    rows = torch.where(valid)[0]
    attention = attention[:, rows][:, :, rows]
    kind = visual[rows]
    crossing = attention[:, kind][:, :, ~kind].sum((1, 2)) + attention[:, ~kind][:, :, kind].sum((1, 2))
    return crossing / attention.sum((1, 2))


@pytest.mark.parametrize("rows", [PROMPT, [[30, -4, 2]], [[3, -64, 1, -36, 50]]], ids=str)
def test_rho_of_every_layer_and_head_equals_eager(model: Any, rows: list[list[int]]) -> None:
    inputs = tiny_inputs(rows)
    flow = record_flow(model, inputs)
    visual, valid = visual_mask(model.config, inputs["input_ids"])[0], inputs["attention_mask"][0].bool()
    for layer, attention in zip(flow.layers, eager_attention(model, inputs), strict=True):
        torch.testing.assert_close(
            torch.tensor(layer.rho).double(), reference_rho(attention[0], visual, valid), atol=1e-6, rtol=0
        )


def test_rho_ignores_padding(model: Any) -> None:
    alone, batch = tiny_inputs([[4, -9, 16]]), tiny_inputs([[4, -9, 16], [80]])
    padded = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    padded |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    first, second = record_flow(model, alone), record_flow(model, padded)
    assert second.tokens == first.tokens
    for one, two in zip(first.layers, second.layers, strict=True):
        assert one.rho == pytest.approx(two.rho, abs=1e-6)
        assert one.rho_nosink == pytest.approx(two.rho_nosink, abs=1e-6)


def test_recording_changes_nothing(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    with torch.no_grad():
        before = model(**inputs).logits
        record_flow(model, inputs)
        after = model(**inputs).logits
    assert torch.equal(before, after)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_recorded_pass_gives_the_models_own_hidden_states(model: Any) -> None:
    """The recorder replaces attention; its outputs must be the host's, or deep layers would see another model."""
    inputs = tiny_inputs(PROMPT)
    deep: list[torch.Tensor] = []
    handle = model.model.language_model.norm.register_forward_hook(lambda _m, _i, output: deep.append(output))
    with torch.no_grad():
        model(**inputs)
        record_flow(model, inputs)
    handle.remove()
    torch.testing.assert_close(deep[0], deep[1], atol=1e-5, rtol=1e-5)


def test_text_only_prompt_has_no_flow_and_no_sinks(model: Any) -> None:
    flow = record_flow(model, tiny_inputs([[25]]))
    assert (flow.uniform_rho, flow.sinks, flow.images) == (0.0, 0, 0)
    assert all(layer.rho == [0.0] * 4 for layer in flow.layers)


def test_sinks_are_the_text_before_the_first_image(model: Any) -> None:
    def sinks(rows: list[list[int]]) -> int:
        flow: PromptFlow = record_flow(model, tiny_inputs(rows))
        return flow.sinks

    assert sinks([[30, -4, 2]]) == 4
    assert sinks([[1, -4, 2]]) == 2, "one text token and the vision start marker"


def random_layer(seed: int, length: int, visual_share: float) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, length, 8, generator=generator)
    key = torch.randn(1, 2, length, 8, generator=generator)
    visual = torch.rand(1, length, generator=generator) < visual_share
    layout = PromptLayout.from_masks(visual, torch.ones_like(visual))
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")
    )
    mass = torch.where(visual[:, None, None], scores.double().softmax(-1), 0.0).sum(-1)
    return query, key, layout, rho_per_head(mass, layout).mean().item()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(2, 80), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_sampling_every_row_is_exact(seed: int, length: int, share: float) -> None:
    query, key, layout, rho = random_layer(seed, length, share)
    estimate = sampled_rho(query, key, layout, RowSample.draw(layout, length, seed=0), 8**-0.5)
    assert estimate.rho.item() == pytest.approx(rho, abs=1e-5)
    assert estimate.standard_error.item() == pytest.approx(0.0, abs=1e-6)


def test_sampled_intervals_cover_the_truth() -> None:
    query, key, layout, rho = random_layer(3, 400, 0.6)
    covered, estimates = 0, []
    for seed in range(200):
        estimate = sampled_rho(query, key, layout, RowSample.draw(layout, 24, seed), 8**-0.5)
        estimates.append(estimate.rho.item())
        covered += abs(estimate.rho.item() - rho) <= 1.96 * estimate.standard_error.item()
    assert sum(estimates) / len(estimates) == pytest.approx(rho, abs=0.005), "unbiased"
    assert 0.90 <= covered / 200 <= 0.99


def test_sampled_rho_is_the_same_behind_padding_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, layout, _ = random_layer(4, 300, 0.6)
    alone = sampled_rho(query, key, layout, RowSample.draw(layout, 24, seed=1), 8**-0.5)
    padded = PromptLayout.from_masks(
        torch.nn.functional.pad(layout.visual, (37, 0)), torch.nn.functional.pad(layout.valid, (37, 0))
    )
    shifted = [torch.nn.functional.pad(states, (0, 0, 37, 0)) for states in (query, key)]
    rows = RowSample.draw(padded, 24, seed=1)
    for logits in (1, 2**30):
        monkeypatch.setattr(flow, "LOGITS_AT_A_TIME", logits)
        behind = sampled_rho(*shifted, padded, rows, 8**-0.5)
        torch.testing.assert_close(behind.rho, alone.rho)
        torch.testing.assert_close(behind.standard_error, alone.standard_error)


def test_rows_come_from_equal_stretches_and_all_are_as_likely() -> None:
    candidates = torch.arange(50) % 7 != 0
    places = candidates.nonzero().flatten()
    drawn = torch.zeros(50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        index, used = sample_rows(candidates[None], 12, generator)
        assert used.all()
        assert candidates[index].all()
        ranks = torch.searchsorted(places, index[0])
        assert ((ranks // (len(places) / 12)).sub(torch.arange(12)).abs() <= 1).all()
        drawn[index[0]] += 1
    expected = 4000 * 12 / len(places)
    assert (drawn[candidates] - expected).abs().max() < 5 * expected**0.5


def test_rows_of_a_modality_with_few_or_none() -> None:
    generator = torch.Generator().manual_seed(0)
    index, used = sample_rows(torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool(), 5, generator)
    assert index[0, :3].tolist() == [1, 3, 4]
    assert used.sum(-1).tolist() == [3, 0]


@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(st.booleans(), min_size=1, max_size=40))
def test_uniform_rho_is_the_flow_of_uniform_attention(kinds: list[bool]) -> None:
    visual = torch.tensor([kinds])
    layout = PromptLayout.from_masks(visual, torch.ones_like(visual))
    length = len(kinds)
    uniform = torch.ones(length, length, dtype=torch.float64).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    mass = (uniform * visual[0]).sum(-1)[None, None]
    assert uniform_rho(layout).item() == pytest.approx(rho_per_head(mass, layout).item(), abs=1e-12)
