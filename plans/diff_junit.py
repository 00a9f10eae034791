"""A plan difference as JUnit XML, which GitLab, Jenkins and most others show: a test case per layer and kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from flowmm.plans.diff import Change, Kind, PlanDiff, describe

LAYER_KINDS: tuple[Kind, ...] = ("mode", "rho", "method")
PLAN_KINDS: tuple[Kind, ...] = ("model", "method", "data")
# XML 1.0 has no way to write these, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(difference: PlanDiff) -> str:
    """One test suite: `failure` for drift, `skipped` for an unsettled mode or a kind that was not asked for."""
    suite = ElementTree.Element("testsuite", name="flowmm.plan")
    for layer, kind in _cases(difference):
        name = kind if layer is None else f"layer[{layer}].{kind}"
        case = ElementTree.SubElement(suite, "testcase", classname="flowmm.plan", name=name, time="0")
        _judge(case, difference, [c for c in difference.changes if c.layer == layer and c.kind == kind])
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _cases(difference: PlanDiff) -> Iterator[tuple[int | None, Kind]]:
    yield from ((None, kind) for kind in PLAN_KINDS)
    layers = min(len(difference.old.layers), len(difference.new.layers))
    yield from ((layer, kind) for layer in range(layers) for kind in LAYER_KINDS)


def _judge(case: ElementTree.Element, difference: PlanDiff, changes: list[Change]) -> None:
    said = _NOT_XML.sub("?", "\n".join(describe(change, difference.tol) for change in changes))
    exceeding = [change for change in changes if change.exceeds]
    if any(change.kind in difference.fail_on for change in exceeding):
        failure = ElementTree.SubElement(case, "failure", message=said.partition("\n")[0], type="drift")
        failure.text = said
    elif exceeding:
        ElementTree.SubElement(case, "skipped", message=f"changed, but {case.get('name')} is not in --fail-on: {said}")
    elif any(change.kind == "mode" for change in changes):
        ElementTree.SubElement(case, "skipped", message=said)
    elif said:
        ElementTree.SubElement(case, "system-out").text = said
