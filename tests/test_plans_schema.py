"""The plan format: round trips, and every way a file can be refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flowmm.errors import BudgetError, InputError, PlanFormatError, PlanMismatchError, PlanVersionError
from flowmm.plans import (
    LayerPlan,
    MethodParameters,
    ModelFingerprint,
    Plan,
    RhoStatistics,
    decide_mode,
    resolve_plan,
    scale_budgets,
    shipped_names,
    source_name,
    unprofiled_plan,
)
from flowmm.plans.canonical import canonical_text
from flowmm.plans.fields import rounded
from flowmm.plans.files import MAX_BYTES
from flowmm.plans.json_schema import SCHEMA_FILE, schema_text
from flowmm.plans.migrations import upgraded
from flowmm.plans.shipped import SHIPPED_DIRECTORY, qwen25vl_plan

SAMPLE = Path(__file__).with_name("test_plans_sample.json")
TEXT = SAMPLE.read_text(encoding="utf-8")
PLAN = Plan.loads(TEXT)


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    """The sample with `change` applied to its JSON values, laid out as a plan is."""
    values = json.loads(TEXT)
    change(values)
    return canonical_text(values)


def refusal(text: str) -> str:
    with pytest.raises(PlanFormatError) as caught:
        Plan.loads(text, "p.json")
    return str(caught.value)


# Round trip


def test_sample_is_canonical() -> None:
    assert PLAN.dumps() == TEXT


def test_loose_text_becomes_canonical() -> None:
    loose = json.dumps(json.loads(TEXT), indent=7, sort_keys=True).replace("\n", "\r\n")
    assert Plan.loads(loose) == PLAN
    assert Plan.loads(loose).dumps() == TEXT


def test_one_layer_per_line() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith('    {"index"')]
    assert len(lines) == PLAN.model.num_layers


def test_integer_is_read_as_float_and_written_with_a_point() -> None:
    plan = Plan.loads(edited(lambda p: p["layers"][0]["rho"].update(std=0)))
    assert '"std": 0.0' in plan.dumps()


shares = st.floats(0, 1)
positive = st.floats(0, 1e6)


@st.composite
def rho_statistics(draw: st.DrawFn) -> RhoStatistics:
    low, middle, high = sorted(draw(st.tuples(shares, shares, shares)))
    return RhoStatistics(
        mean=draw(shares),
        std=draw(positive),
        q05=low,
        q50=middle,
        q95=high,
        n=draw(st.integers(1, 10**6)),
        lift_mean=draw(st.none() | positive),
        lift_std=draw(st.none() | positive),
        margin=draw(st.none() | positive),
        agree=draw(st.none() | shares),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count, theta, budget = draw(st.integers(1, 8)), draw(shares), draw(st.floats(1e-6, 1))
    layers = []
    for index in range(count):
        rho = draw(st.none() | rho_statistics())
        mode = "online" if rho is None else decide_mode(rho.mean, theta)
        layers.append(LayerPlan(index=index, mode=mode, forced=draw(st.booleans()), budget=budget, rho=rho))
    printable = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])
    return Plan(
        flowmm_version="0.1.0",
        created_at="2026-01-02T03:04:05Z",
        model=PLAN.model.model_copy(update={"num_layers": count}),
        calibration=draw(st.sampled_from([None, PLAN.calibration])),
        method=MethodParameters(theta=theta, budget=budget, min_sim=draw(st.floats(-1, 1))),
        layers=tuple(layers),
        environment=draw(st.sampled_from([None, PLAN.environment])),
        note=draw(st.text(printable, max_size=40)),
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_round_trip(plan: Plan) -> None:
    text = plan.dumps()
    again = Plan.loads(text)
    assert again == plan
    assert again.dumps() == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_stable_and_close(value: float) -> None:
    once = rounded(value)
    assert rounded(once) == once
    assert once == pytest.approx(value, rel=5e-6)
    assert str(once) != "-0.0"


# Refusals of text


@pytest.mark.parametrize("keep", [0, 1, 40, len(TEXT) // 2, len(TEXT) - 3])
def test_truncated(keep: int) -> None:
    assert "not valid JSON" in refusal(TEXT[:keep])


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_not_finite(literal: str) -> None:
    assert "not finite" in refusal(TEXT.replace('"std": 0.02,', f'"std": {literal},'))


def test_duplicate_key() -> None:
    message = refusal(TEXT.replace('"theta": 0.25,', '"theta": 0.25,\n    "theta": 0.3,'))
    assert '"theta" appears twice' in message


@pytest.mark.parametrize("text", ["[]", "3", '"plan"', "null"])
def test_not_an_object(text: str) -> None:
    assert "expected a JSON object" in refusal(text)


@pytest.mark.parametrize("depth", [40, 200_000])
def test_nested_too_deep(depth: int) -> None:
    assert "nested deeper" in refusal('{"schema": ' + "[" * depth + "]" * depth + "}")


def test_too_many_values() -> None:
    assert "more than 200000 values" in refusal(edited(lambda p: p.update(extra=[0] * 200_000)))


def test_integer_of_too_many_digits() -> None:
    assert "p.json" in refusal(TEXT.replace('"n": 32', '"n": ' + "9" * 6000, 1))


def test_byte_order_mark() -> None:
    assert "BOM" in refusal("\ufeff" + TEXT)


@settings(deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 8), st.text(max_size=3))
def test_damage_is_refused_or_harmless(position: int, length: int, insertion: str) -> None:
    try:
        plan = Plan.loads(TEXT[:position] + insertion + TEXT[position + length :])
    except (PlanFormatError, PlanVersionError):
        return
    assert Plan.loads(plan.dumps()) == plan


# Refusals of fields


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda p: p["layers"][3]["rho"].update(mean="0.3"), "line 57, layers[3].rho.mean"),
        (lambda p: p["layers"][3].update(budget=0), "line 57, layers[3].budget"),
        (lambda p: p["layers"][3].update(index=True), "line 57, layers[3].index"),
        (lambda p: p["layers"][3].update(mode="sideways"), "line 57, layers[3].mode"),
        (lambda p: p["layers"][3].update(index=4), "layers[3].index: found 4, expected 3"),
        (lambda p: p["layers"][3]["rho"].update(q05=0.9), "quantiles must not decrease"),
        (lambda p: p["layers"][3].update(colour="red"), "layers[3].colour: unknown field"),
        (lambda p: p["layers"][3].update({"a\u001b[2J": 1}), r'layers[3]."a\u001b[2J": unknown field'),
        (lambda p: p["layers"].pop(), "layers: 5 layers, but model.num_layers is 6"),
        (lambda p: p["model"].pop("head_dim"), "line 5, model.head_dim: required field is missing"),
        (lambda p: p["model"].update(source="/data/models/x"), "not a path"),
        (lambda p: p["model"].update(source="C:/models"), "not a path"),
        (lambda p: p["model"].update(weights_sha256="ABC"), "model.weights_sha256"),
        (lambda p: p["model"].update(revision="a\u001b[31mb"), "model.revision"),
        (lambda p: p["method"].update(theta=2), "method.theta"),
        (lambda p: p["method"].update(tau="abs"), "method.tau"),
        (lambda p: p["method"].update(preset="a\nb"), "method.preset: control characters"),
        (
            lambda p: p["method"].update(budget=0.3),
            "method.budget: found 0.3, but the layers' budgets have the mean 0.2",
        ),
        (lambda p: p["calibration"].update(n_samples=0), "calibration.n_samples"),
        (lambda p: p.update(created_at="yesterday"), "created_at"),
        (lambda p: p.update(created_at="2026-1-2T03:04:05Z"), "created_at"),
        (lambda p: p.update(layers=[]), "layers"),
        (lambda p: p.update(note=4), "note"),
        (lambda p: p.pop("environment"), "environment: required field is missing"),
    ],
)
def test_field_that_does_not_fit(change: Callable[[dict[str, Any]], object], place: str) -> None:
    assert place in refusal(edited(change))


def test_too_many_layers() -> None:
    message = refusal(edited(lambda p: p.update(layers=p["layers"] * 200)))
    assert "1024" in message


def test_many_problems_are_counted() -> None:
    message = refusal(edited(lambda p: [layer.update(budget=7) for layer in p["layers"]]))
    assert message.count("budget") == 5
    assert "and 1 more" in message


# Modes against rho


def test_contradicting_mode_is_refused_with_its_layer_and_line() -> None:
    message = refusal(TEXT.replace('"index": 4, "mode": "cross"', '"index": 4, "mode": "intra"'))
    line = next(number for number, line in enumerate(TEXT.splitlines(), 1) if '"index": 4' in line)
    assert f"line {line}, layers[4].mode" in message
    assert "rho.mean 0.412 > theta 0.25" in message
    assert "forced" in message


def test_forced_mode_may_contradict() -> None:
    plan = Plan.loads(edited(lambda p: p["layers"][4].update(mode="intra", forced=True)))
    assert plan.layers[4].mode == "intra"
    assert '"mode": "intra", "forced": true, "budget"' in plan.dumps()


def test_rho_equal_to_theta_is_intra() -> None:
    assert decide_mode(0.25, 0.25) == "intra"
    assert decide_mode(0.2500001, 0.25) == "intra", "equal at the stored precision"
    assert decide_mode(0.250001, 0.25) == "cross"


def test_decided_mode_needs_rho() -> None:
    assert "rho is null" in refusal(edited(lambda p: p["layers"][4].update(rho=None)))
    Plan.loads(edited(lambda p: p["layers"][4].update(rho=None, mode="online")))
    Plan.loads(edited(lambda p: (p["layers"][4].update(rho=None), p["method"].update(flow="off:any"))))


def test_plan_made_in_python_is_checked_too() -> None:
    layers = [layer.model_copy(update={"mode": "cross"}) for layer in PLAN.layers]
    with pytest.raises(ValidationError, match=r"layers\[0\]\.mode"):
        Plan.model_validate(PLAN.model_dump(by_alias=True) | {"layers": [layer.model_dump() for layer in layers]})


# Versions


def test_newer_schema_is_refused() -> None:
    with pytest.raises(PlanVersionError, match="Upgrade flowmm"):
        Plan.loads(TEXT.replace("flowmm.plan/1", "flowmm.plan/2"))


def test_older_schema_without_migration_is_refused() -> None:
    with pytest.raises(PlanVersionError, match="no migration"):
        Plan.loads(TEXT.replace("flowmm.plan/1", "flowmm.plan/0"))


def test_older_schema_is_migrated() -> None:
    old = {"schema": "flowmm.plan/0", "remark": "x"}
    assert upgraded(old, "p", {0: lambda plan: {"note": plan["remark"]}}) == {"schema": "flowmm.plan/1", "note": "x"}


@pytest.mark.parametrize("schema", ["", "flowmm.plan", "flowmm.plan/01", "flowmm.plan/1.2", "other/1", 1, None])
def test_schema_that_is_none(schema: object) -> None:
    assert "not a flowmm plan" in refusal(edited(lambda p: p.update(schema=schema)))


# Files


def test_save_and_load(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p.json")
    assert (tmp_path / "p.json").read_bytes() == TEXT.encode()
    assert Plan.load(tmp_path / "p.json") == PLAN
    assert os.listdir(tmp_path) == ["p.json"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(InputError, match="No space left"):
        PLAN.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.json"]


def test_save_keeps_permissions_and_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    PLAN.save(link)
    assert link.is_symlink()
    assert Plan.load(real) == PLAN
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_save_into_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        PLAN.save(tmp_path / "none" / "p.json")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such plan file"):
        Plan.load(tmp_path / "p.json")
    with pytest.raises(InputError, match="is a directory"):
        Plan.load(tmp_path)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(b'{\n"note": "\xff"}')
    with pytest.raises(PlanFormatError, match="line 2: not UTF-8"):
        Plan.load(path)


def test_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PlanFormatError, match="larger than 16 MiB"):
        Plan.load(path)


# Identity


def test_sha256_follows_content() -> None:
    changed = Plan.loads(edited(lambda p: p["layers"][0]["rho"].update(mean=0.19)))
    assert len(PLAN.sha256) == 64
    assert PLAN.short_id == PLAN.sha256[:12]
    assert changed.sha256 != PLAN.sha256


def variant(**changes: object) -> ModelFingerprint:
    return ModelFingerprint.model_validate(PLAN.model.model_dump() | changes)


def test_same_model_has_no_mismatch() -> None:
    assert PLAN.check_model(variant(dtype="bfloat16", attn_implementation="eager")) == []


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 7}, {"num_kv_heads": 1}, {"num_attention_heads": 8}, {"head_dim": 32}, {"architecture": "Other"}],
)
def test_other_architecture_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PlanMismatchError, match=next(iter(changes))):
        PLAN.check_model(variant(**changes))


def test_fine_tune_is_a_soft_mismatch() -> None:
    soft = PLAN.check_model(variant(weights_sha256="e" * 64, source="me/tuned"))
    assert [(mismatch.field, mismatch.severity) for mismatch in soft] == [
        ("weights_sha256", "soft"),
        ("source", "soft"),
    ]


def test_equal_weights_settle_source_and_unknown_is_not_compared() -> None:
    assert PLAN.check_model(variant(source="copy", revision="other")) == []
    assert PLAN.check_model(variant(weights_sha256=None, config_sha256=None, revision=None, source="tiny-vl")) == []


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/data/models/tiny/", "tiny"),
        ("../tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("a/b/tiny", "tiny"),
    ],
)
def test_source_name(given_name: str, name: str) -> None:
    assert source_name(given_name) == name


# Budgets


def test_uniform_budgets_are_exact() -> None:
    assert PLAN.layer_budgets(0.07) == (0.07,) * 6


def test_full_layers_hand_on_what_they_cannot_use() -> None:
    assert scale_budgets([0.6, 0.2, 0.2], 0.7) == pytest.approx((1.0, 0.55, 0.55))


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=40), st.floats(1e-6, 1))
def test_budgets_have_the_asked_mean(shares: list[float], ratio: float) -> None:
    ratios = scale_budgets(shares, ratio)
    assert sum(ratios) / len(ratios) == pytest.approx(ratio, rel=1e-9)
    assert all(0 < value <= 1 for value in ratios)
    pairs = sorted(zip(shares, ratios, strict=True))
    assert all(low <= high * (1 + 1e-12) for (_, low), (_, high) in pairwise(pairs))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_budget_out_of_range(ratio: float) -> None:
    with pytest.raises(BudgetError, match=r"\(0, 1\]"):
        PLAN.layer_budgets(ratio)


# Shipped files


def test_shipped_plans_are_canonical() -> None:
    assert "qwen25vl" in shipped_names()
    for name in shipped_names():
        path = resolve_plan(name)
        assert Plan.load(path).dumps() == path.read_text(encoding="utf-8")


def test_qwen25vl_is_current() -> None:
    text = (SHIPPED_DIRECTORY / "qwen25vl.json").read_text(encoding="utf-8")
    assert text == qwen25vl_plan().dumps(), "run flowmm.plans.shipped.write_shipped()"


def test_unprofiled_plan_says_so() -> None:
    plan = unprofiled_plan(PLAN.model, flowmm_version="0.1.0")
    assert not plan.measured
    assert plan.calibration is None
    assert {layer.mode for layer in plan.layers} == {"online"}
    assert "Nothing was profiled" in plan.note


def test_json_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run flowmm.plans.json_schema.write_schema()"


def test_resolve_prefers_a_file_and_takes_no_typo_for_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = SHIPPED_DIRECTORY / "qwen25vl.json"
    assert resolve_plan("qwen25vl") == resolve_plan("qwen25vl.json") == resolve_plan("plans/qwen25vl.json") == shipped
    (tmp_path / "qwen25vl").mkdir()
    assert resolve_plan("qwen25vl") == shipped
    (tmp_path / "qwen25vl.json").write_text(TEXT)
    assert resolve_plan("qwen25vl.json") == Path("qwen25vl.json")
    with pytest.raises(InputError, match="no such plan file"):
        resolve_plan("other/qwen25vl.json")


def test_importing_plans_stays_light() -> None:
    code = "import sys, flowmm.plans; print({'torch','numpy','scipy','transformers','rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
