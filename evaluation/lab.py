"""Where studies are measured: a model, its plan, and rows on disk that all studies and figures share."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flowmm.evaluation.comparison import Line, compare
from flowmm.evaluation.methods import FULL, parse_methods
from flowmm.evaluation.plan_kinds import plan_of_kind
from flowmm.evaluation.progress import ProgressLine
from flowmm.evaluation.records import Row, RowStore
from flowmm.evaluation.runner import Grid, evaluate, identity_of, measuring_here
from flowmm.evaluation.studies import Block, Study
from flowmm.evaluation.suite import pocket_cases
from flowmm.evaluation.workers import measuring_in_processes
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan

DEFAULT_KIND = "uniform"
Cell = tuple[str, str, float]
"""Method, kind of plan, budget."""


@dataclass(frozen=True)
class Lab:
    """A model, its measured plan and where rows are kept.

    Attributes:
        source: what the model was loaded from; worker processes load it again.
        runs: directory of all rows.
        split, per_task: cases.
        workers: processes.
    """

    model: LoadedModel
    source: str
    plan: Plan
    runs: Path
    split: str
    per_task: int
    workers: int = 1
    quiet: bool = False

    @property
    def weights(self) -> str:
        """First 12 hex digits of the weights' fingerprint."""
        return str(self.model.fingerprint().weights_sha256)[:12]

    def measure(self, cells: Sequence[Cell], protocols: Sequence[str]) -> dict[Cell, list[Row]]:
        """Rows of every cell, from disk or measured now.

        Raises:
            InputError: unknown names, or rows on disk that another plan or version measured.
        """
        wanted: dict[tuple[str, float], list[str]] = defaultdict(list)
        for method, kind, budget in dict.fromkeys(cells):
            wanted[kind, budget].append(method)
        grids: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
        for (kind, budget), methods in wanted.items():
            grids[kind, tuple(sorted(methods))].append(budget)
        found: dict[Cell, list[Row]] = defaultdict(list)
        for (kind, methods), budgets in grids.items():
            for row in self._grid(kind, methods, budgets, protocols):
                found[row.method, kind, row.budget].append(row)
        return found

    def _grid(self, kind: str, methods: Sequence[str], budgets: Sequence[float], protocols: Sequence[str]) -> list[Row]:
        plan = plan_of_kind(kind, self.plan)
        parsed = parse_methods(",".join(methods), plan.method.theta)
        own = [budget for budget in budgets if budget < 1]
        if self.workers > 1:
            measure = measuring_in_processes(self.workers, self.source, "cpu", "fp32", plan)
        else:
            measure = measuring_here(self.model, plan)
        return evaluate(
            measure,
            pocket_cases(self.split, self.per_task),
            Grid(tuple(parsed), tuple(own), tuple(protocols)),
            store=RowStore(self.runs / self.weights / kind, identity_of(self.model, plan)),
            progress=None if self.quiet else ProgressLine(f"{kind} plan, {len(methods)} methods:"),
        )


def open_lab(*, model: str, plan: str, runs: Path, split: str, n: int, workers: int = 1, quiet: bool = False) -> Lab:
    """A lab on the CPU, in fp32 and on one thread, with a plan file or a shipped plan.

    Raises:
        FlowmmError: whatever loading raises.
    """
    torch.set_num_threads(1)
    loaded, chosen = load_model(model, device="cpu", dtype="fp32"), Plan.load(resolve_plan(plan))
    chosen.check_model(loaded.fingerprint())
    return Lab(loaded, model, chosen, runs, split, n, workers, quiet)


def split_variant(variant: str) -> tuple[str, str]:
    """Method and kind of plan of ``METHOD`` or ``METHOD@KIND``."""
    method, at, kind = variant.rpartition("@")
    return (method, kind) if at else (variant, DEFAULT_KIND)


def cells_of(study: Study) -> list[Cell]:
    """Everything a study measures."""
    return [cell for block in study.blocks for cell in _block_cells(block, study.budgets)]


def _block_cells(block: Block, budgets: Sequence[float]) -> list[Cell]:
    cells = []
    for method, kind in map(split_variant, block.variants):
        cells += [(method, kind, budget) for budget in ((1.0,) if method == FULL else budgets)]
    return cells


def lines_of(study: Study, found: Mapping[Cell, Sequence[Row]]) -> list[list[Line]]:
    """Lines of each block of a study."""
    blocks = []
    for block in study.blocks:
        measured = {
            variant: [
                row
                for cell in _block_cells(Block((variant,)), study.budgets)
                for row in found[cell]
                if row.protocol in study.protocols
            ]
            for variant in block.variants
        }
        blocks.append(compare(measured, block.reference))
    return blocks


def measure_studies(lab: Lab, studies: Sequence[Study]) -> dict[str, list[list[Line]]]:
    """Lines of each block of each study, by the study's name; measured together, each case's prefill once.

    Raises:
        InputError: see :meth:`Lab.measure`.
    """
    found: dict[Cell, list[Row]] = {}
    for protocols in dict.fromkeys(study.protocols for study in studies):
        cells = [cell for study in studies if study.protocols == protocols for cell in cells_of(study)]
        found |= lab.measure(cells, protocols)
    return {study.name: lines_of(study, found) for study in studies}


def run_study(lab: Lab, study: Study) -> list[list[Line]]:
    """Lines of each block of one study."""
    return measure_studies(lab, [study])[study.name]


def as_csv(study: Study, blocks: Sequence[Sequence[Line]], weights: str) -> str:
    """Every number of a study at full precision."""
    out = io.StringIO()
    rows = [
        {"study": study.name, "block": number, "weights": weights} | line.to_dict()
        for number, lines in enumerate(blocks, start=1)
        for line in lines
    ]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
