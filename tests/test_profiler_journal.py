"""The journal of layer measurements: exact, and unharmed by a kill at any byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmm.errors import InputError
from flowmm.profiler.journal import Journal

IDENTITY = {"model": "a", "prompts": "b"}


@given(st.lists(st.tuples(st.text(), st.lists(st.floats(allow_nan=False), max_size=4)), max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_at_any_byte_knows_a_prefix_exactly(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, list[float]]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "layers.jsonl"
    written = Journal(path, IDENTITY)
    for key, values in entries:
        written.put(key, values)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    found = Journal(path, IDENTITY)
    prefixes = [dict(entries[:count]) for count in range(len(entries) + 1)]
    assert {key: found.get(key) for key, _ in entries if found.get(key) is not None} in prefixes
    for key, values in entries:
        found.put(key, values)
    again = Journal(path, IDENTITY)
    assert {key: again.get(key) for key, _ in entries} == dict(entries)


def test_another_identity_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    Journal(path, IDENTITY).put("x", [0.1])
    assert Journal(path, IDENTITY).get("x") == [0.1]
    assert Journal(path, IDENTITY | {"prompts": "c"}).get("x") is None
    assert Journal(path, IDENTITY).get("x") is None


def test_without_a_file_nothing_is_kept() -> None:
    journal = Journal()
    journal.put("x", [1.0])
    journal.discard()
    assert journal.get("x") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--no-resume"):
        Journal(tmp_path, IDENTITY)
