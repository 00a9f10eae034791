"""Upgrading older plans, and refusing those this flowmm cannot read (``plans/FORMAT.md``, "Versions")."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from flowmm.errors import PlanFormatError, PlanVersionError

MAJOR = 1
SCHEMA = f"flowmm.plan/{MAJOR}"

Migration = Callable[[dict[str, Any]], dict[str, Any]]

# Key n turns the JSON values of a plan of major n into one of n + 1. No plan older than /1 was ever released.
MIGRATIONS: dict[int, Migration] = {}


def upgraded(plan: dict[str, Any], origin: str, migrations: Mapping[int, Migration] = MIGRATIONS) -> dict[str, Any]:
    """`plan` in the schema of this flowmm.

    Raises:
        PlanFormatError: ``schema`` is missing or not ``flowmm.plan/<n>``.
        PlanVersionError: newer than this flowmm, or older without a migration.
    """
    found = _major(plan, origin)
    if found > MAJOR:
        raise PlanVersionError(
            f"{origin}: schema flowmm.plan/{found}, but this flowmm reads up to {SCHEMA}. "
            "Upgrade flowmm: pip install --upgrade flowmm"
        )
    for major in range(found, MAJOR):
        if major not in migrations:
            raise PlanVersionError(
                f"{origin}: schema flowmm.plan/{found} is too old for this flowmm ({SCHEMA}), and no migration from "
                f"/{major} is known. Make the plan again with 'flowmm profile'"
            )
        plan = {**migrations[major](plan), "schema": f"flowmm.plan/{major + 1}"}
    return plan


def _major(plan: dict[str, Any], origin: str) -> int:
    schema = plan.get("schema")
    match = re.fullmatch(r"flowmm\.plan/(0|[1-9][0-9]{0,5})", schema) if isinstance(schema, str) else None
    if match is None:
        found = "none" if schema is None else repr(schema)[:60]
        raise PlanFormatError(f"{origin}: not a flowmm plan: schema is {found}, expected {SCHEMA!r}")
    return int(match[1])
