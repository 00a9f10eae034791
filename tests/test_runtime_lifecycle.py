"""What a user can do wrong, what is left behind, and what the report says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flowmm
from flowmm.errors import BudgetError, DriftError, FlowmmError, InputError, PlanMismatchError, UnsupportedModelError
from flowmm.models import fingerprint_model
from flowmm.plans import LayerPlan, MethodParameters, Plan, RhoStatistics, unprofiled_plan
from flowmm.plans.choices import LayerChoice
from flowmm.profiler import record_flow
from flowmm.runtime import FlowDriftWarning, PlanFitWarning

PROMPT = [[5, -16, 7, -25, 9, -9, 40]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def plan(model: Any) -> Plan:
    return unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)


def planned_rho(plan: Plan, means: list[float]) -> Plan:
    """`plan` with measured layers whose rho has the given means."""
    layers = tuple(
        LayerPlan(
            index=index,
            mode="cross" if mean > plan.method.theta else "intra",
            budget=plan.method.budget,
            rho=RhoStatistics(
                mean=mean, std=0.001, q05=mean, q50=mean, q95=mean, n=9, lift_mean=1, lift_std=0, margin=None, agree=1
            ),
        )
        for index, mean in enumerate(means)
    )
    return plan.model_copy(update={"layers": layers})


def everything_about(model: Any) -> dict[str, Any]:
    """Attributes and hooks of every module, attention implementations of every config."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = {key: id(value) for key, value in vars(module).items()}
        state[name + ".hooks"] = [list(module._forward_pre_hooks), list(module._forward_hooks)]
    configs = [model.config, model.config.text_config, model.config.vision_config]
    state["attention"] = [config._attn_implementation for config in configs]
    state["registry"] = dict(ALL_ATTENTION_FUNCTIONS.items())
    return state


@pytest.mark.parametrize("failing", [False, True], ids=["normal exit", "exception"])
def test_the_model_is_as_it_was(model: Any, plan: Plan, failing: bool) -> None:
    model.generate(**tiny_inputs(PROMPT), max_new_tokens=1)  # M-RoPE deltas are the host's own state
    rope_deltas = model.model.rope_deltas
    before = everything_about(model)
    try:
        with flowmm.compress(model, plan) as run:
            assert everything_about(model) != before
            model.generate(**tiny_inputs(PROMPT), max_new_tokens=2)
            model.model.rope_deltas = rope_deltas
            assert run.report.kept_tokens < run.report.full_tokens
            if failing:
                raise RuntimeError("from the user's code")
    except RuntimeError:
        assert failing
    assert everything_about(model) == before


def test_nested_blocks_restore_in_order(model: Any, plan: Plan) -> None:
    before = everything_about(model)["attention"]
    with flowmm.compress(model, plan, budget=0.5) as outer:
        with flowmm.compress(model, plan, budget=0.1) as inner:
            model.generate(**tiny_inputs(PROMPT), max_new_tokens=2)
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=2)
    assert inner.report.kept_tokens < outer.report.kept_tokens
    assert everything_about(model)["attention"] == before


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.6, 1.0, 7, 1000])
@pytest.mark.parametrize("rows", [PROMPT, [[30]], [[3]], [[-9]], [*PROMPT, [6]]], ids=str)
def test_budget_is_met_exactly_and_bytes_are_real(model: Any, plan: Plan, rows: list[list[int]], budget: Any) -> None:
    inputs = tiny_inputs(rows)
    with flowmm.compress(model, plan, budget=budget) as run:
        model(**inputs)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    asked = [budget if isinstance(budget, int) else int(budget * length + 1e-9) for length in lengths]
    expected = [min(max(count, 1), length) for count, length in zip(asked, lengths, strict=True)]
    report = run.report
    heads, item = model.config.text_config.num_key_value_heads, 4
    for layer, states in zip(report.layers, run.cache.states, strict=True):
        assert layer.entries_after == heads * sum(expected)
        assert layer.entries_before == heads * sum(lengths) == layer.entries_after + layer.merged + layer.dropped
        slots = inputs["input_ids"].shape[1] if expected == lengths else max(expected)
        bias = 0 if states.bias is None else states.bias.nbytes
        assert layer.bytes_after == len(rows) * heads * slots * 2 * 16 * item + bias == states.nbytes
    assert report.full_tokens == sum(lengths)
    assert report.kept_tokens == sum(expected)


def test_text_only_prompt_is_intra_and_merges_text(model: Any, plan: Plan) -> None:
    with flowmm.compress(model, plan, budget=0.2) as run:
        model.generate(**tiny_inputs([[60]]), max_new_tokens=2)
    assert {layer.mode for layer in run.report.layers} == {"intra"}
    assert all(layer.merged > 0 and layer.rho == [0.0] for layer in run.report.layers)


