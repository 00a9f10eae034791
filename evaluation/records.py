"""Measured rows on disk: one parquet file per chunk while a grid runs, one ``rows.parquet`` when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flowmm.errors import InputError
from flowmm.plans.files import replacing

IDENTITY_KEY = b"flowmm.identity"
CHUNK_ROWS = 500

Key = tuple[str | int | float, ...]


@dataclass(frozen=True)
class Row:
    """One case under one method, budget and protocol.

    Attributes:
        digest: of the method's parameters.
        budget: ratio asked for; 1 for the full cache.
        correct: exact match; ``None`` without a label.
        text, expected: decoded answer, right answer (the full cache's answer where there is no label).
        tokens: of the compressed prompt.
        kept: entries per KV head after compression, mean over layers.
        bytes: of the compressed prompt's keys, values and biases; ``full_bytes`` those of the full cache.
        kl: KL(full || compressed) of the next token in nats: at the first answer position, or without a label mean over
            the full cache's answer, teacher-forced.
        agreement: share of the same positions whose most likely token is the full cache's.
        attention_error: of each layer, mean over the same positions, see
            :func:`flowmm.evaluation.attention_error.attention_errors`; ``None`` with a label.
    """

    suite: str
    split: str
    task: str
    seed: int
    index: int
    protocol: str
    method: str
    digest: str
    budget: float
    correct: bool | None
    text: str
    expected: str
    tokens: int
    kept: float
    bytes: int
    full_bytes: int
    kl: float
    agreement: float
    attention_error: tuple[float, ...] | None = None

    @property
    def key(self) -> Key:
        """What a row is found by; see :func:`row_key`."""
        case = (self.suite, self.split, self.task, self.seed, self.index)
        return row_key(case, self.protocol, self.method, self.digest, self.budget)


def row_key(case: tuple[str, str, str, int, int], protocol: str, method: str, digest: str, budget: float) -> Key:
    """Key of a row; `case` is suite, split, task, seed, index."""
    return (*case, protocol, method, digest, budget)


_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool | None": pa.bool_(),
    "tuple[float, ...] | None": pa.list_(pa.float64()),
}
SCHEMA = pa.schema([(name, _TYPES[str(field.type)]) for name, field in Row.__dataclass_fields__.items()])


def _row(values: dict[str, Any]) -> Row:
    if values["attention_error"] is not None:
        values["attention_error"] = tuple(values["attention_error"])
    return Row(**values)


class RowStore:
    """Rows of one model and plan in a directory.

    A chunk is written under a temporary name and renamed, so a kill loses at most the rows of the open chunk and never
    leaves half a file. A row that is in two files counts once.
    """

    def __init__(self, directory: Path, identity: dict[str, str]) -> None:
        self.table = directory / "rows.parquet"
        self.parts = directory / "rows.parts"
        self.identity = identity
        self._rows: dict[Key, Row] = {}
        self._open: list[Row] = []

    def load(self) -> dict[Key, Row]:
        """All rows of earlier runs.

        Raises:
            InputError: a damaged file, or rows of another model, plan or version.
        """
        files = [self.table] if self.table.exists() else []
        files += sorted(self.parts.glob("*.parquet")) if self.parts.is_dir() else []
        for file in files:
            self._rows |= {row.key: row for row in self._read(file)}
        return dict(self._rows)

    def _read(self, file: Path) -> list[Row]:
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable parquet file ({error}); remove it or pass --no-resume") from error
        identity = json.loads((table.schema.metadata or {}).get(IDENTITY_KEY, b"{}"))
        if identity != self.identity or not table.schema.equals(SCHEMA):
            changed = sorted(name for name in self.identity if identity.get(name) != self.identity[name])
            raise InputError(
                f"{file}: holds rows measured with another {', '.join(changed) or 'version'}; choose another --out, or "
                "pass --no-resume to replace them"
            )
        return [_row(values) for values in table.to_pylist()]

    def add(self, rows: Iterable[Row]) -> None:
        """Take in finished rows; writes a chunk when enough are there.

        Raises:
            InputError: the directory cannot be written.
        """
        for row in rows:
            self._rows[row.key] = row
            self._open.append(row)
        if len(self._open) >= CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the open chunk now.

        Raises:
            InputError: the directory cannot be written.
        """
        if not self._open:
            return
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            number = 1 + max((int(file.stem) for file in self.parts.glob("*.parquet")), default=0)
            self._write(self.parts / f"{number:06d}.parquet", self._open)
        except OSError as error:
            raise InputError(f"{self.parts}: cannot be written ({error})") from error
        self._open = []

    def finish(self) -> None:
        """Put all rows, old and new, into one file and remove the chunks."""
        self.flush()
        if self._rows:
            self.table.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.table, self._rows.values())
        shutil.rmtree(self.parts, ignore_errors=True)

    def discard(self) -> None:
        """Forget everything on disk."""
        self.table.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _write(self, target: Path, rows: Iterable[Row]) -> None:
        metadata = {IDENTITY_KEY: json.dumps(self.identity, sort_keys=True).encode()}
        table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA.with_metadata(metadata))
        with replacing(target) as file:
            pq.write_table(table, file)
