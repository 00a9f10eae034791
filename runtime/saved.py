"""A compressed conversation on disk: one safetensors file that another process can continue.

Tensors: ``layers.N.keys`` and ``.values`` ``[B, Hkv, n, D]``, ``.bias`` ``[B, Hkv, n]`` and ``.positions``
``[B, Hkv, m]`` where a layer has them, ``ids`` ``[B, seen]``, and ``rope_deltas`` for models with M-RoPE. Metadata, all
text: ``format``, ``version``, ``model`` and ``method`` (JSON), ``plan`` (its hash), ``seen``, ``prompt_length``, and
``sha256`` over all tensors in order of their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowmm.errors import ContextFormatError, ContextMismatchError, InputError
from flowmm.plans import ModelFingerprint, Plan
from flowmm.plans.files import replacing
from flowmm.runtime.cache import FlowCache
from flowmm.runtime.growing import Growing
from flowmm.runtime.settings import CompressionSettings

FORMAT, VERSION = "flowmm.context", "1"
_FIELDS = ("format", "version", "model", "method", "plan", "seen", "prompt_length", "sha256")


def save_context(path: Path, cache: FlowCache, model: ModelFingerprint, plan: Plan) -> None:
    """Write what `cache` holds; the file appears whole or not at all.

    Raises:
        InputError: the cache is empty or was filled without token ids, or the file cannot be written.
    """
    seen = int(cache.get_seq_length())
    if seen == 0 or cache.ids is None:
        raise InputError("there is nothing to save: generate, or feed a prompt's input_ids, first")
    if cache.ids.length != seen:
        raise InputError(
            "a static cache does not remember the ids it generated; use the growing cache for what will be saved"
        )
    tensors = {"ids": cache.ids.filled}
    if cache.rope_deltas is not None:
        tensors["rope_deltas"] = cache.rope_deltas
    for index, (keys, values, bias, positions) in enumerate(cache.contents()):
        named = {"keys": keys, "values": values, "bias": bias, "positions": positions}
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in named.items() if tensor is not None}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.model_dump_json(),
        "method": cache.settings.method.model_dump_json(),
        "plan": plan.sha256,
        "seen": str(seen),
        "prompt_length": str(cache.states[0].prompt_length),
        "sha256": _digest(tensors),
    }
    _write(path, tensors, metadata)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        with replacing(path) as file:
            save_file(tensors, file, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}). Check the directory and its free space") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_context(
    path: Path, settings: CompressionSettings, model: ModelFingerprint, plan: Plan, like: Tensor
) -> FlowCache:
    """The cache that was saved.

    Args:
        settings: of the run that will continue it.
        model: fingerprint of the model that will continue it.
        plan: of the run.
        like: any weight of the model; its dtype and device are those of the cache.

    Raises:
        InputError: no such file, or not readable.
        ContextFormatError: damaged, cut short, or not a saved context.
        ContextMismatchError: saved by another model, or for another plan or method.
    """
    metadata, tensors = _read(path)
    if settings.recompress_every is not None:
        raise ContextMismatchError(
            f"{path}: a saved context does not tell its rows' modes apart, so it cannot be compressed again; leave "
            "recompress_every out"
        )
    _check_origin(path, metadata, settings, model, plan)
    cache = FlowCache(settings)
    seen, prompt_length = _count(path, metadata, "seen"), _count(path, metadata, "prompt_length")
    if (layers := sum(name.endswith(".keys") for name in tensors)) != len(cache.states):
        raise ContextFormatError(f"{path}: found {layers} layers, expected {len(cache.states)}")
    ids = _tensor(path, tensors, "ids", 2, like.device)
    if ids.shape[1] != seen:
        raise ContextFormatError(f"{path}: found {ids.shape[1]} token ids, expected {seen}. Save it again")
    cache.ids = Growing(ids, dim=1)
    if "rope_deltas" in tensors:
        cache.rope_deltas = tensors["rope_deltas"].to(like.device)
    for index, layer in enumerate(cache.states):
        keys, values = (_tensor(path, tensors, f"layers.{index}.{name}", 4, like.device) for name in ("keys", "values"))
        if keys.dtype != like.dtype:
            raise ContextMismatchError(
                f"{path}: saved in {keys.dtype}, but the model runs in {like.dtype}; load the model with that dtype"
            )
        bias, positions = (
            tensors[name].to(like.device) if (name := f"layers.{index}.{part}") in tensors else None
            for part in ("bias", "positions")
        )
        if values.shape[:3] != keys.shape[:3] or (bias is not None and bias.shape != keys.shape[:3]):
            raise ContextFormatError(f"{path}: tensors of layer {index} do not fit each other. Save it again")
        layer.hold(keys, values, bias)
        layer.positions, layer.seen, layer.prompt_length = positions, seen, prompt_length
    return cache


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Create one with run.save(path)") from error
    except SafetensorError as error:
        raise ContextFormatError(
            f"{path}: damaged or cut short ({error}), expected a context written by run.save(path). Save it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}). Check the path and its permissions") from error
    if metadata.get("format") != FORMAT:
        raise ContextFormatError(f"{path}: a safetensors file, but not one written by run.save(path)")
    if metadata.get("version") != VERSION:
        raise ContextFormatError(f"{path}: version {metadata.get('version')}, expected {VERSION}; update flowmm")
    if missing := [field for field in _FIELDS if field not in metadata]:
        raise ContextFormatError(f"{path}: {', '.join(missing)} missing from its metadata. Save it again")
    if _digest(tensors) != metadata["sha256"]:
        raise ContextFormatError(f"{path}: its content changed since it was saved. Save it again")
    return metadata, tensors


def _check_origin(
    path: Path, metadata: dict[str, str], settings: CompressionSettings, model: ModelFingerprint, plan: Plan
) -> None:
    try:
        saved = ModelFingerprint.model_validate_json(metadata["model"])
        method = json.loads(metadata["method"])
    except ValueError as error:
        raise ContextFormatError(f"{path}: its metadata cannot be read ({error}). Save it again") from error
    for what, found, expected in (
        ("architecture", saved.config_sha256, model.config_sha256),
        ("weights", saved.weights_sha256, model.weights_sha256),
        ("plan", metadata["plan"], plan.sha256),
        ("method", method, settings.method.model_dump(mode="json")),
    ):
        if found != expected:
            raise ContextMismatchError(
                f"{path}: made with another {what} (found {found}, expected {expected}); "
                "continue it with the model, plan and method it was made with"
            )


def _count(path: Path, metadata: dict[str, str], name: str) -> int:
    if not metadata[name].isascii() or not metadata[name].isdigit():
        raise ContextFormatError(f"{path}: {name} is {metadata[name]!r}, expected a number. Save it again")
    return int(metadata[name])


def _tensor(path: Path, tensors: dict[str, Tensor], name: str, rank: int, device: Any) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != rank:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise ContextFormatError(f"{path}: tensor {name} is {found}, expected {rank} dimensions. Save it again")
    return tensor.to(device)
