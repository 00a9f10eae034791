"""A plan's bytes on disk: bounded reading; atomic writing, of other files, too."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flowmm.errors import InputError, PlanFormatError

MAX_BYTES = 16 * 2**20


def read_text(path: Path) -> str:
    """The text of a plan file.

    Raises:
        InputError: no such file, a directory, or not readable.
        PlanFormatError: larger than 16 MiB, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            # One byte past the limit tells "too large" without trusting the reported size (pipes report none).
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan file. Create one with 'flowmm profile'") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory, expected a plan file (*.json)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Check the path and its permissions") from error
    if len(content) > MAX_BYTES:
        raise PlanFormatError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, so it is not a plan")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PlanFormatError(f"{path}, line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8") from error


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A file to write beside `path`, which takes its place when the block is left.

    `path` holds the old content or the new one, never a part, even after a crash; after an exception it is as it was.
    """
    # A link stays a link: its target is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, by :func:`replacing`.

    Raises:
        InputError: the directory is missing or cannot be written; the old file is untouched.
    """
    try:
        with replacing(path) as file:
            file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}). Check the directory and its permissions") from error
