"""Attention-output error of each layer against dense attention worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from torch import Tensor

import flowmm
from flowmm.errors import FlowmmError
from flowmm.evaluation.attention_error import Asked, attention_errors, recording
from flowmm.evaluation.bench import Bench, Cell
from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.protocols import build_trial
from flowmm.evaluation.records import Row, RowStore
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, unprofiled_plan
from flowmm.runtime import FlowCache
from flowmm.runtime.replay import Prefill, Trial, feed, prefill, reading_caches

LAST = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("tiny"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)


@pytest.fixture(scope="module")
def case() -> Case:
    story = {"type": "text", "text": "once upon a time a cache was far too large for its own good."}
    return Case("own", "all", "fidelity", 0, 0, (story,))


@pytest.fixture(scope="module")
def trial(model: LoadedModel, case: Case) -> Trial:
    return build_trial(model, case, "aware")


@pytest.fixture(scope="module")
def prefilled(model: LoadedModel, trial: Trial) -> Prefill:
    return prefill(model.model, trial)


def compressed(prefilled: Prefill, plan: Plan, name: str, budget: float) -> FlowCache:
    (method,) = parse_methods(name, 0.25)
    assert method.parameters is not None
    return prefilled.hide_last(prefilled.cache(prefilled.settings(plan, method.parameters, budget)), 1)


def fed_tokens(trial: Trial) -> tuple[Tensor, Tensor]:
    ids = torch.cat([trial.continuation, torch.tensor([[10, 11, 12, 13]])], dim=1)
    return ids, trial.positions[..., :1] + torch.arange(ids.shape[1])


@pytest.fixture(scope="module")
def asked(model: LoadedModel, trial: Trial, prefilled: Prefill) -> list[Asked]:
    full = prefilled.hide_last(prefilled.full_cache(), 1)
    with reading_caches(model.model), recording(model.model, full) as layers:
        feed(model.model, full, *fed_tokens(trial))
    return layers


def dense(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Output ``[q, D]`` of one head; of the entries in `keys`, the last q are those of the queries themselves."""
    rows = []
    for place, row in enumerate(query):
        seen = len(keys) - len(query) + place + 1
        weights = (scaling * keys[:seen] @ row + bias[:seen]).exp()
        rows.append((weights / weights.sum()) @ values[:seen])
    return torch.stack(rows)


def output_by_hand(layer: Asked, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """``[q, Hq * D]`` of the fed tokens behind the prompt's entries `keys`, `values` ``[1, Hkv, n, D]``."""
    group = layer.query.shape[1] // keys.shape[1]
    heads = []
    for head in range(layer.query.shape[1]):
        own = head // group
        entries = [
            torch.cat([prompt[0, own], fed[0, own]]) for prompt, fed in ((keys, layer.key), (values, layer.value))
        ]
        padded = torch.cat([bias[0, own], torch.zeros(layer.query.shape[2])])
        heads.append(dense(layer.query[0, head], *entries, padded, layer.scaling))
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize("method", ["robust", "evict", "paper"])
def test_error_is_that_of_dense_attention(
    prefilled: Prefill, plan: Plan, trial: Trial, asked: list[Asked], method: str
) -> None:
    cache = compressed(prefilled, plan, method, 0.3)
    expected = []
    for layer, full, (_, key, value) in zip(cache.states, asked, prefilled.states, strict=True):
        keys, values = layer.first_entries(layer.kept)
        bias = torch.zeros(keys.shape[:3]) if layer.bias is None else layer.bias
        length = trial.prompt_length - 1
        whole = output_by_hand(full, key[:, :, :length], value[:, :, :length], torch.zeros(1, key.shape[1], length))
        found = output_by_hand(full, keys, values, bias)
        expected.append(((found - whole).norm(dim=1) / whole.norm(dim=1))[-LAST:].mean())
    errors = attention_errors(asked, cache, LAST)
    assert errors.shape == (1, len(asked))
    torch.testing.assert_close(errors[0], torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert errors.min() > 1e-3


def test_queries_are_those_of_one_run_over_everything(model: LoadedModel, trial: Trial, asked: list[Asked]) -> None:
    ids, positions = fed_tokens(trial)
    whole = torch.cat([trial.inputs["input_ids"][:, :-1], ids], dim=1)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    joined = torch.cat([trial.prompt_positions[..., :-1], positions], dim=-1)
    states = prefill(model.model, Trial(inputs, ids[:, :0], joined, positions[..., :0], 0)).states
    for layer, (query, key, value) in zip(asked, states, strict=True):
        new = ids.shape[1]
        torch.testing.assert_close(layer.query, query[:, :, -new:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.key, key[:, :, -new:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.value, value[:, :, -new:], rtol=1e-4, atol=1e-5)


def test_a_row_of_a_batch_has_its_own_error(prefilled: Prefill, plan: Plan, asked: list[Asked]) -> None:
    budgets = (0.1, 0.4, 1.0)
    single = [attention_errors(asked, compressed(prefilled, plan, "robust", budget), LAST) for budget in budgets]
    stacked = FlowCache.stack([compressed(prefilled, plan, "robust", budget) for budget in budgets])
    torch.testing.assert_close(attention_errors(asked, stacked, LAST), torch.cat(single), rtol=1e-4, atol=1e-6)


def test_measured_rows_have_an_error_per_layer_and_none_at_budget_1(
    model: LoadedModel, plan: Plan, case: Case, trial: Trial, prefilled: Prefill, tmp_path: Path
) -> None:
    methods = parse_methods("full,robust,evict", 0.25)
    cells = [Cell(method, 1.0) for method in methods] + [Cell(methods[1], 0.2)]
    with reading_caches(model.model):
        rows = Bench(model, plan, case, "aware", trial, prefilled).measure(cells)
    layers = len(prefilled.states)
    for row in rows[:3]:
        assert row.attention_error == pytest.approx([0.0] * layers, abs=1e-6)
    lossy: Row = rows[3]
    assert lossy.attention_error is not None
    assert min(lossy.attention_error) > 1e-3
    store = RowStore(tmp_path, {})
    store.add(rows)
    store.finish()
    assert list(RowStore(tmp_path, {}).load().values()) == rows


def test_only_the_recorded_cache_can_be_fed(model: LoadedModel, trial: Trial, prefilled: Prefill) -> None:
    full = prefilled.full_cache()
    with pytest.raises(FlowmmError, match="no other"), recording(model.model, full):
        feed(model.model, prefilled.full_cache(), trial.continuation, trial.positions)
