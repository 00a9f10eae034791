"""Open questions of the paper, answered by experiment: measure a named study and print it as a Markdown section.

``python -m flowmm.evaluation.choices merge_operator --n 50``. Rows are kept under ``--runs`` (by weights and kind of
plan) and shared by all studies, so that a cell is measured once and an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flowmm.errors import FlowmmError, InputError
from flowmm.evaluation.comparison import ALL, Line
from flowmm.evaluation.lab import Lab, as_csv, measure_studies, open_lab
from flowmm.evaluation.studies import STUDIES, Study
from flowmm.plans.files import read_text, write_atomic


def markdown(study: Study, blocks: Sequence[Sequence[Line]], about: str) -> str:
    """A study's tables, a line per variant and budget, accuracies in percent.

    A difference stands in brackets behind the accuracy, bold where its interval excludes zero.
    """
    protocols = [*study.protocols, *([ALL] if len(study.protocols) > 1 else [])]
    names = ["mean of all" if protocol == ALL else protocol for protocol in protocols]
    parts = [f"{about}\n"]
    for block, lines in zip(study.blocks, blocks, strict=True):
        cells = {(line.variant, line.budget, line.protocol): line for line in lines}
        table = [["variant", "budget", *names], ["---", "---:", *["---"] * len(names)]]
        for budget in sorted({line.budget for line in lines}, reverse=True):
            for variant in block.variants:
                if (variant, budget, protocols[0]) in cells:
                    label = f"`{variant}`" + (" (reference)" if variant == block.reference else "")
                    shown = [_shown(cells[variant, budget, protocol]) for protocol in protocols]
                    table.append([label, f"{100 * budget:g} %", *shown])
        parts.append("".join("| " + " | ".join(row) + " |\n" for row in table))
    return "\n".join(parts)


def _shown(line: Line) -> str:
    text = f"{100 * line.accuracy:.1f} [{100 * line.low:.0f}, {100 * line.high:.0f}]"
    if line.difference is None or line.difference_low is None or line.difference_high is None:
        return text
    ends = f"[{100 * line.difference_low:+.1f}, {100 * line.difference_high:+.1f}]"
    difference = f"{100 * line.difference:+.1f}"
    return f"{text} ({f'**{difference}**' if line.decided else difference} {ends})"


def insert_section(document: str, name: str, section: str) -> str:
    """`document` with what stands between ``<!-- study:NAME -->`` and ``<!-- /study -->`` replaced.

    Raises:
        InputError: the document has no such place.
    """
    pattern = re.compile(rf"(<!-- study:{re.escape(name)} -->\n).*?(<!-- /study -->)", re.DOTALL)
    if not pattern.search(document):
        raise InputError(f"no place for the study {name}: expected a line <!-- study:{name} -->")
    return pattern.sub(lambda place: place[1] + section + place[2], document)


def name_of(lab: Lab, study: Study) -> str:
    """Name of a study's section and file: its own on the validation split, ``NAME_test`` on the test split."""
    return study.name if lab.split == "validation" else f"{study.name}_{lab.split}"


def section_of(lab: Lab, study: Study, blocks: Sequence[Sequence[Line]]) -> str:
    """How a study was measured, and its tables."""
    split = "" if lab.split == "validation" else f" --split {lab.split}"
    about = (
        f"`{study.command}{split} --n {lab.per_task}`: {lab.split} split, n = {blocks[0][0].n} cases per cell, weights "
        f"`{lab.weights}`, numbers in `results/choices/{name_of(lab, study)}.csv`."
    )
    return markdown(study, blocks, about)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser("flowmm.evaluation.choices", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)} [default: all]")
    parser.add_argument("--n", type=int, default=50, help="cases per task [50]")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--model", default="pocket", help="alias or checkpoint directory [pocket]")
    parser.add_argument("--plan", default="pocket", help="a plan with curves [the shipped one]")
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"), help="where rows are kept")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--csv", type=Path, help="directory for one CSV per study")
    parser.add_argument("--document", type=Path, help="Markdown file whose sections are renewed")
    parser.add_argument("-q", "--quiet", action="store_true")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except FlowmmError as error:
        print(f"flowmm: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if unknown := [name for name in options.studies if name not in STUDIES]:
        raise InputError(f"studies {', '.join(unknown)}: expected some of {', '.join(STUDIES)}")
    lab = open_lab(
        model=options.model,
        plan=options.plan,
        runs=options.runs,
        split=options.split,
        n=options.n,
        workers=options.workers,
        quiet=options.quiet,
    )
    results = measure_studies(lab, [STUDIES[name] for name in options.studies or STUDIES])
    for name, blocks in results.items():
        study = STUDIES[name]
        section, place = section_of(lab, study, blocks), name_of(lab, study)
        print(f"## {study.title}\n\n{study.question}\n\n{section}")
        if options.csv is not None:
            options.csv.mkdir(parents=True, exist_ok=True)
            write_atomic(options.csv / f"{place}.csv", as_csv(study, blocks, lab.weights))
        if options.document is not None:
            write_atomic(options.document, insert_section(read_text(options.document), place, section))


if __name__ == "__main__":
    sys.exit(main())
