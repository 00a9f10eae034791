"""Profile a model: one forward pass per calibration prompt, then a frozen plan."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import length_hint
from pathlib import Path

import torch
import transformers

import flowmm
from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import (
    CalibrationFingerprint,
    Environment,
    MethodParameters,
    ModelFingerprint,
    Plan,
    source_name,
    utc_now,
)
from flowmm.profiler.ranks import Ranks, joined_ranks
from flowmm.profiler.recorder import record_flow
from flowmm.profiler.records import PromptRecord, RecordStore, read_tables
from flowmm.profiler.samples import Sample, UnreadableSample, dataset_sha256
from flowmm.profiler.statistics import Measurements, half_widths, plan_layers, token_statistics

Progress = Callable[[int, int | None], None]
OnSkip = Callable[[UnreadableSample], None]

MAX_BAD = 0.01
# `until_ci` looks at the intervals after so many samples, and then after every further eighth.
FIRST_CHECK = 32
NAMED_BAD = 5


def profile(
    model: LoadedModel,
    samples: Iterable[Sample],
    *,
    source: str,
    method: MethodParameters | None = None,
    seed: int = 0,
    records: Path | None = None,
    resume: bool = True,
    max_bad: float = MAX_BAD,
    until_ci: float | None = None,
    sampled_rows: int | None = None,
    progress: Progress | None = None,
    on_skip: OnSkip | None = None,
) -> Plan:
    """Measure rho of every layer on calibration prompts and decide each layer's mode (eq. 6-7).

    Under torchrun every rank calls this with the same arguments, measures every so-manieth sample, and returns the
    same plan, which does not depend on the number of ranks.

    Args:
        model: loaded with sdpa or eager attention.
        samples: calibration prompts, in order; ``operator.length_hint`` tells how many where it can.
        source: name of the data set, recorded in the plan.
        method: parameters to freeze in the plan; default ``robust``. ``rho_kind`` names the estimator that decides.
        seed: recorded in the plan; of the bootstrap over prompts.
        records: parquet file for per-prompt records; ``None`` keeps them only while this runs.
        resume: use what an earlier, interrupted run of the same model left beside `records`.
        max_bad: largest share of samples that may be unreadable; they are skipped and counted.
        until_ci: stop once half the 95 % interval of every layer's deciding estimate is at most this.
        sampled_rows: also record rho from so many sampled rows of each modality, with its standard error.
        progress: called with (finished, total or None) after every prompt of this rank.
        on_skip: called with every sample of this rank that is skipped.

    Raises:
        InputError: no samples, too many unreadable ones, or no prompt with both modalities.
    """
    method = method or MethodParameters()
    with joined_ranks() as ranks, _record_path(records, ranks) as path:
        fingerprint = model.fingerprint()
        identity = {"model": fingerprint.model_dump_json(), "flowmm": flowmm.__version__, "rows": str(sampled_rows)}
        store = RecordStore(path, identity)
        if not resume and ranks.first:
            store.discard()
        # No rank may look for finished prompts before rank 0 has removed them, or write where it still will.
        ranks.gather("ready")
        run = _Run(model, store, ranks, sampled_rows, max_bad, progress, on_skip, _total(samples))
        run.measure(samples, method, seed, until_ci)
        return _agreed_plan(run, fingerprint, method, source, seed)


def _total(samples: Iterable[Sample]) -> int | None:
    hint = length_hint(samples, -1)
    return None if hint < 0 else hint


@contextmanager
def _record_path(records: Path | None, ranks: Ranks) -> Generator[Path]:
    if records is not None:
        yield records
    elif ranks.size > 1:
        raise InputError("several ranks meet in the record file: pass records= (a path that all of them see)")
    else:
        with tempfile.TemporaryDirectory(prefix="flowmm-") as folder:
            yield Path(folder) / "records.parquet"


@dataclass
class _Outcome:
    """Samples by index: content hash of those that were measured, reason of those that cannot be read."""

    kept: dict[int, str] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def add(self, other: _Outcome) -> None:
        self.kept |= other.kept
        self.skipped |= other.skipped

    def dumps(self) -> str:
        return json.dumps([list(self.kept.items()), list(self.skipped.items())])

    @classmethod
    def loads(cls, text: str) -> _Outcome:
        kept, skipped = json.loads(text)
        return cls(dict(kept), dict(skipped))


@dataclass
class _Run:
    """One rank's way through the samples; `outcome` is that of all ranks."""

    model: LoadedModel
    store: RecordStore
    ranks: Ranks
    sampled_rows: int | None
    max_bad: float
    progress: Progress | None
    on_skip: OnSkip | None
    total: int | None
    outcome: _Outcome = field(default_factory=_Outcome)

    def measure(self, samples: Iterable[Sample], method: MethodParameters, seed: int, until_ci: float | None) -> None:
        """Measure samples to the end, or until the intervals are narrow enough; exchange what was kept."""
        finished = self.store.finished()
        numbered = enumerate(samples)
        for count in _stages(until_ci):
            seen, own = 0, _Outcome()
            try:
                for index, sample in islice(numbered, count):
                    seen += 1
                    if self.ranks.takes(index):
                        self._measure_one(index, sample, finished, own)
            finally:
                self.store.flush()
            for text in self.ranks.gather(own.dumps()):
                self.outcome.add(_Outcome.loads(text))
            if seen != count or (until_ci is not None and self._is_narrow(method, seed, until_ci)):
                break
        kept, skipped = self.outcome.kept, self.outcome.skipped
        self._refuse_bad(skipped, len(kept) + len(skipped))
        if not kept:
            raise InputError("no calibration prompts were given; expected at least one")

    def _measure_one(self, index: int, sample: Sample, finished: set[tuple[int, str]], own: _Outcome) -> None:
        try:
            if isinstance(sample, UnreadableSample):
                raise InputError(sample.reason)
            opened = sample.opened()
            digest = opened.sha256()
            if (index, digest) not in finished:
                inputs = self.model.build_inputs(opened.messages)
                flow = record_flow(self.model.model, inputs, sampled_rows=self.sampled_rows)
                self.store.add(PromptRecord(index, digest, sample.name, flow))
            own.kept[index] = digest
        except InputError as error:
            self._skip(index, UnreadableSample(sample.name, str(error).removeprefix(f"{sample.name}: ")), own)
        if self.progress is not None:
            self.progress(index + 1, self.total)

    def _skip(self, index: int, sample: UnreadableSample, own: _Outcome) -> None:
        own.skipped[index] = f"{sample.name}: {sample.reason}"
        if self.on_skip is not None:
            self.on_skip(sample)
        if self.total:
            # What is certain to fail in the end need not run to the end.
            self._refuse_bad(self.outcome.skipped | own.skipped, self.total)

    def _refuse_bad(self, skipped: dict[int, str], total: int) -> None:
        if len(skipped) > self.max_bad * total:
            named = [skipped[index] for index in sorted(skipped)][:NAMED_BAD]
            more = f" and {len(skipped) - len(named)} more" if len(skipped) > len(named) else ""
            raise InputError(
                f"{len(skipped)} of {total} calibration samples cannot be read, more than {self.max_bad:.3g} of all "
                f"(--max-bad): {'; '.join(named)}{more}. Repair or remove them, or allow more"
            )

    def _is_narrow(self, method: MethodParameters, seed: int, until_ci: float) -> bool:
        verdict = "wide"
        if self.ranks.first and self.outcome.kept:
            measured = Measurements.from_tables(self.store.tables(self.outcome.kept))
            flows = measured.flows[method.rho_kind]
            flows = flows[measured.has_flow] if method.rho_kind == "lift" else flows
            verdict = "narrow" if half_widths(flows, seed).max() <= until_ci else "wide"
        return self.ranks.from_first(verdict) == "narrow"


