"""Per-prompt records: one parquet file beside the plan, written prompt by prompt so that a killed run can resume."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flowmm.errors import InputError
from flowmm.profiler.recorder import LayerFlow, PromptFlow

IDENTITY_KEY = b"flowmm.identity"

_PER_HEAD = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("sample_sha256", pa.string()),
        ("sample", pa.string()),
        ("tokens", pa.int64()),
        ("visual_tokens", pa.int64()),
        ("images", pa.int64()),
        ("sinks", pa.int64()),
        ("uniform_rho", pa.float64()),
        ("layer", pa.int64()),
        ("rho", _PER_HEAD),
        ("rho_nosink", _PER_HEAD),
        ("text_mass_of_visual", _PER_HEAD),
        ("visual_mass_of_text", _PER_HEAD),
        ("sink_mass", _PER_HEAD),
    ]
)
_PROMPT_FIELDS = ("tokens", "visual_tokens", "images", "sinks", "uniform_rho")


@dataclass(frozen=True)
class PromptRecord:
    """One profiled prompt: its place in the calibration set, its content hash, its flow."""

    index: int
    sample_sha256: str
    sample: str
    flow: PromptFlow


def to_table(records: Iterable[PromptRecord], identity: dict[str, str]) -> pa.Table:
    """Long table: a row per prompt and layer. `identity` (model, flowmm version) goes into the metadata."""
    rows = []
    for record in records:
        prompt = {name: getattr(record.flow, name) for name in _PROMPT_FIELDS}
        place = {"index": record.index, "sample_sha256": record.sample_sha256, "sample": record.sample}
        rows += [place | prompt | {"layer": i} | asdict(layer) for i, layer in enumerate(record.flow.layers)]
    metadata = {IDENTITY_KEY: json.dumps(identity, sort_keys=True).encode()}
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))


def from_table(table: pa.Table) -> list[PromptRecord]:
    """Inverse of :func:`to_table`, in index order."""
    prompts: dict[int, list[dict]] = {}
    for row in table.to_pylist():
        prompts.setdefault(row["index"], []).append(row)
    return [_prompt_record(sorted(rows, key=lambda row: row["layer"])) for _, rows in sorted(prompts.items())]


def _prompt_record(rows: list[dict]) -> PromptRecord:
    first = rows[0]
    layers = [LayerFlow(**{name: row[name] for name in LayerFlow.__dataclass_fields__}) for row in rows]
    flow = PromptFlow(**{name: first[name] for name in _PROMPT_FIELDS}, layers=layers)
    return PromptRecord(first["index"], first["sample_sha256"], first["sample"], flow)


class RecordStore:
    """Finished prompts on disk: ``PATH`` when a profile is complete, ``PATH.parts/`` while it runs.

    Each prompt is one file, written under a temporary name and renamed, so a kill leaves it whole or absent.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path = path
        self.parts = path.with_name(path.name + ".parts")
        self.identity = identity

    def load(self) -> dict[tuple[int, str], PromptRecord]:
        """Finished prompts of the same model and version, by (index, content hash)."""
        files = [self.path] if self.path.exists() else []
        files += sorted(self.parts.glob("*.parquet")) if self.parts.is_dir() else []
        found: dict[tuple[int, str], PromptRecord] = {}
        for file in files:
            for record in self._read(file):
                found[record.index, record.sample_sha256] = record
        return found

    def _read(self, file: Path) -> list[PromptRecord]:
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable parquet file ({error}); remove it or pass --no-resume") from error
        identity = json.loads((table.schema.metadata or {}).get(IDENTITY_KEY, b"null"))
        return from_table(table) if identity == self.identity and table.schema.equals(SCHEMA) else []

    def add(self, record: PromptRecord) -> None:
        """Keep one finished prompt.

        Raises:
            InputError: the directory cannot be written.
        """
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._write(self.parts / f"{record.index:06d}-{record.sample_sha256[:16]}.parquet", [record])
        except OSError as error:
            raise InputError(f"{self.parts}: cannot be written ({error})") from error

    def finish(self, records: list[PromptRecord]) -> None:
        """Replace the parts by one file with exactly these prompts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(self.path, records)
        shutil.rmtree(self.parts, ignore_errors=True)

    def discard(self) -> None:
        """Forget everything on disk."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _write(self, target: Path, records: list[PromptRecord]) -> None:
        temporary = target.with_name(target.name + ".tmp")
        try:
            pq.write_table(to_table(records, self.identity), temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
