"""What one layer takes instead of the plan's method, because it was measured to cost less."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from flowmm.plans.fields import NonNegative, Record, rounded
from flowmm.plans.method import TAU_RULES, MethodParameters, parse_rule, parse_selector, require_operator

# Parameters that neither decide how a layer is compressed nor matter once its mode is known.
_BESIDE = {"preset", "budget", "theta", "rho_kind"}


def _tau(rule: str) -> str:
    parse_rule(rule, TAU_RULES)
    return _printable(rule)


def _selector(selector: str) -> str:
    parse_selector(selector)
    return _printable(selector)


def _printable(text: str) -> str:
    # A number may have blanks around it, also such as end a line.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


class LayerChoice(Record):
    """Parameters of one layer in place of the method's; absent ones are the method's.

    `selector`, `first_share`, `keep_proxies`, `merge`, `min_sim` and `tau` are those of :class:`MethodParameters`
    (``tau`` "none": no gate, any other rule: the gate is on), `mode` is the layer's, which then need not follow rho.
    `cost` is what was measured with the method's own parameters in this layer and with these: next-token KL against
    the full cache in nats, means over prompts and budgets.
    """

    mode: Literal["cross", "intra"] | None = None
    selector: Annotated[str, AfterValidator(_selector)] | None = None
    first_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), AfterValidator(rounded)] | None = None
    keep_proxies: bool | None = None
    merge: Annotated[str, AfterValidator(require_operator)] | None = None
    min_sim: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False), AfterValidator(rounded)] | None = None
    tau: Annotated[str, AfterValidator(_tau)] | None = None
    cost: tuple[NonNegative, NonNegative]

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.changes:
            raise ValueError(f"a choice names at least one of {', '.join(self._choosable())}")
        return self

    @model_validator(mode="after")
    def _two_share(self) -> Self:
        if self.first_share is not None and self.selector is not None and len(parse_selector(self.selector)) < 2:
            raise ValueError(f"first_share is of two selectors, but selector is {self.selector!r}. Leave it out")
        return self

    @classmethod
    def _choosable(cls) -> list[str]:
        return [name for name in cls.model_fields if name != "cost"]

    @property
    def changes(self) -> dict[str, Any]:
        """What was chosen, by field."""
        values = {name: getattr(self, name) for name in self._choosable()}
        return {name: value for name, value in values.items() if value is not None}

    def applied_to(self, method: MethodParameters) -> MethodParameters:
        """`method` with the chosen parameters."""
        changes = {name: value for name, value in self.changes.items() if name != "mode"}
        if self.tau is not None:
            changes["gate"] = self.tau != "none"
        return method.model_copy(update=changes)

    def __str__(self) -> str:
        return ", ".join(_described(name, value) for name, value in self.changes.items())


def _described(name: str, value: Any) -> str:
    match name:
        case "mode":
            return str(value)
        case "keep_proxies":
            return "proxies kept" if value else "proxies not forced"
        case _:
            return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def same_algorithm(left: MethodParameters, right: MethodParameters) -> bool:
    """Whether two sets of parameters compress a layer of known mode alike at every budget."""
    return left.model_dump(exclude=_BESIDE) == right.model_dump(exclude=_BESIDE)
