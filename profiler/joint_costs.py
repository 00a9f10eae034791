"""What it costs to compress all layers at once: next-token KL against the full cache on calibration prompts.

Layers stand in for each other: where two can find the same thing, compressing either alone costs nothing. Budgets and
choices that are to hold together are therefore measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import MethodParameters, Mode, Plan
from flowmm.profiler.profiling import Progress
from flowmm.profiler.samples import CalibrationSample, Sample
from flowmm.profiler.sensitivity import MIXED, PROTOCOLS, ROWS_PER_BATCH, Reading, check_protocols
from flowmm.runtime.budgets import entry_budget
from flowmm.runtime.cache import CompressionSettings
from flowmm.runtime.replay import Trial, build_trial, reading_caches

Measure = Callable[[Tensor], Tensor]
"""From a token's KL(full || compressed) in nats to what it costs."""


def shift_bound(divergence: Tensor) -> Tensor:
    """How likely the next token is another one, at most: min(1, sqrt(KL / 2)) (Pinsker's inequality).

    A token that is lost costs 1, however lost it is, and one that is about to be lost shows: the mean hangs less on a
    few prompts than that of KL itself.
    """
    return (divergence / 2).sqrt().clamp(max=1)


def nats(divergence: Tensor) -> Tensor:
    """KL itself."""
    return divergence


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
        trials: per prompt, one for each protocol that it fits.
        held: prefilled readings in place of the trials; ``None``: every call of :meth:`costs` prefills again.
    """

    model: LoadedModel
    plan: Plan
    trials: tuple[tuple[Trial, ...], ...]
    held: tuple[tuple[Reading, ...], ...] | None = None

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
    ) -> JointPrompts:
        """Args as of :func:`flowmm.profiler.sensitivity.measure_sensitivity`.

        Args:
            hold: keep all prompts' queries, keys and values in memory, which saves a prefill per prompt and question.

        Raises:
            InputError: an unknown protocol, or no prompt that fits any of the protocols.
        """
        check_protocols(protocols)
        readable = (sample for sample in samples if isinstance(sample, CalibrationSample))
        chats = [[PROTOCOLS[name](sample.messages) for name in protocols] for sample in islice(readable, limit)]
        trials = [tuple(build_trial(model, chat) for chat in of if chat is not None) for of in chats]
        prompts = cls(model, plan, tuple(of for of in trials if of))
        if not prompts.trials:
            raise InputError(
                f"no calibration prompt fits {' or '.join(protocols)}: 'blind' needs prompts whose last turn ends with "
                "a text behind other parts"
            )
        return replace(prompts, held=tuple(tuple(of) for of in prompts._readings())) if hold else prompts

    def __len__(self) -> int:
        return len(self.trials)

    def every(self, step: int, start: int) -> JointPrompts:
        """Each `step`-th prompt from `start` on; all where that would be none."""
        part = slice(start, None, step) if start < len(self) else slice(None)
        return replace(self, trials=self.trials[part], held=None if self.held is None else self.held[part])

    def _readings(self) -> Iterator[Sequence[Reading]]:
        if self.held is not None:
            yield from self.held
            return
        for trials in self.trials:
            yield [Reading.of(self.model, self.plan, trial) for trial in trials]

    def costs(
        self,
        arrangements: Sequence[Arrangement],
        *,
        of: Measure = shift_bound,
        forget: bool = True,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """``[prompts, arrangements]`` fp64: mean over answer tokens and protocols.

        Args:
            of: what a token costs.
            forget: free what compressions of a prompt have in common before the next prompt.
            progress: called with (finished prompts, prompts).
        """
        costs = []
        with reading_caches(self.model.model):
            for done, readings in enumerate(self._readings(), start=1):
                costs.append(np.mean([_costs(reading, arrangements, of) for reading in readings], axis=0))
                if forget:
                    for reading in readings:
                        reading.prefilled.forget_shared()
                if progress is not None:
                    progress(done, len(self))
        return np.stack(costs)


def _costs(reading: Reading, arrangements: Sequence[Arrangement], of: Measure) -> np.ndarray:
    """``[arrangements]`` of one prompt under one protocol."""
    found = []
    for start in range(0, len(arrangements), ROWS_PER_BATCH):
        batch = arrangements[start : start + ROWS_PER_BATCH]
        made = [reading.cache(arrangement.settings(reading.modes)) for arrangement in batch]
        found.append(of(reading.divergence(made)).mean(-1).double().cpu().numpy())
    return np.concatenate(found)
