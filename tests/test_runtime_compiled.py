"""Compiled merging: one graph for all prompts, the same entries as uncompiled, and a clear word without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime_oracle import BATCH, PROMPT, uneven_plan
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.plans import MethodParameters
from flowmm.plans.method import TAU_RULES, parse_rule
from flowmm.runtime import NoCompilerWarning, compiled
from flowmm.runtime.compiled import MergeLayer, Names, merge_layer
from flowmm.runtime.kept_code import KeptCode

LENGTHS = (512, 1024, 777, 2048, 3000, 513)
METHODS = {
    "paper": MethodParameters.from_preset("paper"),
    "robust": MethodParameters.from_preset("robust"),
    "content": MethodParameters(key_space="pre_rope"),
    "drop": MethodParameters(gate=True, gate_action="drop", fallback="any_modality", merge="keep_mass_bias"),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def layer_arguments(length: int, budget: float, cross: bool, tau: float, method: MethodParameters) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(length)
    heads, dim, kept = 2, 64, int(length * budget)
    key, value = torch.randn(2, 1, heads, length, dim, generator=generator)
    importance = torch.rand(1, heads, length, generator=generator)
    places = torch.arange(length)[None]
    return (
        importance,
        importance,
        importance,
        key,
        key,
        value,
        places % 300 < 200,
        torch.ones(1, length, dtype=torch.bool),
        (places < 1) | (places >= length - 4),
        torch.tensor([kept]),
        torch.tensor([cross]),
        torch.tensor([4]),
        torch.tensor(tau),
        torch.tensor(method.min_sim),
        kept,
        length - kept,
        Names.of(method),
    )


def check_all_prompts(operation: Callable[..., Any], method: MethodParameters, lengths: tuple[int, ...]) -> None:
    """Six lengths, three budgets, both modes, several thresholds: equal to uncompiled, one graph, no break."""
    for length in lengths:
        for budget in (0.05, 0.2, 0.6):
            for cross in (True, False):
                arguments = layer_arguments(length, budget, cross, 0.4 + budget, method)
                for ours, theirs in zip(operation(*arguments), merge_layer(*arguments), strict=True):
                    if theirs is not None:
                        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_one_graph_for_a_few_lengths() -> None:
    graph = torch.compile(merge_layer, fullgraph=True, dynamic=True, backend="eager")
    check_all_prompts(graph, METHODS["paper"], (300, 512, 301))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_graph_for_all_lengths_budgets_modes_and_thresholds(method: MethodParameters) -> None:
    graph = torch.compile(merge_layer, fullgraph=True, dynamic=True, backend="eager")
    check_all_prompts(graph, method, LENGTHS)


@pytest.mark.slow
def test_compiled_equals_uncompiled(tmp_path: Path) -> None:
    check_all_prompts(KeptCode(merge_layer, tmp_path), METHODS["paper"], LENGTHS)


@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_step_equals_step_by_step(
    method: MethodParameters, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model()
    inputs = tiny_inputs(rows)
    monkeypatch.setattr(compiled, "_compiled", lambda: merge_layer)
    reports, logits = [], []
    for compile_merging in (False, True):
        with flowmm.compress(model, uneven_plan(model), budget=0.3, method=method, compile=compile_merging) as run:
            output = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert isinstance(run.settings.operation, MergeLayer) is compile_merging
        reports.append(run.report.to_dict())
        logits.append(torch.stack(output.logits))
    assert reports[0] == reports[1]
    assert torch.equal(logits[0], logits[1])


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model()
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    block = flowmm.compress(model, uneven_plan(model), budget=0.3, compile=True)
    with pytest.warns(NoCompilerWarning, match=r"no compiler for cpu code .* uncompiled; install g\+\+"), block as run:
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=2)
    assert run.report.kept_tokens < run.report.full_tokens


def test_names_leave_numbers_out() -> None:
    low, high = (MethodParameters.from_preset("paper", tau=f"pivot_quantile:{q}", min_sim=q) for q in (0.2, 0.8))
    assert Names.of(low) == Names.of(high)
    assert parse_rule(low.tau, TAU_RULES) != parse_rule(high.tau, TAU_RULES)


A_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_runtime_compiled import METHODS, layer_arguments, merge_layer
from flowmm.runtime.compiled import merge_operation
operation = merge_operation(torch.device("cpu"))
for length in (512, 777):
    arguments = layer_arguments(length, 0.2, True, 0.5, METHODS["paper"])
    for ours, theirs in zip(operation._function(*arguments), merge_layer(*arguments)):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
counters = torch._dynamo.utils.counters
print(counters["stats"]["calls_captured"], counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"])
"""


@pytest.mark.slow
def test_a_second_process_traces_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != compiled.CACHE_VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-c", A_PROCESS, str(Path(__file__).parent)]
    runs = [subprocess.run(words, env=environment, check=True, capture_output=True, text=True) for _ in range(2)]
    (calls, graphs, lowered), second = ([int(word) for word in run.stdout.split()] for run in runs)
    assert calls > 100
    assert graphs == lowered == 1
    assert second == [0, 0, 0]
    assert len(list((tmp_path / "flowmm" / "inductor" / "merge_layer").rglob("*.code"))) == 1
