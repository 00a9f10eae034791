"""What one layer takes instead of the plan's method, because it was measured to cost less."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from flowmm.plans.fields import NonNegative, Record, rounded
from flowmm.plans.method import TAU_RULES, MethodParameters, parse_rule, require_operator

# Parameters that neither decide how a layer is compressed nor matter once its mode is known.
_BESIDE = {"preset", "budget", "theta", "rho_kind"}


def _tau(rule: str) -> str:
    parse_rule(rule, TAU_RULES)
    return rule


class LayerChoice(Record):
    """Parameters of one layer in place of the method's; absent ones are the method's.

    `merge`, `min_sim` and `tau` are those of :class:`MethodParameters` (``tau`` "none": no gate, any other rule: the
    gate is on), `mode` is the layer's, which then need not follow rho. `cost` is what was measured with the method's
    own parameters and with these: next-token KL against the full cache in nats, means over prompts and budgets.
    """

    mode: Literal["cross", "intra"] | None = None
    merge: Annotated[str, AfterValidator(require_operator)] | None = None
    min_sim: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False), AfterValidator(rounded)] | None = None
    tau: Annotated[str, AfterValidator(_tau)] | None = None
    cost: tuple[NonNegative, NonNegative]

    @model_validator(mode="after")
    def _something(self) -> Self:
        if (self.mode, self.merge, self.min_sim, self.tau) == (None, None, None, None):
            raise ValueError("a choice names at least one of mode, merge, min_sim, tau")
        return self

    def applied_to(self, method: MethodParameters) -> MethodParameters:
        """`method` with the chosen parameters."""
        changes: dict[str, object] = {} if self.tau is None else {"gate": self.tau != "none", "tau": self.tau}
        changes |= {} if self.merge is None else {"merge": self.merge}
        changes |= {} if self.min_sim is None else {"min_sim": self.min_sim}
        return method.model_copy(update=changes)

    def __str__(self) -> str:
        named = {"": self.mode, "merge ": self.merge, "min_sim ": self.min_sim, "tau ": self.tau}
        return ", ".join(
            f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"
            for name, value in named.items()
            if value is not None
        )


def same_algorithm(left: MethodParameters, right: MethodParameters) -> bool:
    """Whether two sets of parameters compress a layer of known mode alike at every budget."""
    return left.model_dump(exclude=_BESIDE) == right.model_dump(exclude=_BESIDE)
