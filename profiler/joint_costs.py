"""What it costs to compress all layers at once: next-token KL against the full cache on calibration prompts.

Layers stand in for each other: where two can find the same thing, compressing either alone costs nothing. Budgets and
choices that are to hold together are therefore measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowmm.models import LoadedModel
from flowmm.plans import MethodParameters, Mode, Plan
from flowmm.profiler.journal import Journal, answered, key_of
from flowmm.profiler.profiling import Progress
from flowmm.profiler.ranks import Ranks
from flowmm.profiler.samples import Sample, readable_samples
from flowmm.profiler.sensitivity import MIXED, ROWS_PER_BATCH, Reading, check_protocols, require_prompts, trials_of
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.replay import Trial, reading_caches
from flowmm.runtime.settings import CompressionSettings

BUDGETS = (0.05, 0.1, 0.2)
"""Totals at which layers are compared."""


def shift_bound(divergence: Tensor) -> Tensor:
    """How likely the next token is another one, at most: min(1, sqrt(KL / 2)) (Pinsker's inequality).

    A token that is lost costs 1, however lost it is, and one that is about to be lost shows: the mean hangs less on a
    few prompts than that of KL itself.
    """
    return (divergence / 2).sqrt().clamp(max=1)


def nats(divergence: Tensor) -> Tensor:
    """KL itself."""
    return divergence


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"shift_bound": shift_bound, "nats": nats}
"""From a token's KL(full || compressed) in nats to what it costs."""


Measure = Literal["shift_bound", "nats"]


@dataclass(frozen=True)
class Arrangement:
    """How every layer is compressed: its options, its mode, and the ratio of entries it keeps."""

    methods: tuple[MethodParameters, ...]
    modes: tuple[Mode, ...]
    ratios: tuple[float, ...]

    @classmethod
    def planned(cls, plan: Plan, total: float) -> Arrangement:
        """What a run of `plan` with its own method does at a total ratio."""
        method = plan.method
        return cls(plan.layer_methods(method), plan.layer_modes(method), plan.layer_budgets(total))

    def settings(self, modes: Sequence[Mode]) -> CompressionSettings:
        """For a prompt whose ``online`` layers have the modes in `modes`."""

        def entries(length: int) -> list[int]:
            return [entry_budget(length, float(ratio)) for ratio in self.ratios]

        decided = tuple(own if own != "online" else of for own, of in zip(self.modes, modes, strict=True))
        return CompressionSettings(self.methods[0], decided, entries, layer_methods=self.methods)


@dataclass(frozen=True)
class JointPrompts:
    """Calibration prompts on which arrangements are compared.

    Attributes:
        model, plan: the plan gives the modes of ``online`` layers on each prompt.
        trials: per prompt, one for each protocol that it fits, by the prompt's place among all.
        held: readings by place, once they were prefilled; ``None``: every call of :meth:`costs` prefills again.
        journal: what was measured before is not measured again.
        ranks: processes that share the prompts; all of them ask the same.
    """

    model: LoadedModel
    plan: Plan
    trials: dict[int, tuple[Trial, ...]]
    held: dict[int, tuple[Reading, ...]] | None = None
    journal: Journal = field(default_factory=Journal)
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def read(
        cls,
        model: LoadedModel,
        plan: Plan,
        samples: Iterable[Sample],
        *,
        limit: int | None = None,
        protocols: Sequence[str] = MIXED,
        hold: bool = False,
        journal: Journal | None = None,
        ranks: Ranks | None = None,
    ) -> JointPrompts:
        """Args as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.

        Args:
            hold: keep all prompts' queries, keys and values in memory, which saves a prefill per prompt and question.
            journal: of the same model, plan, prompts and protocols.
            ranks: processes that share the prompts.

        Raises:
            InputError: an unknown protocol, or no prompt that fits any of the protocols.
        """
        check_protocols(protocols)
        trials = [trials_of(model, sample, protocols) for sample in readable_samples(samples, limit)]
        fitting = {place: of for place, of in enumerate(trials) if of}
        require_prompts(fitting, protocols)
        return cls(model, plan, fitting, {} if hold else None, journal or Journal(), ranks or Ranks())

    def __len__(self) -> int:
        return len(self.trials)

    def every(self, step: int, start: int) -> JointPrompts:
        """Each `step`-th prompt from `start` on; all where that would be none."""
        part = list(self.trials)[start::step] or list(self.trials)
        return replace(self, trials={place: self.trials[place] for place in part})

    def window(self, start: int, size: int) -> JointPrompts:
        """So many prompts from the one at `start` on; the first follows the last."""
        each = list(self.trials.items())
        return replace(self, trials=dict(each[(start + place) % len(each)] for place in range(size)))

    def parts(self, ends: Sequence[int]) -> list[JointPrompts]:
        """The prompts up to the first end, from there up to the next one, and so on."""
        each = list(self.trials.items())
        return [replace(self, trials=dict(each[start:stop])) for start, stop in pairwise((0, *ends))]

    def _readings(self, place: int) -> tuple[Reading, ...]:
        if self.held is not None and place in self.held:
            return self.held[place]
        readings = tuple(Reading.of(self.model, self.plan, trial) for trial in self.trials[place])
        if self.held is not None:
            self.held[place] = readings
        return readings

    def costs(
        self,
        arrangements: Sequence[Arrangement],
        *,
        of: Sequence[Measure] = ("shift_bound",),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """``[prompts, arrangements]`` fp64: mean over answer tokens and protocols.

        Args:
            of: what a token costs, see :data:`MEASURES`; of several, the columns of one stand before those of the next.
            progress: called with (finished prompts, prompts).
        """
        found = answered(
            _question(arrangements, of),
            self.trials,
            lambda place: self._costs_of(place, arrangements, of),
            journal=self.journal,
            ranks=self.ranks,
            told=None if progress is None else lambda done: progress(done, len(self)),
        )
        return np.array(list(found.values()))

    def _costs_of(self, place: int, arrangements: Sequence[Arrangement], of: Sequence[Measure]) -> list[float]:
        readings = self._readings(place)
        # A tenth faster than without gradients alone.
        with torch.inference_mode(), reading_caches(self.model.model):
            costs = np.mean([_costs(reading, arrangements, of) for reading in readings], axis=0)
        for reading in readings:
            reading.prefilled.forget_shared()
        return costs.tolist()


def _question(arrangements: Sequence[Arrangement], of: Sequence[Measure]) -> str:
    parts = [
        [[method.model_dump(mode="json") for method in one.methods], one.modes, [float(ratio) for ratio in one.ratios]]
        for one in arrangements
    ]
    return key_of([[*of], parts])


def _costs(reading: Reading, arrangements: Sequence[Arrangement], of: Sequence[Measure]) -> np.ndarray:
    """``[measures x arrangements]`` of one prompt under one protocol."""
    found = []
    for start in range(0, len(arrangements), ROWS_PER_BATCH):
        batch = arrangements[start : start + ROWS_PER_BATCH]
        made = [reading.cache(arrangement.settings(reading.modes)) for arrangement in batch]
        divergence = reading.divergence(made)
        found.append(torch.stack([MEASURES[one](divergence).mean(-1) for one in of]).double().cpu().numpy())
    return np.concatenate(found, axis=1).reshape(-1)
