"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = click.Choice(["auto", "bf16", "fp16", "fp32"])


class BudgetType(click.ParamType):
    """A ratio of the prompt (float) or a number of entries per layer (int), told apart by how it is written."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        """``0.2``, ``1.0`` and ``20%`` are ratios, ``512`` is entries; a bare ``1`` could be either and is refused."""
        if isinstance(value, (int, float)):
            return value
        try:
            if value.endswith("%"):
                return self._ratio(float(value[:-1]) / 100)
            if "." in value:
                return self._ratio(float(value))
            entries = int(value)
        except ValueError:
            entries = 0
        if entries == 1:
            self.fail("1 is ambiguous: write 1.0 or 100% for the whole prompt, 2 or more for entries per layer")
        if entries < 1:
            self.fail(f"{value!r}: expected a ratio such as 0.2 or 20%, or a whole number of entries such as 512")
        return entries

    @staticmethod
    def _ratio(ratio: float) -> float:
        if not 0 < ratio <= 1:
            raise ValueError(ratio)
        return ratio


class ShareType(click.ParamType):
    """A share in [0, 1], written 0.01 or 1%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a float."""
        if isinstance(value, float):
            return value
        try:
            share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r}: expected a share such as 0.01 or 1%")
        return share


def comma_list(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """A callback: the names between the commas."""
    return [name.strip() for name in value.split(",") if name.strip()]


def ratios(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """A callback: budgets between commas, all of them shares of the prompt; sorted, each once."""
    budgets = [BudgetType().convert(text, parameter, context) for text in comma_list(context, parameter, value)]
    if not budgets or not all(isinstance(budget, float) for budget in budgets):
        raise click.BadParameter(f"{value!r}: expected ratios such as 0.02,0.1,20%")
    return sorted({float(budget) for budget in budgets})


def known_preset(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A callback: refuses what is no preset while the command line is read, not when the model is loaded."""
    if value is not None:
        from flowmm.plans import PRESETS

        if value not in PRESETS:
            raise click.BadParameter(f"{value!r}: expected one of {', '.join(PRESETS)}")
    return value


PRESET_OPTION = click.option(
    "--preset",
    "--method",
    callback=known_preset,
    help="Method parameters: robust, paper, evict, ...  [default: robust, or the plan's]",
)

MAX_BAD_OPTION = click.option(
    "--max-bad", type=ShareType(), default="1%", show_default=True, help="Fail if more of the prompts cannot be read."
)
QUIET_OPTION = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


def loading_options(command: Command) -> Command:
    """The options of :func:`flowmm.models.load_model` that ``profile``, ``check``, ``run`` and ``bench`` take."""
    for option in (
        click.option("--revision", help="Branch, tag or commit of a hub repository."),
        click.option("--device-map", help="Spread the model, e.g. auto (needs accelerate)."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps."),
        click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="auto: as stored."),
    ):
        command = option(command)
    return command
