"""Side-by-side measurements of prefill, decoding and memory: interleaved runs, medians with their spread.

Caches are compared on one model and one prompt. Prefills run in turns, and decoding goes on a few tokens at a time in
turns, so that other load on the machine falls on all alike; ratios are medians over pairs taken side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import flowmm
from flowmm.errors import InputError
from flowmm.models import fingerprint_model, text_config
from flowmm.plans import Plan, unprofiled_plan
from flowmm.runtime.attention import attached
from flowmm.runtime.budgets import planned_entries
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.compiled import decoding_config
from flowmm.runtime.context import compress
from flowmm.runtime.host import offsets_of
from flowmm.runtime.measurements import CACHE_KINDS, CacheKind, Figure, Row
from flowmm.runtime.peak_memory import PeakMemory
from flowmm.runtime.roofline import Bandwidth, bytes_per_token, entry_bytes, wait_for
from flowmm.runtime.static_cache import StaticFlowCache
from flowmm.runtime.token_code import TokenCall

WARM_UP_TOKENS = 3
# Tokens of one cache in a row: most of them then find the processor's caches as an answer's own tokens leave them.
STRETCH = 4

BASELINE: CacheKind = "dynamic"
FIXED_SHAPE = ("static", "flowmm-static")


def fixed_plan(model: Any) -> Plan:
    """A plan whose layers' modes are decided beforehand, as a profiled model's are."""
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    layers = tuple(layer.model_copy(update={"mode": "cross", "forced": True}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


@dataclass(frozen=True)
class Settings:
    """What is compared on every prompt.

    Attributes:
        caches: kinds; ``dynamic`` is always there, because ratios are to it.
        budgets: shares kept by each flowmm cache.
        methods: presets of each flowmm cache; None: the plan's own.
        rounds: prefills of each cache that are counted; one more comes first, in which memory is measured.
        new_tokens: tokens decoded with each cache that are counted, after a few that are not.
        compiled: merge with compiled code, and decode with it from caches of fixed shape.
    """

    caches: tuple[CacheKind, ...] = ("dynamic", "static", "flowmm")
    budgets: tuple[float, ...] = (0.2, 1.0)
    methods: tuple[str | None, ...] = (None,)
    rounds: int = 5
    new_tokens: int = 32
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.new_tokens < 1:
            raise InputError(f"rounds={self.rounds}, new_tokens={self.new_tokens}: expected at least 1")
        unknown = set(self.caches) - set(CACHE_KINDS)
        if unknown:
            raise InputError(f"{', '.join(sorted(unknown))}: expected caches among {', '.join(CACHE_KINDS)}")
        object.__setattr__(self, "caches", (BASELINE, *(kind for kind in self.caches if kind != BASELINE)))


@torch.no_grad()
def bench(
    model: Any,
    inputs: dict[str, Tensor],
    settings: Settings | None = None,
    *,
    plan: Plan | None = None,
    bandwidth: Bandwidth | None = None,
) -> list[Row]:
    """Compare caches on one prompt (or batch).

    Args:
        plan: default :func:`fixed_plan`.
        bandwidth: a meter that earlier prompts used, too.
    """
    settings, plan = settings or Settings(), plan or fixed_plan(model)
    bandwidth = bandwidth or Bandwidth(model.device)
    contestants = _contestants(settings, plan)
    _prefill_in_turns(model, inputs, contestants, settings)
    sizes = [_Size.of(contestant.cache) for contestant in contestants]
    reads = _decode_in_turns(model, inputs, contestants, settings, bandwidth)
    return [
        _row(model, inputs, contestant, contestants[0], size, plan, bandwidth.best, reads)
        for contestant, size in zip(contestants, sizes, strict=True)
    ]


@dataclass
class _Contestant:
    """A cache under measurement and the times taken with it."""

    kind: CacheKind
    compiled: bool
    plan: Plan | None = None
    budget: float = 1.0
    method: str | None = None
    cache: Any = None
    next: Tensor | None = None
    prefills: list[float] = field(default_factory=list)
    prefills_cpu: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    tokens_cpu: list[float] = field(default_factory=list)
    peak: int = 0
    first_prefill_s: float = 0.0
    first_token_s: float = 0.0

    @contextmanager
    def reading(self, model: Any, inputs: dict[str, Tensor], room: int) -> Generator[None]:
        """Inside the block the model fills :attr:`cache`, which is fresh."""
        self.cache = None
        if self.plan is None:
            config, tokens = text_config(model.config), inputs["input_ids"].shape[1]
            static = self.kind == "static"
            self.cache = (
                StaticCache(config=config, max_cache_len=tokens + room) if static else DynamicCache(config=config)
            )
            yield
            return
        with compress(model, self.plan, budget=self.budget, method=self.method, compile=self.compiled) as run:
            self.cache = run.static_cache(room) if self.kind == "flowmm-static" else run.new_cache()
            with self.cache.prefill() if isinstance(self.cache, StaticFlowCache) else nullcontext():
                yield


def _contestants(settings: Settings, plan: Plan) -> list[_Contestant]:
    made = []
    for kind in settings.caches:
        if not kind.startswith("flowmm"):
            made.append(_Contestant(kind, settings.compiled and kind in FIXED_SHAPE))
            continue
        made += [
            _Contestant(kind, settings.compiled, plan, budget, method)
            for method in settings.methods
            for budget in settings.budgets
        ]
    return made


class _DecoderClock:
    """Seconds, and those of the processor, spent in the text layers of the latest forward call."""

    def __init__(self, model: Any) -> None:
        self._decoder, self._device = model.get_decoder(), model.device
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> _DecoderClock:
        self._handles = [
            self._decoder.register_forward_pre_hook(self._start, with_kwargs=True),
            self._decoder.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, *_: Any) -> None:
        wait_for(self._device)
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def _stop(self, *_: Any) -> None:
        wait_for(self._device)
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._began_cpu


def _prefill_in_turns(
    model: Any, inputs: dict[str, Tensor], contestants: Sequence[_Contestant], settings: Settings
) -> None:
    room = settings.new_tokens + WARM_UP_TOKENS + 1
    with _DecoderClock(model) as clock:
        for contestant in contestants:
            # What is compiled, or made once, is nobody's memory peak.
            if contestant.compiled and contestant.plan is not None:
                contestant.first_prefill_s = _prefill(model, inputs, contestant, room)
            contestant.cache = None
            with PeakMemory(model.device) as peak:
                _prefill(model, inputs, contestant, room)
            contestant.peak = peak.extra
        for turn in range(settings.rounds):
            for contestant in _rotated(contestants, turn):
                contestant.firsts.append(_prefill(model, inputs, contestant, room))
                contestant.prefills.append(clock.seconds)
                contestant.prefills_cpu.append(clock.cpu_seconds)


def _prefill(model: Any, inputs: dict[str, Tensor], contestant: _Contestant, room: int) -> float:
    """Seconds until the first token is on the host."""
    with contestant.reading(model, inputs, room):
        wait_for(model.device)
        start = time.perf_counter()
        logits = model(**inputs, past_key_values=contestant.cache, logits_to_keep=1).logits
        contestant.next = logits[:, -1:].argmax(-1)
        contestant.next.tolist()
        return time.perf_counter() - start


def _decode_in_turns(
    model: Any,
    inputs: dict[str, Tensor],
    contestants: Sequence[_Contestant],
    settings: Settings,
    bandwidth: Bandwidth,
) -> list[float]:
    """Decode; returns the bandwidth beside each token that counts."""

    def pick(kwargs: dict[str, Any]) -> FlowCache | None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StaticFlowCache):
            return cache
        if not isinstance(cache, FlowCache):
            return None
        cache.begin_token(kwargs["input_ids"])
        return cache

    batch, tokens = inputs["input_ids"].shape
    offsets, reads = offsets_of(model), []
    position = torch.full((batch, 1), tokens, device=model.device)
    if offsets is not None:
        # M-RoPE: temporal, height and width positions, the same for text.
        position = (position + offsets).expand(3, batch, 1)
    with attached(model, pick), _many_graphs():
        calls = _token_calls(model, contestants)
        for begin in range(0, settings.new_tokens + WARM_UP_TOKENS, STRETCH):
            steps = range(begin, min(begin + STRETCH, settings.new_tokens + WARM_UP_TOKENS))
            for contestant in _rotated(contestants, begin // STRETCH):
                for step in steps:
                    _decode(model, calls[id(contestant)], contestant, position, step)
            reads += [bandwidth.read() for step in steps if step >= WARM_UP_TOKENS]
    return reads


def _decode(model: Any, call: Callable[..., Any], contestant: _Contestant, prompt_end: Tensor, step: int) -> None:
    """Time a token, the `step`-th after the prompt's first."""
    if call is not model:
        # What an earlier graph left may be overwritten; otherwise every order of graphs is recorded anew.
        torch.compiler.cudagraph_mark_step_begin()
    wait_for(model.device)
    start, start_cpu = time.perf_counter(), time.process_time()
    output = call(input_ids=contestant.next, position_ids=prompt_end + step, past_key_values=contestant.cache)
    contestant.next = output.logits[:, -1:].argmax(-1)
    wait_for(model.device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    if step >= WARM_UP_TOKENS:
        contestant.tokens.append(seconds)
        contestant.tokens_cpu.append(cpu_seconds)
    elif step == 0:
        contestant.first_token_s = seconds


def _token_calls(model: Any, contestants: Sequence[_Contestant]) -> dict[int, Callable[..., Any]]:
    """What decodes a token of each contestant, by identity: the model, or the call ``compile_decoding=True`` makes."""
    calls: dict[int, Callable[..., Any]] = {id(contestant): model for contestant in contestants}
    compiling = [contestant for contestant in contestants if contestant.compiled and contestant.kind in FIXED_SHAPE]
    config = decoding_config(model.device) if compiling else None
    if config is None:
        return calls
    mode, options = config.mode, config.options
    compiled = torch.compile(model.__call__, fullgraph=True, dynamic=False, mode=mode, options=options)
    for contestant in compiling:
        kept = contestant.kind == "flowmm-static" and model.device.type == "cpu"
        calls[id(contestant)] = TokenCall(model, lambda: compiled) if kept else compiled
    return calls


@contextmanager
def _many_graphs() -> Generator[None]:
    """Every size of a cache makes a graph of its own here, more than torch holds to be healthy."""
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
        yield


def _rotated(contestants: Sequence[_Contestant], turn: int) -> list[_Contestant]:
    """Everyone goes first in turn."""
    first = turn % len(contestants)
    return [*contestants[first:], *contestants[:first]]


@dataclass(frozen=True)
class _Size:
    held: int
    reserved: int

    @classmethod
    def of(cls, cache: Any) -> _Size:
        """Bytes of a cache that holds a prompt."""
        if isinstance(cache, FlowCache):
            return cls(cache.nbytes, cache.reserved_bytes)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if isinstance(cache, StaticCache):
            filled = held * int(cache.get_seq_length()) // cache.get_max_length()
            return cls(filled, held - filled)
        return cls(held, 0)


def _row(
    model: Any,
    inputs: dict[str, Tensor],
    contestant: _Contestant,
    baseline: _Contestant,
    size: _Size,
    plan: Plan,
    best: float,
    reads: Sequence[float],
) -> Row:
    batch, tokens = inputs["input_ids"].shape
    entry = entry_bytes(model) * batch
    token = Figure.of(contestant.tokens)
    first = Figure.of(contestant.firsts)
    needed = bytes_per_token(model) + size.held
    entries = planned_entries(plan.layer_budgets, contestant.budget)(tokens)
    compiles_token = contestant.compiled and contestant.kind in FIXED_SHAPE
    compiles_prefill = contestant.compiled and contestant.plan is not None
    on_cpu = model.device.type == "cpu"
    return Row(
        tokens=tokens,
        batch=batch,
        cache=contestant.kind,
        method=contestant.method,
        budget=contestant.budget,
        compiled=contestant.compiled,
        prefill_s=Figure.of(contestant.prefills),
        prefill_ratio=_paired(contestant.prefills, baseline.prefills),
        ttft_s=first,
        ttft_ratio=_paired(contestant.firsts, baseline.firsts),
        token_s=token,
        token_ratio=_paired(contestant.tokens, baseline.tokens),
        prefill_cpu_ratio=_paired(contestant.prefills_cpu, baseline.prefills_cpu) if on_cpu else None,
        token_cpu_ratio=_paired(contestant.tokens_cpu, baseline.tokens_cpu) if on_cpu else None,
        tokens_per_s=batch / token.median,
        prompt_bytes=size.held,
        contract_bytes=sum(entries) * entry,
        reserved_bytes=size.reserved,
        peak_bytes=contestant.peak,
        peak_over_dynamic_layers=(contestant.peak - baseline.peak) / (tokens * entry),
        compile_prefill_s=max(0.0, contestant.first_prefill_s - first.median) if compiles_prefill else None,
        compile_token_s=max(0.0, contestant.first_token_s - token.median) if compiles_token else None,
        roofline_s=needed / best,
        roofline_ratio=token.median * best / needed,
        roofline_paired=Figure.of([a * b / needed for a, b in zip(contestant.tokens, reads, strict=True)]),
    )


def _paired(values: Sequence[float], reference: Sequence[float]) -> Figure:
    return Figure.of([value / other for value, other in zip(values, reference, strict=True)])
