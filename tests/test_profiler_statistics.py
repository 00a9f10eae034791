"""Statistics of flows over prompts: closed forms, intervals, and what a plan keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowmm.errors import InputError, PlanFormatError
from flowmm.plans import FlowKind, MethodParameters, Plan, TokenStatistics
from flowmm.profiler.bootstrap import mean_intervals
from flowmm.profiler.recorder import LayerFlow, PromptFlow
from flowmm.profiler.records import PromptRecord, RecordStore, from_table, read_tables, to_table
from flowmm.profiler.statistics import (
    KINDS,
    Measurements,
    estimator_statistics,
    half_widths,
    plan_layers,
    token_statistics,
)

IDENTITY = {"model": "m"}


def layer_flow(rho: float, sinks: int = 0) -> LayerFlow:
    """Two heads around `rho`; every estimator another multiple of it."""
    return LayerFlow(
        rho=[rho - 0.01, rho + 0.01],
        rho_nosink=[0.5 * rho] * 2,
        rho_nosink_auto=[0.4 * rho] * 2,
        text_mass_of_visual=[0.2 * rho] * 2,
        visual_mass_of_text=[0.6 * rho] * 2,
        sink_mass=[0.1] * 2,
        sink_columns=list(range(sinks)),
        sink_column_masses=[0.2] * sinks,
    )


def record(index: int, rhos: list[float], uniform: float = 0.25, sinks: int = 0) -> PromptRecord:
    flow = PromptFlow(100 + index, 40, 2, 4, uniform, [layer_flow(rho, sinks) for rho in rhos])
    return PromptRecord(index, f"{index:064x}", f"sample {index}", flow)


def measurements(rhos: np.ndarray, uniform: list[float] | None = None) -> Measurements:
    levels = uniform or [0.25] * len(rhos)
    records = [record(i, list(row), level) for i, (row, level) in enumerate(zip(rhos, levels, strict=True))]
    return Measurements.from_tables([to_table(records[:2], IDENTITY), to_table(records[2:], IDENTITY)])


RHOS = np.array([[0.2, 0.3], [0.3, 0.3], [0.4, 0.3], [0.5, 0.3]])


def test_statistics_against_closed_forms() -> None:
    rows = estimator_statistics(measurements(RHOS), "raw", theta=0.25)
    column = RHOS[:, 0]
    assert rows[0].mean == pytest.approx(0.35)
    assert rows[0].std == pytest.approx(column.std(ddof=1))
    assert (rows[0].q05, rows[0].q50, rows[0].q95) == pytest.approx(tuple(np.quantile(column, [0.05, 0.5, 0.95])))
    assert rows[0].agree == 0.75
    assert rows[0].margin == pytest.approx(0.1 / column.std(ddof=1))
    assert rows[1].std == pytest.approx(0)
    assert rows[1].ci95 == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    ("kind", "factor"), [("nosink", 0.5), ("nosink_auto", 0.4), ("v2t", 0.2), ("t2v", 0.6), ("balanced", 0.4)]
)
def test_every_kind_has_statistics(kind: FlowKind, factor: float) -> None:
    row = estimator_statistics(measurements(RHOS), kind, theta=0.25)[0]
    assert row.mean == pytest.approx(0.35 * factor)
    assert row.n == 4


def test_lift_leaves_out_prompts_of_one_modality_and_is_compared_with_chance() -> None:
    row = estimator_statistics(measurements(RHOS, [0.4, 0.0, 0.2, 0.25]), "lift", theta=0.9)[0]
    assert row.n == 3
    assert row.mean == pytest.approx((0.5 + 2 + 2) / 3)
    assert row.agree == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="both text and images"):
        estimator_statistics(measurements(RHOS, [0.0] * 4), "lift", theta=0.25)


def test_a_single_prompt_has_no_interval() -> None:
    measured = Measurements.from_tables([to_table([record(0, [0.3])], IDENTITY)])
    row = estimator_statistics(measured, "raw", theta=0.25)[0]
    assert (row.std, row.margin, row.ci95, row.agree) == (0.0, None, None, 1.0)
    (layer,) = plan_layers(measured, MethodParameters())
    assert layer.estimates is not None
    assert layer.estimates.nosink == (0.15, None, None)
    assert np.isinf(half_widths(measured.flows["raw"], 0)).all()


def test_intervals_agree_with_scipy_and_repeat_exactly() -> None:
    values = np.random.default_rng(0).beta(2, 5, size=(60, 3))
    ours = mean_intervals(values, seed=1)
    assert np.array_equal(ours, mean_intervals(values, seed=1))
    assert not np.array_equal(ours, mean_intervals(values, seed=2))
    theirs = stats.bootstrap((values,), np.mean, axis=0, method="percentile", rng=np.random.default_rng(0))
    interval = theirs.confidence_interval
    assert ours == pytest.approx(np.stack([interval.low, interval.high]), abs=0.004)


def test_intervals_cover_the_mean_at_their_level() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(100):
        low, high = mean_intervals(rng.beta(2, 5, size=(50, 2)), seed)
        covered += int(((low <= 2 / 7) & (high >= 2 / 7)).sum())
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((30, 2))
    whole = mean_intervals(values, 0)
    monkeypatch.setattr("flowmm.profiler.bootstrap.BLOCK_VALUES", 100)
    assert np.array_equal(whole, mean_intervals(values, 0))


def plan_with(layers: Any, method: MethodParameters) -> Plan:
    shipped = Plan.load(Path(__file__).parent.parent / "plans" / "qwen25vl.json")
    model = shipped.model.model_copy(update={"num_layers": len(layers)})
    return Plan.model_validate(shipped.as_json() | {"model": model, "method": method, "layers": layers})


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_estimate_decides_and_the_plan_checks_it(kind: FlowKind) -> None:
    measured = measurements(RHOS, [0.4, 0.4, 0.3, 0.3])
    method = MethodParameters(rho_kind=kind, theta=0.16)
    layers = plan_layers(measured, method)
    expected = [row.mean > method.threshold for row in estimator_statistics(measured, kind, method.theta)]
    assert [layer.mode == "cross" for layer in layers] == expected
    plan = plan_with(layers, method)
    assert Plan.loads(plan.dumps()) == plan
    flipped = {"cross": "intra", "intra": "cross"}[layers[0].mode]
    text = plan.dumps().replace(f'"index": 0, "mode": "{layers[0].mode}"', f'"index": 0, "mode": "{flipped}"')
    with pytest.raises(PlanFormatError, match=r"layers\[0\].mode.*contradicts"):
        Plan.loads(text)
    dropped = layers[0].model_copy(update={"estimates": None, "rho": None})
    with pytest.raises(ValueError, match="is null"):
        plan_with((dropped, *layers[1:]), method)


def test_the_stored_margin_is_that_of_the_deciding_estimate() -> None:
    measured = measurements(RHOS)
    raw, balanced = (plan_layers(measured, MethodParameters(rho_kind=kind))[0].rho for kind in ("raw", "balanced"))
    assert raw is not None
    assert balanced is not None
    assert raw.mean == balanced.mean
    assert raw.agree == 0.75
    assert balanced.agree == 1.0, "balanced is below theta on every prompt"
    assert raw.margin != balanced.margin


def test_a_layer_stays_one_line_and_old_plans_stay_as_they_were() -> None:
    plan = plan_with(plan_layers(measurements(RHOS), MethodParameters()), MethodParameters())
    lines = [line for line in plan.dumps().splitlines() if line.startswith('    {"index"')]
    assert len(lines) == 2
    assert all(len(line) < 600 for line in lines)
    assert "rho_kind" not in plan.dumps()
    shipped = Path(__file__).parent.parent / "plans" / "qwen25vl.json"
    assert Plan.load(shipped).dumps() == shipped.read_text()


def test_sinks_and_tokens_are_means_over_prompts() -> None:
    records = [record(0, [0.3], sinks=2), record(1, [0.3], sinks=0)]
    measured = Measurements.from_tables([to_table(records, IDENTITY)])
    (layer,) = plan_layers(measured, MethodParameters())
    assert layer.sinks is not None
    assert (layer.sinks.mass, layer.sinks.count) == pytest.approx((0.2, 1.0))
    assert token_statistics(measured) == TokenStatistics(
        total_mean=100.5, total_min=100, total_max=101, visual_share_mean=(40 / 100 + 40 / 101) / 2, images_mean=2
    )


def test_records_survive_the_table() -> None:
    records = [record(0, [0.2, 0.3], sinks=1), record(1, [0.4, 0.5])]
    assert from_table(to_table(records, IDENTITY)) == records


def test_the_finished_file_does_not_depend_on_how_it_came_about(tmp_path: Path) -> None:
    records = [record(index, [0.1 + index / 1000, 0.3], sinks=index % 3) for index in range(150)]
    kept = {one.index: one.sample_sha256 for one in records}

    def finished(name: str, shards: list[list[PromptRecord]]) -> bytes:
        stores = [RecordStore(tmp_path / name, IDENTITY) for _ in shards]
        for store, shard in zip(stores, shards, strict=True):
            for place, one in enumerate(shard):
                store.add(one)
                if place % 7 == 0:
                    store.flush()
            store.flush()
        stores[0].finish(kept)
        assert not (tmp_path / f"{name}.parts").exists()
        return (tmp_path / name).read_bytes()

    whole = finished("whole", [records])
    assert finished("thirds", [records[rank::3] for rank in range(3)]) == whole
    assert finished("twice", [records, records[::-1][:40]]) == whole
    stale = [record(index, [0.9, 0.9]) for index in (3, 150, 151)]
    stale[0] = PromptRecord(3, "f" * 64, "changed since", stale[0].flow)
    assert finished("stale", [stale, records]) == whole
    tables = list(read_tables(tmp_path / "whole"))
    assert [table.num_rows for table in tables] == [128, 128, 44]


def test_records_of_another_identity_are_not_found(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records", IDENTITY)
    store.add(record(0, [0.3]))
    store.flush()
    assert store.finished() == {(0, f"{0:064x}")}
    assert RecordStore(tmp_path / "records", {"model": "other"}).finished() == set()
    store.discard()
    assert store.finished() == set()
