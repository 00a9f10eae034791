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
    """Accuracy minus that of the full cache on the same cases: mean over tasks, its interval, McNemar's exact p."""

    mean: float
    ci95: Interval
    p: float


@dataclass(frozen=True)
class SummaryRow:
    """One line of a result table.

    Attributes:
        task: a task, or ``average``: the mean over tasks, each counted alike.
        accuracy, ci95: share of exact matches and its interval; ``None`` without labels.
        kl, agreement, attention_error: means, see :class:`flowmm.evaluation.records.Row`.
        tokens, kept, bytes, full_bytes: means per prompt.
        to_full: difference to the full cache, where that was measured.
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
    attention_error: tuple[float, ...] | None
    tokens: float
    kept: float
    bytes: float
    full_bytes: float
    to_full: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and flat: ``difference_to_full`` with ``difference_ci95`` and ``difference_p``."""
        flat = {name: value for name, value in asdict(self).items() if name != "to_full"}
        full = self.to_full
        flat["difference_to_full"] = None if full is None else full.mean
        flat["difference_ci95"] = None if full is None else full.ci95
        flat["difference_p"] = None if full is None else full.p
        return flat


Group = dict[str, list[Row]]
"""Rows of one suite, protocol, method and budget, by task."""


def summarise(rows: Iterable[Row]) -> list[SummaryRow]:
    """Summary of the rows of one grid: a line per task, and their average where there are several."""
    groups: dict[tuple[str, str, str, float], Group] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.suite, row.protocol, row.method, row.budget][row.task].append(row)
    lines = []
    for (suite, protocol, method, _), group in groups.items():
        full = None if method == FULL else groups.get((suite, protocol, FULL, 1.0))
        parts = [{task: group[task]} for task in group] + ([group] if len(group) > 1 else [])
        lines += [_line(part, _difference(part, full)) for part in parts]
    return lines


def _line(group: Group, to_full: Difference | None) -> SummaryRow:
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
        attention_error=_mean_by_layer(rows),
        tokens=mean("tokens"),
        kept=mean("kept"),
        bytes=mean("bytes"),
        full_bytes=mean("full_bytes"),
        to_full=to_full,
    )


def _mean_by_layer(rows: Sequence[Row]) -> tuple[float, ...] | None:
    errors = [row.attention_error for row in rows if row.attention_error is not None]
    return tuple(np.mean(errors, axis=0).tolist()) if errors else None


def _outcomes(rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(bool(row.correct)) for row in rows])


def _difference(group: Group, full: Group | None) -> Difference | None:
    """Paired difference on the cases that both measured; ``None`` without labels or without such cases."""
    pairs = [_paired(members, (full or {}).get(task, [])) for task, members in group.items()]
    if any(len(first) == 0 for first, _ in pairs):
        return None
    changes = [first - second for first, second in pairs]
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    return Difference(mean_of_groups(changes), bootstrap_interval(changes), mcnemar_p(first, second))


def _paired(rows: Sequence[Row], others: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    by_case = {(row.seed, row.split, row.index): row for row in others if row.correct is not None}
    pairs = [(row, by_case[case]) for row in rows if (case := (row.seed, row.split, row.index)) in by_case]
    return _outcomes([row for row, _ in pairs]), _outcomes([other for _, other in pairs])
