"""A conversation that outgrew its budget is compressed again: exactly, boundedly, and each row for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_runtime_modes import later_turn
from test_runtime_oracle import BATCH, GREEDY, PROMPT, logits_of, single_row, uneven_plan
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.errors import ContextMismatchError, InputError
from flowmm.plans import MethodParameters
from flowmm.runtime.attention import attend_compressed
from flowmm.runtime.layer import FlowLayer
from flowmm.runtime.recompression import Conversation, recompress_layer

# One proxy, every entry merged, keys kept: what the proxy reads from a group is then what the group held.
EXACT_FOR_THE_PROXY = MethodParameters(
    merge="keep_mass_bias", mass="proxy", selector="proxy", proxies="last:1", keep_proxies=False, n_sink=0, min_sim=-1
)
METHODS = {
    "robust": MethodParameters.from_preset("robust"),
    "paper": MethodParameters.from_preset("paper"),
    "content": MethodParameters(key_space="pre_rope", merge="tangent"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def grown_layer(empty: int = 0, batch: int = 2, heads: int = 3, held: int = 30, dim: int = 8) -> FlowLayer:
    """A layer with 20 merged entries of 50 tokens and 10 later ones; the first row has `empty` slots less."""
    torch.manual_seed(0)
    layer = FlowLayer()
    bias = torch.rand(batch, heads, held)
    bias[:, :, 20:] = 0
    bias[0, :, 20 - empty : 20] = float("-inf")
    layer.hold(torch.randn(batch, heads, held, dim), torch.randn(batch, heads, held, dim), bias)
    layer.positions = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(batch * heads)])
    layer.positions = layer.positions.view(batch, heads, 20)
    layer.seen, layer.prompt_length = 60, 50
    layer.recent = torch.randn(batch, heads, 1, dim)
    return layer


@pytest.mark.parametrize("empty", [0, 4])
def test_the_proxy_reads_the_same_from_entries_merged_twice(empty: int) -> None:
    layer = grown_layer(empty)
    query = layer.recent
    assert query is not None
    before = attend_compressed(query, *layer.first_entries(30), layer.bias, 0.3)
    conversation = Conversation(torch.zeros(2, 60, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), None)
    recompress_layer(layer, (30 - empty, 30), (9, 12), conversation, EXACT_FOR_THE_PROXY, 0.3, 0)
    after = attend_compressed(query, *layer.first_entries(12), layer.bias, 0.3)
    assert layer.kept == 12
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_positions_follow_the_entries() -> None:
    layer = grown_layer()
    keys, _ = layer.first_entries(30)
    origin = {
        tuple(keys[0, 1, slot].tolist()): place for slot, place in enumerate(layer.all_positions()[0, 1].tolist())
    }
    conversation = Conversation(torch.zeros(2, 60, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), None)
    evict = MethodParameters.from_preset("evict", proxies="last:1", selector="proxy")
    recompress_layer(layer, (30, 30), (12, 12), conversation, evict, 0.3, 0)
    kept, _ = layer.first_entries(12)
    assert layer.positions is not None
    assert [origin[tuple(key.tolist())] for key in kept[0, 1]] == layer.positions[0, 1].tolist()
    assert layer.all_positions()[0, 1, -1] == 59


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_long_answer_stays_bounded(model: Any, method: Any) -> None:
    inputs, held = tiny_inputs(PROMPT), []
    length = inputs["input_ids"].shape[1]
    with flowmm.compress(model, uneven_plan(model), budget=0.2, method=method, recompress_every=8) as run:
        cache = run.new_cache()
        handle = model.register_forward_hook(lambda *_: held.append([layer.kept for layer in cache.states]))
        model.generate(**inputs, max_new_tokens=60, do_sample=False, past_key_values=cache)
        handle.remove()
        for seen, kept in enumerate(held, start=length):
            budget = run.settings.entries(seen)
            assert all(entries < allowed + 8 for entries, allowed in zip(kept, budget, strict=True))
        assert all(times >= 4 for times in run.report.recompressions)
    assert all(layer.seen == length + 59 for layer in cache.states)


def test_a_row_of_a_padded_batch_equals_its_own_run(model: Any) -> None:
    together, options = tiny_inputs(BATCH), GREEDY | {"max_new_tokens": 16}
    with flowmm.compress(model, uneven_plan(model), budget=0.3, recompress_every=4) as run:
        batch = model.generate(**together, **options)
        assert all(run.report.recompressions)
        for row, length in enumerate(together["attention_mask"].sum(-1).tolist()):
            single = model.generate(**single_row(together, BATCH, row, length), **options)
            torch.testing.assert_close(logits_of(batch)[:, row], logits_of(single)[:, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_second_prompt_with_an_image_comes_back_to_the_budget(model: Any, method: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    with flowmm.compress(model, uneven_plan(model), budget=0.2, method=method, recompress_every=1) as run:
        cache = run.new_cache()
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
        turn = later_turn(model, first)
        model.generate(**turn, max_new_tokens=1, do_sample=False, past_key_values=cache)
    seen = turn["input_ids"].shape[1]
    assert [layer.kept for layer in cache.states] == run.settings.entries(seen)
    positions = [layer.all_positions() for layer in cache.states]
    assert all(int(columns.max()) < seen for columns in positions)
    assert any(bool((columns >= inputs["input_ids"].shape[1]).any()) for columns in positions)


def test_full_budget_is_never_compressed_again(model: Any) -> None:
    inputs = tiny_inputs(BATCH)
    plain = model.generate(**inputs, **GREEDY)
    with flowmm.compress(model, uneven_plan(model), budget=1.0, recompress_every=1) as run:
        kept = model.generate(**inputs, **GREEDY)
        assert not any(run.report.recompressions)
    torch.testing.assert_close(logits_of(plain), logits_of(kept), atol=1e-5, rtol=1e-5)


def test_what_does_not_go_together_is_refused(model: Any, tmp_path: Any) -> None:
    plan = uneven_plan(model)
    with pytest.raises(InputError, match="at least 1"), flowmm.compress(model, plan, recompress_every=0):
        pass
    with flowmm.compress(model, plan, recompress_every=4) as run:
        with pytest.raises(InputError, match="recompress_every"):
            model.generate(**tiny_inputs(PROMPT), max_new_tokens=3, prompt_lookup_num_tokens=2)
        model(**tiny_inputs(PROMPT))
        run.save(tmp_path / "context.safetensors")
        with pytest.raises(ContextMismatchError, match="recompress_every"):
            run.load(tmp_path / "context.safetensors")
