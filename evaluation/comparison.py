"""Variants compared case by case: accuracy with its interval, and the paired difference to a reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from flowmm.evaluation.records import Row
from flowmm.evaluation.statistics import Interval, accuracy_interval, bootstrap_interval, mean_of_groups

ALL = "all"
"""The mean over protocols, as a protocol."""

Outcomes = dict[tuple[str, int, int], float]
"""A value by case: (task, seed, index). Under :data:`ALL`, a case's mean over the protocols."""


@dataclass(frozen=True)
class Line:
    """One variant at one budget under one protocol.

    Attributes:
        n: cases; under :data:`ALL` each stands for one answer per protocol.
        accuracy, low, high: mean over tasks with its 95 % interval.
        reference: what `difference` is relative to: this variant's accuracy minus the reference's on the same cases,
            with its 95 % interval. ``None`` for the reference itself.
        kl: mean KL(full || compressed) of the first answer token, nats.
        kept: entries per KV head, mean over layers and prompts.
        tokens: entries of the prompt, mean.
    """

    variant: str
    budget: float
    protocol: str
    n: int
    accuracy: float
    low: float
    high: float
    reference: str
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    kl: float
    kept: float
    tokens: float

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Fields by name."""
        return asdict(self)

    @property
    def decided(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        if self.difference_low is None or self.difference_high is None:
            return False
        return self.difference_low > 0 or self.difference_high < 0


def compare(measured: Mapping[str, Sequence[Row]], reference: str) -> list[Line]:
    """Lines of all variants, by variant, falling budget and protocol, each variant's :data:`ALL` last.

    Args:
        measured: rows by variant; all variants on the same cases and protocols.
        reference: one of the variants. The full cache, which has no budget, compares with every budget.
    """
    known = {variant: _by_cell(rows) for variant, rows in measured.items()}
    lines = []
    for variant, cells in known.items():
        for (budget, protocol), rows in cells.items():
            others = [] if variant == reference else _counterpart(known[reference], budget, protocol)
            lines.append(_line(variant, budget, protocol, rows, reference, others))
    return lines


Cells = dict[tuple[float, str], list[Row]]


def _by_cell(rows: Iterable[Row]) -> Cells:
    """Rows by (budget, protocol), and by (budget, ALL)."""
    cells: Cells = defaultdict(list)
    for row in rows:
        cells[row.budget, row.protocol].append(row)
    for budget, _ in list(cells):
        if (budget, ALL) not in cells:
            cells[budget, ALL] = [row for (other, _), part in list(cells.items()) if other == budget for row in part]
    return dict(sorted(cells.items(), key=lambda cell: -cell[0][0]))


def _counterpart(cells: Cells, budget: float, protocol: str) -> list[Row]:
    return cells.get((budget, protocol)) or cells.get((1.0, protocol), [])


def outcomes(rows: Iterable[Row], quantity: Literal["accuracy", "kl"] = "accuracy") -> Outcomes:
    """Share of right answers, or mean KL, of every case in `rows`, over its protocols."""
    values: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        values[row.task, row.seed, row.index].append(row.kl if quantity == "kl" else float(bool(row.correct)))
    return {case: float(np.mean(found)) for case, found in values.items()}


def groups_by_task(values: Outcomes) -> list[np.ndarray]:
    """Values by task."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for (task, _, _), value in sorted(values.items()):
        tasks[task].append(value)
    return [np.array(part) for part in tasks.values()]


def _line(
    variant: str, budget: float, protocol: str, rows: Sequence[Row], reference: str, others: Sequence[Row]
) -> Line:
    own, other = outcomes(rows), outcomes(others)
    low, high = accuracy_interval(groups_by_task(own))
    shared = {case: own[case] - other[case] for case in own if case in other}
    difference, interval = _difference(groups_by_task(shared))
    return Line(
        variant=variant,
        budget=budget,
        protocol=protocol,
        n=len(own),
        accuracy=mean_of_groups(groups_by_task(own)),
        low=low,
        high=high,
        reference=reference,
        difference=difference,
        difference_low=None if interval is None else interval[0],
        difference_high=None if interval is None else interval[1],
        kl=float(np.mean([row.kl for row in rows])),
        kept=float(np.mean([row.kept for row in rows])),
        tokens=float(np.mean([row.tokens for row in rows])),
    )


def _difference(groups: Sequence[np.ndarray]) -> tuple[float | None, Interval | None]:
    return (mean_of_groups(groups), bootstrap_interval(groups)) if groups else (None, None)
