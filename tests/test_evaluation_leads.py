"""One method against the others, on hand-made rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_evaluation_statistics import row

from flowmm.errors import InputError
from flowmm.evaluation.comparison import ALL
from flowmm.evaluation.leads import Lead, compare_with_reference
from flowmm.evaluation.records import Row


def answers(method: str, right: list[bool], protocol: str = "aware", budget: float = 0.2, task: str = "a") -> list[Row]:
    return [replace(row(method, task, i, ok, budget), protocol=protocol, digest=method) for i, ok in enumerate(right)]


def find(leads: list[Lead], method: str, protocol: str = "aware", budget: float = 0.2) -> Lead:
    (found,) = [lead for lead in leads if (lead.method, lead.protocol, lead.budget) == (method, protocol, budget)]
    return found


def test_differences_are_paired_and_tasks_count_alike() -> None:
    rows = answers("ours", [True] * 40) + answers("ours", [True] * 10, task="b")
    rows += answers("theirs", [True] * 10 + [False] * 30) + answers("theirs", [True] * 10, task="b")
    lead = find(compare_with_reference(rows, "ours"), "theirs")
    assert (lead.reference_value, lead.method_value, lead.n) == (1.0, 0.625, 50)
    assert lead.difference == pytest.approx(0.375)
    half_width = 1.96 * 0.5 * (0.75 * 0.25 / 40) ** 0.5
    assert lead.ci95 == pytest.approx((0.375 - half_width, 0.375 + half_width), abs=0.01)
    assert lead.verdict == "ahead"


def test_verdicts_follow_the_interval() -> None:
    rows = answers("ours", [True, False] * 20) + answers("worse", [False] * 40) + answers("better", [True] * 40)
    rows += answers("as_good", [False, True] * 20) + answers("equal", [True, False] * 20)
    rows += [replace(found, method="alias") for found in rows if found.method == "ours"]
    verdicts = {lead.method: lead.verdict for lead in compare_with_reference(rows, "ours")}
    assert verdicts == {
        "worse": "ahead",
        "better": "behind",
        "as_good": "undecided",
        "equal": "undecided",
        "alias": "same method",
    }


def test_an_interval_without_width_decides_nothing_by_itself() -> None:
    few, many = (
        compare_with_reference(answers("ours", [True] * n) + answers("theirs", [False] * n), "ours") for n in (5, 6)
    )
    assert few[0].ci95 == many[0].ci95 == (1.0, 1.0)
    # All of n pairs on one side: p is 2 / 2**n.
    assert (few[0].verdict, many[0].verdict) == ("undecided", "ahead")


def test_the_full_cache_is_compared_at_every_budget() -> None:
    rows = answers("full", [True] * 4, budget=1.0)
    rows += [found for budget in (0.1, 0.2) for found in answers("ours", [True, False] * 2, budget=budget)]
    leads = compare_with_reference(rows, "ours")
    assert [(lead.budget, lead.difference) for lead in leads] == [(0.2, -0.5), (0.1, -0.5)]
    assert [lead.difference for lead in compare_with_reference(rows, "full")] == [0.5, 0.5]


def test_a_case_counts_once_over_all_protocols() -> None:
    rows = [found for protocol in ("aware", "blind") for found in answers("ours", [True] * 4, protocol)]
    rows += answers("theirs", [True] * 4, "aware") + answers("theirs", [False] * 4, "blind")
    leads = compare_with_reference(rows, "ours")
    assert [lead.protocol for lead in leads] == ["aware", "blind", ALL]
    assert (find(leads, "theirs", ALL).difference, find(leads, "theirs", ALL).n) == (0.5, 4)


def test_less_divergence_is_ahead_where_nothing_is_labelled() -> None:
    rows = [
        replace(row(method, "fidelity", i, None, kl=kl * (1 + 0.1 * i)), digest=method)
        for method, kl in (("ours", 0.1), ("theirs", 0.4))
        for i in range(5)
    ]
    lead = find(compare_with_reference(rows, "ours"), "theirs")
    assert (lead.quantity, lead.difference, lead.verdict) == ("kl", pytest.approx(-0.36), "ahead")
    assert find(compare_with_reference(rows, "theirs"), "ours").verdict == "behind"


@pytest.mark.parametrize("reference", ["theirs", "ours"])
def test_a_reference_needs_another_method(reference: str) -> None:
    with pytest.raises(InputError, match=r"at least two methods, found ours"):
        compare_with_reference(answers("ours", [True]), reference)
