"""A grid of measurements over lengths and batches: written as it is measured, cut short honestly, taken up again.

A cell is one prompt length and one batch. Cells run from the cheapest on. One that would not end in time, or would not
fit into memory, is left out and named, so that nobody takes a part of the grid for the whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowmm.errors import InputError
from flowmm.models import text_config
from flowmm.models.random_weights import image_prompt
from flowmm.plans import Plan
from flowmm.plans.files import write_atomic
from flowmm.runtime.bench import Settings, bench
from flowmm.runtime.measurements import environment
from flowmm.runtime.roofline import MIB, Bandwidth, bytes_per_token, entry_bytes, linear_layers

# Must agree for results of different days to stand in one file.
SAME = ("machine", "device", "threads", "torch", "transformers", "flowmm")

Cell = tuple[int, int]
"""Tokens and rows of a prompt."""


@dataclass(frozen=True)
class Limits:
    """When to stop: ``minutes`` for all cells together, ``gib`` for the caches of a cell; None: no limit."""

    minutes: float | None = None
    gib: float | None = None


def cells(tokens: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """All combinations, the cheapest first."""
    return sorted(((length, batch) for length in tokens for batch in batches), key=_work)


def _work(cell: Cell) -> int:
    # Attention of a prompt; an upper bound for how cost grows.
    tokens, batch = cell
    return tokens * tokens * batch


def run_grid(
    model: Any,
    wanted: Sequence[Cell],
    settings: Settings,
    *,
    plan: Plan | None = None,
    limits: Limits | None = None,
    out: Path | None = None,
    resume: bool = False,
    note: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the cells and describe them, JSON-ready.

    Args:
        wanted: of :func:`cells`.
        out: written after every cell.
        resume: keep the cells that `out` already holds.
        progress: told a line per cell.

    Raises:
        InputError: `out` holds results that cannot stand beside new ones.
    """
    limits = limits or Limits()
    bandwidth = Bandwidth(model.device)
    result = _described(model, settings, bandwidth, note)
    if resume and out is not None and out.exists():
        _take_over(result, out)
    done = {(cell["tokens"], cell["batch"]) for cell in result["cells"]}
    began, rate = time.perf_counter(), 0.0
    for cell in wanted:
        if cell in done:
            continue
        reason = _refusal(model, cell, settings, limits, time.perf_counter() - began, rate)
        start = time.perf_counter()
        if reason is None:
            reason = _measure(model, cell, settings, plan, bandwidth, result)
        seconds = time.perf_counter() - start
        tokens, batch = cell
        if reason is None:
            rate = seconds / _work(cell)
            result["cells"].append({"tokens": tokens, "batch": batch, "seconds": round(seconds, 1)})
        else:
            result["not_measured"].append({"tokens": tokens, "batch": batch, "reason": reason})
        progress(f"{tokens} tokens x {batch}: {f'{seconds:.0f} s' if reason is None else f'left out, {reason}'}")
        result["bandwidth"] = bandwidth.describe()
        if out is not None:
            write_atomic(out, json.dumps(result, indent=1) + "\n")
    return result


def _described(model: Any, settings: Settings, bandwidth: Bandwidth, note: str) -> dict[str, Any]:
    text = text_config(model.config)
    return {
        "environment": environment(note),
        "model": {
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "bytes_per_token": bytes_per_token(model),
        },
        "settings": _plain(asdict(settings)),
        "linear_layers": _plain(linear_layers(model, bandwidth)),
        "bandwidth": bandwidth.describe(),
        "cells": [],
        "not_measured": [],
        "rows": [],
    }


def _plain(value: Any) -> Any:
    """Tuples as lists and floats to six digits: what comes back from a JSON file."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _take_over(result: dict[str, Any], path: Path) -> None:
    """Begin with what `path` holds.

    Raises:
        InputError: not results of this bench, or of other weights, settings or another machine.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        held = {name: earlier[name] for name in ("environment", "model", "settings", "cells", "rows")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: holds no results to resume ({error}); write elsewhere or without --resume"
        ) from error
    found = [name for name in ("model", "settings") if held[name] != result[name]]
    found += [name for name in SAME if held["environment"].get(name) != result["environment"][name]]
    if found:
        raise InputError(
            f"{path}: measured with another {', '.join(found)}; expected the same for all rows of a file; "
            "write elsewhere or without --resume"
        )
    result["cells"], result["rows"] = held["cells"], held["rows"]


