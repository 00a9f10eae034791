"""Pivot selection, gated matching and merging of a layer, compiled as a single graph; where and how else is compiled.

Lengths, budgets, modes and thresholds are inputs of the graph, so one graph serves all prompts; only a method's rules
(the names of its operator, tau rule, gate action, ...) make another one. Code is kept on disk, where the next process
finds it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers.generation.configuration_utils import CompileConfig

from flowmm.plans import MethodParameters
from flowmm.plans.method import TAU_RULES, parse_rule
from flowmm.runtime.compression import compared_keys, leaving_entries, masses_of, match, merged_keys
from flowmm.runtime.kept_code import KeptCode
from flowmm.runtime.matching import Assignment
from flowmm.runtime.merging import MergedEntries, merge
from flowmm.runtime.pivots import Pivots, select_pivots
from flowmm.runtime.prompt import Proxies
from flowmm.runtime.selection import LayerView

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# The compiler's options for one token on a CPU.
CPU_DECODING = {
    # Linear layers of one row become loops of their own, fused with what surrounds them: they read matrices of up to
    # 2,048 columns at the memory's bandwidth, where the library's kernel reaches two thirds of it.
    "post_grad_fusion_options": {"decompose_mm_pass": {}},
    # Sizes and strides of every weight have been checked before, by guards or once per answer.
    "size_asserts": False,
}


class NoCompilerWarning(UserWarning):
    """Compilation was asked for where no compiler is found; everything runs uncompiled."""


@dataclass(frozen=True)
class Names:
    """The rules that make a graph of their own."""

    operator: str
    tau_rule: str
    gate: bool
    gate_action: str
    fallback: str
    cross_scope: str

    @classmethod
    def of(cls, method: MethodParameters) -> Names:
        """Of a method."""
        tau_rule, _ = parse_rule(method.tau if method.gate else "none", TAU_RULES)
        return cls(method.merge, tau_rule, method.gate, method.gate_action, method.fallback, method.cross_scope)


@dataclass(frozen=True)
class _Rules:
    """:class:`flowmm.runtime.matching.MatchingRules` with a similarity floor that is a tensor."""

    gate: bool
    gate_action: str
    fallback: str
    cross_scope: str
    min_sim: Tensor


Outcome = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def merge_layer(
    scores: Tensor,
    importance: Tensor,
    masses: Tensor,
    compared: Tensor,
    key: Tensor,
    value: Tensor,
    visual: Tensor,
    valid: Tensor,
    forced: Tensor,
    kept: Tensor,
    cross: Tensor,
    n_proxies: Tensor,
    tau: Tensor,
    min_sim: Tensor,
    slots: int,
    leaving: int,
    names: Names,
) -> Outcome:
    """Select pivots, match, merge (eq. 5 and 8-10); shapes as in the functions it calls.

    Returns:
        Keys, values and bias of the merged entries, then the tensors of the :class:`Assignment`.
    """
    pivots = select_pivots(scores, forced, valid, kept, slots)
    rules = _Rules(names.gate, names.gate_action, names.fallback, names.cross_scope, min_sim)
    found = match(
        compared, importance, visual, valid, forced, cross, n_proxies, tau, names.tau_rule, leaving, pivots, rules
    )
    entries = merge(names.operator, key, value, masses, found)
    return (
        entries.keys,
        entries.values,
        entries.bias,
        pivots.index,
        pivots.filled,
        found.evicted,
        found.used,
        found.target,
        found.similarity,
        found.protected,
    )


class MergeLayer:
    """:func:`merge_layer` as :func:`flowmm.runtime.compression.compress_layer` calls it."""

    def __init__(self, function: Callable[..., Outcome]) -> None:
        self._function = function

    def __call__(
        self,
        view: LayerView,
        scores: Tensor,
        value: Tensor,
        forced: Tensor,
        kept: Tensor,
        counts: tuple[int, ...],
        cross: Tensor,
        proxies: Proxies,
        method: MethodParameters,
    ) -> tuple[MergedEntries, Assignment]:
        """Entries and assignment of one layer; arguments as there."""
        _, tau = parse_rule(method.tau if method.gate else "none", TAU_RULES)
        keys, values, bias, index, filled, evicted, used, target, similarity, protected = self._function(
            scores,
            view.importance,
            masses_of(view, method),
            compared_keys(view, method),
            merged_keys(view, method),
            value,
            view.layout.visual,
            view.layout.valid,
            forced,
            kept,
            cross,
            proxies.used.sum(-1),
            torch.tensor(tau or 0.0, device=value.device),
            torch.tensor(method.min_sim, device=value.device),
            max(counts),
            leaving_entries(view.layout, counts),
            Names.of(method),
        )
        assignment = Assignment(Pivots(index, filled), evicted, used, target, similarity, protected)
        return MergedEntries(keys, values, bias), assignment


def compiler_for(device: torch.device) -> str | None:
    """The compiler that code for `device` would be made with, or ``None``."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else None
    named = os.environ.get("CXX")
    return next((name for name in ([named] if named else ["g++", "clang++"]) if shutil.which(name)), None)


def merge_operation(device: torch.device) -> MergeLayer:
    """The compiled operation where a compiler is at hand, else the same uncompiled, and a warning that says so."""
    return MergeLayer(_compiled() if _can_compile(device, "merging runs") else merge_layer)


def decoding_config(device: torch.device) -> CompileConfig | None:
    """transformers' options for one compiled graph per decoded token; None and a warning where no compiler is found."""
    if not _can_compile(device, "decoding runs"):
        return None
    kept_code_directory()
    if device.type == "cuda":
        return CompileConfig(fullgraph=True)
    # Options and a named mode exclude each other; without either, torch takes the default mode.
    config = CompileConfig(fullgraph=True, mode=cast(str, None), options=CPU_DECODING)
    # Elsewhere than on a GPU, transformers compiles nothing unless told so.
    config._compile_all_devices = True
    return config


def _can_compile(device: torch.device, what: str) -> bool:
    if compiler_for(device) is not None:
        return True
    warnings.warn(
        f"no compiler for {device.type} code was found, so {what} uncompiled; install "
        f"{'triton' if device.type == 'cuda' else 'g++ or clang++'}, or do not ask for compilation",
        NoCompilerWarning,
        stacklevel=4,
    )
    return False


@cache
def _compiled() -> Callable[..., Outcome]:
    return KeptCode(merge_layer, kept_code_directory() / merge_layer.__name__)


def kept_code_directory() -> Path:
    """Where compiled code is kept, so that the next process finds it; torch is told, too."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing torch's compiler may already have named a directory that does not outlive a restart.
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(_cache_directory())
    return Path(os.environ[CACHE_VARIABLE])


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flowmm" / "inductor"
