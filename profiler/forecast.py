"""What a profile would cost, before it runs: a few prompts are measured, nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from operator import length_hint
from typing import Any

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.profiler.recorder import record_flow
from flowmm.profiler.samples import Sample, UnreadableSample

PROBED = 4
# Probes are spread over so many first samples: one data set often follows another.
LOOKED_AT = 64


@dataclass(frozen=True)
class Forecast:
    """Expected cost of a profile, from `probed` prompts.

    `samples` and what follows from it (`tokens` in all, `seconds`) are None where the data is a stream of unknown
    length. `tokens_per_sample` and `seconds_per_sample` are means.
    """

    model: str
    layers: int
    samples: int | None
    probed: int
    tokens_per_sample: float
    seconds_per_sample: float

    @property
    def tokens(self) -> int | None:
        return None if self.samples is None else round(self.samples * self.tokens_per_sample)

    @property
    def seconds(self) -> float | None:
        return None if self.samples is None else self.samples * self.seconds_per_sample

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"tokens": self.tokens, "seconds": self.seconds}

    def __str__(self) -> str:
        each = f"{self.tokens_per_sample:.0f} tokens and {self.seconds_per_sample:.3g} s each"
        if self.seconds is None:
            return f"{self.model}, {self.layers} layers: prompts of unknown number, {each} (mean of {self.probed})"
        return (
            f"{self.model}, {self.layers} layers: {self.samples} prompts, {each} (mean of {self.probed}), "
            f"about {self.tokens} tokens and {self.seconds:.0f} s in all"
        )


def forecast(model: LoadedModel, samples: Iterable[Sample]) -> Forecast:
    """Measure a few prompts, after one that pays for warming up, and extrapolate.

    Raises:
        InputError: no sample can be read.
    """
    hint = length_hint(samples, -1)
    conversations = [s.messages for s in islice(samples, PROBED) if not isinstance(s, UnreadableSample)]
    if not conversations:
        raise InputError(
            f"none of the first {PROBED} calibration samples can be read; run without --dry-run to see why"
        )
    record_flow(model.model, model.build_inputs(conversations[0]))
    start = time.perf_counter()
    tokens = [record_flow(model.model, model.build_inputs(messages)).tokens for messages in conversations]
    seconds = time.perf_counter() - start
    return Forecast(
        model=model.source,
        layers=model.fingerprint().num_layers,
        samples=None if hint < 0 else hint,
        probed=len(tokens),
        tokens_per_sample=sum(tokens) / len(tokens),
        seconds_per_sample=seconds / len(tokens),
    )
