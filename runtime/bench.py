"""Side-by-side measurements of prefill, decoding and memory: interleaved runs, medians with their spread, roofline.

Caches are compared on one model and one prompt. Prefills run in turns, and decoding goes on token by token in turns, so
that other load on the machine falls on all alike; ratios are medians over pairs taken side by side.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import flowmm
from flowmm.errors import InputError
from flowmm.models import fingerprint_model, text_config
from flowmm.plans import Plan, unprofiled_plan
from flowmm.runtime.attention import attached
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.context import compress

WARM_UP_TOKENS = 3
BASELINE = "dynamic"
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """Median of several measurements and the quarter of them that lies below and above."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


@dataclass(frozen=True)
class Row:
    """One cache on one prompt.

    Attributes:
        cache: ``dynamic`` and ``static`` are transformers' own, ``flowmm B`` keeps the share B.
        prefill_s: seconds until the first token is known (TTFT of prepared inputs).
        token_s: seconds per later token (TPOT).
        prefill_ratio, token_ratio: to the dynamic cache, in pairs.
        prompt_bytes: keys, values and biases of the entries kept of the prompt.
        contract_bytes: sum over layers of kept x 2 x KV heads x head dimension x item size.
        reserved_bytes: memory beyond the entries, for tokens to come.
        extra_peak_bytes: peak memory of the prefill beyond what was held before it, None where it cannot be read.
        roofline_s: bytes that a token must move over the measured bandwidth.
        roofline_ratio: `token_s` over `roofline_s`.
    """

    cache: str
    tokens: int
    batch: int
    prefill_s: Figure
    prefill_ratio: Figure
    token_s: Figure
    token_ratio: Figure
    prompt_bytes: int
    contract_bytes: int
    reserved_bytes: int
    extra_peak_bytes: int | None
    roofline_s: float
    roofline_ratio: float


def environment(note: str = "") -> dict[str, Any]:
    """JSON values: date, machine kind (never its name), threads, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flowmm": flowmm.__version__,
        "note": note,
    }


def measured_bandwidth(device: torch.device, size_mib: int = 512, repeats: int = 9) -> float:
    """Bytes per second at which this machine reads a large matrix times a vector, the best of several tries."""
    rows = size_mib * MIB // (4 * 1024)
    matrix, vector = torch.ones(rows, 1024, device=device), torch.ones(1024, device=device)
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        torch.mv(matrix, vector)
        _wait(device)
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times)


def bytes_per_token(model: Any) -> int:
    """Bytes of the weights that every decoded token reads: text layers and output head, not the input embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder = model.get_decoder()
    layers = sum(weight.nbytes for weight in decoder.parameters() if weight is not embedding)
    return layers + head.nbytes


