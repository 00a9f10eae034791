"""What a run did, layer by layer, measured on the tensors it left behind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import Tensor

from flowmm.runtime.compression import CompressedLayer
from flowmm.runtime.flow import RhoEstimate


@dataclass(frozen=True)
class LayerRecord:
    """One layer's compression as tensors; reading them is left to the report, so prefill never waits for it."""

    index: int
    planned: str
    cross: Tensor
    rho: RhoEstimate | None
    counts: tuple[int, ...]
    kv_heads: int
    merged: Tensor | None
    protected: Tensor | None
    largest_group: Tensor | None
    bytes_before: int = 0
    bytes_after: int = 0

    @classmethod
    def of(
        cls,
        index: int,
        planned: str,
        cross: Tensor,
        rho: RhoEstimate | None,
        counts: tuple[int, ...],
        kv_heads: int,
        compressed: CompressedLayer | None,
    ) -> Self:
        """Summarise a compressed layer (``None``: it was left whole)."""
        merged = protected = largest = None
        if compressed is not None:
            merged, protected, largest = compressed.totals
        return cls(index, planned, cross, rho, counts, kv_heads, merged, protected, largest)

    def with_bytes(self, before: int, after: int) -> Self:
        return replace(self, bytes_before=before, bytes_after=after)


@dataclass
class PrefillRecord:
    """Everything kept about one prefill; holds no keys or values.

    ``recompressions`` counts, per layer, how often the conversation was compressed again since.
    """

    lengths: tuple[int, ...]
    layers: list[LayerRecord]
    findings: list[str]
    recompressions: list[int]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a report. Entries are summed over batch rows and KV heads, so
    ``entries_before == entries_after + merged + dropped``.

    ``protected`` counts pivots that may not absorb (forced, or importance above tau); ``mode`` is "mixed" when rows of
    a batch differ; ``rho`` and ``rho_standard_error`` hold one value per row, or ``None`` where nothing was measured.
    """

    index: int
    mode: str
    planned: str
    entries_before: int
    entries_after: int
    merged: int
    dropped: int
    protected: int
    largest_group: int
    bytes_before: int
    bytes_after: int
    rho: list[float] | None
    rho_standard_error: list[float] | None


@dataclass(frozen=True)
class RunReport:
    """What happened to one prompt (or batch of prompts) in its prefill.

    ``full_tokens`` is the prompt's length summed over rows; ``kept_tokens`` the mean over layers of what was kept.
    ``findings`` lists every layer whose online rho left the plan. ``recompressions`` says how often each layer was
    compressed again after the prefill, which the other numbers do not describe.
    """

    full_tokens: int
    kept_tokens: float
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport]
    findings: list[str]
    recompressions: list[int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        kept = self.kept_tokens / self.full_tokens
        modes = {mode: sum(layer.mode == mode for layer in self.layers) for mode in ("cross", "intra", "mixed")}
        shown = ", ".join(f"{count} {mode}" for mode, count in modes.items() if count)
        return (
            f"{self.full_tokens} -> {self.kept_tokens:g} entries per layer ({kept:.1%}), "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, layers: {shown}"
        )


def build_report(record: PrefillRecord) -> RunReport:
    """Read the tensors of a record (one device transfer per layer)."""
    layers = [_layer_report(layer, record.lengths) for layer in record.layers]
    kept = sum(sum(layer.counts) for layer in record.layers) / max(len(record.layers), 1)
    return RunReport(
        full_tokens=sum(record.lengths),
        kept_tokens=kept,
        bytes_before=sum(layer.bytes_before for layer in layers),
        bytes_after=sum(layer.bytes_after for layer in layers),
        layers=layers,
        findings=list(record.findings),
        recompressions=list(record.recompressions),
    )


def _layer_report(layer: LayerRecord, lengths: tuple[int, ...]) -> LayerReport:
    before, after = layer.kv_heads * sum(lengths), layer.kv_heads * sum(layer.counts)
    merged = 0 if layer.merged is None else int(layer.merged)
    cross = layer.cross.tolist()
    return LayerReport(
        index=layer.index,
        mode="cross" if all(cross) else "mixed" if any(cross) else "intra",
        planned=layer.planned,
        entries_before=before,
        entries_after=after,
        merged=merged,
        dropped=before - after - merged,
        protected=0 if layer.protected is None else int(layer.protected),
        largest_group=0 if layer.largest_group is None else int(layer.largest_group),
        bytes_before=layer.bytes_before,
        bytes_after=layer.bytes_after,
        rho=None if layer.rho is None else layer.rho.rho.tolist(),
        rho_standard_error=None if layer.rho is None else layer.rho.standard_error.tolist(),
    )
