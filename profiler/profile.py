"""Profile a model: one forward pass per calibration prompt, then a frozen plan."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

import flowmm
from flowmm.errors import InputError
from flowmm.models import LoadedModel
from flowmm.plans import CalibrationFingerprint, Environment, MethodParameters, Plan, source_name, utc_now
from flowmm.profiler.calibration import CalibrationSample, dataset_sha256
from flowmm.profiler.recorder import record_flow
from flowmm.profiler.records import PromptRecord, RecordStore
from flowmm.profiler.statistics import plan_layers, token_statistics

Progress = Callable[[int, int], None]


def profile(
    model: LoadedModel,
    samples: Sequence[CalibrationSample],
    *,
    source: str,
    method: MethodParameters | None = None,
    seed: int = 0,
    records: Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Measure rho of every layer on calibration prompts and decide each layer's mode (eq. 6-7).

    Args:
        model: loaded with sdpa or eager attention.
        samples: calibration prompts, in order.
        source: name of the data set, recorded in the plan.
        method: parameters to freeze in the plan; default ``robust``.
        seed: recorded in the plan.
        records: parquet file for per-prompt records; ``None`` keeps them in memory only.
        resume: use what an earlier, interrupted run of the same model left beside `records`.
        progress: called with (finished, total) after every prompt.

    Raises:
        InputError: no samples, unreadable images, or no prompt with both modalities.
    """
    if not samples:
        raise InputError("no calibration prompts were given; expected at least one")
    method = method or MethodParameters()
    fingerprint = model.fingerprint()
    store = None if records is None else _store(records, fingerprint.model_dump_json(), resume)
    finished = {} if store is None else store.load()
    kept: list[PromptRecord] = []
    for index, sample in enumerate(samples):
        digest = sample.sha256()
        record = finished.get((index, digest))
        if record is None:
            record = PromptRecord(index, digest, sample.name, record_flow(model.model, _inputs(model, sample)))
            if store is not None:
                store.add(record)
        kept.append(record)
        if progress is not None:
            progress(index + 1, len(samples))
    flows = [record.flow for record in kept]
    plan = Plan(
        flowmm_version=flowmm.__version__,
        created_at=utc_now(),
        model=fingerprint,
        calibration=CalibrationFingerprint(
            source=source_name(source),
            dataset_sha256=dataset_sha256(record.sample_sha256 for record in kept),
            n_samples=len(kept),
            seed=seed,
            chat_template_sha256=_sha256(_template(model)),
            image_processor_sha256=_sha256(_processor_settings(model)),
            tokens=token_statistics(flows),
        ),
        method=method,
        layers=plan_layers(flows, method.theta, method.budget),
        environment=_environment(model),
    )
    if store is not None:
        store.finish(kept)
    return plan


def _store(path: Path, model: str, resume: bool) -> RecordStore:
    store = RecordStore(path, {"model": model, "flowmm": flowmm.__version__})
    if not resume:
        store.discard()
    return store


def _inputs(model: LoadedModel, sample: CalibrationSample) -> dict[str, torch.Tensor]:
    try:
        return model.build_inputs(sample.messages)
    except InputError as error:
        raise InputError(f"{sample.name}: {error}") from error


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
