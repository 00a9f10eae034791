"""``with flowmm.compress(model, plan) as run``: generation on a merged cache, and the model as it was afterwards."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowmm.errors import FlowmmError, InputError, UnsupportedModelError
from flowmm.models import fingerprint_model, text_config, visual_mask
from flowmm.models.visual import visual_token_ids
from flowmm.plans import LayerPlan, MethodParameters, ModelFingerprint, Plan, resolve_plan
from flowmm.runtime.attention import attached
from flowmm.runtime.budgets import Budget, planned_entries, validate_budget
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.compiled import decoding_config, merge_operation
from flowmm.runtime.host import GenerateShadow, offsets_of, restore_offsets, shadowed_generate, valid_tokens
from flowmm.runtime.online import CheckAction, OnlineCheck, PlannedRho
from flowmm.runtime.report import RunReport, build_report
from flowmm.runtime.saved import load_context, save_context
from flowmm.runtime.settings import CompressionSettings
from flowmm.runtime.static_cache import StaticFlowCache

# Rows per modality that rho is sampled from: few where it is compared with a plan (less than 2 % of a prefill of 2,000
# tokens, less of a longer one), more where it decides a mode.
ROWS_THAT_CHECK = 20
ROWS_THAT_DECIDE = 128


class PlanFitWarning(UserWarning):
    """The plan fits the model's shape but was made on other weights or another revision."""


