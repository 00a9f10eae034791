"""Is one method ahead of the others? Paired differences on the same cases, per protocol and budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from flowmm.errors import InputError
from flowmm.evaluation.comparison import ALL, groups_by_task, outcomes
from flowmm.evaluation.methods import FULL
from flowmm.evaluation.records import Row
from flowmm.evaluation.statistics import Interval, bootstrap_interval, mcnemar_p, mean_of_groups

Quantity = Literal["accuracy", "kl"]
Verdict = Literal["ahead", "behind", "undecided", "same method"]


@dataclass(frozen=True)
class Lead:
    """The reference against one other method.

    Attributes:
        protocol: one of the protocols, or ``all``: each case's mean over them.
        budget: of both methods; the full cache is the same at every budget.
        quantity: ``accuracy``, or ``kl`` (nats, less is better) where nothing is labelled.
        n: cases that both measured.
        reference_value, method_value: mean over tasks, each counted alike.
        difference, ci95: reference minus method, mean over tasks of paired differences, with its 95 % bootstrap
            interval over cases.
        verdict: of the reference; ``undecided`` where the interval holds zero, or has no width (all cases of a task
            differ alike, as a single case always does) and an exact sign test over cases has p of 0.05 or more;
            ``same method`` where both have equal parameters.
    """

    protocol: str
    budget: float
    reference: str
    method: str
    quantity: Quantity
    n: int
    reference_value: float
    method_value: float
    difference: float
    ci95: Interval
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


Cells = dict[tuple[str, str, float], list[Row]]
"""Rows by method, protocol (or ``all``) and budget."""


def compare_with_reference(rows: Iterable[Row], reference: str) -> list[Lead]:
    """The reference against every other method in `rows` of one suite: by protocol, falling budget and method.

    Where there are several protocols, ``all`` comes last.

    Raises:
        InputError: the reference was not measured, or nothing else was.
    """
    cells, methods, protocols = _by_cell(rows)
    others = [method for method in methods if method != reference]
    if reference not in methods or not others:
        raise InputError(f"reference {reference!r}: expected one of at least two methods, found {', '.join(methods)}")
    budgets = sorted({budget for method, _, budget in cells if method != FULL}, reverse=True)
    return [
        _lead(protocol, budget, ours, theirs)
        for protocol in (*protocols, *([ALL] if len(protocols) > 1 else []))
        for budget in budgets
        for method in others
        if (ours := _at(cells, reference, protocol, budget)) and (theirs := _at(cells, method, protocol, budget))
    ]


def _by_cell(rows: Iterable[Row]) -> tuple[Cells, list[str], list[str]]:
    cells: Cells = defaultdict(list)
    methods: dict[str, None] = {}
    protocols: dict[str, None] = {}
    for row in rows:
        methods[row.method] = protocols[row.protocol] = None
        for protocol in (row.protocol, ALL):
            cells[row.method, protocol, row.budget].append(row)
    return cells, list(methods), list(protocols)


def _at(cells: Cells, method: str, protocol: str, budget: float) -> list[Row]:
    return cells.get((method, protocol, 1.0 if method == FULL else budget), [])


def _lead(protocol: str, budget: float, ours: Sequence[Row], theirs: Sequence[Row]) -> Lead:
    quantity: Quantity = "kl" if ours[0].correct is None else "accuracy"
    own, other = outcomes(ours, quantity), outcomes(theirs, quantity)
    shared = own.keys() & other.keys()
    differences = groups_by_task({case: own[case] - other[case] for case in shared})
    ci95 = bootstrap_interval(differences)
    told = ci95[0] < ci95[1] or _sign_p(np.concatenate(differences)) < 0.05
    return Lead(
        protocol=protocol,
        budget=budget,
        reference=ours[0].method,
        method=theirs[0].method,
        quantity=quantity,
        n=len(shared),
        reference_value=mean_of_groups(groups_by_task({case: own[case] for case in shared})),
        method_value=mean_of_groups(groups_by_task({case: other[case] for case in shared})),
        difference=mean_of_groups(differences),
        ci95=ci95,
        verdict="same method"
        if ours[0].digest == theirs[0].digest
        else _verdict(ci95, quantity)
        if told
        else "undecided",
    )


def _sign_p(differences: np.ndarray) -> float:
    return mcnemar_p(differences, np.zeros_like(differences))


def _verdict(ci95: Interval, quantity: Quantity) -> Verdict:
    low, high = ci95 if quantity == "accuracy" else (-ci95[1], -ci95[0])
    if low > 0:
        return "ahead"
    return "behind" if high < 0 else "undecided"
