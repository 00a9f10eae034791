"""What ``flowmm eval`` does: load, measure the grid, summarise, leave the results in a directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.progress import ProgressLine
from flowmm.evaluation.records import RowStore
from flowmm.evaluation.report import write_report
from flowmm.evaluation.runner import Grid, evaluate, identity_of, measuring_here
from flowmm.evaluation.suite import SUITES, unlabelled_cases
from flowmm.evaluation.summary import SummaryRow, summarise
from flowmm.evaluation.workers import measuring_in_processes
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan, shipped_names, unprofiled_plan

UNPROFILED = "unprofiled"


def run_evaluation(
    *,
    model: str,
    plan: str | None,
    suite: str,
    data: str | None,
    methods: str,
    budgets: Sequence[float],
    protocols: Sequence[str],
    tasks: Sequence[str],
    n: int,
    split: str,
    seed: int,
    versus: str | None,
    out: Path | None,
    resume: bool,
    device: str,
    dtype: str,
    workers: int,
    note: Callable[[str], None],
    quiet: bool = False,
) -> tuple[list[SummaryRow], dict[str, Any]]:
    """Measure a grid; options as in ``flowmm eval --help``.

    Args:
        note: receives one-line messages for people.

    Returns:
        Summary rows, and what was measured: suite, model, plan, number of rows, seconds.

    Raises:
        FlowmmError: whatever loading, planning or measuring raises; see the functions called.
    """
    start = time.monotonic()
    cases = unlabelled_cases(data, n, seed) if data else SUITES[suite](split, n, tasks, seed)
    loaded = load_model(model, device=device, dtype=dtype)
    chosen = _plan(plan, loaded, note)
    grid = Grid(
        methods=tuple(parse_methods(methods, chosen.method.theta)),
        budgets=tuple(budgets),
        protocols=tuple(protocols) or (("aware",) if data else ("aware", "blind")),
    )
    _check_versus(versus, grid)
    store = None if out is None else _store(out, loaded, chosen, resume)
    progress = None if quiet else ProgressLine("measured")
    if workers > 1:
        measure = measuring_in_processes(workers, model, device, dtype, chosen)
    else:
        measure = measuring_here(loaded, chosen)
    rows = evaluate(measure, cases, grid, store=store, progress=progress)
    summary = summarise(rows, versus)
    if out is not None:
        write_report(out, summary)
        note(f"rows, tables and curves are in {out}")
    described = {
        "suite": cases[0].suite,
        "model": loaded.source,
        "plan": UNPROFILED if chosen.calibration is None else chosen.short_id,
        "measured_rows": len(rows),
        "seconds": round(time.monotonic() - start, 3),
    }
    return summary, described


def _plan(name: str | None, model: LoadedModel, note: Callable[[str], None]) -> Plan:
    """The plan asked for, else the shipped one of the model, else one without measurements."""
    fingerprint = model.fingerprint()
    if name is None and model.source in shipped_names():
        name = model.source
    if name is None:
        note("no plan was given: every layer decides its mode per prompt (make a plan with 'flowmm profile')")
        return unprofiled_plan(fingerprint, flowmm_version=flowmm.__version__)
    plan = Plan.load(resolve_plan(name))
    if differences := plan.check_model(fingerprint):
        note(f"warning: plan and model differ: {'; '.join(map(str, differences))}")
    return plan


def _check_versus(versus: str | None, grid: Grid) -> None:
    names = [method.name for method in grid.methods]
    if versus is not None and versus not in names:
        raise InputError(f"versus {versus!r}: expected one of the measured methods, {', '.join(names)}")


def _store(out: Path, model: LoadedModel, plan: Plan, resume: bool) -> RowStore:
    store = RowStore(out, identity_of(model, plan))
    if not resume:
        store.discard()
    return store