class Run:
    """Handle of a ``compress`` block: makes caches and reports what happened to the latest prompt.

    Attributes:
        plan: the plan in use.
        settings: method, modes, budget and check of every cache this run makes.
        compile_config: transformers' options for compiled decoding, ``None``: decode as told.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        settings: CompressionSettings,
        fingerprint: ModelFingerprint,
        compile_config: Any = None,
    ) -> None:
        self.plan = plan
        self.compile_config = compile_config
        self._fingerprint = fingerprint
        self.settings = settings
        self._model = model
        self._config = model.config
        self._shadow: GenerateShadow | None = None
        self._latest: FlowCache | None = None
        self._static: StaticFlowCache | None = None
        # Hooks of two blocks on one model fire in every thread; each thread remembers whose call is under way.
        self._thread = threading.local()

    def new_cache(self) -> FlowCache:
        """A cache for one prompt (or batch), to pass as ``past_key_values=`` to ``generate`` or to a forward call.

        Pass it again with a longer sequence of ids to continue the conversation. It works inside this run's block only.
        """
        return FlowCache(self.settings)

    def static_cache(self, room: int) -> StaticFlowCache:
        """This run's static cache, emptied, with room for `room` tokens after the next prompt.

        There is one per run, so that its buffers, and graphs compiled for them, serve one prompt after another. It is
        what ``generate(..., cache_implementation="static")`` uses.
        """
        if self._static is None:
            self._static = StaticFlowCache(self.settings, room)
        self._static.reset()
        self._static.room = room
        return self._static

    @property
    def cache(self) -> FlowCache:
        """The cache of the latest prompt.

        Raises:
            FlowmmError: nothing has run in this block yet.
        """
        if self._latest is None:
            raise FlowmmError("nothing has been compressed yet: call model.generate(...) inside the block first")
        return self._latest

    @property
    def report(self) -> RunReport:
        """What was compressed, merged and dropped in the latest prefill; may be read after the block, too.

        Raises:
            FlowmmError: nothing has run in this block yet.
        """
        record = self.cache.record
        if record is None or len(record.layers) < len(self.settings.modes):
            raise FlowmmError("the latest prefill did not reach the last layer, so there is nothing to report")
        return build_report(record)

    def save(self, path: str | os.PathLike[str], cache: FlowCache | None = None) -> None:
        """Write a compressed conversation, the latest one unless told otherwise, as a safetensors file.

        Raises:
            InputError: there is nothing to save, or the file cannot be written.
        """
        save_context(Path(path), self.cache if cache is None else cache, self._fingerprint, self.plan)

    def load(self, path: str | os.PathLike[str]) -> FlowCache:
        """A conversation that was saved, to pass as ``past_key_values=`` together with all of its ids.

        ``cache.ids.filled`` are the ids it holds; put the new question's behind them.

        Raises:
            InputError: no such file, or not readable.
            ContextFormatError: damaged, cut short, or not a saved context.
            ContextMismatchError: saved by another model, or for another plan or method.
        """
        weight = next(iter(self._model.get_input_embeddings().parameters()))
        return load_context(Path(path), self.settings, self._fingerprint, self.plan, weight)

    def _flow_of(self, kwargs: dict[str, Any]) -> FlowCache | None:
        """The cache a forward call will fill, made here for a call without one; ``None``: another block's call."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StaticFlowCache) and cache.settled and kwargs.get("position_ids") is not None:
            # Compiled code runs through here for every token and must find nothing to decide.
            return cache if cache.settings is self.settings else None
        self._thread.cache = None
        if isinstance(cache, FlowCache) and cache.settings is not self.settings:
            return None
        if cache is None and kwargs.get("use_cache") is not False:
            if self._shadow is not None and self._shadow.block_of_this_thread() is not self:
                return None
            cache = kwargs["past_key_values"] = self.new_cache()
        if not isinstance(cache, FlowCache):
            found = "use_cache=False" if cache is None else f"a {type(cache).__name__}"
            raise InputError(
                f"this call inside compress(...) brings {found}, so nothing would be compressed; leave "
                "past_key_values out or pass run.new_cache()"
            )
        ids = kwargs.get("input_ids")
        if ids is None:
            raise InputError("compress(...) finds visual tokens by their ids: pass input_ids, not inputs_embeds alone")
        if kwargs.get("position_ids") is None:
            restore_offsets(self._model, cache)
        if ids.shape[1] == 1 and cache.get_seq_length() > 0 and not cache.reads_prompt:
            cache.begin_token(ids)
        else:
            valid = valid_tokens(kwargs.get("attention_mask"), ids)
            cache.begin_forward(visual_mask(self._config, ids), valid, ids, _asks_for_last_row(kwargs, self._config))
        self._latest = self._thread.cache = cache
        return cache

    def _note_offsets(self, kwargs: dict[str, Any]) -> None:
        """Keep the position offsets that a call without explicit positions left on the model."""
        if kwargs.get("position_ids") is not None:
            return
        cache = kwargs.get("past_key_values")
        if isinstance(cache, FlowCache) and cache is getattr(self._thread, "cache", None):
            cache.rope_deltas = offsets_of(self._model)

    def _see_rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        cache = getattr(self._thread, "cache", None)
        if cache is not None:
            rope = text_config(self._config).rope_parameters
            cache.see_rotary(cos, sin, rope.get("mrope_section", []))

    def _last_row_suffices(self) -> bool:
        cache = getattr(self._thread, "cache", None)
        return cache is not None and cache.takes_last_row_only()


