"""What ``flowmm eval`` does: load, measure the grid, summarise, leave the results in a directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.leads import compare_with_reference
from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.progress import ProgressLine
from flowmm.evaluation.protocols import PROTOCOLS, conversations
from flowmm.evaluation.records import RowStore
from flowmm.evaluation.report import Results, write_report
from flowmm.evaluation.runner import Grid, evaluate, identity_of, measuring_here
from flowmm.evaluation.suite import SUITES, Case, unlabelled_cases
from flowmm.evaluation.summary import summarise
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
    reference: str | None,
    out: Path | None,
    resume: bool,
    device: str,
    dtype: str,
    workers: int,
    note: Callable[[str], None],
    quiet: bool = False,
) -> tuple[Results, dict[str, Any]]:
    """Measure a grid; options as in ``flowmm eval --help``.

    Args:
        note: receives one-line messages for people.

    Returns:
        The results, and what was measured: suite, model, plan, number of rows, seconds.

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
        protocols=tuple(protocols) or (("aware",) if data else tuple(PROTOCOLS)),
    )
    _check_fit(cases, grid, reference)
    store = None if out is None else _store(out, loaded, chosen, resume)
    progress = None if quiet else ProgressLine("measured")
    if workers > 1:
        measure = measuring_in_processes(workers, model, device, dtype, chosen)
    else:
        measure = measuring_here(loaded, chosen)
    rows = evaluate(measure, cases, grid, store=store, progress=progress)
    results = Results(summarise(rows), [] if reference is None else compare_with_reference(rows, reference))
    if out is not None:
        write_report(out, results)
        note(f"rows, tables and curves are in {out}")
    described = {
        "suite": cases[0].suite,
        "model": loaded.source,
        "plan": UNPROFILED if chosen.calibration is None else chosen.short_id,
        "measured_rows": len(rows),
        "seconds": round(time.monotonic() - start, 3),
    }
    return results, described


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


def _check_fit(cases: Sequence[Case], grid: Grid, reference: str | None) -> None:
    """Refuse what cannot be measured or compared before hours are spent on the rest."""
    names = [method.name for method in grid.methods]
    if reference is not None and (reference not in names or len(names) < 2):
        raise InputError(f"reference {reference!r}: expected one of several measured methods, found {', '.join(names)}")
    for case in cases:
        for protocol in grid.protocols:
            conversations(case, protocol)


def _store(out: Path, model: LoadedModel, plan: Plan, resume: bool) -> RowStore:
    store = RowStore(out, identity_of(model, plan))
    if not resume:
        store.discard()
    return store
