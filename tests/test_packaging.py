"""What ``pyproject.toml`` puts into a wheel: every package, and every data file that the code reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
ROOMS = [path.parent for path in sorted(ROOT.glob("*/__init__.py")) if not path.parent.name.startswith(".")]


def test_every_room_is_listed() -> None:
    assert set(SETUPTOOLS["packages"]) == {"flowmm", *(f"flowmm.{room.name}" for room in ROOMS if room.name != "tests")}


def test_every_data_file_of_a_room_is_shipped() -> None:
    for room in ROOMS:
        patterns = SETUPTOOLS["package-data"].get(f"flowmm.{room.name}", [])
        shipped = {path for pattern in patterns for path in room.glob(pattern)}
        present = {path for path in room.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        present = {path for path in present if not any(part.startswith(".") for part in path.relative_to(room).parts)}
        if room.name != "tests":
            assert present == shipped, room.name
