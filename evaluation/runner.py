"""Run a grid: cases x protocols x methods x budgets, one prefill per case and protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flowmm
from flowmm.errors import InputError
from flowmm.evaluation.decoding import answer_greedily, divergence, feed, reading_caches
from flowmm.evaluation.methods import FULL, Method
from flowmm.evaluation.prefill import Prefill, prefill
from flowmm.evaluation.protocols import PROTOCOLS, Trial, build_trial
from flowmm.evaluation.records import Key, Row, RowStore, row_key
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel
from flowmm.plans import Plan
from flowmm.runtime import FlowCache

# Caches decoded together: more rows save forward calls, and copy more memory in each.
ROWS_PER_BATCH = 16
# Tokens of the full cache's answer that an unlabelled prompt is compared on.
FIDELITY_TOKENS = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """One method at one budget (a ratio; 1 for the full cache)."""

    method: Method
    budget: float


@dataclass(frozen=True)
class Grid:
    """What to measure on every case."""

    methods: tuple[Method, ...]
    budgets: tuple[float, ...]
    protocols: tuple[str, ...]

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"budget {budget}: expected a ratio in (0, 1]")

    def cells(self) -> list[Cell]:
        """Neighbours have equal budgets, hence caches of about equal size; the full cache is one cell."""
        full = [Cell(method, 1.0) for method in self.methods if method.parameters is None]
        compressed = [method for method in self.methods if method.parameters is not None]
        return full + [Cell(method, budget) for budget in sorted(self.budgets) for method in compressed]


def evaluate(
    model: LoadedModel,
    plan: Plan,
    cases: Sequence[Case],
    grid: Grid,
    *,
    store: RowStore | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measure every cell of a grid on every case.

    Args:
        model: loaded with sdpa or eager attention.
        plan: modes and relative budgets of the layers.
        cases: from one suite.
        grid: methods, budgets, protocols.
        store: keeps finished rows on disk and knows those of an interrupted run.
        progress: called with (finished, total) after every case and protocol.

    Returns:
        The grid's rows, case by case; those that were on disk are not measured again.

    Raises:
        PlanMismatchError: the plan was made for another architecture.
        InputError: a protocol that a case does not fit, or rows of another model on disk.
    """
    plan.check_model(model.fingerprint())
    finished = {} if store is None else store.load()
    cells, units = grid.cells(), [(case, protocol) for case in cases for protocol in grid.protocols]
    rows: list[Row] = []
    try:
        for done, (case, protocol) in enumerate(units, start=1):
            keys = {cell: _key(case, protocol, cell) for cell in cells}
            missing = [cell for cell in cells if keys[cell] not in finished]
            measured = _measure(model, plan, case, protocol, missing) if missing else []
            if store is not None:
                store.add(measured)
            finished |= {row.key: row for row in measured}
            rows += [finished[keys[cell]] for cell in cells]
            if progress is not None:
                progress(done, len(units))
    finally:
        if store is not None:
            store.flush()
    if store is not None:
        store.finish()
    return rows


def identity_of(model: LoadedModel, plan: Plan) -> dict[str, str]:
    """What measured rows depend on beside their key: weights, layer modes and budgets, flowmm's version."""
    layers = json.dumps([[layer.mode, layer.budget] for layer in plan.layers])
    return {
        "model": model.fingerprint().model_dump_json(),
        "plan": hashlib.sha256(layers.encode()).hexdigest(),
        "flowmm": flowmm.__version__,
    }


def _key(case: Case, protocol: str, cell: Cell) -> Key:
    place = (case.suite, case.split, case.task, case.seed, case.index)
    return row_key(place, protocol, cell.method.name, cell.method.digest, cell.budget)


def _measure(model: LoadedModel, plan: Plan, case: Case, protocol: str, cells: Sequence[Cell]) -> list[Row]:
    trial = build_trial(model, case, protocol)
    bench = _Bench(model, plan, case, protocol, trial, prefill(model.model, trial))
    with reading_caches(model.model):
        return bench.answers(cells) if case.answer is not None else bench.fidelity(cells)


