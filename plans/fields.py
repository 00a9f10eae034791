"""Types of the plan's fields, with the limits of ``plans/FORMAT.md``."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MAX_LAYERS = 1024
SIGNIFICANT_DIGITS = 6
# Control characters could drive a terminal or forge a line of a CI log when a foreign plan is printed.
_NO_CONTROL = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_NO_CONTROL_BUT_LINES = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]*$"
_TIMESTAMP = "%Y-%m-%dT%H:%M:%SZ"


def rounded(value: float) -> float:
    """`value` at the 6 significant digits a plan stores; -0.0 becomes 0.0."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") + 0.0


def utc_now() -> str:
    """The present time as a plan's ``created_at``: ``YYYY-MM-DDTHH:MM:SSZ``."""
    return datetime.now(UTC).strftime(_TIMESTAMP)


def source_name(id_or_path: str) -> str:
    """What a plan may say about where something came from: a hub id as it is, the last part of a local path."""
    name = id_or_path.replace("\\", "/").rstrip("/")
    return name if _is_name(name) else name.rpartition("/")[2]


def _is_name(text: str) -> bool:
    parts = text.split("/")
    return (
        len(parts) <= 2
        and not any(part in ("", ".", "..") for part in parts)
        and "\\" not in text
        and not text.startswith("~")
        and not re.match(r"[A-Za-z]:/", text)
    )


def _not_a_path(text: str) -> str:
    if not _is_name(text):
        raise ValueError("a hub id (owner/name) or a bare name is expected, not a path")
    return text


def _is_utc(text: str) -> str:
    # strptime alone also takes "2026-1-2": the round trip insists on the one written form.
    if datetime.strptime(text, _TIMESTAMP).strftime(_TIMESTAMP) != text:
        raise ValueError("a UTC time written YYYY-MM-DDTHH:MM:SSZ is expected")
    return text


class Record(BaseModel):
    """Base of every object in a plan: immutable, and no key that FORMAT.md does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(rounded)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), AfterValidator(rounded)]
Ratio = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), AfterValidator(rounded)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(rounded)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=_NO_CONTROL)]
Source = Annotated[Name, AfterValidator(_not_a_path)]
Note = Annotated[str, StringConstraints(max_length=4000, pattern=_NO_CONTROL_BUT_LINES)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Timestamp = Annotated[str, AfterValidator(_is_utc)]
