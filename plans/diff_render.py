"""A plan difference as text, JSON, Markdown, JUnit XML or GitHub workflow annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from flowmm.errors import InputError
from flowmm.plans.diff import Change, PlanDiff, describe
from flowmm.plans.diff_junit import junit
from flowmm.plans.reading import dotted, line_of

FORMATS = ("text", "json", "markdown", "github", "junit")

# GitHub shows about ten annotations per step; the rest goes into one.
MAX_ANNOTATIONS = 8


def summary(difference: PlanDiff) -> str:
    """One line: drift or not, of how many changes, and the largest |change of rho| over layers."""
    moved = {change.layer for change in difference.drift if change.layer is not None}
    rho = "" if difference.max_abs_rho is None else f", largest rho change {difference.max_abs_rho:.6g}"
    counts = f"{len(difference.drift)} of {_plural(len(difference.changes), 'change')} count as drift"
    if not difference.changes:
        return "no change"
    unsettled = f", {_plural(len(difference.unsettled), 'mode')} unsettled" if difference.unsettled else ""
    if not difference.drifted:
        return f"no drift: none of {_plural(len(difference.changes), 'change')} counts{unsettled}{rho}"
    return f"drift: {counts}, {_plural(len(moved), 'layer')} moved{unsettled}{rho}"


def rule(difference: PlanDiff) -> str:
    """One line: what a layer's rho must do to count."""
    test = "paired t-test, same prompts" if difference.paired else "Welch's t-test"
    layers = _plural(len(difference.new.layers), "layer")
    return f"rho counts above {difference.tol:g} and at p <= {difference.alpha:g} ({test}, Holm over {layers})"


def text(difference: PlanDiff) -> str:
    """For a terminal: the summary, what drifted, what else changed."""
    drift = difference.drift
    others = [change for change in difference.changes if change not in drift]
    lines = [f"{difference.old.short_id} → {difference.new.short_id}  {summary(difference)}"]
    lines += [f"  {rule(difference)}"] if difference.changes else []
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
        "alpha": difference.alpha,
        "test": "paired" if difference.paired else "welch",
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
        "p": change.p,
        "drift": counts,
        "unsettled": change.kind == "mode" and not change.exceeds,
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
        lines += ["", rule(difference) + ".", "", "| drift | kind | change |", "|---|---|---|"]
        lines += [
            f"| {'yes' if change in drift else ''} | {change.kind} | {_cell(describe(change, difference.tol))} |"
            for change in difference.changes
        ]
    return "\n".join(lines) + "\n"


def _cell(content: str) -> str:
    """Table cell of plain text: a plan's strings are foreign, so nothing in them is markup."""
    escaped = content.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{mark}" if mark in "\\|`*_[]@#" else mark for mark in escaped)


def github(difference: PlanDiff, file: str, plan_text: str) -> str:
    """GitHub workflow commands: an error per drifted value, a warning per unsettled mode, at its line in the plan file.

    Args:
        difference: what to report.
        file: path of the plan to annotate, relative to the repository.
        plan_text: its content, for true line numbers.
    """
    drift = difference.drift
    shown = drift if len(drift) <= MAX_ANNOTATIONS else drift[: MAX_ANNOTATIONS - 1]
    commands = [
        _annotation("error", file, line_of(plan_text, change.path), describe(change, difference.tol))
        for change in shown
    ]
    if rest := drift[len(shown) :]:
        message = f"{len(rest)} more:\n" + "\n".join(describe(change, difference.tol) for change in rest)
        commands.append(_annotation("error", file, line_of(plan_text, rest[0].path), message))
    commands += [
        _annotation("warning", file, line_of(plan_text, change.path), describe(change, difference.tol))
        for change in difference.unsettled[:MAX_ANNOTATIONS]
    ]
    if not drift:
        commands.append(_annotation("notice", file, 1, summary(difference)))
    return "\n".join(commands) + "\n"


def _annotation(level: str, file: str, line: int, message: str) -> str:
    return f"::{level} file={_property(file)},line={line},title=flowmm drift::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def append_github_files(difference: PlanDiff, environment: Mapping[str, str]) -> None:
    """Add the Markdown report to `$GITHUB_STEP_SUMMARY` and `drift`, `max_abs_rho` to `$GITHUB_OUTPUT`, where set.

    Raises:
        InputError: one of these files cannot be written.
    """
    rho = "" if difference.max_abs_rho is None else f"{difference.max_abs_rho:.6g}"
    outputs = f"drift={str(difference.drifted).lower()}\nmax_abs_rho={rho}\n"
    for variable, content in (("GITHUB_STEP_SUMMARY", markdown(difference)), ("GITHUB_OUTPUT", outputs)):
        if path := environment.get(variable):
            try:
                with Path(path).open("a", encoding="utf-8") as file:
                    file.write(content)
            except OSError as error:
                raise InputError(f"{path}: cannot be written ({error}). Correct or unset ${variable}") from error


def render(difference: PlanDiff, form: str, path: Path, plan_text: str) -> str:
    """The difference in one of :data:`FORMATS`.

    Args:
        difference: what to report.
        form: ``text``, ``json``, ``markdown``, ``github`` or ``junit``.
        path: the plan file that annotations point into.
        plan_text: its content.

    Raises:
        InputError: no such format.
    """
    if form == "github":
        file = os.path.relpath(path) if path.is_absolute() else str(path)
        return github(difference, file, plan_text)
    renderers = {"text": text, "json": to_json, "markdown": markdown, "junit": junit}
    if form not in renderers:
        raise InputError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    return renderers[form](difference)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
