"""Run a grid: cases x protocols x methods x budgets, one prefill per case and protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.bench import Bench, Cell
from flowmm.evaluation.decoding import reading_caches
from flowmm.evaluation.methods import Method
from flowmm.evaluation.prefill import prefill
from flowmm.evaluation.protocols import PROTOCOLS, build_trial
from flowmm.evaluation.records import Key, Row, RowStore, row_key
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel
from flowmm.plans import Plan

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


def evaluate(
    model: LoadedModel,
    plan: Plan,
    cases: Sequence[Case],
    grid: Grid,
    *,
    store: RowStore | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure every cell of a grid on every case.

    Args:
        model: loaded with sdpa or eager attention.
        plan: modes and relative budgets of the layers.
        cases: from one suite.
        grid: methods, budgets, protocols.
        store: keeps finished rows on disk and knows those of an interrupted run.
        progress: called with (finished, total) after every case and protocol.

    Returns:
        The grid's rows, case by case; those that were on disk are not measured again.

    Raises:
        PlanMismatchError: the plan was made for another architecture.
        InputError: a protocol that a case does not fit, or rows of another model on disk.
    """
    plan.check_model(model.fingerprint())
    finished = {} if store is None else store.load()
    cells, units = grid.cells(), [(case, protocol) for case in cases for protocol in grid.protocols]
    rows: list[Row] = []
    try:
        for done, (case, protocol) in enumerate(units, start=1):
            keys = {cell: _key(case, protocol, cell) for cell in cells}
            missing = [cell for cell in cells if keys[cell] not in finished]
            measured = _measure(model, plan, case, protocol, missing) if missing else []
            if store is not None:
                store.add(measured)
            finished |= {row.key: row for row in measured}
            rows += [finished[keys[cell]] for cell in cells]
            if progress is not None:
                progress(done, len(units))
    finally:
        if store is not None:
            store.flush()
    if store is not None:
        store.finish()
    return rows


def identity_of(model: LoadedModel, plan: Plan) -> dict[str, str]:
    """What measured rows depend on beside their key: weights, layer modes and budgets, flowmm's version."""
    layers = json.dumps([[layer.mode, layer.budget] for layer in plan.layers])
    return {
        "model": model.fingerprint().model_dump_json(),
        "plan": hashlib.sha256(layers.encode()).hexdigest(),
        "flowmm": flowmm.__version__,
    }


def _key(case: Case, protocol: str, cell: Cell) -> Key:
    place = (case.suite, case.split, case.task, case.seed, case.index)
    return row_key(place, protocol, cell.method.name, cell.method.digest, cell.budget)


def _measure(model: LoadedModel, plan: Plan, case: Case, protocol: str, cells: Sequence[Cell]) -> list[Row]:
    trial = build_trial(model, case, protocol)
    bench = Bench(model, plan, case, protocol, trial, prefill(model.model, trial))
    with reading_caches(model.model):
        return bench.measure(cells)