@dataclass(frozen=True)
class _Bench:
    """One prefilled prompt, on which cells are measured."""

    model: LoadedModel
    plan: Plan
    case: Case
    protocol: str
    trial: Trial
    prefilled: Prefill

    @property
    def positions(self) -> Tensor:
        """``[3, 1, q]`` of the continuation."""
        return self.trial.positions[..., self.trial.prompt_length :]

    def batches(self, cells: Sequence[Cell]) -> Iterator[tuple[Sequence[Cell], list[FlowCache]]]:
        """Compressed cells, with their caches, as many as are decoded together."""
        compressed = [cell for cell in cells if cell.method.parameters is not None]
        for start in range(0, len(compressed), ROWS_PER_BATCH):
            chunk = compressed[start : start + ROWS_PER_BATCH]
            caches = [
                self.prefilled.cache(self.plan, parameters, cell.budget)
                for cell in chunk
                if (parameters := cell.method.parameters) is not None
            ]
            yield chunk, caches

    def answers(self, cells: Sequence[Cell]) -> list[Row]:
        """Exact match of the greedy answer, and fidelity at its first position."""
        expected = self.case.answer or ""
        # One token more than the right answer decides an exact match: the last must end the turn.
        steps = len(self.model.tokenizer(expected)["input_ids"]) + 1
        decoder, continuation = self.model.model, self.trial.continuation
        reference = answer_greedily(decoder, self.prefilled.full_cache(), continuation, self.positions, steps)
        rows = self._full_row(cells, self._text(reference.tokens[0]), expected)
        for chunk, caches in self.batches(cells):
            asked = continuation.expand(len(caches), -1)
            decoded = answer_greedily(decoder, FlowCache.stack(caches), asked, self.positions, steps)
            losses = divergence(reference.logits, decoded.logits).tolist()
            agree = (reference.logits.argmax(-1) == decoded.logits.argmax(-1)).double().tolist()
            texts = [self._text(tokens) for tokens in decoded.tokens]
            measured = zip(chunk, caches, texts, losses, agree, strict=True)
            rows += [
                self._row(cell, _size(cache), text, expected, kl, same) for cell, cache, text, kl, same in measured
            ]
        return rows

    def fidelity(self, cells: Sequence[Cell]) -> list[Row]:
        """Next-token KL and top-1 agreement along the full cache's own greedy answer, fed to every cell alike."""
        decoder, continuation = self.model.model, self.trial.continuation
        reference = answer_greedily(decoder, self.prefilled.full_cache(), continuation, self.positions, FIDELITY_TOKENS)
        answer = reference.tokens[0, : self._length(reference.tokens[0]) + 1]
        count, text = len(answer), self._text(reference.tokens[0])
        forced = torch.cat([continuation, answer[None, :-1]], dim=1)
        first = self.positions[..., :1]
        positions = first + torch.arange(forced.shape[1], device=first.device)
        wanted = feed(decoder, self.prefilled.full_cache(), forced, positions, keep=count)
        rows = self._full_row(cells, text, text)
        for chunk, caches in self.batches(cells):
            logits = feed(decoder, FlowCache.stack(caches), forced.expand(len(caches), -1), positions, keep=count)
            losses = divergence(wanted, logits).mean(-1).tolist()
            same = (wanted.argmax(-1) == logits.argmax(-1)).double().mean(-1).tolist()
            texts = [self._text(tokens) for tokens in logits.argmax(-1)]
            measured = zip(chunk, caches, texts, losses, same, strict=True)
            rows += [self._row(cell, _size(cache), said, text, kl, agree) for cell, cache, said, kl, agree in measured]
        return rows

    def _full_row(self, cells: Sequence[Cell], text: str, expected: str) -> list[Row]:
        size = (float(self.trial.prompt_length), self.prefilled.full_bytes)
        asked = [cell for cell in cells if cell.method.name == FULL]
        return [self._row(cell, size, text, expected, 0.0, 1.0) for cell in asked]

    def _row(self, cell: Cell, size: tuple[float, int], text: str, expected: str, kl: float, agreement: float) -> Row:
        case, (kept, nbytes) = self.case, size
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
            correct=None if case.answer is None else text == expected,
            text=text,
            expected=expected,
            tokens=self.trial.prompt_length,
            kept=kept,
            bytes=nbytes,
            full_bytes=self.prefilled.full_bytes,
            kl=kl,
            agreement=agreement,
        )

    def _length(self, tokens: Tensor) -> int:
        """Tokens in front of the one that ends the turn."""
        ends = self.model.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return next((place for place, token in enumerate(tokens.tolist()) if token in ends), len(tokens))

    def _text(self, tokens: Tensor) -> str:
        # Special tokens stay: an answer is not right because it is followed by a stray marker.
        return str(self.model.tokenizer.decode(tokens[: self._length(tokens)])).strip()


def _size(cache: FlowCache) -> tuple[float, int]:
    """Entries per KV head, mean over layers, and bytes."""
    return sum(layer.kept for layer in cache.states) / len(cache.states), cache.nbytes
