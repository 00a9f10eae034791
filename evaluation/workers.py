"""The same grid on several processes of one machine: small models leave a second core idle otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import torch

from flowmm.evaluation.records import Row
from flowmm.evaluation.runner import Measure, Unit, measure_unit
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan

UNITS_PER_TASK = 4


def measuring_in_processes(workers: int, model: str, device: str, dtype: str, plan: Plan) -> Measure:
    """Measure units in `workers` processes; each loads the model once and computes on one thread.

    Args:
        model, device, dtype: as for :func:`flowmm.models.load_model`.
    """
    task = partial(_measure, model, device, dtype, plan.dumps())

    def measure(units: Sequence[Unit]) -> Iterator[list[Row]]:
        # Forking a process that has run torch can deadlock.
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            try:
                yield from pool.map(task, units, chunksize=UNITS_PER_TASK)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return measure


@cache
def _loaded(model: str, device: str, dtype: str) -> LoadedModel:
    return load_model(model, device=device, dtype=dtype)


@cache
def _parsed(plan: str) -> Plan:
    return Plan.loads(plan)


def _measure(model: str, device: str, dtype: str, plan: str, unit: Unit) -> list[Row]:
    return measure_unit(_loaded(model, device, dtype), _parsed(plan), unit)
