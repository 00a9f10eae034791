"""How much each layer minds being compressed: label-free next-token KL against the full cache, one layer at a time.

The prefill of a prompt is shared by all its measurements, so a curve costs decode steps, not prefills. Costs of layers
add up well enough to share a budget between them (:mod:`flowmm.plans.allocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import LayerPlan, MethodParameters, Mode, Plan, SensitivityFingerprint
from flowmm.plans.allocation import allocate
from flowmm.profiler.journal import Journal, answered, key_of
from flowmm.profiler.profiling import Progress
from flowmm.profiler.ranks import Ranks
from flowmm.profiler.samples import CalibrationSample, Sample, readable_samples
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.replay import (
    Conversations,
    Message,
    Prefill,
    Trial,
    answer_greedily,
    build_trial,
    divergence,
    feed,
    length_of_turn,
    prefill,
    reading_caches,
)
from flowmm.runtime.settings import CompressionSettings

RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)
# At most so many tokens of the full cache's own answer are what a compressed cache is compared on.
ANSWER_TOKENS = 4
# Rows decoded together, each a cache and an answer: more of them save forward calls, and take more memory.
ROWS_PER_BATCH = 16
MIXED = ("aware", "blind")


@dataclass(frozen=True)
class Sensitivity:
    """Curves of all layers, or of some.

    Attributes:
        ratios: measured ratios of entries kept, rising.
        cost: ``[prompts, layers, ratios]`` fp64: KL(full || compressed) in nats, mean over answer tokens and protocols,
            with that layer alone compressed.
    """

    ratios: tuple[float, ...]
    cost: np.ndarray

    def curves(self) -> list[list[tuple[float, float]]]:
        """Per layer, (ratio, mean cost over prompts)."""
        mean = self.cost.mean(0)
        return [list(zip(self.ratios, map(float, layer), strict=True)) for layer in mean]

    def with_layers(self, layers: Sequence[int], other: Sensitivity) -> Sensitivity:
        """These curves, but those of `layers` from `other`, which holds them in that order, on the same prompts."""
        cost = self.cost.copy()
        cost[:, list(layers)] = other.cost
        return Sensitivity(self.ratios, cost)


def aware(sample: CalibrationSample) -> Conversations:
    """The whole prompt is compressed; its last token is then read again."""
    messages = sample.messages
    return Conversations(list(messages), list(messages), opened=True, fed_again=1)


def blind(sample: CalibrationSample) -> Conversations | None:
    """The last text of the prompt is its question: what stands before is compressed, the question is fed afterwards.

    So is each further question in its place. ``None`` where the last turn does not end with a text behind other parts.
    """
    *history, last = sample.messages
    content = last.get("content")
    if isinstance(content, str) or not content or len(content) < 2 or content[-1].get("type") != "text":
        return None

    def asking(*parts: Any) -> list[Message]:
        return [*history, {**last, "content": [*content[:-1], *parts]}]

    others = tuple(asking({**content[-1], "text": text}) for text in sample.further)
    return Conversations(asking(), list(sample.messages), opened=False, others=others)


PROTOCOLS: dict[str, Callable[[CalibrationSample], Conversations | None]] = {"aware": aware, "blind": blind}


def check_protocols(names: Sequence[str]) -> None:
    """Raise InputError unless `names` are some of :data:`PROTOCOLS`."""
    if not names or not set(names) <= PROTOCOLS.keys():
        raise InputError(f"protocols {list(names)}: expected one or more of {', '.join(PROTOCOLS)}")


def trials_of(model: LoadedModel, sample: CalibrationSample, protocols: Sequence[str]) -> tuple[Trial, ...]:
    """The prompt under each of the protocols that it fits."""
    chats = (PROTOCOLS[name](sample) for name in protocols)
    return tuple(build_trial(model, chat) for chat in chats if chat is not None)


def require_prompts(found: Collection[Any], protocols: Sequence[str]) -> None:
    """Raise InputError if nothing was `found` that fits any of the protocols."""
    if not found:
        raise InputError(
            f"no calibration prompt fits {' or '.join(protocols)}: 'blind' needs prompts whose last turn ends with a "
            "text behind other parts"
        )


@dataclass(frozen=True)
class Answer:
    """What the full cache answers to one continuation, T tokens: :data:`ANSWER_TOKENS`, or up to the end of the turn.

    Attributes:
        forced: ``[1, q + T - 1]`` ids fed: the continuation and the answer but for its last token.
        places: ``[3, 1, q + T - 1]`` their positions.
        wanted: ``[1, T, V]`` logits.
    """

    forced: Tensor
    places: Tensor
    wanted: Tensor

    @property
    def asked(self) -> range:
        """Where in `forced` the wanted logits are given."""
        end = self.forced.shape[1]
        return range(end - self.wanted.shape[1], end)

    @classmethod
    def of(cls, host: Any, full: Callable[[], FlowCache], continuation: Tensor, first: Tensor) -> Answer:
        """Use inside :func:`reading_caches`; `full` makes a full cache, `first` ``[3, 1, 1]`` is where it goes on."""

        def places(ids: Tensor) -> Tensor:
            return first + torch.arange(ids.shape[1], device=ids.device)

        tokens = answer_greedily(host, full(), continuation, places(continuation), ANSWER_TOKENS).tokens
        # What a model would say behind the end of its turn costs nobody anything.
        count = min(length_of_turn(host, tokens[0]) + 1, ANSWER_TOKENS)
        forced = torch.cat([continuation, tokens[:, : count - 1]], dim=1)
        fed_at = places(forced)
        return cls(forced, fed_at, feed(host, full(), forced, fed_at, keep=count))


@dataclass(frozen=True)
class Reading:
    """A prefilled prompt and the full cache's own answers, which compressed caches are fed.

    Attributes:
        host: the model.
        prefilled, trial: the prompt.
        modes: each layer's on this prompt.
        answers: to the trial's continuation and to its others.
    """

    host: Any
    prefilled: Prefill
    trial: Trial
    modes: tuple[Mode, ...]
    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, model: LoadedModel, plan: Plan, trial: Trial) -> Reading:
        """Prefill a trial and let the full cache answer."""
        host, prefilled = model.model, prefill(model.model, trial)

        def full() -> FlowCache:
            return prefilled.hide_last(prefilled.full_cache(), trial.fed_again)

        with reading_caches(host):
            answers = tuple(
                Answer.of(host, full, continuation, trial.positions[..., :1])
                for continuation in (trial.continuation, *trial.others)
            )
        return cls(host, prefilled, trial, prefilled.modes(plan), answers)

    def cache(self, settings: CompressionSettings) -> FlowCache:
        """The prompt compressed as `settings` say, ready for the continuation."""
        return self.prefilled.hide_last(self.prefilled.cache(settings), self.trial.fed_again)

    def divergence(self, caches: Sequence[FlowCache]) -> Tensor:
        """``[caches, T]``: KL(full || compressed) in nats of all answers' tokens. Use inside :func:`reading_caches`."""
        fed = zip(self.answers, self.logits(caches), strict=True)
        return torch.cat([divergence(answer.wanted, logits) for answer, logits in fed], dim=1)

    def logits(self, caches: Sequence[FlowCache]) -> Iterator[Tensor]:
        """Of each answer in turn, ``[caches, T, V]`` fp32 at its tokens. Use inside :func:`reading_caches`."""
        at_a_time = max(1, ROWS_PER_BATCH // len(caches))
        stacked, copies = None, 0
        for start in range(0, len(self.answers), at_a_time):
            answers = self.answers[start : start + at_a_time]
            if stacked is None or copies != len(answers):
                stacked, copies = FlowCache.stack([*caches] * len(answers)), len(answers)
            yield from self._fed_together(stacked, len(caches), answers)

    def _fed_together(self, stacked: FlowCache, caches: int, answers: Sequence[Answer]) -> Iterator[Tensor]:
        """`stacked` holds so many caches for each of the answers, and holds them again when all is fed."""
        longest = max((answer.places for answer in answers), key=lambda places: places.shape[-1])
        # What stands behind an answer's last token is seen by none of its own.
        forced = torch.cat([_lengthened(answer.forced, longest.shape[-1]).expand(caches, -1) for answer in answers])
        kept = sorted({place for answer in answers for place in answer.asked})
        logits = feed(self.host, stacked, forced, longest, keep=torch.tensor(kept, device=longest.device))
        stacked.crop(-longest.shape[-1])
        for answer, part in zip(answers, logits.unflatten(0, (len(answers), caches)), strict=True):
            yield part[:, [kept.index(place) for place in answer.asked]]


def _lengthened(ids: Tensor, length: int) -> Tensor:
    """``[1, n]`` ids with the last one repeated up to `length`."""
    return torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)


