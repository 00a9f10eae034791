"""What a profile asks about its layers, and where it remembers the answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmm.plans import Plan, resolve_plan
from flowmm.profiler.layer_questions import LayerQuestions
from flowmm.profiler.sensitivity import MIXED


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(resolve_plan("pocket"))


def test_only_what_compressed_prompts_answer_is_a_measurement() -> None:
    joint = LayerQuestions("joint", True, "mixed", 8).measurements
    assert (joint.prompts, joint.protocols, joint.budgets, joint.choices) == (8, MIXED, "joint", True)
    ruled = LayerQuestions("entropy", False, "blind", 8).measurements
    assert (ruled.protocols, ruled.budgets, ruled.choices) == (("blind",), None, False)


def test_answers_are_kept_beside_the_records_for_the_same_questions(plan: Plan, tmp_path: Path) -> None:
    questions = LayerQuestions("measured", False, "mixed", 8)
    records = tmp_path / "plan.records.parquet"
    questions.journal(records, plan, resume=True).put("x", [0.5])
    assert [file.name for file in tmp_path.iterdir()] == ["plan.records.parquet.layers"]
    assert questions.journal(records, plan, resume=True).get("x") == [0.5]
    assert LayerQuestions("measured", False, "mixed", 9).journal(records, plan, resume=True).get("x") is None
    questions.journal(records, plan, resume=True).put("x", [0.5])
    assert questions.journal(records, plan, resume=False).get("x") is None


def test_without_records_nothing_is_kept(plan: Plan, tmp_path: Path) -> None:
    questions = LayerQuestions("measured", False, "mixed", 8)
    journal = questions.journal(None, plan, resume=True)
    journal.put("x", [0.5])
    assert journal.get("x") is None
    assert not list(tmp_path.iterdir())