def _refusal(model: Any, cell: Cell, settings: Settings, limits: Limits, spent: float, rate: float) -> str | None:
    """Why a cell is not even begun."""
    if limits.minutes is not None and spent + rate * _work(cell) > limits.minutes * 60:
        return f"it would not have ended within the {limits.minutes:g} minutes of this run"
    needed = _cache_bytes(model, cell, settings) / 1024 / MIB
    if limits.gib is not None and needed > limits.gib:
        return f"its caches need {needed:.1f} GiB of the {limits.gib:g} allowed"
    return None


def _cache_bytes(model: Any, cell: Cell, settings: Settings) -> float:
    """Bytes of all caches of a cell, which are held at a time, and a full one for the prefill under way."""
    tokens, batch = cell
    full = tokens * batch * entry_bytes(model) * text_config(model.config).num_hidden_layers
    plain = sum(not kind.startswith("flowmm") for kind in settings.caches)
    ours = (len(settings.caches) - plain) * len(settings.methods) * sum(settings.budgets)
    return full * (1 + plain + ours)


def _measure(
    model: Any, cell: Cell, settings: Settings, plan: Plan | None, bandwidth: Bandwidth, result: dict[str, Any]
) -> str | None:
    """Add the rows of a cell to `result`, or say why there are none."""
    tokens, batch = cell
    try:
        rows = bench(model, image_prompt(model, tokens, batch), settings, plan=plan, bandwidth=bandwidth)
    except RuntimeError as error:
        # A GPU says so by type, a CPU in words.
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        return "out of memory"
    result["rows"] += [_plain(asdict(row)) for row in rows]
    return None


COLUMNS = (
    "cache",
    "tokens",
    "batch",
    "prefill",
    "ratio",
    "range",
    "cpu",
    "TTFT",
    "token",
    "ratio",
    "range",
    "cpu",
    "/ roofline",
    "paired",
    "KV MiB",
    "contract",
    "peak MiB",
    "layers",
    "compile",
)


def table(result: dict[str, Any]) -> str:
    """The results for a terminal, with what was not measured below."""
    lines = [COLUMNS, *(_line(row) for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    read = result["bandwidth"]
    shown += ["", f"memory is read at {read['gb_s']} GB/s at best, {read['median_gb_s']} GB/s in the median"]
    linear = result["linear_layers"]
    alone = f"{linear['token_s'] * 1e3:.2f} ms, {linear['roofline_ratio']:.2f} x roofline"
    shown += [f"a token's linear layers alone, uncompiled: {alone}"]
    shown += [
        f"not measured: {cell['tokens']} tokens x {cell['batch']}: {cell['reason']}" for cell in result["not_measured"]
    ]
    return "\n".join(shown)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    compiling = [row[name] for name in ("compile_prefill_s", "compile_token_s") if row[name] is not None]
    return (
        row_name(row),
        str(row["tokens"]),
        str(row["batch"]),
        f"{row['prefill_s']['median'] * 1e3:.0f} ms",
        *_ratio_cells(row["prefill_ratio"], row["prefill_cpu_ratio"]),
        f"{row['ttft_s']['median'] * 1e3:.0f} ms",
        f"{row['token_s']['median'] * 1e3:.2f} ms",
        *_ratio_cells(row["token_ratio"], row["token_cpu_ratio"]),
        f"{row['roofline_ratio']:.2f}",
        f"{row['roofline_paired']['median']:.2f}",
        f"{row['prompt_bytes'] / MIB:.2f}",
        f"{row['prompt_bytes'] / row['contract_bytes']:.4f}",
        f"{row['peak_bytes'] / MIB:.1f}",
        f"{row['peak_over_dynamic_layers']:+.2f}",
        f"{sum(compiling):.1f} s" if compiling else "-",
    )


def _ratio_cells(ratio: dict[str, float], cpu: dict[str, float] | None) -> tuple[str, str, str]:
    spread = f"{ratio['least']:.2f}-{ratio['greatest']:.2f}"
    return f"{ratio['median']:.3f}", spread, "-" if cpu is None else f"{cpu['median']:.3f}"


def row_name(row: dict[str, Any]) -> str:
    """Cache, method and budget in a few words."""
    parts = [row["cache"], row["method"], f"{row['budget']:g}" if row["cache"].startswith("flowmm") else None]
    return " ".join(part for part in (*parts, "compiled" if row["compiled"] else None) if part)
