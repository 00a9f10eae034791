"""The journal of layer measurements: exact, and unharmed by a kill at any byte."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmm.errors import InputError
from flowmm.profiler.journal import Journal, answered
from flowmm.profiler.ranks import Ranks

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
    with pytest.raises(InputError, match=r"--no-resume") as caught:
        Journal(tmp_path, IDENTITY)
    assert str(caught.value).count(str(tmp_path)) == 1


class Meeting:
    """Where threads that play ranks exchange texts."""

    def __init__(self, size: int) -> None:
        self.texts = [""] * size
        self.barrier = threading.Barrier(size)


@dataclass(frozen=True)
class Thread(Ranks):
    """A rank that is a thread."""

    meeting: Meeting | None = None

    def gather(self, text: str) -> list[str]:
        assert self.meeting is not None
        self.meeting.texts[self.rank] = text
        self.meeting.barrier.wait(timeout=30)
        texts = list(self.meeting.texts)
        self.meeting.barrier.wait(timeout=30)
        return texts


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_what_is_not_known_and_return_the_same(size: int, tmp_path: Path) -> None:
    meeting, measured = Meeting(size), []
    first = Journal(tmp_path / "layers.jsonl", IDENTITY)
    first.put("4 q", [40.0])

    def measure(place: int) -> list[float] | None:
        measured.append(place)
        return None if place == 5 else [place / 10]

    def run(rank: int) -> dict[int, list[float]]:
        ranks = Ranks() if size == 1 else Thread(rank, size, meeting)
        return answered("q", range(2, 8), measure, journal=first if rank == 0 else Journal(), ranks=ranks)

    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(run, range(size)))
    expected = {2: [0.2], 3: [0.3], 4: [40.0], 6: [0.6], 7: [0.7]}
    assert answers == [expected] * size
    assert [list(answer) for answer in answers] == [list(expected)] * size
    assert sorted(measured) == [2, 3, 5, 6, 7], "each place is measured by one rank, known ones by none"
    again = Journal(tmp_path / "layers.jsonl", IDENTITY)
    assert {place: again.get(f"{place} q") for place in expected} == expected
