"""Checking plan files one by one, so that one bad file does not hide the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowmm.errors import FlowmmError
from flowmm.plans.files import read_text
from flowmm.plans.schema import Plan
from flowmm.plans.shipped import resolve_plan


@dataclass(frozen=True)
class PlanCheck:
    """Outcome for one file. `error` is None when it is a plan; `canonical` whether its text is the canonical one."""

    name: str
    exit_code: int
    error: str | None = None
    sha256: str | None = None
    canonical: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values of the outcome."""
        valid = self.error is None
        return {
            "plan": self.name,
            "valid": valid,
            "error": self.error,
            "sha256": self.sha256,
            "canonical": self.canonical,
        }

    def __str__(self) -> str:
        if self.sha256 is None:
            return f"bad  {self.error}"
        return f"ok   {self.name}  {self.sha256[:12]}" + ("" if self.canonical else "  (valid, but not canonical text)")


def validate_file(name: str) -> PlanCheck:
    """Read one plan as every command would; a refusal becomes part of the outcome."""
    try:
        path = resolve_plan(name)
        text = read_text(path)
        plan = Plan.loads(text, name)
    except FlowmmError as error:
        return PlanCheck(name, error.exit_code, error=str(error))
    return PlanCheck(name, 0, sha256=plan.sha256, canonical=plan.dumps() == text)
