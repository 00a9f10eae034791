"""Every way of generating: chunks, drafts, expanded batches, later turns, several conversations, several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracle import oracle_generate
from test_runtime_oracle import BATCH, GREEDY, PROMPT, logits_of, uneven_plan
from tiny import tiny_inputs, tiny_model
from transformers import TextStreamer

import flowmm
from flowmm.errors import InputError
from flowmm.plans import MethodParameters
from flowmm.runtime import cache

# Answers that repeat themselves give prompt lookup something to draft.
REPEATING = [[5, -16, *[7] * 3, -9, 40]]
METHODS = {
    "robust": MethodParameters.from_preset("robust"),
    "paper": MethodParameters.from_preset("paper"),
    "bias": MethodParameters(merge="keep_mass_bias", proxies="last_text:24", n_sink=1),
    "content": MethodParameters(selector="kcenter", key_space="pre_rope", proxies="last:9"),
    "columns": MethodParameters(selector="column_mean+proxy", merge="tangent"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def check_same_caches(left: Any, right: Any) -> None:
    for ours, theirs in zip(left.states, right.states, strict=True):
        assert ours.seen == theirs.seen
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("chunk", [13])
def test_chunked_prefill_equals_the_whole(model: Any, rows: list[list[int]], method: Any, chunk: int) -> None:
    inputs = tiny_inputs(rows)
    plan = uneven_plan(model)
    with flowmm.compress(model, plan, budget=0.25, method=method) as run:
        whole = model.generate(**inputs, **GREEDY)
        unchunked = run.cache
        report = run.report
        chunked = model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
        assert run.report.to_dict() | {"layers": []} == report.to_dict() | {"layers": []}
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(logits_of(whole), logits_of(chunked), atol=1e-5, rtol=1e-5)
    check_same_caches(unchunked, run.cache)


@pytest.mark.parametrize(
    ("method", "queries"),
    [
        (MethodParameters.from_preset("paper", proxies="last:4"), 4),
        (MethodParameters(mass="column_mean:8", selector="proxy", proxies="last:4"), 4 + 8 - 1),
        (MethodParameters(mass="column_mean", selector="proxy", proxies="last:4"), 117),
    ],
    ids=["proxies", "rows", "every row"],
)
def test_chunks_remember_few_queries(model: Any, method: MethodParameters, queries: int) -> None:
    plan = uneven_plan(model)
    planned = plan.model_copy(
        update={"layers": tuple(layer.model_copy(update={"mode": "intra"}) for layer in plan.layers)}
    )
    with flowmm.compress(model, planned, budget=0.25, method=method) as run:
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=1, prefill_chunk_size=16)
        prompt = run.cache._prompt
    assert prompt is not None
    assert prompt.rows is not None
    assert len(prompt.rows.columns) == queries
    assert not any(prompt.rows.queries)


@pytest.mark.parametrize("budget", [0.25, 1.0])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_prompt_lookup_equals_plain_greedy(model: Any, method: Any, budget: float) -> None:
    inputs, steps = tiny_inputs(REPEATING), {"do_sample": False, "max_new_tokens": 40}
    calls: list[int] = []
    count = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with flowmm.compress(model, uneven_plan(model), budget=budget, method=method) as run:
        plain = model.generate(**inputs, **steps)
        calls.clear()
        drafted = model.generate(**inputs, **steps, prompt_lookup_num_tokens=4)
        assert run.report.kept_tokens == int(budget * inputs["input_ids"].shape[1])
    count.remove()
    assert torch.equal(plain, drafted)
    assert max(calls[1:]) > 1, "nothing was drafted"
    assert all(layer.seen == run.cache.states[0].seen for layer in run.cache.states)


def test_assistant_model_equals_plain_greedy(model: Any) -> None:
    inputs, steps = tiny_inputs(PROMPT), {"do_sample": False, "max_new_tokens": 12}
    assistant = tiny_model()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    with flowmm.compress(model, uneven_plan(model), budget=0.3):
        plain = model.generate(**inputs, **steps)
        assisted = model.generate(**inputs, **steps, assistant_model=assistant)
    assert torch.equal(plain, assisted)


def test_drafts_in_a_later_turn_are_refused(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        cache = run.new_cache()
        ids = model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        with pytest.raises(InputError, match="fresh cache"):
            model.generate(input_ids=ids, max_new_tokens=2, past_key_values=cache, prompt_lookup_num_tokens=2)


def test_returned_sequences_are_rows_of_their_own(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    sampled = {"do_sample": True, "max_new_tokens": 6, "temperature": 1.5}
    with flowmm.compress(model, uneven_plan(model), budget=0.3):
        torch.manual_seed(3)
        together = model.generate(**inputs, **sampled, num_return_sequences=3)
        repeated = {name: torch.cat([tensor] * 3) for name, tensor in inputs.items()}
        torch.manual_seed(3)
        rows = model.generate(**repeated, **sampled)
    assert torch.equal(together, rows)


def test_beams_equal_beams_on_the_oracle(model: Any) -> None:
    inputs = tiny_inputs(BATCH)
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "num_return_sequences": 3}
    expanded = {
        name: inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    with flowmm.compress(model, uneven_plan(model), budget=0.3, method="evict") as run:
        cache = run.new_cache()
        model(**expanded, **repeated_images(inputs, BATCH, 3), past_key_values=cache)
        found = model.generate(**inputs, **beams)
    assert torch.equal(found, oracle_generate(model, cache, inputs, **beams))


def repeated_images(inputs: dict[str, torch.Tensor], rows: list[list[int]], times: int) -> dict[str, torch.Tensor]:
    """Images of a batch, each row's repeated `times` times."""
    counts = [[-segment for segment in segments if segment < 0] for segments in rows]
    pixels = inputs["pixel_values"].split([4 * sum(row) for row in counts])
    grids = inputs["image_grid_thw"].split([len(row) for row in counts])
    return {
        "pixel_values": torch.cat([part for part in pixels for _ in range(times)]),
        "image_grid_thw": torch.cat([part for part in grids for _ in range(times)]),
    }


