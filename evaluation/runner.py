"""Run a grid: cases x protocols x methods x budgets, one prefill per case and protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.bench import Bench, Cell
from flowmm.evaluation.methods import Method
from flowmm.evaluation.protocols import PROTOCOLS, build_trial
from flowmm.evaluation.records import Key, Row, RowStore, row_key
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel
from flowmm.plans import Plan
from flowmm.runtime.replay import prefill, reading_caches

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Grid:
    """What to measure on every case."""

    methods: tuple[Method, ...]
    budgets: tuple[float, ...]
    protocols: tuple[str, ...]

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"budget {budget}: expected a ratio in (0, 1]")

    def cells(self) -> list[Cell]:
        """Neighbours have equal budgets, hence caches of about equal size; the full cache is one cell."""
        full = [Cell(method, 1.0) for method in self.methods if method.parameters is None]
        compressed = [method for method in self.methods if method.parameters is not None]
        return full + [Cell(method, budget) for budget in sorted(self.budgets) for method in compressed]


@dataclass(frozen=True)
class Unit:
    """A case under a protocol, and the cells still to be measured on it: one prefill's worth of work."""

    case: Case
    protocol: str
    cells: tuple[Cell, ...]


Measure = Callable[[Sequence[Unit]], Iterator[list[Row]]]
"""Rows of each unit, in order."""


def measuring_here(model: LoadedModel, plan: Plan) -> Measure:
    """Measure units one after the other in this process."""
    return lambda units: (measure_unit(model, plan, unit) for unit in units)


def measure_unit(model: LoadedModel, plan: Plan, unit: Unit) -> list[Row]:
    """One row per cell.

    Raises:
        PlanMismatchError: the plan was made for another architecture.
        InputError: a protocol that the case does not fit.
    """
    plan.check_model(model.fingerprint())
    trial = build_trial(model, unit.case, unit.protocol)
    bench = Bench(model, plan, unit.case, unit.protocol, trial, prefill(model.model, trial))
    with reading_caches(model.model):
        return bench.measure(unit.cells)


def evaluate(
    measure: Measure,
    cases: Sequence[Case],
    grid: Grid,
    *,
    store: RowStore | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure every cell of a grid on every case.

    Args:
        measure: :func:`measuring_here`, or :func:`flowmm.evaluation.workers.measuring_in_processes`.
        cases: from one suite.
        grid: methods, budgets, protocols.
        store: keeps finished rows on disk and knows those of an interrupted run.
        progress: called with (finished, total) after every case and protocol.

    Returns:
        The grid's rows, case by case; those that were on disk are not measured again.

    Raises:
        PlanMismatchError, InputError: see :func:`measure_unit` and :meth:`RowStore.load`.
    """
    finished = {} if store is None else store.load()
    wanted = [Unit(case, protocol, tuple(grid.cells())) for case in cases for protocol in grid.protocols]
    units = [unit for unit in (_without(unit, finished) for unit in wanted) if unit.cells]
    before = len(wanted) - len(units)
    try:
        for done, rows in enumerate(measure(units), start=before + 1):
            finished |= {row.key: row for row in rows}
            if store is not None:
                store.add(rows)
            if progress is not None:
                progress(done, len(wanted))
    finally:
        if store is not None:
            store.flush()
    if store is not None:
        store.finish()
    return [finished[_key(unit, cell)] for unit in wanted for cell in unit.cells]


def _without(unit: Unit, finished: Mapping[Key, Row]) -> Unit:
    return replace(unit, cells=tuple(cell for cell in unit.cells if _key(unit, cell) not in finished))


def identity_of(model: LoadedModel, plan: Plan) -> dict[str, str]:
    """What measured rows depend on beside their key: weights, layer modes, budgets and choices, flowmm's version."""
    layers = json.dumps(
        [
            [
                layer.mode,
                layer.budget,
                *filter(None, [layer.curve, layer.choice and f"{layer.choice}, in controls too"]),
            ]
            for layer in plan.layers
        ]
        + [list(plan.allocations or ())]
    )
    return {
        "model": model.fingerprint().model_dump_json(),
        "plan": hashlib.sha256(layers.encode()).hexdigest(),
        "flowmm": flowmm.__version__,
    }


def _key(unit: Unit, cell: Cell) -> Key:
    case = unit.case
    place = (case.suite, case.split, case.task, case.seed, case.index)
    return row_key(place, unit.protocol, cell.method.name, cell.method.digest, cell.budget)
