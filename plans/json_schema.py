"""JSON Schema of the plan, for editors and other languages. ``plans/plan-1.schema.json`` is its checked-in text."""

from __future__ import annotations

import json
from pathlib import Path

from flowmm.plans.migrations import MAJOR
from flowmm.plans.schema import OPTIONAL, Plan

SCHEMA_FILE = Path(__file__).with_name(f"plan-{MAJOR}.schema.json")


def schema_text() -> str:
    """JSON Schema (2020-12) generated from the pydantic model. Checks across fields are not part of it."""
    schema = Plan.model_json_schema(by_alias=True)
    # `schema` has a default in Python, but is required in a file.
    schema["required"] = [name for name in schema["properties"] if name not in OPTIONAL]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | schema | {"title": "flowmm layer plan"}, indent=2, ensure_ascii=False) + "\n"


def write_schema() -> None:
    """Write the checked-in file anew, after a change of the format."""
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
