"""From rows to numbers: per method, budget, protocol and task, with paired differences to the full cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowmm.evaluation.methods import FULL
from flowmm.evaluation.records import Row
from flowmm.evaluation.statistics import Interval, accuracy_interval, bootstrap_interval, mcnemar_p, mean_of_groups

AVERAGE = "average"


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of another method on the same cases: mean over tasks, its interval, McNemar's exact p."""

    other: str
    mean: float
    ci95: Interval
    p: float


@dataclass(frozen=True)
class SummaryRow:
    """One line of a result table.

    Attributes:
        task: a task, or ``average``: the mean over tasks, each counted alike.
        accuracy, ci95: share of exact matches and its interval; ``None`` without labels.
        kl, agreement: means, see :class:`flowmm.evaluation.records.Row`.
        tokens, kept, bytes, full_bytes: means per prompt.
        to_full: difference to the full cache, where that was measured.
        to_other: difference to the method asked for, at the same budget.
    """

    method: str
    budget: float
    suite: str
    task: str
    protocol: str
    n: int
    accuracy: float | None
    ci95: Interval | None
    kl: float
    agreement: float
    tokens: float
    kept: float
    bytes: float
    full_bytes: float
    to_full: Difference | None = None
    to_other: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and flat: ``difference_to_full`` with ``difference_ci95`` and ``difference_p``; for another method
        ``other``, ``difference_to_other``, ``difference_to_other_ci95``, ``difference_to_other_p``."""
        flat = {name: value for name, value in asdict(self).items() if name not in ("to_full", "to_other")}
        full, other = self.to_full, self.to_other
        flat["difference_to_full"] = None if full is None else full.mean
        flat["difference_ci95"] = None if full is None else full.ci95
        flat["difference_p"] = None if full is None else full.p
        if other is not None:
            flat["other"] = other.other
            flat["difference_to_other"] = other.mean
            flat["difference_to_other_ci95"] = other.ci95
            flat["difference_to_other_p"] = other.p
        return flat


Group = dict[str, list[Row]]
"""Rows of one suite, protocol, method and budget, by task."""


def summarise(rows: Iterable[Row], versus: str | None = None) -> list[SummaryRow]:
    """Summary of rows: a line per task, and their average where there are several.

    Args:
        rows: of one grid.
        versus: method whose paired difference is wanted, too.
    """
    groups: dict[tuple[str, str, str, float], Group] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.suite, row.protocol, row.method, row.budget][row.task].append(row)
    lines = []
    for (suite, protocol, method, budget), group in groups.items():
        full = groups.get((suite, protocol, FULL, 1.0))
        other = None if versus is None else groups.get((suite, protocol, versus, 1.0 if versus == FULL else budget))
        parts = [{task: group[task]} for task in group] + ([group] if len(group) > 1 else [])
        lines += [
            _line(part, _difference(part, full if method != FULL else None), _difference(part, other)) for part in parts
        ]
    return lines


def _line(group: Group, to_full: Difference | None, to_other: Difference | None) -> SummaryRow:
    rows = [row for members in group.values() for row in members]
    outcomes = [_outcomes(members) for members in group.values()]
    labelled = rows[0].correct is not None

    def mean(field: str) -> float:
        return mean_of_groups([np.array([getattr(row, field) for row in members]) for members in group.values()])

    return SummaryRow(
        method=rows[0].method,
        budget=rows[0].budget,
        suite=rows[0].suite,
        task=rows[0].task if len(group) == 1 else AVERAGE,
        protocol=rows[0].protocol,
        n=len(rows),
        accuracy=mean_of_groups(outcomes) if labelled else None,
        ci95=accuracy_interval(outcomes) if labelled else None,
        kl=mean("kl"),
        agreement=mean("agreement"),
        tokens=mean("tokens"),
        kept=mean("kept"),
        bytes=mean("bytes"),
        full_bytes=mean("full_bytes"),
        to_full=to_full,
        to_other=to_other,
    )


def _outcomes(rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(bool(row.correct)) for row in rows])


def _difference(group: Group, other: Group | None) -> Difference | None:
    """Paired difference on the cases that both measured; ``None`` without labels or without such cases."""
    pairs = [_paired(members, (other or {}).get(task, [])) for task, members in group.items()]
    if any(len(first) == 0 for first, _, _ in pairs):
        return None
    changes = [first - second for first, second, _ in pairs]
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return Difference(pairs[0][2], mean_of_groups(changes), bootstrap_interval(changes), mcnemar_p(first, second))


def _paired(rows: Sequence[Row], others: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, str]:
    by_case = {(row.seed, row.split, row.index): row for row in others if row.correct is not None}
    pairs = [(row, by_case[case]) for row in rows if (case := (row.seed, row.split, row.index)) in by_case]
    name = others[0].method if others else ""
    return _outcomes([row for row, _ in pairs]), _outcomes([other for _, other in pairs]), name
