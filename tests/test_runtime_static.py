"""The static cache: the same tokens as the growing one, in memory that stays where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_runtime_oracle import BATCH, GREEDY, PROMPT, logits_of, uneven_plan
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.errors import InputError
from flowmm.plans import MethodParameters
from flowmm.runtime import NoCompilerWarning, compiled, static_cache
from flowmm.runtime.attention import attend_compressed, attend_one_token

METHODS = {
    "robust": MethodParameters.from_preset("robust"),
    "evict": MethodParameters.from_preset("evict"),
    "bias": MethodParameters(merge="keep_mass_bias", proxies="last_text:6"),
}
STATIC: dict[str, Any] = GREEDY | {"cache_implementation": "static"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_static_equals_growing(model: Any, rows: list[list[int]], method: Any, budget: float) -> None:
    inputs = tiny_inputs(rows)
    with flowmm.compress(model, uneven_plan(model), budget=budget, method=method) as run:
        growing = model.generate(**inputs, **GREEDY)
        sizes = run.cache.nbytes, [layer.kept for layer in run.cache.states]
        static = model.generate(**inputs, **STATIC)
        assert [layer.kept for layer in run.cache.states] == sizes[1]
        assert run.cache.reserved_bytes > 0
    assert torch.equal(growing.sequences, static.sequences)
    torch.testing.assert_close(logits_of(growing), logits_of(static), atol=1e-5, rtol=1e-5)


def test_buffers_serve_one_prompt_after_another(model: Any) -> None:
    prompts = [tiny_inputs(PROMPT), tiny_inputs([[9, -4, 30]], seed=1), tiny_inputs([[50, -16, 9]], seed=2)]
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        expected = [model.generate(**inputs, **GREEDY) for inputs in prompts]
        places = []
        for inputs, fresh in zip(prompts, expected, strict=True):
            reused = model.generate(**inputs, **STATIC)
            torch.testing.assert_close(logits_of(reused), logits_of(fresh), atol=1e-5, rtol=1e-5)
            buffers = [layer.buffers for layer in run.static_cache(8)._static_states]
            places.append([held.keys.data_ptr() for held in buffers if held is not None])
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 4


def test_buffers_have_room_for_the_answer_and_no_more(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "BUCKET", 8)
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        model.generate(**tiny_inputs(PROMPT), **STATIC | {"max_new_tokens": 4})
        cache: Any = run.cache
        assert cache.record is not None
        needed = [layer.counts[0] + 4 for layer in cache.record.layers]
        capacities = [layer.buffers.capacity for layer in cache.states]
    assert capacities == [-(-count // 8) * 8 for count in needed]


def test_a_later_turn_continues_and_finds_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "BUCKET", 8)
    inputs = tiny_inputs(PROMPT)
    question = torch.tensor([[7, 8, 9, 10]])

    def talk(cache: Any) -> list[torch.Tensor]:
        first = model.generate(**inputs, **GREEDY, past_key_values=cache)
        ids = torch.cat([first.sequences, question], dim=1)
        second = model.generate(input_ids=ids, **GREEDY | {"max_new_tokens": 20}, past_key_values=cache)
        return [logits_of(first), logits_of(second)]

    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        growing, static = talk(run.new_cache()), talk(run.static_cache(2))
    for ours, theirs in zip(static, growing, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_beams_on_the_static_cache(model: Any) -> None:
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    with flowmm.compress(model, uneven_plan(model), budget=0.3):
        growing = model.generate(**tiny_inputs(BATCH), **beams)
        static = model.generate(**tiny_inputs(BATCH), **beams, cache_implementation="static")
    assert torch.equal(growing, static)


def test_what_a_static_cache_cannot_do_is_refused(model: Any) -> None:
    with flowmm.compress(model, uneven_plan(model)), pytest.raises(InputError, match="static"):
        model.generate(**tiny_inputs(PROMPT), **STATIC, prompt_lookup_num_tokens=2)
    again = flowmm.compress(model, uneven_plan(model), recompress_every=8)
    with again, pytest.raises(InputError, match="recompress_every"):
        model.generate(**tiny_inputs(PROMPT), **STATIC)


def test_compiled_decoding_without_a_compiler_runs_uncompiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs(PROMPT)
    with flowmm.compress(model, uneven_plan(model), budget=0.3):
        expected = model.generate(**inputs, **GREEDY)
        drafted = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    block = flowmm.compress(model, uneven_plan(model), budget=0.3, compile_decoding=True)
    with pytest.warns(NoCompilerWarning, match="decoding runs uncompiled"), block:
        found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    monkeypatch.undo()
    with flowmm.compress(model, uneven_plan(model), budget=0.3, compile_decoding=True) as run:
        assert run.compile_config.fullgraph
        found = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
        assert not isinstance(run.cache, static_cache.StaticFlowCache)
    assert torch.equal(found.sequences, drafted.sequences)


@pytest.mark.slow
def test_compiled_decoding_is_one_graph_where_no_code_can_be_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("aoti_compile_and_package", "aoti_load_package"):
        monkeypatch.delattr(torch._inductor, function)
    prompts = [[[9, -4, 30]], PROMPT, [[50, -16, 9]], [[5, -25, 60]]]
    attributes = set(vars(model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed, rows in enumerate(prompts):
        inputs = tiny_inputs(rows, seed=seed)
        with flowmm.compress(model, uneven_plan(model), budget=0.3):
            expected = model.generate(**inputs, **GREEDY)
        with flowmm.compress(model, uneven_plan(model), budget=0.3, compile_decoding=True) as run:
            found = model.generate(**inputs, **GREEDY)
            assert isinstance(run.cache, static_cache.StaticFlowCache)
        assert set(vars(model)) == attributes
        torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-4, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("group", [1, 4])
def test_attention_for_compiled_code_is_attention(group: int) -> None:
    query, key, value = torch.randn(2, 3 * group, 1, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    bias = torch.randn(2, 3, 40).masked_fill_(torch.rand(2, 3, 40) < 0.2, float("-inf"))
    arguments = query, key, value, bias, 0.3
    torch.testing.assert_close(attend_one_token(*arguments), attend_compressed(*arguments))
