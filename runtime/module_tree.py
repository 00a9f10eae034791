"""What code compiled ahead of time depends on in a tree of modules, and a twin of the tree that can be traced.

``torch.compile`` guards its code against a changed model. Code compiled ahead of time checks nothing, so it is kept
under a description of the model, which is made afresh before the code is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PretrainedConfig

from flowmm.runtime.kept_code import digest_of

# What every module keeps for itself.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
_TABLES = ("_parameters", "_buffers")
_HOOKS = frozenset(name for name in _OF_TORCH if "_hooks" in name)
# They do nothing for a token that nobody asks more of than its logits.
_IDLE_HOOKS = ("flowmm.runtime.attention", "transformers.utils.output_capturing")
# Where a model comes from, and what transformers leaves on one that it compiled.
_UNREAD = frozenset({"name_or_path", "_name_or_path", "_commit_hash", "_compiled_call", "_last_compile_config"})
_UNSAID = _OF_TORCH | _UNREAD


class UnsuitedError(Exception):
    """Nothing can be said about this model that would hold for its code."""


def twin(module: nn.Module) -> Any:
    """A copy of the tree with the same parameters and buffers, and no hooks; what is exchanged in it stays in it.

    Where a module is used twice the copy has two: of shared ones, torch's exporter wraps those in other threads, too.
    """
    copied = object.__new__(type(module))
    own = vars(module) | {name: dict(vars(module)[name]) for name in _TABLES}
    own |= {name: type(table)() for name, table in own.items() if name in _HOOKS}
    own["_modules"] = {name: None if child is None else twin(child) for name, child in module._modules.items()}
    vars(copied).update(own)
    return copied


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def describe(model: nn.Module) -> str:
    """Classes and their sources, attributes, configuration, and the sizes of all weights; not their values.

    Raises:
        UnsuitedError: hooks, replaced methods, classes from no file, or weights elsewhere than in the CPU's memory.
    """
    if _has_any_global_hook():
        raise UnsuitedError("hooks on all modules")
    known: dict[int, str] = {}
    modules = [f"{name}: {_module(module, known)}" for name, module in model.named_modules(remove_duplicate=False)]
    return digest_of("\n".join([*modules, *_sizes(weights_of(model))]).encode())


def _module(module: nn.Module, known: dict[int, str]) -> str:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if getattr(hook, "__module__", None) not in _IDLE_HOOKS:
            raise UnsuitedError(f"a hook on {type(module).__name__}: {hook!r}")
    own = {name: value for name, value in vars(module).items() if name not in _UNSAID}
    for name, value in own.items():
        ours = getattr(value, "__module__", None) == "flowmm.runtime.host"
        if callable(value) and hasattr(type(module), name) and not ours:
            raise UnsuitedError(f"{type(module).__name__}.{name} is replaced")
    return f"{_class(type(module))} {_code(type(module).forward)} {_say(own, known)}"


def _sizes(weights: dict[str, Tensor]) -> Iterator[str]:
    # Weights that share memory are one constant of the code.
    first: dict[Any, str] = {}
    for name, weight in weights.items():
        plain = type(weight) in (Tensor, nn.Parameter, nn.Buffer) and weight.layout == torch.strided
        if not plain or weight.device.type != "cpu":
            raise UnsuitedError(f"{name} is a {type(weight).__name__} on {weight.device}")
        size = (tuple(weight.shape), weight.stride(), weight.dtype)
        yield f"{name} {size} {first.setdefault((weight.data_ptr(), size), name)}"


def _say(value: Any, known: dict[int, str]) -> str:
    """What matters of an attribute's value; `known`: configurations by identity, because all layers hold the same."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, PretrainedConfig):
        if id(value) not in known:
            known[id(value)] = f"{type(value).__qualname__}({_say(vars(value), known)})"
        return known[id(value)]
    if isinstance(value, dict):
        return _list(f"{key!r}: {_say(item, known)}" for key, item in value.items() if key not in _UNREAD)
    if isinstance(value, list | tuple):
        return _list(_say(item, known) for item in value)
    if isinstance(value, set | frozenset):
        return _list(sorted(_say(item, known) for item in value))
    if isinstance(value, partial):
        return _say([value.func, value.args, value.keywords], known)
    if isinstance(value, FunctionType | MethodType):
        return _code(value)
    if isinstance(value, torch.ScriptObject):
        raise UnsuitedError("weights that torch packed")
    return type(value).__qualname__


def _list(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _code(function: Any) -> str:
    """A function's name and bytecode, which tell one put in its place from the class's own."""
    inner: Any = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(inner, "__code__", None)
    return f"{inner.__module__}.{inner.__qualname__} {'' if code is None else _bytecode(code)}"


@cache
def _bytecode(code: CodeType) -> str:
    constants = (
        _bytecode(value)
        if isinstance(value, CodeType)
        # Sets come in another order in every process.
        else repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
        for value in code.co_consts
    )
    return digest_of(repr((code.co_code, code.co_names, *constants)).encode())


@cache
def _class(kind: type[nn.Module]) -> str:
    """A class's name and the content of all files that it and its bases are from."""
    try:
        files = {inspect.getsourcefile(base) for base in kind.__mro__ if base.__module__ != "builtins"}
        content = b"".join(digest_of(Path(file).read_bytes()).encode() for file in sorted(map(str, files)))
    except (OSError, TypeError) as error:
        raise UnsuitedError(f"{kind.__qualname__} comes from no file: {error}") from error
    return f"{kind.__module__}.{kind.__qualname__} {digest_of(content)}"