class Pieces(TextStreamer):
    """Collects what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_a_streamer_sees_every_token(model: Any) -> None:
    streamer = Pieces()
    with flowmm.compress(model, uneven_plan(model), budget=0.3):
        ids = model.generate(**tiny_inputs(PROMPT), max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.tokens == ids[0].tolist()


def later_turn(model: Any, ids: torch.Tensor, seed: int = 5) -> dict[str, Any]:
    """Inputs of a turn that follows `ids` with a new image: all ids, and the features of the new image alone."""
    first, second = tiny_inputs(PROMPT), tiny_inputs([[4, -16, 8]], seed=seed)
    whole = torch.cat([ids, second["input_ids"]], dim=1)
    features = model.model.get_image_features(second["pixel_values"], second["image_grid_thw"], return_dict=True)
    return {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "mm_token_type_ids": (whole == model.config.image_token_id).int(),
        "mm_encoder_outputs": {"image": features},
        "image_grid_thw": torch.cat([first["image_grid_thw"], second["image_grid_thw"]]),
    }


@torch.no_grad()
def test_a_new_image_in_a_later_turn(model: Any) -> None:
    inputs = tiny_inputs(PROMPT)
    fed: list[int] = []
    with flowmm.compress(model, uneven_plan(model), budget=0.3, method="evict") as run:
        cache = run.new_cache()
        first = model.generate(**inputs, **GREEDY, past_key_values=cache)
        turn = later_turn(model, first.sequences)
        handle = model.register_forward_pre_hook(
            lambda _module, _args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        second = model.generate(**turn, **GREEDY, past_key_values=cache)
        handle.remove()
    assert fed[0] == 1 + 4 + 18 + 8
    reference = oracle_generate(model, cache, inputs, turn, **GREEDY)
    torch.testing.assert_close(logits_of(second), logits_of(reference), atol=1e-5, rtol=1e-5)


def test_interleaved_conversations_keep_their_own_positions(model: Any) -> None:
    prompts = [tiny_inputs(PROMPT), tiny_inputs([[9, -4, 30]], seed=1)]
    question = torch.tensor([[7, 8, 9, 10]])

    def turn(cache: Any, ids: torch.Tensor) -> torch.Tensor:
        return logits_of(model.generate(input_ids=torch.cat([ids, question], 1), **GREEDY, past_key_values=cache))

    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        alone, firsts = [], []
        for inputs in prompts:
            cache = run.new_cache()
            firsts.append(model.generate(**inputs, **GREEDY, past_key_values=cache).sequences)
            alone.append(turn(cache, firsts[-1]))
        caches = [run.new_cache() for _ in prompts]
        for inputs, cache in zip(prompts, caches, strict=True):
            model.generate(**inputs, **GREEDY, past_key_values=cache)
        mixed = [turn(cache, ids) for cache, ids in zip(caches, firsts, strict=True)]
        by_hand = [run.new_cache() for _ in prompts]
        for inputs, cache in zip(prompts, by_hand, strict=True):
            model(**inputs, past_key_values=cache)
        for ids, inputs, cache, expected in zip(firsts, prompts, by_hand, mixed, strict=True):
            fed = torch.cat([ids[:, inputs["input_ids"].shape[1] :], question], 1)
            logits = model(input_ids=fed, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(mixed, alone, strict=True):
        assert torch.equal(ours, theirs)


def test_threads_with_runs_of_their_own(model: Any) -> None:
    prompts, plan = [tiny_inputs(PROMPT), tiny_inputs([[9, -4, 30]], seed=1)], uneven_plan(model)
    budgets = [0.2, 0.5]
    expected, found = [], {}
    for inputs, budget in zip(prompts, budgets, strict=True):
        with flowmm.compress(model, plan, budget=budget):
            expected.append(model.generate(**inputs, **GREEDY))
    together, before = threading.Barrier(2), model.config.text_config._attn_implementation

    def answer(index: int) -> None:
        together.wait()
        for _ in range(3):
            with flowmm.compress(model, plan, budget=budgets[index]) as run:
                found[index] = model.generate(**prompts[index], **GREEDY), run.report

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, inputs in enumerate(prompts):
        output, report = found[index]
        assert torch.equal(logits_of(output), logits_of(expected[index]))
        assert report.full_tokens == inputs["input_ids"].shape[1]
    assert model.config.text_config._attn_implementation == before
    assert not [name for name in vars(model) if name.startswith(("_prepare", "_prefill"))]


def test_a_worker_thread_uses_the_block_around_it(model: Any) -> None:
    found = {}
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        thread = threading.Thread(target=lambda: found.update(ids=model.generate(**tiny_inputs(PROMPT), **GREEDY)))
        thread.start()
        thread.join()
        assert run.report.kept_tokens < run.report.full_tokens
        here = model.generate(**tiny_inputs(PROMPT), **GREEDY)
    assert torch.equal(logits_of(found["ids"]), logits_of(here))


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_autocast_leaves_compression_in_its_own_precision(
    model: Any, preset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast makes bf16 values; what entries are compressed to is the same as without autocast around it."""
    made: list[tuple[Any, Any]] = []
    original: Any = cache.compress_layer

    def compress_layer(*args: Any, **kwargs: Any) -> Any:
        under = original(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            made.append((under, original(*args, **kwargs)))
        return under

    monkeypatch.setattr(cache, "compress_layer", compress_layer)
    block = flowmm.compress(model, uneven_plan(model), budget=0.25, method=preset, recompress_every=4)
    with block as run, torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(**tiny_inputs(PROMPT), **GREEDY)
        values: Any = run.cache.states[0].values
        assert values.dtype == torch.bfloat16
    assert made
    for under, plain in made:
        assert torch.equal(under.entries.keys, plain.entries.keys)
        assert torch.equal(under.entries.values, plain.entries.values)