@dataclass(frozen=True)
class Variant:
    """One layer compressed to a ratio of its entries, with these parameters and in this mode; the others stay full."""

    layer: int
    ratio: float
    method: MethodParameters
    mode: Mode


def measure_sensitivity(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> Sensitivity:
    """Measure every layer's curve on calibration prompts.

    Args:
        model: loaded with sdpa or eager attention.
        plan: gives each layer's mode and parameters.
        samples: calibration prompts; their answers are not needed. Unreadable ones are passed over.
        limit: use at most so many.
        protocols: ``aware``, ``blind`` or both (their costs are averaged).
        ratios: entries kept in the one compressed layer.
        layers: measure these alone; ``None``: all.
        progress: called with (finished prompts, `limit`).
        journal: of the same model, plan, prompts and protocols; what it knows is not measured again.
        ranks: processes that share the prompts, each calling this.

    Raises:
        InputError: an unknown protocol, or no prompt that fits any of the protocols.
    """
    ratios = tuple(sorted(ratios))
    modes, methods = plan.layer_modes(plan.method), plan.layer_methods(plan.method)
    layers = range(len(modes)) if layers is None else layers
    variants = [Variant(layer, ratio, methods[layer], modes[layer]) for layer in layers for ratio in ratios]
    how: dict[str, Any] = {
        "limit": limit,
        "protocols": protocols,
        "progress": progress,
        "journal": journal,
        "ranks": ranks,
    }
    costs = measure_costs(model, plan, samples, variants, **how)
    return Sensitivity(ratios, costs.reshape(len(costs), len(layers), len(ratios)))


def measure_costs(
    model: LoadedModel,
    plan: Plan,
    samples: Iterable[Sample],
    variants: Sequence[Variant],
    *,
    limit: int | None = None,
    protocols: Sequence[str] = MIXED,
    progress: Progress | None = None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """``[prompts, variants]`` fp64: next-token KL against the full cache in nats, mean over tokens and protocols.

    Args and errors as of :func:`measure_sensitivity`. The same samples, limit and protocols give the same prompts, so
    that costs of several calls can be compared prompt by prompt.
    """
    check_protocols(protocols)
    numbered = dict(enumerate(readable_samples(samples, limit)))

    def measure(place: int) -> list[float] | None:
        trials = trials_of(model, numbered[place], protocols)
        rows = [_prompt_costs(model, plan, trial, variants) for trial in trials]
        return np.mean(rows, axis=0).tolist() if rows else None

    found = answered(
        key_of([[one.layer, one.ratio, one.method.model_dump(mode="json"), one.mode] for one in variants]),
        numbered,
        measure,
        journal=journal or Journal(),
        ranks=ranks or Ranks(),
        told=None if progress is None else lambda done: progress(done, limit),
    )
    costs = list(found.values())
    require_prompts(costs, protocols)
    return np.array(costs)


def _prompt_costs(model: LoadedModel, plan: Plan, trial: Trial, variants: Sequence[Variant]) -> np.ndarray:
    """``[variants]`` of one prompt under one protocol."""
    reading, costs = Reading.of(model, plan, trial), []
    with torch.inference_mode(), reading_caches(model.model):
        for batch in _batches(variants):
            caches = [reading.cache(_one_layer(reading.modes, variant)) for variant in batch]
            costs.append(reading.divergence(caches).mean(-1).double().cpu().numpy())
    return np.concatenate(costs)


def _batches(variants: Sequence[Variant]) -> Iterator[list[Variant]]:
    """Neighbours of one layer, because a batch takes the memory of its largest rows."""
    for _, of_layer in groupby(variants, key=lambda variant: variant.layer):
        ready = list(of_layer)
        yield from (ready[start : start + ROWS_PER_BATCH] for start in range(0, len(ready), ROWS_PER_BATCH))


def _one_layer(modes: tuple[Mode, ...], variant: Variant) -> CompressionSettings:
    """Every layer is left full, except for one; an ``online`` one has the mode that this prompt gives it."""
    mode = modes[variant.layer] if variant.mode == "online" else variant.mode
    modes = (*modes[: variant.layer], mode, *modes[variant.layer + 1 :])

    def entries(length: int) -> list[int]:
        kept = entry_budget(length, variant.ratio)
        return [kept if layer == variant.layer else length for layer in range(len(modes))]

    return CompressionSettings(variant.method, modes, entries)


def with_measured_budgets(plan: Plan, sensitivity: Sensitivity, protocols: Sequence[str]) -> Plan:
    """`plan` with every layer's curve, and its budget split by them."""
    curves = sensitivity.curves()
    ratios = allocate(curves, plan.method.budget)
    layers = tuple(
        LayerPlan.model_validate(layer.model_dump() | {"curve": tuple(curve), "budget": ratio})
        for layer, curve, ratio in zip(plan.layers, curves, ratios, strict=True)
    )
    decided = None if plan.sensitivity is None else plan.sensitivity.budgets
    measured = SensitivityFingerprint(protocols=tuple(protocols), n_samples=len(sensitivity.cost), budgets=decided)
    kept = {name: getattr(plan, name) for name in Plan.model_fields if name != "schema_"}
    return Plan.model_validate(kept | {"layers": layers, "sensitivity": measured})
