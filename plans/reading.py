"""From text to checked JSON values, and from a field's path to its line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from flowmm.errors import PlanFormatError

MAX_DEPTH = 32
MAX_VALUES = 200_000
MAX_REPORTED = 5
_SPACE = " \t\r\n"

PathStep = str | int


def parse(text: str, origin: str) -> dict[str, Any]:
    """The JSON object in `text`, under the limits of ``plans/FORMAT.md``.

    Args:
        text: content of a plan file.
        origin: its name in messages.

    Raises:
        PlanFormatError: not JSON, a duplicate key, NaN or infinity, nested too deep, or not an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        cut = " The file ends too early: was it cut off?" if error.pos >= len(text.rstrip()) else ""
        raise PlanFormatError(f"{origin}, line {error.lineno}: not valid JSON ({error.msg}).{cut}") from error
    except RecursionError as error:
        raise PlanFormatError(f"{origin}: nested deeper than {MAX_DEPTH} levels, so it is not a plan") from error
    except ValueError as error:
        raise PlanFormatError(f"{origin}: {error}") from error
    if not isinstance(value, dict):
        raise PlanFormatError(f"{origin}: expected a JSON object, found {_shown(value)}")
    _check_extent(value, origin)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {_shown(key)} appears twice in one object. Remove one of the two")
        members[key] = value
    return members


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {literal[:40]} is not finite; write null for what is not known")
    return value


def _check_extent(value: Any, origin: str) -> None:
    """Refuse what would make validation slow long before a plan's size limit is reached."""
    level, depth, count = [value], 0, 0
    while level:
        members = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [inner for item in members for inner in item if isinstance(inner, dict | list)]
        depth, count = depth + 1, count + sum(map(len, members))
        if depth > MAX_DEPTH:
            raise PlanFormatError(f"{origin}: nested deeper than {MAX_DEPTH} levels, so it is not a plan")
        if count > MAX_VALUES:
            raise PlanFormatError(f"{origin}: more than {MAX_VALUES} values, so it is not a plan")


def format_error(error: ValidationError, text: str, origin: str) -> PlanFormatError:
    """`error` as one message that names the field, its line in `text`, what was found and what was expected."""
    problems = error.errors(include_url=False)
    messages = [_problem(dict(problem), text) for problem in problems[:MAX_REPORTED]]
    if len(problems) > MAX_REPORTED:
        messages.append(f"and {len(problems) - MAX_REPORTED} more")
    return PlanFormatError(f"{origin}: does not follow plans/FORMAT.md\n  " + "\n  ".join(messages))


def _problem(problem: dict[str, Any], text: str) -> str:
    path = problem.get("ctx", {}).get("path", problem["loc"])
    place = f"line {line_of(text, path)}, {dotted(path)}"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown field. Remove it, or upgrade flowmm if a newer one wrote this file"
    if problem["type"] == "missing":
        return f"{place}: required field is missing"
    found = "" if "path" in problem.get("ctx", {}) else f" (found {_shown(problem['input'])})"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}{found}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: Sequence[PathStep]) -> str:
    """``("layers", 3, "mode")`` as ``layers[3].mode``."""
    # A key of a foreign file can hold anything: only plain ones are shown bare.
    names = [
        f"[{step}]" if isinstance(step, int) else f".{step if step.isidentifier() else _shown(step)}" for step in path
    ]
    text = "".join(names)
    return text.removeprefix(".") or "the plan"


def line_of(text: str, path: Sequence[PathStep]) -> int:
    """Line (from 1) of the value at `path`, or of the innermost part of the path that exists. `text` is valid JSON."""
    position = _skip_space(text, 0)
    for step in path:
        inner = _child(text, position, step)
        if inner is None:
            break
        position = inner
    return text.count("\n", 0, position) + 1


def _child(text: str, position: int, step: PathStep) -> int | None:
    """Position of the member `step` of the object or list that starts at `position`."""
    if text[position] not in "{[":
        return None
    is_object, index, decoder = text[position] == "{", 0, json.JSONDecoder()
    position = _skip_space(text, position + 1)
    while text[position] not in "}]":
        name: PathStep = index
        if is_object:
            name, position = decoder.raw_decode(text, position)
            position = _skip_space(text, _skip_space(text, position) + 1)
        if name == step:
            return position
        _, position = decoder.raw_decode(text, position)
        position = _skip_space(text, position)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
        index += 1
    return None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
