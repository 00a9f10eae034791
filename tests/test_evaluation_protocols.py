"""The three protocols on random weights: exact at a budget of 1.0, and equal to what ``flowmm.compress`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import tiny_image, write_checkpoint
from torch import Tensor

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.bench import Bench, Cell
from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.protocols import PROTOCOLS, build_trial
from flowmm.evaluation.suite import Case, pocket_cases, unlabelled_cases
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, unprofiled_plan
from flowmm.runtime import FlowCache, compress
from flowmm.runtime.replay import Prefill, Trial, answer_greedily, divergence, prefill, reading_caches

METHODS = ("robust", "paper", "evict", "merge=tangent", "robust:selector=kcenter", "inverted")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("tiny"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)


@pytest.fixture(scope="module")
def case() -> Case:
    (first,) = pocket_cases("validation", 1, ["text_needle"])
    return first


def conversation(model: LoadedModel, case: Case, protocol: str) -> dict[str, Tensor]:
    return model.build_inputs(PROTOCOLS[protocol](case).whole)


def parameters(name: str) -> MethodParameters:
    (method,) = parse_methods(name, 0.25)
    assert method.parameters is not None
    return method.parameters


@torch.no_grad()
def plain_logits(model: LoadedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model.model(**inputs, logits_to_keep=1).logits[:, -1].float()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tokens_are_those_of_the_whole_conversation(model: LoadedModel, case: Case, protocol: str) -> None:
    trial = build_trial(model, case, protocol)
    kept = trial.prompt_length - trial.fed_again
    joined = torch.cat([trial.inputs["input_ids"][:, :kept], trial.continuation], dim=1)
    assert torch.equal(joined, conversation(model, case, protocol)["input_ids"])
    assert trial.positions.shape[-1] == trial.continuation.shape[1]


def texts(model: LoadedModel, trial: Trial) -> tuple[str, str]:
    prompt, fed = (model.tokenizer.decode(ids[0]) for ids in (trial.inputs["input_ids"], trial.continuation))
    return str(prompt), str(fed)


def test_aware_knows_the_question_and_feeds_the_last_token_again(model: LoadedModel, case: Case) -> None:
    prompt, fed = texts(model, build_trial(model, case, "aware"))
    assert prompt.endswith(f"\n{case.question}<|im_end|>\n<|im_start|>assistant\n")
    assert fed == "\n"


def test_blind_compresses_nothing_of_the_question(model: LoadedModel, case: Case) -> None:
    prompt, fed = texts(model, build_trial(model, case, "blind"))
    assert case.question not in prompt
    assert prompt.endswith((".", "<|vision_end|>"))
    assert fed == f"\n{case.question}<|im_end|>\n<|im_start|>assistant\n"


def test_second_compresses_another_question_and_feeds_its_answer(model: LoadedModel, case: Case) -> None:
    assert case.earlier is not None
    question, answer = case.earlier
    prompt, fed = texts(model, build_trial(model, case, "second"))
    assert prompt.endswith(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
    turn = f"<|im_end|>\n<|im_start|>user\n\n{case.question}<|im_end|>\n<|im_start|>assistant\n"
    assert fed.replace("\n\n", "\n") == answer + turn.replace("\n\n", "\n")
    assert question != case.question


def full_cache(prefilled: Prefill, trial: Trial) -> FlowCache:
    cache = prefilled.full_cache()
    prefilled.hide_last(cache, trial.fed_again)
    return cache


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_full_cache_equals_plain_generation(model: LoadedModel, case: Case, protocol: str) -> None:
    trial, inputs = build_trial(model, case, protocol), conversation(model, case, protocol)
    prefilled = prefill(model.model, trial)
    with reading_caches(model.model):
        cache = full_cache(prefilled, trial)
        decoded = answer_greedily(model.model, cache, trial.continuation, trial.positions, steps=5)
    torch.testing.assert_close(decoded.logits, plain_logits(model, inputs), rtol=0, atol=1e-5)
    generated = model.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(decoded.tokens, generated[:, -5:])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_lost_at_budget_1(model: LoadedModel, plan: Plan, case: Case, protocol: str) -> None:
    trial = build_trial(model, case, protocol)
    bench = Bench(model, plan, case, protocol, trial, prefill(model.model, trial))
    cells = [Cell(method, 1.0) for method in parse_methods("full,robust,paper", 0.25)]
    with reading_caches(model.model):
        full, *others = bench.measure(cells)
    for row in others:
        assert row.kl < 1e-6
        assert (row.agreement, row.text, row.kept, row.bytes) == (1.0, full.text, full.kept, full.bytes)
    assert full.bytes == full.full_bytes


@torch.no_grad()
def real_run(model: LoadedModel, plan: Plan, trial: Trial, method: str) -> tuple[FlowCache, Tensor]:
    """A compressed cache as users get it, and the logits after the continuation (for prompts not fed again)."""
    with compress(model.model, plan, budget=0.2, method=parameters(method)) as run:
        cache = run.new_cache()
        model.model(**trial.inputs, past_key_values=cache, logits_to_keep=1)
        kept = [(layer.keys, layer.values, layer.bias) for layer in cache.states]
        ids, positions = trial.continuation, trial.positions
        logits = model.model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    snapshot = FlowCache(run.settings)
    for layer, (keys, values, bias) in zip(snapshot.states, kept, strict=True):
        layer.keys, layer.values, layer.bias = keys, values, bias
    return snapshot, logits[:, -1].float()


@pytest.mark.parametrize("method", METHODS)
def test_captured_states_give_the_cache_of_a_real_run(model: LoadedModel, plan: Plan, case: Case, method: str) -> None:
    trial = build_trial(model, case, "blind")
    prefilled = prefill(model.model, trial)
    cache = prefilled.cache(prefilled.settings(plan, parameters(method), 0.2))
    real, logits = real_run(model, plan, trial, method)
    for ours, theirs in zip(cache.states, real.states, strict=True):
        assert torch.equal(ours.keys, theirs.keys)  # ty: ignore[invalid-argument-type]
        assert torch.equal(ours.values, theirs.values)  # ty: ignore[invalid-argument-type]
        assert ours.bias is theirs.bias is None or torch.equal(ours.bias, theirs.bias)  # ty: ignore[invalid-argument-type]
    with reading_caches(model.model):
        decoded = answer_greedily(model.model, cache, trial.continuation, trial.positions, steps=1)
    assert torch.equal(decoded.logits, logits)


def test_a_row_of_a_batch_equals_its_own_run(model: LoadedModel, plan: Plan, case: Case) -> None:
    trial = build_trial(model, case, "second")
    prefilled = prefill(model.model, trial)
    settings = [(parameters(method), budget) for budget in (0.05, 0.3, 1.0) for method in METHODS]
    with reading_caches(model.model):
        single = [
            answer_greedily(
                model.model, prefilled.cache(prefilled.settings(plan, *one)), trial.continuation, trial.positions, 3
            )
            for one in settings
        ]
        stacked = FlowCache.stack([prefilled.cache(prefilled.settings(plan, *one)) for one in settings])
        ids = trial.continuation.expand(len(settings), -1)
        batch = answer_greedily(model.model, stacked, ids, trial.positions, 3)
    torch.testing.assert_close(batch.logits, torch.cat([one.logits for one in single]), rtol=0, atol=1e-5)
    assert torch.equal(batch.tokens, torch.cat([one.tokens for one in single]))


def test_the_token_fed_again_counts_once(model: LoadedModel, plan: Plan, case: Case) -> None:
    trial = build_trial(model, case, "aware")
    prefilled = prefill(model.model, trial)
    cache = prefilled.cache(prefilled.settings(plan, parameters("evict"), 0.2))
    prefilled.hide_last(cache, trial.fed_again)
    for layer in cache.states:
        assert layer.bias is not None
        assert layer.positions is not None
        assert torch.equal(layer.bias == float("-inf"), layer.positions == trial.prompt_length - 1)


def test_an_entry_that_absorbed_others_is_not_hidden(model: LoadedModel, plan: Plan, case: Case) -> None:
    trial = build_trial(model, case, "aware")
    prefilled = prefill(model.model, trial)
    cache = prefilled.cache(prefilled.settings(plan, parameters("evict"), 0.2))
    for layer in cache.states:
        assert layer.keys is not None
        layer.keys[:, 0, -1] += 1.0
    prefilled.hide_last(cache, trial.fed_again)
    for layer in cache.states:
        assert layer.bias is not None
        assert layer.bias[0, :, -1].tolist() == [0.0, float("-inf")]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def unlabelled(tmp_path: Path, *messages: Any) -> Case:
    """The case of a prompt file with one conversation, in which the path ``red.png`` leads to an image."""
    tiny_image().save(tmp_path / "red.png")
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    (case,) = unlabelled_cases(str(data))
    return case


PICTURE = {"type": "image", "image": "red.png"}
FIRST = {"role": "user", "content": [PICTURE, text("what is this?")]}
ANSWER = {"role": "assistant", "content": "a square."}
LAST = {"role": "user", "content": "what colour is it?"}


def test_aware_compresses_an_unlabelled_prompt_as_it_is(model: LoadedModel, tmp_path: Path) -> None:
    case = unlabelled(tmp_path, FIRST)
    prompt = build_trial(model, case, "aware").inputs["input_ids"]
    messages = [{"role": "user", "content": [{"type": "image", "image": tiny_image()}, text("what is this?")]}]
    assert torch.equal(prompt, model.build_inputs(messages)["input_ids"])


def test_blind_feeds_the_last_user_text_of_an_unlabelled_prompt(model: LoadedModel, tmp_path: Path) -> None:
    prompt, fed = texts(model, build_trial(model, unlabelled(tmp_path, FIRST), "blind"))
    assert prompt.endswith("<|vision_end|>")
    assert fed == "what is this?<|im_end|>\n<|im_start|>assistant\n"
    prompt, fed = texts(model, build_trial(model, unlabelled(tmp_path, FIRST, ANSWER, LAST), "blind"))
    assert prompt.endswith("a square.<|im_end|>\n")
    assert fed == "<|im_start|>user\nwhat colour is it?<|im_end|>\n<|im_start|>assistant\n"


def test_second_feeds_the_recorded_answer_and_the_next_turn(model: LoadedModel, tmp_path: Path) -> None:
    case = unlabelled(tmp_path, FIRST, ANSWER, LAST)
    prompt, fed = texts(model, build_trial(model, case, "second"))
    assert prompt.endswith("what is this?<|im_end|>\n<|im_start|>assistant\n")
    turn = "<|im_end|>\n<|im_start|>user\nwhat colour is it?<|im_end|>\n<|im_start|>assistant\n"
    assert fed == "a square." + turn


def test_a_recorded_answer_at_the_end_is_left_out(tmp_path: Path) -> None:
    case = unlabelled(tmp_path, FIRST, ANSWER, LAST, ANSWER)
    assert (case.question, len(case.history)) == ("what colour is it?", 2)
    with pytest.raises(InputError, match="user's turn at its end"):
        unlabelled(tmp_path, {"role": "system", "content": "be brief."})


@pytest.mark.parametrize(
    ("protocol", "messages", "needed"),
    [
        ("blind", [LAST], "in front of it"),
        ("blind", [{"role": "system", "content": "be brief."}, LAST], "in front of it"),
        ("blind", [{"role": "user", "content": [text("look:"), PICTURE]}], "a text at the end"),
        ("second", [FIRST], "user, assistant, user"),
        ("second", [FIRST, LAST], "user, assistant, user"),
    ],
)
def test_a_prompt_that_does_not_fit_a_protocol_is_told_what_it_lacks(
    model: LoadedModel, tmp_path: Path, protocol: str, messages: list[Any], needed: str
) -> None:
    with pytest.raises(InputError, match=rf"own:all:fidelity:0.*{needed}"):
        build_trial(model, unlabelled(tmp_path, *messages), protocol)


def test_images_of_a_later_turn_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    case = unlabelled(tmp_path, LAST, ANSWER, FIRST)
    with pytest.raises(InputError, match=r"own:all:fidelity:0.*images behind"):
        build_trial(model, case, "second")


def test_an_unknown_protocol_is_named(model: LoadedModel, case: Case) -> None:
    with pytest.raises(InputError, match=r"deaf.*aware"):
        build_trial(model, case, "deaf")


def test_divergence_matches_its_definition() -> None:
    full, other = torch.randn(2, 7, dtype=torch.double), torch.randn(2, 7, dtype=torch.double)
    p, q = full.softmax(-1), other.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(full, other).double(), expected, rtol=1e-5, atol=1e-6)
    assert divergence(full, full).tolist() == [0.0, 0.0]


def test_pocket_cases_are_balanced_and_ask_two_different_questions() -> None:
    cases = pocket_cases("test", 2)
    names = [case.task for case in cases]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    for case in cases:
        assert case.earlier is not None
        assert case.earlier[0] != case.question


def test_context_is_that_of_the_pocket_sample(model: LoadedModel, case: Case, tmp_path: Path) -> None:
    from flowmm.pocket.tasks import sample

    original = model.build_inputs(sample("text_needle", "validation", 0).messages())
    ours = model.build_inputs(case.asking(case.question))
    assert all(torch.equal(original[name], ours[name]) for name in original)
