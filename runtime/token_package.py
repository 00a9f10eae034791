"""The code of one decoded token: made ahead of time by AOTInductor, kept on disk without weights, loaded and run."""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from flowmm.runtime.attention import FLOW
from flowmm.runtime.compiled import CPU_DECODING
from flowmm.runtime.kept_code import intact, keep
from flowmm.runtime.module_tree import twin, weights_of
from flowmm.runtime.static_cache import Buffers, StaticFlowCache

SUFFIX = ".pt2"
OPTIONS = CPU_DECODING | {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise small ones become numbers in the code.
    "always_keep_tensor_constants": True,
    # They take 140 MB and are for one package alone.
    "aot_inductor.precompile_headers": False,
    # One allocation for what a token computes instead of a hundred, for whose bookkeeping a token waits.
    "memory_planning": True,
}

logger = logging.getLogger(__name__)


class Package:
    """Code as it was loaded, and where the weights lie that it reads; it keeps none of them alive.

    Args:
        path: of the file, which is not needed afterwards.
        model: whose weights are read first.

    Raises:
        Exception: whatever torch says of a file that it cannot load, or that is for other weights.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        package = torch._inductor.aoti_load_package(str(path))
        self._load, self._run = package.load_constants, package.loader.run
        self._names = package.get_constant_fqns()
        self._lock = Lock()
        self._give(self.weights_in(model))

    def weights_in(self, model: nn.Module) -> list[Tensor]:
        """The weights that the code reads.

        Raises:
            KeyError: it reads a tensor that is no weight of the model.
        """
        weights = weights_of(model)
        return [weights[name.removeprefix("model.")] for name in self._names]

    def _give(self, weights: Sequence[Tensor]) -> None:
        # torch never lets go of a tensor that it was given here.
        borrowed = dict(zip(self._names, map(_borrowed, weights), strict=True))
        self._load(borrowed, check_full_update=True, user_managed=True)
        self._addresses = addresses_of(weights)

    def run(self, weights: Sequence[Tensor], addresses: tuple[int, ...], inputs: list[Tensor]) -> Tensor:
        """Logits ``[B, 1, V]``, a new tensor.

        Args:
            weights: of :meth:`weights_in`; the caller sees to it that their memory stays.
            addresses: their :func:`addresses_of`.
            inputs: ids, positions, and the cache's :func:`flat_buffers`, which then hold the token.
        """
        with self._lock:
            if addresses != self._addresses:
                self._give(weights)
            return self._run(inputs)[0]


def find_package(folder: Path, model: Any, cache: StaticFlowCache, ids: Tensor, positions: Tensor) -> Package | None:
    """The code in `folder`, or else new code, which is put there; None where torch makes none that can be used."""
    for path in intact(folder, SUFFIX):
        try:
            return Package(path, model)
        except Exception as error:
            logger.info("%s is not used: %s", path, error)
            path.unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, f"token{SUFFIX}")
            _make(path, model, cache, ids, positions)
            package = Package(path, model)
            keep(folder, SUFFIX, path.read_bytes())
            return package
    except Exception as error:
        logger.info("torch makes no code that can be kept, so tokens are decoded by torch.compile: %s", error)
        return None


def _make(path: Path, model: Any, cache: StaticFlowCache, ids: Tensor, positions: Tensor) -> None:
    """Compile a token to `path`; nothing is run, so the buffers stay as they are."""
    example = ids.clone(), positions.clone(), flat_buffers(cache)
    with torch.no_grad():
        # Exporting exchanges the weights of what it traces, which another thread may be using.
        program = torch.export.export(_Token(twin(model), cache), example, strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_options())


def _options() -> dict[str, Any]:
    # Multiplication and addition in one instruction; torch made a choice of what was a switch.
    name = "enable_floating_point_contract_flag"
    switch = isinstance(getattr(torch._inductor.config.cpp, name), bool)
    return {**OPTIONS, f"cpp.{name}": True if switch else "fast"}


class _Token(nn.Module):
    """The forward call of one token as a function of tensors alone; it changes the buffers in place."""

    def __init__(self, model: nn.Module, cache: StaticFlowCache) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(self, ids: Tensor, positions: Tensor, buffers: Sequence[Tensor]) -> Tensor:
        cache = _on_buffers(self.cache, buffers)
        flow = {FLOW: cache}
        return self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **flow).logits


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where they lie in memory."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def buffers_of(cache: StaticFlowCache) -> list[Buffers | None]:
    """Of each layer."""
    return [state.buffers for state in cache._static_states]


def flat_buffers(cache: StaticFlowCache) -> list[Tensor]:
    """All tensors of a settled cache's buffers, layer by layer."""
    return [tensor for buffers in buffers_of(cache) for tensor in vars(buffers).values()]


def _on_buffers(cache: StaticFlowCache, tensors: Sequence[Tensor]) -> StaticFlowCache:
    """A copy of `cache` whose :func:`flat_buffers` are `tensors`."""
    other, rest = copy(cache), iter(tensors)
    other.states = [copy(state) for state in cache.states]
    other.layers = [*other.states]
    for state in other._static_states:
        state.buffers = copy(state.buffers)
        vars(state.buffers).update({name: next(rest) for name in vars(state.buffers)})
    return other


def _borrowed(weight: Tensor) -> Tensor:
    """The same numbers in the same memory, which it does not own."""
    size = weight.untyped_storage().nbytes() - weight.storage_offset() * weight.itemsize
    memory = (ctypes.c_char * int(size)).from_address(weight.data_ptr())
    return torch.frombuffer(memory, dtype=weight.dtype).as_strided(weight.shape, weight.stride())
