"""The canonical text of a plan (``plans/FORMAT.md``, "Canonical text")."""

from __future__ import annotations

import json
from typing import Any

from flowmm.plans.fields import rounded


def canonical_text(plan: dict[str, Any]) -> str:
    """One line per member of the top object and of the objects in it, one line per element of a list.

    Args:
        plan: JSON values only; keys are written in the order given.
    """
    members = [f"  {_inline(key)}: {_block(value)}" for key, value in plan.items()]
    return "{\n" + ",\n".join(members) + "\n}\n"


def _block(value: Any) -> str:
    if isinstance(value, dict) and value:
        lines = [f"    {_inline(key)}: {_inline(member)}" for key, member in value.items()]
        return "{\n" + ",\n".join(lines) + "\n  }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {_inline(element)}" for element in value) + "\n  ]"
    return _inline(value)


def _inline(value: Any) -> str:
    return json.dumps(_round_floats(value), ensure_ascii=False, allow_nan=False)


def _round_floats(value: Any) -> Any:
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, dict):
        return {key: _round_floats(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_round_floats(element) for element in value]
    return value
