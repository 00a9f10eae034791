"""A case's cells measured together are those measured one by one, each on a prefill of its own."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.evaluation.bench import Bench, Cell
from flowmm.evaluation.methods import CONTROLS, parse_methods
from flowmm.evaluation.protocols import build_trial
from flowmm.evaluation.records import Row
from flowmm.evaluation.suite import pocket_cases
from flowmm.models import LoadedModel, load_model
from flowmm.plans import PRESETS, Plan, unprofiled_plan
from flowmm.runtime.replay import prefill, reading_caches

METHODS = tuple(parse_methods(",".join(("full", *PRESETS, *CONTROLS, "paper:gate_off")), 0.25))
BUDGETS = (0.1, 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("tiny"))), dtype="fp32")


def plan_of(model: LoadedModel, online: bool) -> Plan:
    """Every layer decides per prompt, or they take turns."""
    plan = unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)
    if online:
        return plan
    modes = ("cross", "intra")
    layers = (layer.model_copy(update={"mode": modes[layer.index % 2], "forced": True}) for layer in plan.layers)
    return plan.model_copy(update={"layers": tuple(layers)})


def outcome(row: Row) -> dict[str, object]:
    return {name: value for name, value in asdict(row).items() if name not in ("kl", "attention_error")}


@pytest.mark.parametrize(
    ("protocol", "labelled", "online"),
    [("aware", True, True), ("blind", False, False), ("second", True, False)],
)
def test_together_as_one_by_one(model: LoadedModel, protocol: str, labelled: bool, online: bool) -> None:
    (case,) = pocket_cases("validation", 1, ["text_needle"])
    # A short prompt is as good here.
    case = replace(case, context=case.context[:3], answer=case.answer if labelled else None)
    trial = build_trial(model, case, protocol)
    prefilled = prefill(model.model, trial)
    cells = [Cell(method, budget) for budget in BUDGETS for method in METHODS]
    checked = [cell for cell in cells if cell.budget == BUDGETS[-1]]
    with reading_caches(model.model):
        benches = [Bench(model, plan_of(model, online), case, protocol, trial, replace(prefilled)) for _ in checked]
        alone = [row for bench, cell in zip(benches, checked, strict=True) for row in bench.measure([cell])]
        together = Bench(model, plan_of(model, online), case, protocol, trial, prefilled).measure(cells)
    by_key = {row.key: row for row in together}
    assert {row.key for row in alone} <= by_key.keys()
    for row in alone:
        assert outcome(by_key[row.key]) == outcome(row)
        assert by_key[row.key].kl == pytest.approx(row.kl, abs=1e-5)
