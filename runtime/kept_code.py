"""Compiled functions whose code outlives the process: the next one loads it and traces nothing.

torch keeps on disk what its compiler makes of a graph, but every process traces the function again before it looks
there, which takes far longer than loading. Its ahead-of-time compilation keeps the outcome of tracing as well: code,
and guards that say which arguments it is for.
"""

from __future__ import annotations

import hashlib
import io
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.plans.files import write_atomic

SUFFIX = ".code"
# As many as torch.compile makes of one function by default.
MOST_VARIANTS = 8

logger = logging.getLogger(__name__)


class KeptCode:
    """A function as ``torch.compile(function, fullgraph=True, dynamic=True)`` runs it, its code kept in `directory`.

    Each file holds one variant and is named by the digest of its content. A damaged file, or one that torch does not
    load, is removed and its code made again. Where torch cannot keep code, every process compiles.

    Args:
        function: takes its arguments by position: tensors, integers, and hashable objects whose ``repr`` says all.
        directory: where the variants of all versions of `function` lie; made when there is something to write.
    """

    def __init__(self, function: Callable[..., Any], directory: Path) -> None:
        self._directory = directory
        self._globals = function.__globals__  # ty: ignore[missing-attribute]
        self._compiled: Any = torch.compile(function, fullgraph=True, dynamic=True)
        self._loaded: dict[tuple[Any, ...], list[Any]] = {}
        self._on_disk: dict[tuple[Any, ...], Iterator[Any]] = {}
        self._lock = Lock()
        # Added to torch after the oldest version that is supported.
        self._keeps = hasattr(self._compiled, "aot_compile") and hasattr(torch.compiler, "load_compiled_function")

    def __call__(self, *arguments: Any) -> Any:
        if not self._keeps:
            return self._compiled(*arguments)
        kind = _kind(arguments)
        for variant in self._loaded.get(kind, ()):
            if variant.guard_check(*arguments):
                return variant(*arguments)
        with self._lock:
            variant = self._find(kind, arguments)
        return variant(*arguments)

    def _find(self, kind: tuple[Any, ...], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """A variant for these arguments: loaded, on disk or new."""
        loaded = self._loaded.setdefault(kind, [])
        for variant in loaded:
            if variant.guard_check(*arguments):
                return variant
        folder = self._directory / digest_of(repr((environment(), kind)).encode())
        for variant in self._on_disk.setdefault(kind, self._read(folder)):
            loaded.append(variant)
            if variant.guard_check(*arguments):
                return variant
        if len(loaded) >= MOST_VARIANTS:
            return self._compiled
        try:
            # A constant is a number, not an input: torch would find out only after tracing, and trace again.
            with torch._dynamo.config.patch(specialize_float=True):
                variant = self._compiled.aot_compile((arguments, {}))
        except Exception as error:
            # What is wrong with the function or the compiler, the ordinary call says.
            logger.info("torch makes no code that can be kept, so every process compiles: %s", error)
            self._keeps = False
            return self._compiled
        self._write(folder, variant)
        # Its guards are asked before each call.
        variant.disable_guard_check()
        loaded.append(variant)
        return variant

    def _read(self, folder: Path) -> Iterator[Any]:
        for path in intact(folder, SUFFIX):
            try:
                content = io.BytesIO(path.read_bytes())
                variant: Any = torch.compiler.load_compiled_function(content, f_globals=self._globals)
            except Exception as error:
                logger.info("%s is not used: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            variant.disable_guard_check()
            yield variant

    def _write(self, folder: Path, variant: Any) -> None:
        try:
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary, "code")
                variant.save_compiled_function(str(path))
                content = path.read_bytes()
        except Exception as error:
            logger.info("compiled code is not kept in %s: %s", folder, error)
            return
        keep(folder, SUFFIX, content)


def intact(folder: Path, suffix: str) -> Iterator[Path]:
    """Kept files whose content is what their names say; others are removed."""
    for path in sorted(folder.glob(f"*{suffix}")):
        try:
            if digest_of(path.read_bytes()) == path.stem:
                yield path
                continue
        except OSError as error:
            logger.info("%s is not used: %s", path, error)
            continue
        logger.info("%s is not used: damaged", path)
        path.unlink(missing_ok=True)


def keep(folder: Path, suffix: str, content: bytes) -> None:
    """Write a file named by the digest of its content, whole or not at all; what stands in the way is logged."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{digest_of(content)}{suffix}", content)
    except (OSError, InputError) as error:
        logger.info("compiled code is not kept in %s: %s", folder, error)


def _kind(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What guards would tell apart anyway, and what is cheaper to know before code is loaded."""
    tensors = ((argument.dtype, argument.device.type) for argument in arguments if isinstance(argument, Tensor))
    others = (argument for argument in arguments if not isinstance(argument, Tensor | int))
    return (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *tensors, *others)


@cache
def environment() -> tuple[str, ...]:
    """What code depends on and no guard sees: versions, processors, and all sources that could have been traced."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        torch.__version__,
        platform.python_version(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *devices,
        sources.hexdigest(),
    )


def digest_of(content: bytes) -> str:
    """SHA-256, as letters and digits."""
    return hashlib.sha256(content).hexdigest()