def test_prompt_shorter_than_the_budget_is_left_whole(model: Any, plan: Plan) -> None:
    inputs = tiny_inputs([[6, -9]])
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with flowmm.compress(model, plan, budget=512) as run:
        kept = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, kept)
    assert run.report.kept_tokens == run.report.full_tokens


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.5, True, "0.2", float("nan")])
def test_impossible_budgets(model: Any, plan: Plan, budget: Any) -> None:
    with pytest.raises(BudgetError, match="budget"), flowmm.compress(model, plan, budget=budget):
        pass


def test_plan_of_another_model_is_refused(plan: Plan) -> None:
    other = tiny_model(layers=2)
    with pytest.raises(PlanMismatchError, match="num_layers"), flowmm.compress(other, plan):
        pass
    assert other.config.get_text_config()._attn_implementation == "sdpa"


def test_plan_of_other_weights_warns(plan: Plan) -> None:
    other = tiny_model(seed=1)
    with pytest.warns(PlanFitWarning, match="weights"), flowmm.compress(other, plan) as run:
        other(**tiny_inputs(PROMPT))
    assert run.report.kept_tokens < run.report.full_tokens


def test_unsupported_attention_is_refused(model: Any, plan: Plan) -> None:
    text = model.config.text_config
    try:
        text._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(UnsupportedModelError, match="sdpa"), flowmm.compress(model, plan):
            pass
    finally:
        text._attn_implementation_internal = "sdpa"


@pytest.mark.parametrize(
    "options",
    [
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"cache_implementation": "quantized"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_would_silently_not_compress_is_refused(model: Any, plan: Plan, options: dict[str, Any]) -> None:
    with flowmm.compress(model, plan), pytest.raises(InputError, match=r"compress\(\.\.\.\)"):
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=3, **options)


def test_cache_outside_its_block_is_refused(model: Any, plan: Plan) -> None:
    with flowmm.compress(model, plan) as run:
        cache = run.new_cache()
        model(**tiny_inputs(PROMPT), past_key_values=cache)
    with pytest.raises(FlowmmError, match="outside"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_report_before_any_prompt(model: Any, plan: Plan) -> None:
    with flowmm.compress(model, plan) as run, pytest.raises(FlowmmError, match="nothing has been compressed"):
        _ = run.report


def test_crop_takes_back_generated_tokens_only(model: Any, plan: Plan) -> None:
    with flowmm.compress(model, plan, budget=0.3) as run:
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=5)
        kept = run.cache.states[0].kept
        run.cache.crop(-2)
        assert run.cache.states[0].kept == kept - 2
        with pytest.raises(FlowmmError, match="merged"):
            run.cache.crop(-50)


def test_a_reused_cache_equals_a_fresh_one(model: Any, plan: Plan) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 5}
    with flowmm.compress(model, plan, budget=0.3) as run:
        cache = run.new_cache()
        model.generate(**tiny_inputs([[70]]), **greedy, past_key_values=cache)
        cache.reset()
        reused = model.generate(**tiny_inputs(PROMPT), **greedy, past_key_values=cache)
        fresh = model.generate(**tiny_inputs(PROMPT), **greedy)
    assert torch.equal(reused, fresh)


def measured_rho(model: Any, plan: Plan) -> list[float]:
    with flowmm.compress(model, plan) as run:
        model(**tiny_inputs(PROMPT))
    return [layer.rho[0] for layer in run.report.layers if layer.rho is not None]


def test_check_is_silent_on_a_fitting_plan(model: Any, plan: Plan, recwarn: pytest.WarningsRecorder) -> None:
    fitting = planned_rho(plan, measured_rho(model, plan))
    with flowmm.compress(model, fitting, check="error") as run:
        model(**tiny_inputs(PROMPT))
    assert run.report.findings == []
    assert not [w for w in recwarn if issubclass(w.category, FlowDriftWarning)]


def test_check_has_nothing_to_say_about_text_alone(model: Any, plan: Plan) -> None:
    with flowmm.compress(model, planned_rho(plan, measured_rho(model, plan)), check="error") as run:
        model(**tiny_inputs([[40]]))
    assert run.report.findings == []


def test_check_names_the_layer_that_left_the_plan(model: Any, plan: Plan) -> None:
    means = measured_rho(model, plan)
    means[2] = 0.02
    drifted = planned_rho(plan, means)
    with flowmm.compress(model, drifted, check="warn") as run, pytest.warns(FlowDriftWarning, match="layer 2"):
        model(**tiny_inputs(PROMPT))
    assert len(run.report.findings) == 1
    with flowmm.compress(model, drifted, check="error"), pytest.raises(DriftError, match="layer 2"):
        model(**tiny_inputs(PROMPT))
    with flowmm.compress(model, drifted) as planned:
        model(**tiny_inputs(PROMPT))
    with flowmm.compress(model, drifted, check="adapt") as adapted:
        model(**tiny_inputs(PROMPT))
    assert planned.report.layers[2].mode == "intra"
    assert adapted.report.layers[2].mode == "cross"


