"""Calibration prompts: one stream from one or several sources, a seeded choice of it, and its identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from flowmm.errors import InputError
from flowmm.plans import source_name
from flowmm.profiler.samples import CalibrationSample, Sample, Source, UnreadableSample
from flowmm.profiler.sources import STDIN, open_source

# Of several sources, so many are named in a plan.
MAX_NAMED = 4


@dataclass(frozen=True)
class CalibrationPrompts:
    """Samples of all sources in order, or a seeded choice of them; read anew in every iteration.

    ``operator.length_hint`` says how many there are, where that is known.
    """

    sources: tuple[Source, ...]
    limit: int | None = None
    seed: int = 0

    def __iter__(self) -> Iterator[Sample]:
        samples = chain.from_iterable(source.read() for source in self.sources)
        count = self._count()
        if self.limit is None or count is None:
            yield from islice(samples, self.limit)
            return
        chosen = np.zeros(count, dtype=bool)
        chosen[np.random.default_rng(self.seed).permutation(count)[: self.limit]] = True
        yield from (sample for sample, wanted in zip(samples, chosen, strict=False) if wanted)

    def __length_hint__(self) -> int:
        count = self._count()
        if count is None:
            return NotImplemented if self.limit is None else self.limit
        return count if self.limit is None else min(count, self.limit)

    def _count(self) -> int | None:
        counts = [source.count for source in self.sources]
        return None if None in counts else sum(count for count in counts if count is not None)


def open_calibration(
    data: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    prompt: str | None = None,
    photo_size: bool = False,
) -> CalibrationPrompts:
    """Calibration prompts as a stream; a sample that cannot be read is an :class:`UnreadableSample` in its place.

    Args:
        data: each a file of JSON lines or a JSON document (prompts or chat messages), a parquet file or a folder of
            them, a MileBench folder, a folder of images, ``-`` (JSON lines on stdin), or ``pocket`` (generated).
        limit: how many; a seeded choice kept in order (from stdin the first ones); the generator makes 64 unless told.
        seed: of the choice, and of the generator.
        prompt: the question for a folder of images.
        photo_size: enlarge generated pictures (for models that expect photographs).

    Raises:
        InputError: no such data, nothing in it, or a file that cannot be read at all.
    """
    sources = []
    for name in data:
        source = open_source(name, limit=limit, seed=seed, prompt=prompt, photo_size=photo_size)
        if source.count == 0:
            raise InputError(f"{name}: holds no calibration prompt")
        sources.append(source)
    return CalibrationPrompts(tuple(sources), limit, seed)


def load_calibration(
    data: str, *, limit: int | None = None, seed: int = 0, prompt: str | None = None, photo_size: bool = False
) -> list[CalibrationSample]:
    """All samples of :func:`open_calibration`, in memory and without exception.

    Raises:
        InputError: also for a line that is not a prompt (its number is named).
    """
    samples = []
    for sample in open_calibration([data], limit=limit, seed=seed, prompt=prompt, photo_size=photo_size):
        if isinstance(sample, UnreadableSample):
            raise InputError(f"{sample.name}: {sample.reason}")
        samples.append(sample)
    return samples


def calibration_name(data: Sequence[str]) -> str:
    """What a plan says about where its prompts came from: names of files and folders, never their paths."""
    if len(data) == 1:
        # resolve() gives "." a name.
        path = Path(data[0])
        return "stdin" if data[0] == STDIN else source_name(str(path.resolve()) if path.exists() else data[0])
    names = [calibration_name([name]).rpartition("/")[2] for name in data]
    return "+".join(names[:MAX_NAMED]) + (f"+{len(names) - MAX_NAMED}" if len(names) > MAX_NAMED else "")
