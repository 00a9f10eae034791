"""The catalogue as ``flowmm models`` prints it: a table to read, or objects for other programs. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flowmm.models.catalogue import ModelCard, known_models

_HEADINGS = ("model", "repository", "layers", "KV heads", "KV of 1k tokens", "note")


def as_objects() -> list[dict[str, Any]]:
    """One JSON-ready object per known model; ``kv_bytes_per_1k_tokens`` is for 1000 tokens in bf16."""
    return [asdict(card) | {"kv_bytes_per_1k_tokens": card.kv_bytes(1000)} for card in known_models()]


def as_table() -> str:
    """One line per known model under a heading, columns aligned."""
    rows = [_HEADINGS, *(_row(card) for card in known_models())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _row(card: ModelCard) -> tuple[str, ...]:
    size = card.kv_bytes(1000)
    return (
        ", ".join(card.aliases),
        "embedded" if card.embedded else card.source,
        _cell(card.num_layers),
        _cell(card.num_kv_heads),
        "-" if size is None else f"{size / 1e6:.1f} MB",
        card.note,
    )


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)