def test_adapt_leaves_modes_alone_that_rho_did_not_decide(model: Any, plan: Plan) -> None:
    means = measured_rho(model, plan)
    means[1] = means[2] = 0.02
    drifted = planned_rho(plan, means)
    choice = LayerChoice(mode="intra", cost=(1.0, 0.5))
    changes = {1: {"forced": True}, 2: {"choice": choice}}
    layers = [layer.model_copy(update=changes.get(layer.index, {})) for layer in drifted.layers]
    with flowmm.compress(model, drifted.model_copy(update={"layers": tuple(layers)}), check="adapt") as run:
        model(**tiny_inputs(PROMPT))
    assert [run.report.layers[layer].mode for layer in (1, 2)] == ["intra", "intra"]
    assert len(run.report.findings) == 2


def test_adapt_needs_a_plan_decided_by_raw_rho(model: Any, plan: Plan) -> None:
    by_lift = plan.model_copy(update={"method": plan.method.model_copy(update={"rho_kind": "lift"})})
    with pytest.raises(InputError, match="decided by 'lift'"), flowmm.compress(model, by_lift, check="adapt"):
        pass


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's output had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_no_tensor_grows_with_the_square_of_the_length(preset: str) -> None:
    heads, dim, length = 4, 32, 8192
    model = tiny_model(layers=1, heads=heads, head_dim=dim)
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    inputs = tiny_inputs([[96, -4096, 1000, -2500, length - 96 - 4096 - 1000 - 2500 - 4]])
    assert inputs["input_ids"].shape[1] == length
    with flowmm.compress(model, plan, budget=0.2, method=preset, check="warn") as run, LargestTensor() as watch:
        model(**inputs, logits_to_keep=1)
    assert run.report.kept_tokens == length // 5
    # Everything counts, the host's own layers too; a square would be 8192 / (3 * 32 * 4) = 21 times more per head.
    assert watch.elements <= 3 * length * dim * heads


def test_profiling_makes_no_square_either() -> None:
    heads, dim, length = 4, 32, 8192
    inputs = tiny_inputs([[96, -4096, 1000, -2500, length - 96 - 4096 - 1000 - 2500 - 4]])
    with LargestTensor() as watch:
        flow = record_flow(tiny_model(layers=1, heads=heads, head_dim=dim), inputs)
    assert flow.tokens == length
    assert watch.elements <= 3 * length * dim * heads


def test_gate_and_operator_options_reach_the_tensors(model: Any, plan: Plan) -> None:
    reports = {}
    for name, change in {
        "gated": {},
        "open": {"gate": False},
        "drop": {"gate_action": "drop"},
        "strict": {"cross_scope": "other_only"},
        "floor": {"min_sim": 0.9},
        "closed": {"tau": "abs:0", "fallback": "drop"},
        "relaxed": {"tau": "abs:0", "fallback": "relax_tau"},
    }.items():
        method = MethodParameters.from_preset("paper", **change)
        with flowmm.compress(model, plan, budget=0.3, method=method) as run:
            model(**tiny_inputs(PROMPT))
        reports[name] = run.report.layers[0]
    assert reports["open"].protected < reports["gated"].protected
    assert reports["drop"].merged < reports["gated"].merged
    assert reports["floor"].merged < reports["gated"].merged
    assert reports["closed"].merged == 0
    assert reports["relaxed"].merged == reports["open"].merged
    assert reports["strict"].entries_after == reports["gated"].entries_after


class _RowsAttended:
    """Counts the query rows of the prompt that the host's attention computes in each layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def counting(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if getattr(module, "layer_idx", None) is not None:
                self.rows.append(query.shape[2])
            return original(module, query, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counting)


def _counting_rows(forward: Callable[[torch.Tensor], Any], rows: list[int]) -> Callable[[torch.Tensor], Any]:
    def counting(hidden: torch.Tensor) -> Any:
        rows.append(hidden.shape[1])
        return forward(hidden)

    return counting


@torch.no_grad()
@pytest.mark.parametrize("rows", [PROMPT, [*PROMPT, [6, -9, 3]]], ids=["single", "left-padded"])
def test_the_last_layer_computes_the_row_that_is_asked_for(
    model: Any, plan: Plan, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(rows)
    width = inputs["input_ids"].shape[1]
    attended, projected = _RowsAttended(monkeypatch), []
    for layer in model.model.language_model.layers:
        monkeypatch.setattr(layer.mlp, "forward", _counting_rows(layer.mlp.forward, projected))
    with flowmm.compress(model, plan, budget=0.3) as run:
        caches = [run.new_cache() for _ in range(3)]
        whole = model(**inputs, past_key_values=caches[0])
        last = model(**inputs, past_key_values=caches[1], logits_to_keep=1)
        states = model(**inputs, past_key_values=caches[2], logits_to_keep=1, output_hidden_states=True)
        with flowmm.compress(model, plan, budget=1.0) as untouched:
            model(**inputs, past_key_values=untouched.new_cache(), logits_to_keep=1)
    assert attended.rows == projected == [width] * 4 + [width] * 3 + [1] + [width] * 8
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(caches[1].contents(), caches[0].contents(), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    plain = model(**inputs, output_hidden_states=True)
    for ours, theirs in zip(states.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
