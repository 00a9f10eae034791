"""Writing that leaves the old file or the new one, never a part."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmm.errors import InputError
from flowmm.plans.files import replacing, write_atomic


def test_an_interrupted_write_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_place_is_taken_when_the_block_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write_bytes(b"new")
        assert not path.exists()
        assert file.parent == tmp_path
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_atomic(link, "neu: ü")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "file", b"")