def fixed_plan(model: Any) -> Plan:
    """A plan whose layers' modes are decided beforehand, as a profiled model's are."""
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    layers = tuple(layer.model_copy(update={"mode": "cross", "forced": True}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


@torch.no_grad()
def bench(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    budgets: Sequence[float] = (0.2, 1.0),
    plan: Plan | None = None,
    method: str | None = None,
    rounds: int = 5,
    new_tokens: int = 32,
    bandwidth: float | None = None,
) -> list[Row]:
    """Compare caches on one prompt (or batch).

    Args:
        budgets: shares kept by flowmm, one row each.
        plan: default :func:`fixed_plan`.
        method: a preset; default: the plan's.
        rounds: prefills of each cache; the first one of a process is not counted.
        new_tokens: tokens decoded with each cache.
        bandwidth: of :func:`measured_bandwidth`, measured if not given.

    Raises:
        InputError: no rounds or tokens to measure.
    """
    if rounds < 1 or new_tokens < 1:
        raise InputError(f"rounds={rounds}, new_tokens={new_tokens}: expected at least 1")
    plan = plan or fixed_plan(model)
    bandwidth = bandwidth or measured_bandwidth(model.device)
    steps = new_tokens + WARM_UP_TOKENS
    contestants = [
        _Contestant(BASELINE, lambda: DynamicCache(config=text_config(model.config))),
        _Contestant("static", lambda: _static_cache(model, inputs, steps)),
        *(_Contestant(f"flowmm {budget:g}", plan=plan, budget=budget, method=method) for budget in budgets),
    ]
    _prefill_in_turns(model, inputs, contestants, rounds)
    sizes = [_Size.of(contestant.cache) for contestant in contestants]
    _decode_in_turns(model, contestants, steps)
    baseline = contestants[0]
    return [
        _row(model, inputs, contestant, baseline, size, bandwidth)
        for contestant, size in zip(contestants, sizes, strict=True)
    ]


class _Contestant:
    """A cache under measurement and the times taken with it."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Any] | None = None,
        plan: Plan | None = None,
        budget: float | None = None,
        method: str | None = None,
    ) -> None:
        self.name = name
        self._make, self._plan, self._budget, self._method = make, plan, budget, method
        self.cache: Any = None
        self.prefills: list[float] = []
        self.tokens: list[float] = []
        self.extra_peak: int | None = None
        self.next: Tensor | None = None

    @contextmanager
    def reading(self, model: Any) -> Any:
        """Inside the block the model fills :attr:`cache`."""
        if self._make is not None or self._plan is None:
            self.cache = None if self._make is None else self._make()
            yield
            return
        with compress(model, self._plan, budget=self._budget, method=self._method) as run:
            self.cache = run.new_cache()
            yield


def _static_cache(model: Any, inputs: dict[str, Tensor], steps: int) -> StaticCache:
    return StaticCache(config=text_config(model.config), max_cache_len=inputs["input_ids"].shape[1] + steps)


def _prefill_in_turns(model: Any, inputs: dict[str, Tensor], contestants: Sequence[_Contestant], rounds: int) -> None:
    for turn in range(rounds + 1):
        for contestant in _rotated(contestants, turn):
            contestant.cache = None
            with contestant.reading(model), _PeakMemory(model.device) as peak:
                _wait(model.device)
                start = time.perf_counter()
                logits = model(**inputs, past_key_values=contestant.cache, logits_to_keep=1).logits
                contestant.next = logits[:, -1:].argmax(-1)
                _wait(model.device)
                seconds = time.perf_counter() - start
            if turn:
                contestant.prefills.append(seconds)
                contestant.extra_peak = peak.extra


def _decode_in_turns(model: Any, contestants: Sequence[_Contestant], steps: int) -> None:
    def pick(kwargs: dict[str, Any]) -> FlowCache | None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FlowCache):
            return None
        cache.begin_token(kwargs["input_ids"])
        return cache

    with attached(model, pick):
        for step in range(steps):
            for contestant in _rotated(contestants, step):
                _wait(model.device)
                start = time.perf_counter()
                output = model(input_ids=contestant.next, past_key_values=contestant.cache)
                contestant.next = output.logits[:, -1:].argmax(-1)
                _wait(model.device)
                if step >= WARM_UP_TOKENS:
                    contestant.tokens.append(time.perf_counter() - start)


def _rotated(contestants: Sequence[_Contestant], turn: int) -> list[_Contestant]:
    """Everyone goes first in turn."""
    first = turn % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Size:
    entries: int
    contract: int
    reserved: int

    @classmethod
    def of(cls, cache: Any) -> _Size:
        """Bytes of a cache that holds a prompt."""
        if isinstance(cache, FlowCache):
            tensors = [tensor for layer in cache.states for tensor in layer.first_entries(layer.kept)]
            return cls(cache.nbytes, sum(tensor.nbytes for tensor in tensors), cache.reserved_bytes)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if isinstance(cache, StaticCache):
            filled = held * int(cache.get_seq_length()) // cache.get_max_length()
            return cls(filled, filled, held - filled)
        return cls(held, held, 0)


def _row(
    model: Any, inputs: dict[str, Tensor], contestant: _Contestant, baseline: _Contestant, size: _Size, bandwidth: float
) -> Row:
    batch, tokens = inputs["input_ids"].shape
    token = Figure.of(contestant.tokens)
    roofline = (bytes_per_token(model) + size.entries) / bandwidth
    return Row(
        cache=contestant.name,
        tokens=tokens,
        batch=batch,
        prefill_s=Figure.of(contestant.prefills),
        prefill_ratio=_paired(contestant.prefills, baseline.prefills),
        token_s=token,
        token_ratio=_paired(contestant.tokens, baseline.tokens),
        prompt_bytes=size.entries,
        contract_bytes=size.contract,
        reserved_bytes=size.reserved,
        extra_peak_bytes=contestant.extra_peak,
        roofline_s=roofline,
        roofline_ratio=token.median / roofline,
    )


def _paired(values: Sequence[float], reference: Sequence[float]) -> Figure:
    return Figure.of([value / other for value, other in zip(values, reference, strict=True)])


class _PeakMemory:
    """Peak memory inside a block beyond what was held at its start; ``extra`` is None where it cannot be read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.extra: int | None = None

    def __enter__(self) -> _PeakMemory:
        self._start = self._reset()
        return self

    def __exit__(self, *_: object) -> None:
        peak = self._peak()
        self.extra = None if self._start is None or peak is None else peak - self._start

    def _reset(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        try:
            # Linux: forget the highest resident size seen so far.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return _status("VmRSS")

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def report(rows: Sequence[Row], model: Any, bandwidth: float, note: str = "") -> dict[str, Any]:
    """JSON-ready: environment, model, bandwidth, one object per row."""
    text = text_config(model.config)
    return {
        "environment": environment(note),
        "model": {
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes_per_token": bytes_per_token(model),
        },
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    head = ("cache", "tokens", "batch", "prefill", "ratio", "token", "ratio", "/ roofline", "KV MiB", "peak MiB")
    lines = [
        (
            row.cache,
            str(row.tokens),
            str(row.batch),
            f"{row.prefill_s.median * 1e3:.0f} ms",
            f"{row.prefill_ratio.median:.3f}",
            f"{row.token_s.median * 1e3:.2f} ms",
            f"{row.token_ratio.median:.3f}",
            f"{row.roofline_ratio:.2f}",
            f"{row.prompt_bytes / MIB:.2f}",
            "-" if row.extra_peak_bytes is None else f"{row.extra_peak_bytes / MIB:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )
