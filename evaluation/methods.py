"""Methods by name: presets, presets with changes, and the controls that switch off one idea at a time.

``full`` keeps everything. ``robust``, ``paper``, ... are presets. ``PRESET:field=value,field=value`` changes fields of
:class:`flowmm.plans.MethodParameters`. A control, or ``merge=OPERATOR``, is a change to ``robust``; ``PRESET:CONTROL``
applies it to another preset. A group stands for several names: ``controls``, ``PRESET:controls``, ``presets``.
``NAME@KIND`` runs under the plan turned into one of :data:`flowmm.evaluation.plan_kinds.PLAN_KINDS`: ``robust@uniform``
has neither measured budgets nor choices.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from flowmm.errors import InputError
from flowmm.evaluation.plan_kinds import PLAN_KINDS
from flowmm.plans import PRESETS, MethodParameters

FULL = "full"
DEFAULT_PRESET = "robust"

CONTROLS: dict[str, dict[str, str]] = {
    "any_pivot": {"flow": "off:any"},
    "intra_only": {"flow": "off:intra"},
    "inverted": {"flow": "inverted"},
    "strict_cross": {"cross_scope": "other_only"},
    "gate_off": {"gate": "false"},
    "same_pivots_evicted": {"merge": "evict"},
    "random_pivots": {"selector": "random"},
    "uniform_stride": {"selector": "uniform"},
    "nothing_forced": {"keep_proxies": "false", "n_sink": "0"},
}

# What a method must beat, at the same number of entries, and the full cache.
COMPARED_CONTROLS = (
    "random_pivots",
    "same_pivots_evicted",
    "any_pivot",
    "intra_only",
    "inverted",
    "strict_cross",
    "gate_off",
)
GROUPS: dict[str, tuple[str, ...]] = {
    "controls": (FULL, *COMPARED_CONTROLS),
    "presets": (FULL, *PRESETS),
    **{f"{preset}:controls": (FULL, *(f"{preset}:{name}" for name in COMPARED_CONTROLS)) for preset in PRESETS},
}


@dataclass(frozen=True)
class Method:
    """A name, its parameters (``None`` is the full cache), and the kind of plan it runs under (``None``: as it is)."""

    name: str
    parameters: MethodParameters | None
    kind: str | None = None

    @property
    def digest(self) -> str:
        """12 hex digits that change with any parameter; part of what identifies a measured row."""
        text = FULL if self.parameters is None else self.parameters.model_dump_json()
        text += "" if self.kind is None else f"@{self.kind}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_methods(text: str, theta: float) -> list[Method]:
    """Methods from a comma-separated list; a piece ``field=value`` after ``name:...`` belongs to that name.

    Args:
        text: such as ``full,robust,paper:merge=tangent,gate=false,any_pivot,controls``.
        theta: the plan's threshold, unless a method changes it.

    Raises:
        InputError: an unknown name or field, a value that does not fit, or the same name twice.
    """
    asked = list(_names(text))
    if not asked:
        raise InputError("no method given; expected names such as full, robust, paper")
    if len(set(asked)) < len(asked):
        raise InputError(f"methods {', '.join(asked)}: a name occurs twice; give each once")
    names = dict.fromkeys(name for piece in asked for name in GROUPS.get(piece, (piece,)))
    return [_parse_method(name, theta) for name in names]


def _names(text: str) -> Iterator[str]:
    current = ""
    for piece in (piece.strip() for piece in text.split(",")):
        if ":" in current and re.match(r"\w+=", piece):
            current += f",{piece}"
            continue
        if current:
            yield current
        current = piece
    if current:
        yield current


def _parse_method(name: str, theta: float) -> Method:
    if name == FULL:
        return Method(name, None)
    asked, at, kind = name.partition("@")
    if at and kind not in PLAN_KINDS:
        raise InputError(f"method {name!r}: expected one of {', '.join(PLAN_KINDS)} behind the @")
    preset, _, changed = asked.partition(":")
    if preset not in PRESETS:
        preset, changed = DEFAULT_PRESET, asked
    try:
        parameters = MethodParameters.from_preset(preset, **({"theta": theta} | _changes(changed)))
        return Method(name, parameters, kind or None)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"method {name!r}: {field}: {first['msg']}") from error


def _changes(text: str) -> dict[str, object]:
    if text in CONTROLS:
        return dict(CONTROLS[text])
    changes: dict[str, object] = {}
    for piece in filter(None, text.split(",")):
        field, equals, value = piece.partition("=")
        if not equals:
            known = (FULL, *PRESETS, *CONTROLS, "controls", "presets")
            raise InputError(f"method {text!r}: expected one of {', '.join(known)}, or PRESET:field=value,...")
        changes[field] = value
    return changes
