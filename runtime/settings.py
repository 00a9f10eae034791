"""What is decided about a prompt before its first layer runs: settings, entries per layer, and the rows asked for."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.plans import MethodParameters, Mode
from flowmm.plans.method import MASS_RULES, parse_rule, parse_selector
from flowmm.runtime.budgets import Entries
from flowmm.runtime.compression import MergeOperation
from flowmm.runtime.flow import RowSample
from flowmm.runtime.importance import spread_rows
from flowmm.runtime.online import OnlineCheck
from flowmm.runtime.prompt import PromptLayout, Proxies, find_proxies
from flowmm.runtime.report import PrefillRecord


@dataclass(frozen=True)
class CompressionSettings:
    """What a cache needs to know to compress any prompt.

    Attributes:
        method: all options of the algorithm.
        modes: planned mode of each layer.
        entries: how many entries each layer keeps of a prompt of some length.
        check: online comparison of rho with the plan, or ``None``.
        rho_rows: rows per modality sampled where rho is measured online.
        seed: of the row sample.
        recompress_every: tokens after which a conversation is compressed again to its budget; ``None``: never.
        layer_methods: options of each layer where they differ from `method`; empty: they differ in none.
        visual_ids: tokens that stand for visual features.
        operation: merges each layer of a prompt in one go; ``None``: step by step.
    """

    method: MethodParameters
    modes: tuple[Mode, ...]
    entries: Entries
    check: OnlineCheck | None = None
    rho_rows: int = 128
    seed: int = 0
    recompress_every: int | None = None
    layer_methods: tuple[MethodParameters, ...] = ()
    visual_ids: tuple[int, ...] = ()
    operation: MergeOperation | None = None

    def method_of(self, layer: int) -> MethodParameters:
        """Options of one layer."""
        return self.layer_methods[layer] if self.layer_methods else self.method

    @property
    def methods(self) -> tuple[MethodParameters, ...]:
        """Options in use in some layer."""
        return self.layer_methods or (self.method,)

    @property
    def measures_rho(self) -> bool:
        """Whether rho of each prompt is measured."""
        return self.check is not None or "online" in self.modes


def _column_mean_rows(method: MethodParameters) -> list[int | None]:
    """Numbers of rows (``None``: all) that the method's column means are taken over."""
    rules = [*parse_selector(method.selector), parse_rule(method.mass, MASS_RULES)]
    return [None if number is None else int(number) for name, number in rules if name == "column_mean"]


@dataclass(frozen=True)
class RememberedRows:
    """Queries that a prompt's compression will ask for, kept until its last chunk has come.

    Attributes:
        columns: ascending, on the host.
        queries: per layer, those seen so far, ``[B, Hq, r, D]`` each.
    """

    columns: tuple[int, ...]
    queries: tuple[list[Tensor], ...]

    @classmethod
    def of(
        cls,
        layout: PromptLayout,
        proxies: Proxies,
        rho_rows: RowSample | None,
        settings: CompressionSettings,
    ) -> Self:
        """Proxies, the row sample, and the rows whose attention a column mean is taken over."""
        wanted = torch.zeros_like(layout.valid[0])
        wanted[proxies.index.flatten()] = True
        if rho_rows is not None:
            wanted[rho_rows.index.flatten()] = True
        for rows in {rows for method in settings.methods for rows in _column_mean_rows(method)}:
            index, _ = spread_rows(layout, rows)
            wanted[index.flatten()] = True
        return cls(tuple(wanted.nonzero().flatten().tolist()), tuple([] for _ in settings.modes))

    def remember(self, layer: int, query: Tensor, start: int) -> None:
        """Keep what will be asked for of the rows ``start, start + 1, ...`` in `query` ``[B, Hq, q, D]``."""
        first, last = (bisect_left(self.columns, column) for column in (start, start + query.shape[2]))
        columns = torch.tensor(self.columns[first:last], device=query.device) - start
        self.queries[layer].append(query.index_select(2, columns.long()))

    def recall(self, layer: int, width: int) -> Tensor:
        """``[B, Hq, width, D]`` with the kept rows in their places and zeros elsewhere; they are kept no longer."""
        rows = torch.cat(self.queries[layer], dim=2)
        self.queries[layer].clear()
        query = rows.new_zeros(*rows.shape[:2], width, rows.shape[3])
        return query.index_copy_(2, torch.tensor(self.columns, device=rows.device), rows)


@dataclass(frozen=True)
class Prompt:
    """One batch of prompts and what was decided for it before its first layer ran.

    Attributes:
        layout: modality, padding, lengths.
        proxies: rows that give importance.
        counts: per layer, the entries that each row keeps.
        whole: every layer keeps everything: the host's attention runs untouched.
        rho_rows: sampled visual and text rows for an online rho; ``None`` where none is measured.
        record: filled layer by layer.
        rows: columns whose queries must be remembered, because the prompt comes in several calls; ``None``: it comes
            in one.
    """

    layout: PromptLayout
    proxies: Proxies
    counts: tuple[tuple[int, ...], ...]
    whole: bool
    rho_rows: RowSample | None
    record: PrefillRecord
    rows: RememberedRows | None = None

    @classmethod
    def of(cls, layout: PromptLayout, settings: CompressionSettings, in_chunks: bool = False) -> Prompt:
        """Budgets, proxies and row sample of a prompt; `in_chunks`: its tokens come in several forward calls.

        Raises:
            InputError: a row holds nothing but padding.
        """
        if min(layout.lengths) == 0:
            raise InputError(f"row {layout.lengths.index(0)} of the batch holds nothing but padding")
        by_row = [settings.entries(length) for length in layout.lengths]
        counts = tuple(zip(*by_row, strict=True))
        proxies = find_proxies(layout, settings.method.proxies)
        rho_rows = RowSample.draw(layout, settings.rho_rows, settings.seed) if settings.measures_rho else None
        return cls(
            layout=layout,
            proxies=proxies,
            counts=counts,
            # What is compressed again later must not depend on the host's masks.
            whole=settings.recompress_every is None and all(layer == layout.lengths for layer in counts),
            rho_rows=rho_rows,
            record=PrefillRecord(layout.lengths, layers=[], findings=[], recompressions=[0] * len(settings.modes)),
            rows=RememberedRows.of(layout, proxies, rho_rows, settings) if in_chunks else None,
        )

    @property
    def width(self) -> int:
        """Columns of the prompt, padding included."""
        return self.layout.valid.shape[1]