def _stages(until_ci: float | None) -> Iterator[int | None]:
    """Samples to read before the next look at the intervals; the same for any number of ranks. None: all."""
    if until_ci is None:
        yield None
        return
    seen = FIRST_CHECK
    yield seen
    while True:
        more = max(FIRST_CHECK, seen // 8)
        seen += more
        yield more


def _agreed_plan(run: _Run, fingerprint: ModelFingerprint, method: MethodParameters, source: str, seed: int) -> Plan:
    """Rank 0 finishes the records and makes the plan; all ranks return it, or raise its error."""
    answer: dict[str, str] = {}
    if run.ranks.first:
        try:
            run.store.finish(run.outcome.kept)
            answer["plan"] = _plan(run, fingerprint, method, source, seed).dumps()
        except InputError as error:
            answer["error"] = str(error)
    answer = json.loads(run.ranks.from_first(json.dumps(answer)))
    if "error" in answer:
        raise InputError(answer["error"])
    return Plan.loads(answer["plan"])


def _plan(run: _Run, fingerprint: ModelFingerprint, method: MethodParameters, source: str, seed: int) -> Plan:
    kept, measured = run.outcome.kept, Measurements.from_tables(read_tables(run.store.path))
    return Plan(
        flowmm_version=flowmm.__version__,
        created_at=utc_now(),
        model=fingerprint,
        calibration=CalibrationFingerprint(
            source=source_name(source),
            dataset_sha256=dataset_sha256(kept[index] for index in sorted(kept)),
            n_samples=len(kept),
            seed=seed,
            chat_template_sha256=_sha256(_template(run.model)),
            image_processor_sha256=_sha256(_processor_settings(run.model)),
            tokens=token_statistics(measured),
            n_skipped=len(run.outcome.skipped),
        ),
        method=method,
        layers=plan_layers(measured, method, seed),
        environment=_environment(run.model),
    )


def _template(model: LoadedModel) -> str | None:
    template = model.chat_template or model.tokenizer.chat_template
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _processor_settings(model: LoadedModel) -> str:
    """What the image processor does to pixels; class names and versions left out."""
    settings = model.image_processor.to_dict()
    noise = ("image_processor_type", "processor_class", "_processor_class")
    return json.dumps({k: v for k, v in settings.items() if k not in noise}, sort_keys=True, default=str)


def _environment(model: LoadedModel) -> Environment:
    return Environment(
        flowmm=flowmm.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=model.model.device.type,
        platform=f"{platform.system()} {platform.machine()}",
    )
