"""Grids: every cell once, also after an interruption, and never rows of another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.errors import InputError, PlanMismatchError
from flowmm.evaluation import records
from flowmm.evaluation.methods import parse_methods
from flowmm.evaluation.records import Row, RowStore
from flowmm.evaluation.runner import Grid, evaluate, identity_of, measuring_here
from flowmm.evaluation.suite import Case, pocket_cases
from flowmm.evaluation.workers import measuring_in_processes
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, resolve_plan, unprofiled_plan
from flowmm.plans.choices import LayerChoice

GRID = Grid(tuple(parse_methods("full,robust,evict", 0.25)), (0.1, 0.3), ("aware", "blind"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("tiny"))), dtype="fp32")


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> Plan:
    return unprofiled_plan(model.fingerprint(), flowmm_version=flowmm.__version__)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return pocket_cases("validation", 2, ["text_needle", "find"])


@pytest.fixture(scope="module")
def uninterrupted(model: LoadedModel, plan: Plan, cases: list[Case]) -> list[Row]:
    return evaluate(measuring_here(model, plan), cases, GRID)


@pytest.fixture
def store(tmp_path: Path, model: LoadedModel, plan: Plan) -> RowStore:
    return RowStore(tmp_path / "run", identity_of(model, plan))


def fresh(store: RowStore) -> RowStore:
    """As a new process sees the same directory."""
    return RowStore(store.table.parent, store.identity)


def test_every_cell_is_measured_once(uninterrupted: list[Row], cases: list[Case]) -> None:
    per_case = len(GRID.protocols) * (1 + 2 * len(GRID.budgets))
    assert len(uninterrupted) == len({row.key for row in uninterrupted}) == len(cases) * per_case
    assert [row.budget for row in uninterrupted[:5]] == [1.0, 0.1, 0.1, 0.3, 0.3]


def test_rows_say_what_was_kept(uninterrupted: list[Row]) -> None:
    for row in uninterrupted:
        assert row.kept == (row.tokens if row.method == "full" else int(row.budget * row.tokens + 1e-9))
        share = row.bytes / row.full_bytes
        # Beside 16 fp32 values each of key and value, an entry may have one fp32 bias.
        assert share in (pytest.approx(row.kept / row.tokens), pytest.approx(row.kept / row.tokens * (1 + 1 / 32)))
        assert row.kl >= 0


class KilledError(Exception):
    pass


def kill_after(units: int) -> object:
    def progress(finished: int, total: int) -> None:
        if finished == units:
            raise KilledError

    return progress


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_an_interrupted_grid_goes_on_where_it_stopped(
    model: LoadedModel,
    plan: Plan,
    cases: list[Case],
    uninterrupted: list[Row],
    store: RowStore,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(records, "CHUNK_ROWS", chunk)
    with pytest.raises(KilledError):
        evaluate(measuring_here(model, plan), cases, GRID, store=store, progress=kill_after(3))  # ty: ignore[invalid-argument-type]
    assert len(fresh(store).load()) == 3 * 5
    assert not store.table.exists()
    rows = evaluate(measuring_here(model, plan), cases, GRID, store=fresh(store))
    assert rows == uninterrupted
    assert list(fresh(store).load().values()) == uninterrupted
    assert not store.parts.exists()


def test_a_kill_without_warning_loses_the_open_chunk_only(
    model: LoadedModel,
    plan: Plan,
    cases: list[Case],
    uninterrupted: list[Row],
    store: RowStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "CHUNK_ROWS", 10)
    monkeypatch.setattr(RowStore, "finish", lambda self: None)
    monkeypatch.setattr(store, "flush", flush_if_full(store))
    with pytest.raises(KilledError):
        evaluate(measuring_here(model, plan), cases, GRID, store=store, progress=kill_after(5))  # ty: ignore[invalid-argument-type]
    (store.parts / "000099.parquet.tmp").write_bytes(b"half a fi")
    assert len(fresh(store).load()) == 20
    assert evaluate(measuring_here(model, plan), cases, GRID, store=fresh(store)) == uninterrupted


def flush_if_full(store: RowStore) -> object:
    """``kill -9`` runs no cleanup: the last, half-full chunk is never written."""
    real = store.flush

    def flush() -> None:
        if len(store._open) >= records.CHUNK_ROWS:
            real()

    return flush


def test_a_finished_grid_can_grow(model: LoadedModel, plan: Plan, cases: list[Case], store: RowStore) -> None:
    evaluate(measuring_here(model, plan), cases[:1], GRID, store=store)
    larger = replace(GRID, budgets=(0.1, 0.2, 0.3))
    measured = []
    evaluate(
        measuring_here(model, plan), cases[:2], larger, store=fresh(store), progress=lambda *at: measured.append(at)
    )
    assert measured[-1] == (4, 4)
    assert len(fresh(store).load()) == 2 * 2 * 7


@pytest.mark.slow
def test_processes_measure_the_same(
    model: LoadedModel, plan: Plan, cases: list[Case], uninterrupted: list[Row], tmp_path: Path
) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "tiny"))
    rows = evaluate(measuring_in_processes(2, checkpoint, "cpu", "fp32", plan), cases, GRID)
    answers = [(row.key, row.text, row.kept, row.bytes) for row in rows]
    assert answers == [(row.key, row.text, row.kept, row.bytes) for row in uninterrupted]


def test_rows_of_another_plan_are_refused(model: LoadedModel, plan: Plan, cases: list[Case], store: RowStore) -> None:
    evaluate(measuring_here(model, plan), cases[:1], GRID, store=store)
    forced = tuple(layer.model_copy(update={"mode": "cross", "forced": True}) for layer in plan.layers)
    other = RowStore(store.table.parent, identity_of(model, plan.model_copy(update={"layers": forced})))
    with pytest.raises(InputError, match=r"another plan.*--no-resume"):
        other.load()
    other.discard()
    assert other.load() == {}


def test_a_damaged_file_is_named(store: RowStore) -> None:
    store.parts.mkdir(parents=True)
    (store.parts / "000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"000001\.parquet"):
        store.load()


def test_a_plan_of_another_model_is_refused(model: LoadedModel, cases: list[Case]) -> None:
    with pytest.raises(PlanMismatchError):
        evaluate(measuring_here(model, Plan.load(resolve_plan("qwen25vl"))), cases, GRID)


@pytest.mark.parametrize(("budgets", "protocols"), [((0.0,), ("aware",)), ((1.5,), ("aware",)), ((0.2,), ("deaf",))])
def test_impossible_grids_are_refused(budgets: tuple[float, ...], protocols: tuple[str, ...]) -> None:
    with pytest.raises(InputError):
        Grid(GRID.methods, budgets, protocols)


def test_a_method_at_uniform_runs_without_the_plans_budgets_and_choices(
    model: LoadedModel, plan: Plan, cases: list[Case]
) -> None:
    layers = [
        layer.model_copy(
            update={"budget": 0.05 if layer.index else 0.65, "choice": LayerChoice(merge="evict", cost=(1, 0))}
        )
        for layer in plan.layers
    ]
    split = plan.model_copy(update={"layers": tuple(layers)})
    grid = Grid(tuple(parse_methods("robust,robust@uniform", 0.25)), (0.2,), ("blind",))
    rows = {row.method: row for row in evaluate(measuring_here(model, split), cases[:1], grid)}
    (even,) = evaluate(measuring_here(model, plan), cases[:1], replace(grid, methods=grid.methods[:1]))
    assert rows["robust@uniform"].kl == pytest.approx(even.kl, abs=1e-6)
    assert rows["robust"].kl != pytest.approx(even.kl, abs=1e-6)