def _asks_for_last_row(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether a forward call returns nothing of any token but the last one, as the prompts of ``generate`` do."""
    options = ("output_hidden_states", "output_attentions")
    asked = (kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, False) for name in options)
    kept = kwargs.get("logits_to_keep")
    return isinstance(kept, int) and kept == 1 and not any(asked)


def _settings(plan: Plan, method: MethodParameters, budget: Budget, check: CheckAction | None) -> CompressionSettings:
    return CompressionSettings(
        method=method,
        modes=plan.layer_modes(method),
        entries=planned_entries(plan.layer_budgets, budget),
        check=None if check is None else OnlineCheck(check, tuple(map(_planned_rho, plan.layers))),
        rho_rows=ROWS_THAT_DECIDE if any(layer.mode == "online" for layer in plan.layers) else ROWS_THAT_CHECK,
        layer_methods=plan.layer_methods(method),
    )


def _planned_rho(layer: LayerPlan) -> PlannedRho | None:
    if layer.rho is None:
        return None
    decides = layer.mode == "online" or not (layer.forced or layer.mode_was_measured)
    return PlannedRho(layer.rho.mean, layer.rho.std, decides)


def _chosen_method(plan: Plan, method: MethodParameters | str | None) -> MethodParameters:
    if method is None:
        return plan.method
    if isinstance(method, MethodParameters):
        return method
    try:
        return MethodParameters.from_preset(method, theta=plan.method.theta, budget=plan.method.budget)
    except ValueError as error:
        raise InputError(str(error)) from error


def _refuse_unsupported_model(model: Any) -> None:
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(
            f"the text layers are {', '.join(sorted(kinds))}; flowmm needs full_attention in every layer"
        )


@contextmanager
def compress(
    model: Any,
    plan: Plan | str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    method: MethodParameters | str | None = None,
    check: CheckAction | None = None,
    recompress_every: int | None = None,
    compile: bool = False,
    compile_decoding: bool = False,
) -> Generator[Run]:
    """Compress the KV cache of every prompt that `model` reads inside the block.

    The prompt's own attention stays exact; each layer's cache is merged right after it (eq. 5-10), so peak memory is
    one full layer plus the compressed others. On exit, also after an exception, the model is as it was.

    Args:
        model: a transformers vision-language model with sdpa or eager attention in its text layers.
        plan: a plan, its file, or the name of a shipped one.
        budget: ratio of the prompt's entries kept (float in (0, 1]) or entries per layer (int); default: the plan's.
        method: a preset's name or full parameters instead of the plan's.
        check: compare each prompt's rho with the plan: ``"warn"``, ``"error"`` or ``"adapt"``.
        recompress_every: compress a conversation again, to its budget for all of its tokens, whenever so many were
            appended, so that long answers and later turns stay bounded; ``None``: what comes after the prompt is kept
            whole.
        compile: merge with compiled code, made at the first prompt (tens of seconds, seconds once it is on disk) and
            used for all later ones; uncompiled with a :class:`NoCompilerWarning` where no compiler is found.
        compile_decoding: ``generate`` uses the static cache and one compiled graph per token, made at the first token
            (tens of seconds; on a CPU a fraction of a second once it is on disk); drafts are decoded uncompiled.

    Yields:
        the :class:`Run`: ``run.report`` after generation, ``run.new_cache()`` for explicit ``past_key_values=``.

    Raises:
        BudgetError: a budget that no layer can meet.
        PlanMismatchError: the plan was made for another architecture.
        UnsupportedModelError: the attention implementation or layer types are not supported.
        DriftError: from the prompt's forward call, with ``check="error"``.
    """
    if not isinstance(plan, Plan):
        plan = Plan.load(resolve_plan(os.fspath(plan)))
    if check not in (None, "warn", "error", "adapt"):
        raise InputError(f"check={check!r}: expected 'warn', 'error', 'adapt' or None")
    if check == "adapt" and plan.method.rho_kind != "raw":
        raise InputError(
            f"check='adapt' decides by raw rho, but this plan's modes were decided by {plan.method.rho_kind!r}; use "
            "'warn' or 'error', or a plan profiled with rho_kind 'raw'"
        )
    chosen = _chosen_method(plan, method)
    asked = validate_budget(plan.method.budget if budget is None else budget)
    _refuse_unsupported_model(model)
    if recompress_every is not None and recompress_every < 1:
        raise InputError(f"recompress_every={recompress_every}: expected a number of tokens, at least 1, or None")
    fingerprint = fingerprint_model(model)
    differences = plan.check_model(fingerprint)
    if differences:
        warnings.warn(
            f"plan and model differ: {'; '.join(map(str, differences))}. The plan still fits; profile again to be sure",
            PlanFitWarning,
            stacklevel=3,
        )
    settings = replace(
        _settings(plan, chosen, asked, check),
        recompress_every=recompress_every,
        visual_ids=visual_token_ids(model.config),
        operation=merge_operation(model.device) if compile else None,
    )
    run = Run(model, plan, settings, fingerprint, decoding_config(model.device) if compile_decoding else None)
    see_rotary = run._see_rotary if any(method.needs_rotary for method in settings.methods) else None
    hooks = attached(model, run._flow_of, see_rotary, run._note_offsets, run._last_row_suffices)
    with hooks, shadowed_generate(model, run) as shadow:
        run._shadow = shadow
        yield run
