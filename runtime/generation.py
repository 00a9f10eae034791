"""One answer, measured: text, what became of the KV cache, time; and the same prompt on the full cache beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from flowmm.errors import FlowmmError, InputError
from flowmm.models import LoadedModel, load_model, resolve_source
from flowmm.plans import MethodParameters, Plan
from flowmm.runtime.budgets import Budget
from flowmm.runtime.compiled import compiler_for, decoding_config
from flowmm.runtime.context import Run, compress
from flowmm.runtime.online import CheckAction
from flowmm.runtime.report import LayerReport, RunReport

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, otherwise sampled from a seeded generator."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of ``model.generate``; None overrules what the checkpoint's generation config brings along."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        if self.temperature > 0:
            return chosen | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Compression:
    """The arguments of :func:`flowmm.compress` except the model; ``compile=None``: on a GPU only.

    ``static``: the answer goes into a cache of fixed shape, whose decoding is compiled where merging is.
    """

    plan: Plan
    budget: Budget | None = None
    method: MethodParameters | str | None = None
    check: CheckAction | None = None
    compile: bool | None = None
    static: bool = False

    def compiles_on(self, model: Any) -> bool:
        """Whether compiled code is asked for."""
        return model.device.type == "cuda" if self.compile is None else self.compile

    def options(self, model: Any) -> dict[str, Any]:
        """Arguments of ``model.generate`` inside the block."""
        if not self.static:
            return {}
        compiles = self.compiles_on(model) and compiler_for(model.device) is not None
        config = decoding_config(model.device) if compiles else None
        if config is None:
            return {"cache_implementation": "static", "disable_compile": True}
        return {"cache_implementation": "static", "compile_config": config}

    def of(self, model: Any) -> AbstractContextManager[Run]:
        """The block inside which `model` compresses."""
        return compress(
            model,
            self.plan,
            budget=self.budget,
            method=self.method,
            check=self.check,
            compile=self.compiles_on(model),
        )


@dataclass(frozen=True)
class Timing:
    """Seconds, read when a token has reached the host (so the device has finished it).

    ``ttft_s``: from the call with prepared inputs to the first new token; ``tpot_s``: mean over the later tokens, None
    where there is only one; ``total_s``: the whole call.
    """

    ttft_s: float
    tpot_s: float | None
    total_s: float


@dataclass(frozen=True)
class CacheUse:
    """The prompt's KV cache: tokens, entries kept per layer (mean), bytes of the real tensors."""

    full_tokens: int
    kept_tokens: float
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerReport, ...] = ()

    @property
    def ratio(self) -> float:
        return self.kept_tokens / self.full_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "full_tokens": self.full_tokens,
            "kept_tokens": self.kept_tokens,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": round(self.ratio, 6),
            "per_layer": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True)
