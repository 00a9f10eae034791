"""What a profile would cost, before it runs: a few prompts are measured, nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from operator import length_hint
from typing import Any

from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import ModelFingerprint
from flowmm.profiler.decisions import GATES, OPERATORS, RACES, SELECTIONS, SIMILARITIES, TOGETHER, Budgets, blocks
from flowmm.profiler.joint_budgets import FACTORS, REACHES, STEPS, step_sizes
from flowmm.profiler.joint_costs import BUDGETS
from flowmm.profiler.racing import ONE_IN, part_ends
from flowmm.profiler.recorder import record_flow
from flowmm.profiler.samples import Sample, UnreadableSample
from flowmm.profiler.sensitivity import ANSWER_TOKENS, RATIOS, ROWS_PER_BATCH

PROBED = 4
# Probes are spread over so many first samples: one data set often follows another.
LOOKED_AT = 64


@dataclass(frozen=True)
class LayerCost:
    """What measuring layers costs: `prefills` of whole prompts, `feeds` of a continuation and a few answer tokens to
    batches of caches (forward calls), at most; `cache_bytes`: keys and values held at once for a prompt of mean length.
    """

    prefills: int
    feeds: int
    cache_bytes: int

    def __str__(self) -> str:
        return (
            f"measuring layers: at most {self.prefills} more prefills, {self.feeds} forward calls of a few tokens on "
            f"compressed caches, {self.cache_bytes / 2**20:.0f} MiB of keys and values at once"
        )


@dataclass(frozen=True)
class LayerMeasurements:
    """What is to be measured about layers, as of :func:`flowmm.profiler.decisions.measure_layers`; `prompts` is its
    limit, and `held` says that prompts stay in memory though no joint budgets are measured."""

    prompts: int
    protocols: tuple[str, ...]
    budgets: Budgets | None
    choices: bool
    held: bool = False

    def cost(self, model: ModelFingerprint, tokens: float, questions: float = 1) -> LayerCost | None:
        """At most this for prompts of so many tokens; None where nothing is measured.

        Args:
            questions: about a prompt where they come after the compression.
        """
        if self.budgets is None and not self.choices:
            return None
        runs, layers, joint = self.prompts * len(self.protocols), model.num_layers, self.budgets == "joint"
        asked = sum(questions if protocol == "blind" else 1 for protocol in self.protocols) / len(self.protocols)
        prefills = feeds = 0
        if self.budgets == "measured":
            # Curves of layers with a choice are measured twice.
            prefills += runs * (1 + self.choices)
            feeds += runs * (1 + self.choices) * _batches(len(RATIOS)) * layers
        if self.choices:
            prefills += 0 if joint else runs * (1 if self.held else RACES + 1)
            feeds += round(runs * _choice_batches(layers, self.prompts))
        if joint:
            prefills += runs
            # Choices need the smallest total before, and all totals go on with them.
            feeds += round(runs * (len(BUDGETS) + self.choices) * _step_batches(layers, self.prompts))
        feeds = math.ceil((feeds + prefills * (ANSWER_TOKENS + 1)) * asked)
        # Per token and layer: captured queries, keys and values, and every row's keys and values.
        captured = model.num_attention_heads + 2 * model.num_kv_heads
        rows = 2 * model.num_kv_heads * ROWS_PER_BATCH
        width = model.head_dim * (4 if model.dtype == "float32" else 2)
        return LayerCost(
            prefills=prefills,
            feeds=feeds,
            cache_bytes=round(tokens * layers * ((runs if joint or self.held else 1) * captured + rows) * width),
        )


def _batches(variants: int) -> int:
    return -(-variants // ROWS_PER_BATCH)


def _choice_batches(layers: int, prompts: int) -> float:
    """Batches of caches per prompt and protocol."""
    asked = len(blocks(layers)) * (len(SELECTIONS) + len(OPERATORS) + len(SIMILARITIES) + len(GATES) + 3)
    # Every other prompt proposes, and the others confirm; those look at every chosen layer twice at the end.
    half = -(-prompts // 2)
    raced = _racing_batches(asked, half) + _racing_batches(TOGETHER, half)
    return RACES * raced / 2 + _batches(len(BUDGETS) * (1 + layers))


def _step_batches(layers: int, prompts: int) -> float:
    """Batches of caches per prompt and protocol, for one total."""
    size, most = step_sizes(prompts)
    total, each = 0, _batches(1 + layers * len(FACTORS)) + _batches(1 + 2 * len(REACHES))
    for _ in range(STEPS):
        total += size * each
        size = min(2 * size, most)
    return total / prompts


def _racing_batches(proposals: int, prompts: int) -> float:
    """Batches of caches per prompt and protocol, when so many prompts measure proposals once."""
    total, left = 0, proposals
    for start, stop in pairwise((0, *part_ends(prompts))):
        total += (stop - start) * _batches(1 + left)
        left = -(-left // ONE_IN)
    return total / prompts


@dataclass(frozen=True)
class Forecast:
    """Expected cost of a profile, from `probed` prompts.

    `samples` and what follows from it (`tokens` in all, `seconds`) are None where the data is a stream of unknown
    length. `tokens_per_sample` and `seconds_per_sample` are means. `layer_cost` comes on top.
    """

    model: str
    layers: int
    samples: int | None
    probed: int
    tokens_per_sample: float
    seconds_per_sample: float
    layer_cost: LayerCost | None = None

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
        layers = "" if self.layer_cost is None else f"\n{self.layer_cost}"
        if self.seconds is None:
            counted = f"prompts of unknown number, {each} (mean of {self.probed})"
        else:
            counted = (
                f"{self.samples} prompts, {each} (mean of {self.probed}), "
                f"about {self.tokens} tokens and {self.seconds:.0f} s in all"
            )
        return f"{self.model}, {self.layers} layers: {counted}{layers}"


def forecast(model: LoadedModel, samples: Iterable[Sample], measurements: LayerMeasurements | None = None) -> Forecast:
    """Measure a few prompts, after one that pays for warming up, and extrapolate; `measurements` are counted.

    Raises:
        InputError: no sample can be read.
    """
    hint = length_hint(samples, -1)
    readable = [s for s in islice(samples, PROBED) if not isinstance(s, UnreadableSample)]
    conversations = [sample.messages for sample in readable]
    if not conversations:
        raise InputError(
            f"none of the first {PROBED} calibration samples can be read; run without --dry-run to see why"
        )
    record_flow(model.model, model.build_inputs(conversations[0]))
    start = time.perf_counter()
    tokens = [record_flow(model.model, model.build_inputs(messages)).tokens for messages in conversations]
    seconds = time.perf_counter() - start
    fingerprint = model.fingerprint()
    length = sum(tokens) / len(tokens)
    questions = 1 + sum(len(sample.further) for sample in readable) / len(readable)
    return Forecast(
        model=model.source,
        layers=fingerprint.num_layers,
        samples=None if hint < 0 else hint,
        probed=len(tokens),
        tokens_per_sample=length,
        seconds_per_sample=seconds / len(tokens),
        layer_cost=None if measurements is None else measurements.cost(fingerprint, length, questions),
    )
