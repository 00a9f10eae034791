"""One prefilled prompt, on which every method and budget is measured against the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowmm.evaluation.attention_error import attention_errors, recording
from flowmm.evaluation.methods import Method
from flowmm.evaluation.plan_kinds import followed_by, plan_of_kind
from flowmm.evaluation.records import Row
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel
from flowmm.plans import MethodParameters, Plan
from flowmm.runtime import FlowCache
from flowmm.runtime.replay import Prefill, Trial, answer_greedily, divergence, feed, length_of_turn
from flowmm.runtime.settings import CompressionSettings

# Caches decoded together: more rows save forward calls, and copy more memory in each.
ROWS_PER_BATCH = 16
# Tokens of the full cache's answer that an unlabelled prompt is compared on.
FIDELITY_TOKENS = 16


@dataclass(frozen=True)
class Cell:
    """One method at one budget (a ratio; 1 for the full cache)."""

    method: Method
    budget: float


@dataclass(frozen=True)
class Size:
    """Entries per KV head, mean over layers, and bytes of a compressed prompt."""

    kept: float
    nbytes: int

    @classmethod
    def of(cls, cache: FlowCache) -> Size:
        return cls(sum(layer.kept for layer in cache.states) / len(cache.states), cache.nbytes)


@dataclass(frozen=True)
class Outcome:
    """What a cache answered, and how far it is from the full cache; see :class:`Row`."""

    text: str
    kl: float
    agreement: float
    attention_error: tuple[float, ...] | None = None


Reader = Callable[[FlowCache, int], list[Outcome]]
"""From a stacked cache and its number of rows to one outcome per row."""


@dataclass(frozen=True)
class Bench:
    """A case under a protocol, prefilled. Use inside :func:`flowmm.runtime.replay.reading_caches`."""

    model: LoadedModel
    plan: Plan
    case: Case
    protocol: str
    trial: Trial
    prefilled: Prefill

    def measure(self, cells: Sequence[Cell]) -> list[Row]:
        """One row per cell."""
        full, read = self._forced_reader() if self.case.answer is None else self._greedy_reader()
        expected = full.text if self.case.answer is None else self.case.answer
        whole = Size(float(self.trial.prompt_length), self.prefilled.full_bytes)
        rows = [self._row(cell, whole, full, expected) for cell in cells if cell.method.parameters is None]
        for chunk, sizes, stacked in self._batches(cells):
            measured = zip(chunk, sizes, read(stacked, len(chunk)), strict=True)
            rows += [self._row(cell, size, outcome, expected) for cell, size, outcome in measured]
        return rows

    def _batches(self, cells: Sequence[Cell]) -> Iterator[tuple[Sequence[Cell], list[Size], FlowCache]]:
        """Compressed cells, what each keeps, and their caches as one batch, as many as are decoded together."""
        made = [
            (
                cell,
                self.prefilled.cache(self._settings(cell, parameters)),
            )
            for cell in cells
            if (parameters := cell.method.parameters) is not None
        ]
        for start in range(0, len(made), ROWS_PER_BATCH):
            chunk, caches = zip(*made[start : start + ROWS_PER_BATCH], strict=True)
            sizes = [Size.of(cache) for cache in caches]
            ready = [self.prefilled.hide_last(cache, self.trial.fed_again) for cache in caches]
            yield chunk, sizes, FlowCache.stack(ready)

    def _settings(self, cell: Cell, parameters: MethodParameters) -> CompressionSettings:
        kind, name = cell.method.kind, cell.method.name
        if name not in self._plans:
            self._plans[name] = followed_by(parameters, self.plan if kind is None else plan_of_kind(kind, self.plan))
        return self.prefilled.settings(self._plans[name], parameters, cell.budget)

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        """By method."""
        return {}

    def _full_cache(self) -> FlowCache:
        """The full cache, ready to be fed the continuation."""
        return self.prefilled.hide_last(self.prefilled.full_cache(), self.trial.fed_again)

    def _greedy_reader(self) -> tuple[Outcome, Reader]:
        """The full cache's greedy answer; fidelity at the first answer position."""
        host, ids, positions = self.model.model, self.trial.continuation, self.trial.positions
        # One token more than the right answer decides an exact match: the last must end the turn.
        steps = len(self.model.tokenizer(self.case.answer)["input_ids"]) + 1
        full = answer_greedily(host, self._full_cache(), ids, positions, steps)

        def read(stacked: FlowCache, rows: int) -> list[Outcome]:
            decoded = answer_greedily(host, stacked, ids.expand(rows, -1), positions, steps)
            return self._outcomes(decoded.tokens, full.logits[:, None], decoded.logits[:, None])

        return Outcome(self._text(full.tokens[0]), 0.0, 1.0), read

    def _forced_reader(self) -> tuple[Outcome, Reader]:
        """The full cache's greedy answer, fed to every cache alike; fidelity as the mean over its positions."""
        host, ids, positions = self.model.model, self.trial.continuation, self.trial.positions
        tokens = answer_greedily(host, self._full_cache(), ids, positions, FIDELITY_TOKENS).tokens[0]
        count = min(length_of_turn(self.model.model, tokens) + 1, FIDELITY_TOKENS)
        forced = torch.cat([ids, tokens[None, : count - 1]], dim=1)
        places = positions[..., :1] + torch.arange(forced.shape[1], device=positions.device)
        whole = self._full_cache()
        with recording(host, whole) as asked:
            wanted = feed(host, whole, forced, places, keep=count)

        def read(stacked: FlowCache, rows: int) -> list[Outcome]:
            # Before the cache is fed: afterwards it holds entries that inherited errors.
            errors = attention_errors(asked, stacked, count).tolist()
            logits = feed(host, stacked, forced.expand(rows, -1), places, keep=count)
            outcomes = self._outcomes(logits.argmax(-1), wanted, logits)
            return [
                replace(outcome, attention_error=tuple(error)) for outcome, error in zip(outcomes, errors, strict=True)
            ]

        return Outcome(self._text(tokens), 0.0, 1.0, (0.0,) * len(asked)), read

    def _outcomes(self, tokens: Tensor, wanted: Tensor, logits: Tensor) -> list[Outcome]:
        """Outcomes of rows from tokens ``[R, T]`` and logits ``[1, P, V]`` (full cache) and ``[R, P, V]``."""
        losses = divergence(wanted, logits).mean(-1).tolist()
        agreements = (wanted.argmax(-1) == logits.argmax(-1)).double().mean(-1).tolist()
        return [Outcome(self._text(row), *rest) for row, *rest in zip(tokens, losses, agreements, strict=True)]

    def _row(self, cell: Cell, size: Size, outcome: Outcome, expected: str) -> Row:
        case = self.case
        return Row(
            suite=case.suite,
            split=case.split,
            task=case.task,
            seed=case.seed,
            index=case.index,
            protocol=self.protocol,
            method=cell.method.name,
            digest=cell.method.digest,
            budget=cell.budget,
            correct=None if case.answer is None else outcome.text == expected,
            text=outcome.text,
            expected=expected,
            tokens=self.trial.prompt_length,
            kept=size.kept,
            bytes=size.nbytes,
            full_bytes=self.prefilled.full_bytes,
            kl=outcome.kl,
            agreement=outcome.agreement,
            attention_error=outcome.attention_error,
        )

    def _text(self, tokens: Tensor) -> str:
        # Special tokens stay: an answer is not right because it is followed by a stray marker.
        return str(self.model.tokenizer.decode(tokens[: length_of_turn(self.model.model, tokens)])).strip()
