"""One decoded token as compiled code without weights, for a CPU: the next process finds it on disk and traces nothing.

torch exports the forward call of a token as a function of ids, positions and the cache's buffers, and compiles it ahead
of time (AOTInductor). Such code checks nothing of what it is given. What ``torch.compile`` asks before every token is
asked here once per answer (is this still the model?) or once per buffers; what the code is not for goes to the ordinary
compiled call.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from flowmm.runtime.attention import flow_of
from flowmm.runtime.compiled import kept_code_directory
from flowmm.runtime.kept_code import digest_of, environment
from flowmm.runtime.module_tree import UnsuitedError, describe
from flowmm.runtime.static_cache import StaticFlowCache
from flowmm.runtime.token_package import Package, addresses_of, buffers_of, find_package, flat_buffers

# Arguments of a forward call: what has no effect on one token after a settled prompt, and values that ask for no more.
UNREAD = {"attention_mask", "mm_token_type_ids"}
USUAL = {
    "logits_to_keep": (0, 1),
    "use_cache": (True,),
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}

logger = logging.getLogger(__name__)
# Makes and loads; None: code that cannot be made, told once.
_lock = Lock()
_packages: weakref.WeakKeyDictionary[nn.Module, dict[str, Package | None]] = weakref.WeakKeyDictionary()


class TokenCall:
    """Stands in for a model's compiled call while one answer is decoded.

    Args:
        model: whose tokens are decoded.
        ordinary: makes transformers' own compiled call, for what the code does not serve.
    """

    def __init__(self, model: Any, ordinary: Callable[[], Callable[..., Any]]) -> None:
        self._model = model
        self._make_ordinary = ordinary
        self._ordinary: Callable[..., Any] | None = None
        self._decoder: _Decoder | None = None
        self._refused: StaticFlowCache | None = None

    def __call__(self, **kwargs: Any) -> Any:
        """Logits ``[B, 1, V]`` and the cache, which then holds the token; one object for all tokens of an answer."""
        ids: Any = kwargs.get("input_ids")
        positions: Any = kwargs.get("position_ids")
        cache: Any = kwargs.get("past_key_values")
        if self._decoder is not None and self._decoder.serves(cache, ids, positions) and _asks_no_more(kwargs):
            return self._decoder(ids, positions)
        if cache is not self._refused and _is_token(ids, positions, cache) and _asks_no_more(kwargs):
            self._decoder = _decoder(self._model, cache, ids, positions, kwargs)
            if self._decoder is not None:
                return self._decoder(ids, positions)
            self._refused = cache
        if self._ordinary is None:
            self._ordinary = self._make_ordinary()
        return self._ordinary(**kwargs)


class _Decoder:
    """A package bound to the weights and the buffers of one answer."""

    def __init__(self, package: Package, model: Any, cache: StaticFlowCache, ids: Tensor, positions: Tensor) -> None:
        self._package = package
        # The memory outlives a replacement for as long as the answer reads it.
        self._weights = [weight.detach() for weight in package.weights_in(model)]
        self._addresses = addresses_of(self._weights)
        self._cache, self._owners, self._buffers = cache, buffers_of(cache), flat_buffers(cache)
        self._setting = _setting(ids, positions)
        # Made once: it takes as long as the rest of what Python does for a token.
        self._output = CausalLMOutputWithPast(logits=torch.empty(0), past_key_values=cache)

    def serves(self, cache: Any, ids: Any, positions: Any) -> bool:
        """Whether this token is like the one that the code was made or found for."""
        return (
            cache is self._cache
            and cache.settled
            and isinstance(ids, Tensor)
            and isinstance(positions, Tensor)
            and all(map(operator.is_, buffers_of(cache), self._owners))
            and _setting(ids, positions) == self._setting
            and _is_plain_inference()
        )

    def __call__(self, ids: Tensor, positions: Tensor) -> CausalLMOutputWithPast:
        inputs = [ids.contiguous(), positions.contiguous(), *self._buffers]
        self._output.logits = self._package.run(self._weights, self._addresses, inputs)
        return self._output


def _is_token(ids: Any, positions: Any, cache: Any) -> bool:
    return (
        isinstance(cache, StaticFlowCache)
        and cache.settled
        and all(isinstance(tensor, Tensor) and tensor.device.type == "cpu" for tensor in (ids, positions))
        and ids.ndim == 2
        and ids.shape[1] == 1
        and _is_plain_inference()
    )


def _is_plain_inference() -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _asks_no_more(kwargs: dict[str, Any]) -> bool:
    known = UNREAD | {"input_ids", "position_ids", "past_key_values"}
    return all(
        value is None or name in known or (isinstance(value, int) and value in USUAL.get(name, ()))
        for name, value in kwargs.items()
    )


def _setting(ids: Tensor, positions: Tensor) -> tuple[Any, ...]:
    return ids.shape, ids.dtype, ids.device, positions.shape, positions.dtype, positions.device, torch.get_num_threads()


def _decoder(
    model: Any, cache: StaticFlowCache, ids: Tensor, positions: Tensor, kwargs: dict[str, Any]
) -> _Decoder | None:
    """Code for this model, cache and token: loaded, on disk or new; None where there is none."""
    if flow_of(model, kwargs) is not cache:
        return None
    try:
        key = _key(model, cache, ids, positions)
    except Exception as error:
        logger.info("tokens are decoded by torch.compile: %s", error)
        return None
    packages = _packages.get(model, {})
    if key not in packages:
        with _lock:
            packages = _packages.setdefault(model, {})
            if key not in packages:
                packages[key] = find_package(kept_code_directory() / "token" / key, model, cache, ids, positions)
    package = packages[key]
    return None if package is None else _Decoder(package, model, cache, ids, positions)


def _key(model: Any, cache: StaticFlowCache, ids: Tensor, positions: Tensor) -> str:
    """Digest of everything that the code depends on."""
    if any(
        getattr(config, f"output_{name}", False)
        for config in (model.config, model.config.get_text_config(decoder=True))
        for name in ("attentions", "hidden_states")
    ):
        raise UnsuitedError("its configuration asks for attentions or hidden states")
    # Not mkldnn's: torch's exporter turns it off for all threads while it traces, and the code asks for it when run.
    switches = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
    buffers = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in flat_buffers(cache)]
    told = (environment(), transformers.__version__, switches, describe(model), _setting(ids, positions), buffers)
    return digest_of(repr(told).encode())
