"""A plan difference as text, JSON, Markdown or GitHub workflow annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Collection

from flowmm.errors import InputError
from flowmm.plans.diff import Change, PlanDiff, describe, diff
from flowmm.plans.files import read_text
from flowmm.plans.reading import dotted, line_of
from flowmm.plans.schema import Plan
from flowmm.plans.shipped import resolve_plan

# GitHub shows about ten annotations per step; the rest goes into one.
MAX_ANNOTATIONS = 8


def summary(difference: PlanDiff) -> str:
    """One line: drift or not, of how many changes, and the largest |change of rho| over layers."""
    moved = {change.layer for change in difference.drift if change.layer is not None}
    rho = "" if difference.max_abs_rho is None else f", largest rho change {difference.max_abs_rho:.6g}"
    counts = f"{len(difference.drift)} of {_plural(len(difference.changes), 'change')} count as drift"
    if not difference.changes:
        return "no change"
    if not difference.drifted:
        return f"no drift: none of {_plural(len(difference.changes), 'change')} counts{rho}"
    return f"drift: {counts}, {_plural(len(moved), 'layer')} moved{rho}"


def text(difference: PlanDiff) -> str:
    """For a terminal: the summary, what drifted, what else changed."""
    drift = difference.drift
    others = [change for change in difference.changes if change not in drift]
    lines = [f"{difference.old.short_id} → {difference.new.short_id}  {summary(difference)}"]
    lines += [f"  ! {describe(change, difference.tol)}" for change in drift]
    lines += [f"    {describe(change, difference.tol)}" for change in others]
    return "\n".join(lines) + "\n"


def to_json(difference: PlanDiff) -> str:
    """One object; `changes` lists every change, `drift` says which count."""
    drift = difference.drift
    report = {
        "drifted": difference.drifted,
        "reasons": [describe(change, difference.tol) for change in drift],
        "tol": difference.tol,
        "fail_on": sorted(difference.fail_on),
        "max_abs_rho": difference.max_abs_rho,
        "old": {"source": difference.old.model.source, "sha256": difference.old.sha256},
        "new": {"source": difference.new.model.source, "sha256": difference.new.sha256},
        "changes": [_change_json(change, change in drift) for change in difference.changes],
    }
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def _change_json(change: Change, counts: bool) -> dict[str, object]:
    return {
        "kind": change.kind,
        "path": dotted(change.path),
        "layer": change.layer,
        "old": change.old,
        "new": change.new,
        "delta": change.delta,
        "drift": counts,
    }


def markdown(difference: PlanDiff) -> str:
    """For a pull request comment or a step summary: a heading, the summary, a table of the changes."""
    drift = difference.drift
    lines = [
        f"### flowmm diff `{difference.old.short_id}` → `{difference.new.short_id}`",
        "",
        summary(difference).capitalize() + ".",
    ]
    if difference.changes:
        lines += ["", "| drift | kind | change |", "|---|---|---|"]
        lines += [
            f"| {'yes' if change in drift else ''} | {change.kind} | {_cell(describe(change, difference.tol))} |"
            for change in difference.changes
        ]
    return "\n".join(lines) + "\n"


def _cell(content: str) -> str:
    """Table cell of plain text: a plan's strings are foreign, so nothing in them is markup."""
    escaped = content.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{mark}" if mark in "\\|`*_[]@#" else mark for mark in escaped)


def github(difference: PlanDiff, file: str, new_text: str) -> str:
    """GitHub workflow commands: an error per drifted value, at its line in the new plan.

    Args:
        difference: what to report.
        file: path of the new plan, relative to the repository.
        new_text: its content, for true line numbers.
    """
    drift = difference.drift
    shown = drift if len(drift) <= MAX_ANNOTATIONS else drift[: MAX_ANNOTATIONS - 1]
    commands = [
        _annotation("error", file, line_of(new_text, change.path), describe(change, difference.tol)) for change in shown
    ]
    if rest := drift[len(shown) :]:
        message = f"{len(rest)} more:\n" + "\n".join(describe(change, difference.tol) for change in rest)
        commands.append(_annotation("error", file, line_of(new_text, rest[0].path), message))
    if not drift:
        commands.append(_annotation("notice", file, 1, summary(difference)))
    return "\n".join(commands) + "\n"


def _annotation(level: str, file: str, line: int, message: str) -> str:
    return f"::{level} file={_property(file)},line={line},title=flowmm drift::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def diff_files(old: str, new: str, tol: float, fail_on: Collection[str], form: str) -> tuple[PlanDiff, str]:
    """Compare two plan files, or shipped plans, and render the difference.

    Args:
        old, new: as :func:`resolve_plan` takes them.
        tol, fail_on: as :func:`diff`.
        form: ``text``, ``json``, ``markdown`` or ``github``.

    Raises:
        InputError, PlanFormatError, PlanVersionError: a plan cannot be read, or an argument is not one of those.
    """
    new_path = resolve_plan(new)
    new_text = read_text(new_path)
    difference = diff(Plan.load(resolve_plan(old)), Plan.loads(new_text, new), tol, fail_on)
    if form == "github":
        file = os.path.relpath(new_path) if new_path.is_absolute() else str(new_path)
        return difference, github(difference, file, new_text)
    renderers = {"text": text, "json": to_json, "markdown": markdown}
    if form not in renderers:
        raise InputError(f"format {form!r}: expected github, {', '.join(renderers)}")
    return difference, renderers[form](difference)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
