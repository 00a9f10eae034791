"""Intervals against closed forms, and summaries of hand-made rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flowmm.evaluation.records import Row
from flowmm.evaluation.statistics import (
    accuracy_interval,
    bootstrap_interval,
    mcnemar_p,
    mean_of_groups,
    wilson_interval,
)
from flowmm.evaluation.summary import AVERAGE, SummaryRow, summarise


def outcomes(right: int, n: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (n - right))


TEMPLATE = Row(
    suite="pocket",
    split="test",
    task="a",
    seed=0,
    index=0,
    protocol="aware",
    method="robust",
    digest="",
    budget=0.2,
    correct=True,
    text="kiwi",
    expected="kiwi",
    tokens=100,
    kept=20.0,
    bytes=400,
    full_bytes=2000,
    kl=0.5,
    agreement=1.0,
)


def row(method: str, task: str, index: int, correct: bool | None, budget: float = 0.2, kl: float = 0.5) -> Row:
    return replace(TEMPLATE, method=method, task=task, index=index, correct=correct, budget=budget, kl=kl)


def find(rows: list[SummaryRow], method: str, task: str) -> SummaryRow:
    (found,) = [line for line in rows if (line.method, line.task) == (method, task)]
    return found


def test_wilson_interval_of_8_in_10() -> None:
    # Newcombe (1998), method 3.
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_interval_stays_inside_the_unit_interval() -> None:
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_bootstrap_of_a_share_has_the_binomial_width() -> None:
    low, high = bootstrap_interval([outcomes(300, 400)])
    expected = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert 0.75 - low == pytest.approx(expected, rel=0.08)
    assert high - 0.75 == pytest.approx(expected, rel=0.08)


def test_bootstrap_of_an_average_adds_variances_per_task() -> None:
    low, high = bootstrap_interval([outcomes(50, 100), outcomes(900, 1000)])
    expected = 1.96 * 0.5 * (0.25 / 100 + 0.09 / 1000) ** 0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)


def test_bootstrap_repeats_exactly() -> None:
    assert bootstrap_interval([outcomes(3, 10)]) == bootstrap_interval([outcomes(3, 10)])


def test_accuracy_interval_without_variation_is_wilsons() -> None:
    assert accuracy_interval([outcomes(10, 10), outcomes(10, 10)]) == wilson_interval(20, 20)


def test_mean_of_groups_counts_every_task_alike() -> None:
    assert mean_of_groups([outcomes(1, 1), outcomes(0, 99)]) == 0.5


def test_mcnemar_is_the_sign_test_on_discordant_pairs() -> None:
    first, second = np.array([1] * 10 + [0] * 2 + [1] * 5), np.array([0] * 10 + [1] * 2 + [1] * 5)
    assert mcnemar_p(first, second) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar_p(first, first) == 1.0


def test_summary_pairs_by_case_and_averages_over_tasks() -> None:
    rows = [row("full", "a", i, True, budget=1.0) for i in range(4)]
    rows += [row("full", "b", i, i < 1, budget=1.0) for i in range(2)]
    rows += [row("robust", "a", i, i < 2) for i in range(4)] + [row("robust", "b", i, i < 2) for i in range(2)]
    lines = summarise(reversed(rows))
    per_task, average = find(lines, "robust", "a"), find(lines, "robust", AVERAGE)
    assert per_task.accuracy == 0.5
    assert per_task.to_full is not None
    assert per_task.to_full.mean == -0.5
    assert average.n == 6
    assert average.accuracy == 0.75
    assert average.to_full is not None
    assert average.to_full.mean == pytest.approx((-0.5 + 0.5) / 2)
    assert find(lines, "full", AVERAGE).to_full is None


def test_summary_averages_attention_errors_layer_by_layer() -> None:
    rows = [replace(row("robust", "fidelity", i, None), attention_error=(0.1 * i, 1.0)) for i in range(3)]
    (line,) = summarise(rows)
    assert line.attention_error == pytest.approx((0.1, 1.0))


def test_summary_without_labels_has_no_accuracy() -> None:
    (line,) = summarise([row("robust", "fidelity", i, None, kl=float(i)) for i in range(3)])
    assert (line.accuracy, line.ci95, line.to_full, line.kl) == (None, None, None, 1.0)


def test_summary_row_as_json_has_the_documented_names() -> None:
    rows = [row("full", "a", 0, True, budget=1.0), row("robust", "a", 0, True)]
    flat = find(summarise(rows), "robust", "a").to_dict()
    documented = "method budget suite task protocol n accuracy ci95 kl kept bytes agreement difference_to_full"
    assert set(documented.split()) | {"difference_ci95"} <= set(flat)
    assert flat["difference_to_full"] == 0.0
