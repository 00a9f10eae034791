"""What a measurement has found so far, a line each, so that one that was killed need not find it again; and how several
processes share what is still to be found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmm.errors import InputError
from flowmm.plans.files import replacing
from flowmm.profiler.ranks import Ranks


class Journal:
    """Numbers by key, on disk as soon as they are known; exact, because JSON keeps all digits of a float.

    A line that a kill cut short is dropped with what follows it; a journal of another identity (model, prompts,
    options) is started over.
    """

    def __init__(self, path: Path | None = None, identity: Mapping[str, str] | None = None) -> None:
        """`path` None: nothing is kept.

        Raises:
            InputError: the file cannot be read or written.
        """
        self.path = path
        self._known: dict[str, list[float]] = {}
        if path is not None:
            self._open(path, json.dumps({"identity": dict(identity or {})}, sort_keys=True))

    def _open(self, path: Path, head: str) -> None:
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            good = [head.encode()]
            # Behind the last line break there is nothing, or half a line.
            for line in lines[1:-1] if lines[:1] == good else []:
                try:
                    key, values = json.loads(line)
                    self._known[key] = [float(value) for value in values]
                except (ValueError, TypeError):
                    break
                good.append(line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write_bytes(b"\n".join(good) + b"\n")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{path}: cannot be used to resume ({reason}); remove it or pass --no-resume") from error

    def get(self, key: str) -> list[float] | None:
        """What `key` was measured to be; None: not yet."""
        return self._known.get(key)

    def put(self, key: str, values: Sequence[float]) -> None:
        """Keep a measurement.

        Raises:
            InputError: the file cannot be written.
        """
        if self.path is None:
            return
        self._known[key] = list(values)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self._known[key]]) + "\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error})") from error

    def discard(self) -> None:
        """Remove the file: what it was for is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_of(question: Any) -> str:
    """A short name for JSON values that say what is measured."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:24]


def answered(
    question: str,
    places: Iterable[int],
    measure: Callable[[int], list[float] | None],
    *,
    journal: Journal,
    ranks: Ranks,
    told: Callable[[int], None] | None = None,
) -> dict[int, list[float]]:
    """What `measure` finds at every place; where it finds nothing (None), the place is left out.

    Every rank calls this with the same question and places, measures those that fall to it, and returns all. The first
    rank's journal is asked before, and told after.

    Args:
        question: see :func:`key_of`.
        told: called with the number of places this rank is done with.
    """
    places = list(places)
    known = {place: found for place in places if (found := journal.get(f"{place} {question}")) is not None}
    if ranks.size > 1:
        known = {int(place): found for place, found in json.loads(ranks.from_first(json.dumps(known))).items()}
    own: dict[int, list[float]] = {}
    for done, place in enumerate(places):
        if place not in known and ranks.takes(done):
            found = measure(place)
            if found is not None:
                own[place] = found
                journal.put(f"{place} {question}", found)
        if told is not None:
            told(done + 1)
    for text in ranks.gather(json.dumps(own)) if ranks.size > 1 else []:
        for place, found in json.loads(text).items():
            if int(place) not in own:
                own[int(place)] = found
                journal.put(f"{place} {question}", found)
    found = known | own
    return {place: found[place] for place in places if place in found}
