"""A compressed run equals a full-cache run masked to what was kept, for every mode of use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import oracle_generate
from tiny import tiny_inputs, tiny_model
from transformers import DynamicCache

import flowmm
from flowmm.models import fingerprint_model
from flowmm.plans import LayerPlan, MethodParameters, Plan, unprofiled_plan

PROMPT = [[5, -16, 7, -25, 9, -9, 40]]
BATCH = [[5, -16, 7, -25, 9, -9, 40], [4, -9, 16], [30]]
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def uneven_plan(model: Any, budget: float = 0.2) -> Plan:
    """Layers of different budgets, so every layer's cache has its own length."""
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    shares = [0.5, 1.5, 0.8, 1.2]
    layers = [LayerPlan(index=i, mode="online", budget=budget * share, rho=None) for i, share in enumerate(shares)]
    return plan.model_copy(update={"layers": tuple(layers), "method": MethodParameters(budget=budget)})


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
def test_full_budget_is_bit_identical(model: Any, rows: list[list[int]]) -> None:
    inputs = tiny_inputs(rows)
    plain = model.generate(**inputs, **GREEDY)
    with flowmm.compress(model, uneven_plan(model), budget=1.0):
        kept = model.generate(**inputs, **GREEDY)
    assert torch.equal(logits_of(plain), logits_of(kept))


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
def test_eviction_equals_the_masked_full_cache(model: Any, rows: list[list[int]], budget: float) -> None:
    check_against_oracle(model, tiny_inputs(rows), budget, "evict")


@pytest.mark.parametrize("operator", ["average", "keep_mass", "keep_mass_bias", "tangent", "pivotal", "weighted"])
def test_merging_equals_the_full_cache_with_entries_written_back(model: Any, operator: str) -> None:
    check_against_oracle(model, tiny_inputs(BATCH), 0.25, operator)


def check_against_oracle(model: Any, inputs: dict[str, torch.Tensor], budget: float, operator: str) -> None:
    method = MethodParameters(merge=operator, proxies="last_text:6", n_sink=1)
    with flowmm.compress(model, uneven_plan(model), budget=budget, method=method) as run:
        compressed = model.generate(**inputs, **GREEDY)
    lengths = {layer.kept for layer in run.cache.states}
    assert len(lengths) > 1 or budget == 0.05, "layers should differ in length"
    reference = oracle_generate(model, run.cache, inputs, **GREEDY)
    assert torch.equal(compressed.sequences, reference.sequences)
    torch.testing.assert_close(logits_of(compressed), logits_of(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["robust", "paper", "evict"])
def test_padded_row_equals_its_own_run(model: Any, preset: str) -> None:
    together = tiny_inputs(BATCH)
    with flowmm.compress(model, uneven_plan(model), budget=0.3, method=preset):
        batch = model.generate(**together, **GREEDY)
    for row, length in enumerate(together["attention_mask"].sum(-1).tolist()):
        alone = single_row(together, BATCH, row, length)
        with flowmm.compress(model, uneven_plan(model), budget=0.3, method=preset):
            single = model.generate(**alone, **GREEDY)
        torch.testing.assert_close(logits_of(batch)[:, row], logits_of(single)[:, 0], atol=1e-5, rtol=1e-5)


def single_row(batch: dict[str, torch.Tensor], rows: list[list[int]], row: int, length: int) -> dict[str, torch.Tensor]:
    """Row `row` of a batch without its padding and without the other rows' images."""
    images = [[-s for s in segments if s < 0] for segments in rows]
    first = sum(map(len, images[:row]))
    before, own = sum(map(sum, images[:row])), sum(images[row])
    alone = {
        name: batch[name][row : row + 1, -length:] for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    if own:
        alone["pixel_values"] = batch["pixel_values"][4 * before : 4 * (before + own)]
        alone["image_grid_thw"] = batch["image_grid_thw"][first : first + len(images[row])]
    return alone


def test_second_turn_feeds_only_its_own_tokens(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    fed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with flowmm.compress(model, uneven_plan(model), budget=0.3, method="evict") as run:
        cache = run.new_cache()
        first = model.generate(**inputs, **GREEDY, past_key_values=cache)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9, 10]])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        fed.clear()
        second = model.generate(**turn, **GREEDY, past_key_values=cache)
    handle.remove()
    assert fed[0] == 5, "the last generated token and the four new ones"
    reference = oracle_generate(model, cache, inputs, turn, **GREEDY)
    torch.testing.assert_close(logits_of(second), logits_of(reference), atol=1e-5, rtol=1e-5)


def test_hand_written_loop_keeps_true_positions(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        generated = model.generate(**inputs, **GREEDY)
        output = model(**inputs)
        cache = output.past_key_values
        logits = [output.logits[:, -1]]
        for _ in range(4):
            token = logits[-1].argmax(-1, keepdim=True)
            logits.append(model(input_ids=token, past_key_values=cache).logits[:, -1])
    assert run.cache is cache
    torch.testing.assert_close(torch.stack(logits), logits_of(generated)[:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_expanded_batches_run(model: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        output = model.generate(**tiny_inputs(BATCH), max_new_tokens=6, **options)
    assert output.shape[1] == tiny_inputs(BATCH)["input_ids"].shape[1] + 6
    assert run.report.kept_tokens < run.report.full_tokens


def test_beams_on_a_full_budget_equal_plain_beams(model: Any) -> None:
    inputs = tiny_inputs(BATCH)
    plain = model.generate(**inputs, num_beams=3, max_new_tokens=6, do_sample=False)
    with flowmm.compress(model, uneven_plan(model), budget=1.0):
        kept = model.generate(**inputs, num_beams=3, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, kept)


def test_past_key_values_and_block_agree(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    with flowmm.compress(model, uneven_plan(model), budget=0.2) as run:
        implicit = model.generate(**inputs, **GREEDY)
        explicit = model.generate(**inputs, **GREEDY, past_key_values=run.new_cache())
    assert torch.equal(logits_of(implicit), logits_of(explicit))


def test_eager_base_equals_sdpa_base(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    plan = uneven_plan(model)
    with flowmm.compress(model, plan, budget=0.3, method="evict"):
        sdpa = model.generate(**inputs, **GREEDY)
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with flowmm.compress(model, plan, budget=0.3, method="evict"):
            eager = model.generate(**inputs, **GREEDY)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    torch.testing.assert_close(logits_of(sdpa), logits_of(eager), atol=1e-5, rtol=1e-5)


def test_dynamic_cache_still_works_next_to_a_block(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    plain = model.generate(**inputs, **GREEDY)
    with flowmm.compress(model, uneven_plan(model), budget=0.2):
        model.generate(**inputs, **GREEDY)
    again = model.generate(**inputs, **GREEDY, past_key_values=DynamicCache())
    assert torch.equal(logits_of(plain), logits_of(again))
