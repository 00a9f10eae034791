"""Per-prompt records: one parquet file beside the plan, written in parts while a profile runs, so that it can resume.

A part is written under a temporary name and renamed, so a kill leaves it whole or absent.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flowmm.errors import InputError
from flowmm.plans.files import replacing
from flowmm.profiler.flows import LayerFlow, PromptFlow

IDENTITY_KEY = b"flowmm.identity"
# A finished prompt waits this long, or for this many others, before it is on disk.
SECONDS_IN_MEMORY = 1.0
PROMPTS_IN_MEMORY = 64
PROMPTS_PER_ROW_GROUP = 64

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
        ("rho_nosink_auto", _PER_HEAD),
        ("text_mass_of_visual", _PER_HEAD),
        ("visual_mass_of_text", _PER_HEAD),
        ("sink_mass", _PER_HEAD),
        ("sink_columns", pa.list_(pa.int64())),
        ("sink_column_masses", pa.list_(pa.float64())),
        ("sampled_rho", pa.float64()),
        ("sampled_error", pa.float64()),
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


def to_table(records: Iterable[PromptRecord], identity: Mapping[str, str]) -> pa.Table:
    """Long table: a row per prompt and layer. `identity` (model, flowmm version) goes into the metadata."""
    rows = []
    for record in records:
        prompt = {name: getattr(record.flow, name) for name in _PROMPT_FIELDS}
        place = {"index": record.index, "sample_sha256": record.sample_sha256, "sample": record.sample}
        rows += [place | prompt | {"layer": i} | asdict(layer) for i, layer in enumerate(record.flow.layers)]
    return pa.Table.from_pylist(rows, schema=_identified(identity))


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


def _identified(identity: Mapping[str, str]) -> pa.Schema:
    return SCHEMA.with_metadata({IDENTITY_KEY: json.dumps(identity, sort_keys=True).encode()})


def read_tables(path: Path) -> Iterator[pa.Table]:
    """The row groups of a finished record file: whole prompts in sample order, at most 64 in memory.

    Raises:
        InputError: not a readable parquet file.
    """
    with _named_errors(path), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


class RecordStore:
    """Finished prompts on disk: ``PATH`` when a profile is complete, ``PATH.parts/`` while it runs.

    Every rank of a distributed profile has a store on the same path and adds its own parts; rank 0 finishes. Records of
    one prompt and one identity are interchangeable, so that a prompt found twice is used once.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self.parts = path.with_name(path.name + ".parts")
        self.identity = identity
        self._waiting: list[PromptRecord] = []
        self._last_write = time.monotonic()

    def finished(self) -> set[tuple[int, str]]:
        """(index, content hash) of every prompt on disk that the same model, version and options measured.

        Raises:
            InputError: a file here is not a readable parquet file.
        """
        found: set[tuple[int, str]] = set()
        for group in self._groups():
            keys = group.read(["index", "sample_sha256"])
            found.update(zip(keys["index"].to_pylist(), keys["sample_sha256"].to_pylist(), strict=True))
        return found

    def add(self, record: PromptRecord) -> None:
        """Keep one finished prompt.

        Raises:
            InputError: the directory cannot be written.
        """
        self._waiting.append(record)
        if len(self._waiting) >= PROMPTS_IN_MEMORY or time.monotonic() - self._last_write >= SECONDS_IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        """Put what was added on disk.

        Raises:
            InputError: the directory cannot be written.
        """
        if self._waiting:
            try:
                self.parts.mkdir(parents=True, exist_ok=True)
                # A random name: a part of an earlier run may hold other prompts that are still good.
                name = f"{self._waiting[0].index:08d}-{secrets.token_hex(4)}.parquet"
                self._write(self.parts / name, [to_table(self._waiting, self.identity)])
            except OSError as error:
                raise InputError(f"{self.parts}: cannot be written ({error})") from error
        self._waiting.clear()
        self._last_write = time.monotonic()

    def tables(self, kept: Mapping[int, str]) -> Iterator[pa.Table]:
        """The prompts `kept` (index to content hash) in sample order, 64 to a table.

        Memory is that of the row groups whose ranges of indices overlap.
        """
        return _in_equal_tables(self._in_order(kept))

    def finish(self, kept: Mapping[int, str]) -> None:
        """Replace the parts by one file with exactly these prompts; its bytes depend on nothing else.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.path, self.tables(kept))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error})") from error
        shutil.rmtree(self.parts, ignore_errors=True)

    def discard(self) -> None:
        """Forget everything on disk."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _in_order(self, kept: Mapping[int, str]) -> Iterator[pa.Table]:
        groups = sorted(self._groups(), key=lambda group: group.first_index)
        following = [group.first_index for group in groups[1:]] + [None]
        pending = SCHEMA.empty_table()
        for group, bound in zip(groups, following, strict=True):
            table = group.read()
            keys = zip(table["index"].to_pylist(), table["sample_sha256"].to_pylist(), strict=True)
            mask = pa.array([kept.get(index) == sample for index, sample in keys], pa.bool_())
            pending = pa.concat_tables([pending, table.filter(mask).replace_schema_metadata()])
            # Whatever is still to be read starts at `bound`.
            complete = pending["index"].to_numpy() < (np.inf if bound is None else bound)
            yield _sorted_once(pending.filter(pa.array(complete)))
            pending = pending.filter(pa.array(~complete))

    def _groups(self) -> list[_RowGroup]:
        files = [self.path] if self.path.exists() else []
        files += sorted(self.parts.glob("*.parquet")) if self.parts.is_dir() else []
        return [group for file in files for group in self._groups_of(file)]

    def _groups_of(self, file: Path) -> list[_RowGroup]:
        """Row groups of a file; none if it is of another model, version, option or schema."""
        with _named_errors(file), pq.ParquetFile(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            identity = json.loads((schema.metadata or {}).get(IDENTITY_KEY, b"null"))
            if identity != self.identity or not schema.equals(SCHEMA):
                return []
            starts = [metadata.row_group(group).column(0).statistics.min for group in range(metadata.num_row_groups)]
            return [_RowGroup(file, group, start) for group, start in enumerate(starts)]

    def _write(self, target: Path, tables: Iterable[pa.Table]) -> None:
        with replacing(target) as file, pq.ParquetWriter(file, _identified(self.identity)) as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(_identified(self.identity).metadata))


@dataclass(frozen=True)
class _RowGroup:
    """Whole prompts in one file; `first_index` is the smallest."""

    file: Path
    group: int
    first_index: int

    def read(self, columns: list[str] | None = None) -> pa.Table:
        with _named_errors(self.file), pq.ParquetFile(self.file) as parquet:
            return parquet.read_row_group(self.group, columns)


@contextmanager
def _named_errors(file: Path) -> Generator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a readable parquet file ({error}); remove it or pass --no-resume") from error


def _sorted_once(table: pa.Table) -> pa.Table:
    """Rows by index and layer, each pair once."""
    table = table.sort_by([("index", "ascending"), ("layer", "ascending")])
    keys = np.stack([table["index"].to_numpy(), table["layer"].to_numpy()])
    return table.filter(pa.array(np.diff(keys, prepend=-1).any(0)))


def _in_equal_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows with :data:`PROMPTS_PER_ROW_GROUP` prompts to a table."""
    waiting = SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows:
            rows = PROMPTS_PER_ROW_GROUP * (int(waiting["layer"].to_numpy().max()) + 1)
            if waiting.num_rows < rows:
                break
            yield waiting.slice(0, rows).combine_chunks()
            waiting = waiting.slice(rows)
    if waiting.num_rows:
        yield waiting.combine_chunks()