class Generation:
    """One answer. ``findings`` holds the online check's, or None where none was asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    kv: CacheUse
    timing: Timing
    findings: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what ``flowmm run --json`` prints of one answer."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": len(self.token_ids)},
            "kv": self.kv.to_dict(),
            "timing": asdict(self.timing),
        }

    def summary(self) -> str:
        """One line: what was kept, and how long it took."""
        kv, timing = self.kv, self.timing
        if kv.kept_tokens == kv.full_tokens:
            kept = f"nothing compressed: all {kv.full_tokens} prompt entries are within the budget"
        else:
            kept = (
                f"kept {kv.kept_tokens:g} of {kv.full_tokens} prompt entries per layer ({kv.ratio:.1%}), "
                f"{kv.bytes_after:,} of {kv.bytes_before:,} bytes"
            )
        return f"{kept}; first token after {_seconds(timing.ttft_s)}, then {_seconds(timing.tpot_s)} per token"


@dataclass(frozen=True)
class Comparison:
    """The same prompt answered on the full cache and on the compressed one."""

    full: Generation
    compressed: Generation

    @property
    def matching_tokens(self) -> int:
        """Positions at which both answers have the same token."""
        return sum(a == b for a, b in zip(self.full.token_ids, self.compressed.token_ids, strict=False))

    @property
    def compared_tokens(self) -> int:
        """Length of the longer answer."""
        return max(len(self.full.token_ids), len(self.compressed.token_ids))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the full answer and how far the compressed one agrees with it."""
        agreement = {
            "same_text": self.full.text == self.compressed.text,
            "matching_tokens": self.matching_tokens,
            "compared_tokens": self.compared_tokens,
        }
        return {"full": self.full.to_dict(), "agreement": agreement}

    def __str__(self) -> str:
        rows = [
            ("", "full cache", "compressed"),
            ("entries per layer", *_cells(self, lambda run: f"{run.kv.kept_tokens:g}")),
            ("KV bytes", *_cells(self, lambda run: f"{run.kv.bytes_after:,}")),
            ("first token", *_cells(self, lambda run: _seconds(run.timing.ttft_s))),
            ("per later token", *_cells(self, lambda run: _seconds(run.timing.tpot_s))),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        answers = [f"full cache: {self.full.text.strip()}", f"compressed: {self.compressed.text.strip()}"]
        agreement = f"{self.matching_tokens} of {self.compared_tokens} tokens agree"
        return "\n".join([*answers, "", *table, "", agreement])


def _cells(comparison: Comparison, cell: Callable[[Generation], str]) -> tuple[str, str]:
    return cell(comparison.full), cell(comparison.compressed)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def load_planned_model(plan: Plan | None, name: str | None, **options: Any) -> LoadedModel:
    """Load `name`, or the model that `plan` was made for (at the plan's revision), and see that the plan fits it.

    Args:
        options: of :func:`flowmm.models.load_model`.

    Raises:
        InputError: no name, and no plan or one whose model has no hub id.
        PlanMismatchError: the plan is for another architecture.
        ModelLoadError, UnsupportedModelError: as :func:`flowmm.models.load_model`.
    """
    if name is None:
        name = _planned_source(plan)
        if plan is not None and options.get("revision") is None:
            options["revision"] = plan.model.revision
    loaded = load_model(name, **options)
    if plan is not None:
        plan.check_model(loaded.fingerprint())
    return loaded


def _planned_source(plan: Plan | None) -> str:
    if plan is None:
        raise InputError("neither a model nor a plan was given; expected one of them")
    try:
        resolve_source(plan.model.source)
    except InputError as error:
        raise InputError(
            f"the plan knows its model only as {plan.model.source!r}, the name of a directory where the plan was made; "
            "say where the model is, with --model DIRECTORY"
        ) from error
    return plan.model.source


def generate_answer(
    loaded: LoadedModel,
    inputs: Mapping[str, Tensor],
    compression: Compression | None = None,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
) -> Generation:
    """Answer one prompt.

    Args:
        inputs: of one prompt, from :meth:`LoadedModel.build_inputs`.
        compression: None answers on the full cache.
        sampling: default greedy, at most 128 new tokens.
        on_text: called with each finished piece of the answer as it is generated.

    Raises:
        InputError: more than one prompt, or a budget that cannot be met.
        PlanMismatchError, UnsupportedModelError, DriftError: as :func:`flowmm.compress`.
        FlowmmError: the device ran out of memory.
    """
    if (rows := inputs["input_ids"].shape[0]) != 1:
        raise InputError(f"found a batch of {rows} prompts; expected one")
    sampling = sampling or Sampling()
    try:
        if compression is None:
            cache = DynamicCache(config=loaded.model.config)
            ids, timing = _timed(loaded, inputs, sampling, on_text, past_key_values=cache)
            return _generation(loaded, inputs, ids, timing, _full_cache_use(cache, inputs))
        with compression.of(loaded.model) as run:
            ids, timing = _timed(loaded, inputs, sampling, on_text, **compression.options(loaded.model))
        findings = None if compression.check is None else tuple(run.report.findings)
        return _generation(loaded, inputs, ids, timing, _cache_use(run.report), findings)
    except torch.OutOfMemoryError as error:
        raise FlowmmError(
            f"out of memory with a prompt of {inputs['input_ids'].shape[1]} tokens; use fewer or smaller images, "
            "--dtype bf16, or --device-map auto"
        ) from error


def compare_caches(
    loaded: LoadedModel, inputs: Mapping[str, Tensor], compression: Compression, sampling: Sampling | None = None
) -> Comparison:
    """Answer one prompt twice, on the full cache and compressed; arguments and errors as :func:`generate_answer`."""
    sampling = sampling or Sampling()
    # The first call of a process pays for kernels and allocations that neither cache is to blame for.
    generate_answer(loaded, inputs, None, Sampling(max_new_tokens=1))
    full = generate_answer(loaded, inputs, None, sampling)
    return Comparison(full, generate_answer(loaded, inputs, compression, sampling))


class _Listener(TextStreamer):
    """Notes when each new token arrives, and passes finished words on."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.arrivals.append(time.perf_counter())
        if self._on_text is not None or self.next_tokens_are_prompt:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)


def _timed(
    loaded: LoadedModel, inputs: Mapping[str, Tensor], sampling: Sampling, on_text: OnText | None, **options: Any
) -> tuple[list[int], Timing]:
    """New token ids of one call of ``generate``, and its times."""
    listener = _Listener(loaded.tokenizer, on_text)
    torch.manual_seed(sampling.seed)
    if loaded.model.device.type == "cuda":
        torch.cuda.synchronize(loaded.model.device)
    start = time.perf_counter()
    output = loaded.model.generate(**inputs, **sampling.options(), **options, streamer=listener)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    end = time.perf_counter()
    first, last = listener.arrivals[0], listener.arrivals[-1]
    later = len(listener.arrivals) - 1
    return ids, Timing(first - start, (last - first) / later if later else None, end - start)


def _generation(
    loaded: LoadedModel,
    inputs: Mapping[str, Tensor],
    ids: list[int],
    timing: Timing,
    kv: CacheUse,
    findings: tuple[str, ...] | None = None,
) -> Generation:
    text = loaded.decode(ids)
    return Generation(
        text=text if isinstance(text, str) else "".join(text),
        token_ids=tuple(ids),
        finish_reason="stop" if ids[-1] in _end_tokens(loaded) else "length",
        prompt_tokens=inputs["input_ids"].shape[1],
        kv=kv,
        timing=timing,
        findings=findings,
    )


def _end_tokens(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _cache_use(report: RunReport) -> CacheUse:
    return CacheUse(
        report.full_tokens, report.kept_tokens, report.bytes_before, report.bytes_after, tuple(report.layers)
    )


def _full_cache_use(cache: DynamicCache, inputs: Mapping[str, Tensor]) -> CacheUse:
    """The prompt's share of a full cache, which also holds the generated tokens."""
    prompt = inputs["input_ids"].shape[1]
    tensors = [tensor for keys, values, *_ in cache for tensor in (keys, values)]
    held = sum(tensor.nbytes // tensor.shape[-2] * prompt for tensor in tensors)
    return CacheUse(prompt, prompt, held, held)
