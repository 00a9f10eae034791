"""Quality that is measured: accuracy and fidelity of a compressed cache against the full one, under three protocols."""

from flowmm.evaluation.methods import Method, parse_methods
from flowmm.evaluation.records import Row
from flowmm.evaluation.runner import Grid, evaluate, measuring_here
from flowmm.evaluation.suite import Case, pocket_cases, unlabelled_cases
from flowmm.evaluation.summary import SummaryRow, summarise

__all__ = [
    "Case",
    "Grid",
    "Method",
    "Row",
    "SummaryRow",
    "evaluate",
    "measuring_here",
    "parse_methods",
    "pocket_cases",
    "summarise",
    "unlabelled_cases",
]
