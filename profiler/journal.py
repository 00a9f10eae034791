"""What a measurement has found so far, a line each, so that one that was killed need not find it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmm.errors import InputError


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
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(b"\n".join(good) + b"\n")
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be used to resume ({error}); remove it or pass --no-resume") from error

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
