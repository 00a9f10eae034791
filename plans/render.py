"""A plan for people: in a colour terminal, as plain text, as JSON."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from flowmm.plans.fingerprint import CalibrationFingerprint
from flowmm.plans.layers import LayerPlan, Mode
from flowmm.plans.method import MethodParameters
from flowmm.plans.schema import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_WIDTH = 20
EIGHTHS = "▏▎▍▌▋▊▉"
HEADER_WIDTH = 108
MODE_STYLES: dict[Mode, str] = {"cross": "magenta", "intra": "cyan", "online": "yellow"}
COLUMNS = ("layer", "rho, 0 to 1 (│ theta)", "mean ± std", "lift", "margin", "agree", "mode", "budget")


def inspection(plan: Plan) -> dict[str, Any]:
    """JSON values: the plan as stored, its hash, and a count per mode."""
    modes = [layer.mode for layer in plan.layers]
    return {
        "sha256": plan.sha256,
        "measured": plan.measured,
        "modes": {mode: modes.count(mode) for mode in MODE_STYLES},
        "plan": plan.as_json(),
    }


def plain(plan: Plan) -> str:
    """Aligned text without colour or control characters."""
    rows = [COLUMNS, *(row(layer, plan.method.theta) for layer in plan.layers)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]
    head = [
        f"{'' if number else name:12}{part}".rstrip()
        for name, value in header(plan)
        for number, part in enumerate(textwrap.wrap(value, HEADER_WIDTH) or [""])
    ]
    return "\n".join([*head, "", *body]) + "\n"


def rich_view(plan: Plan) -> RenderableType:
    """The same for a terminal that has colours, to be printed by a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    for name, value in header(plan):
        # Text, never markup: a plan's strings are foreign.
        head.add_row(Text(name, style="bold"), Text(value))
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="dim")
    for layer in plan.layers:
        style = MODE_STYLES[layer.mode]
        cells = row(layer, plan.method.theta)
        styles = ("", style, "", "", "", "", style, "")
        table.add_row(
            *(Text(cell, style=cell_style, no_wrap=True) for cell, cell_style in zip(cells, styles, strict=True))
        )
    return Group(head, Text(), table)


def header(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of the lines above the layers."""
    model, method = plan.model, plan.method
    lines = [
        ("plan", f"{plan.short_id}, {plan.schema_}, made {plan.created_at} by flowmm {plan.flowmm_version}"),
        ("model", f"{model.source} ({model.architecture}, {model.dtype}, {model.attn_implementation})"),
        ("", f"{model.num_layers} layers, {model.num_attention_heads} heads, {model.num_kv_heads} KV heads"),
        ("calibration", _calibration(plan.calibration)),
        ("method", f"{method.preset}: {_decision(method)}, budget {method.budget:g}, flow {method.flow}"),
        ("", f"selector {method.selector}, proxies {method.proxies}, {_gate(method)}, merge {method.merge}"),
    ]
    lines += _budgets(plan) + _choices(plan)
    if plan.environment is not None:
        made = plan.environment
        lines.append(("made with", f"torch {made.torch}, transformers {made.transformers}, {made.device}"))
    return lines + [("" if number else "note", line) for number, line in enumerate(plan.note.splitlines())]


def _budgets(plan: Plan) -> list[tuple[str, str]]:
    if plan.budget_rule is not None:
        return [("budgets", f"by {plan.budget_rule}; other totals scale all layers alike")]
    if plan.sensitivity is not None and plan.allocations is not None:
        how = f"{plan.sensitivity.n_samples} prompts ({', '.join(plan.sensitivity.protocols)})"
        return [("budgets", f"measured jointly on {how}; other totals follow {len(plan.allocations)} allocations")]
    if plan.sensitivity is None or any(layer.curve is None for layer in plan.layers):
        return []
    how = f"{plan.sensitivity.n_samples} prompts ({', '.join(plan.sensitivity.protocols)})"
    return [("budgets", f"measured on {how}; other totals follow the curves")]


def _choices(plan: Plan) -> list[tuple[str, str]]:
    """One line per layer that has a choice, or that none was clear."""
    if plan.sensitivity is None or plan.sensitivity.budgets is None:
        return []
    at = ", ".join(f"{budget:g}" for budget in plan.sensitivity.budgets)
    chosen = [(layer.index, layer.choice) for layer in plan.layers if layer.choice is not None]
    where = f"measured on {plan.sensitivity.n_samples} prompts at budgets {at}"
    if not chosen:
        return [("choices", f"{where}: none is clearly better than the method's parameters")]
    return [("choices", where)] + [
        ("", f"layer {index}: {choice}; next-token KL {choice.cost[0]:.3g} -> {choice.cost[1]:.3g}")
        for index, choice in chosen
    ]


def _gate(method: MethodParameters) -> str:
    return f"tau {method.tau}" if method.gate else "no gate"


def _decision(method: MethodParameters) -> str:
    if method.rho_kind == "lift":
        return "cross-modal above lift 1"
    return f"theta {method.theta:g}" + ("" if method.rho_kind == "raw" else f" for {method.rho_kind} rho")


def _calibration(calibration: CalibrationFingerprint | None) -> str:
    if calibration is None:
        return "none: nothing was measured"
    tokens = calibration.tokens
    return (
        f"{calibration.n_samples} prompts of {calibration.source}, seed {calibration.seed}: "
        f"{tokens.total_min}-{tokens.total_max} tokens (mean {tokens.total_mean:g}), "
        f"{tokens.visual_share_mean:.0%} visual, {tokens.images_mean:g} images"
        + (f"; {calibration.n_skipped} more could not be read" if calibration.n_skipped else "")
    )


def row(layer: LayerPlan, theta: float) -> tuple[str, ...]:
    """Cells of one layer, one per column of :data:`COLUMNS`; ``-`` for what is not known."""
    mode = f"{layer.mode} (forced)" if layer.forced else layer.mode
    rho = layer.rho
    if rho is None:
        return (str(layer.index), bar(None, theta), "-", "-", "-", "-", mode, f"{layer.budget:.3f}")
    return (
        str(layer.index),
        bar(rho.mean, theta),
        f"{rho.mean:.3f} ± {rho.std:.3f}",
        "-" if rho.lift_mean is None else f"{rho.lift_mean:.2f}",
        "-" if rho.margin is None else f"{rho.margin:.1f}",
        "-" if rho.agree is None else f"{rho.agree:.0%}",
        mode,
        f"{layer.budget:.3f}",
    )


def bar(share: float | None, theta: float) -> str:
    """`share` of 0 to 1 in :data:`BAR_WIDTH` cells, by eighths, with a mark at the cell border next to theta."""
    eighths = 0 if share is None else round(share * BAR_WIDTH * 8)
    cells = "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")
    cells = cells.ljust(BAR_WIDTH, "·")
    border = round(theta * BAR_WIDTH)
    return f"{cells[:border]}│{cells[border:]}"
