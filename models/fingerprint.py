"""What identifies a model: its shape, a hash of its architecture, a hash of its weights.

``config_sha256`` is the SHA-256 of a canonical JSON (sorted keys, no spaces) of exactly the fields listed below that
the configuration has. Paths, library versions, dtype, attention implementation, token limits and dropout are left out,
so it is the same for every supported transformers version and for every way of loading the checkpoint.

``weights_sha256`` is the SHA-256 over all parameters in order of their names (tied ones once) of one line of JSON
``[name, [shape]]`` followed by a newline and at most 16 values: elements ``0, s, 2s, ...`` of the flattened parameter
with ``s = max(1, elements // 17)``, rounded to bfloat16, as little-endian 16-bit words. Hence it depends neither on
shard layout nor, for a bfloat16 checkpoint, on the dtype it is loaded in (float16 differs where it overflows or
underflows). It notices another checkpoint or a fine-tuned one, not one that differs in single elements: it guards
against mistakes, not against tampering. It is None when a parameter is not at hand as a whole (offloaded to disk or
CPU by `device_map`, on the meta device, or sharded over processes).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowmm.models.catalogue import HUB_ID, POCKET, pocket_checkpoint
from flowmm.models.families import family_of
from flowmm.models.visual import text_config
from flowmm.plans import ModelFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOP_FIELDS = ("model_type", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "layer_types",
    "sliding_window",
)
_ROPE_FIELDS = ("rope_theta", "mrope_section", "factor")
_VISION_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "hidden_act",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
_SAMPLES = 16


def fingerprint_model(
    model: PreTrainedModel, source: str | None = None, revision: str | None = None
) -> ModelFingerprint:
    """Fingerprint of a transformers model, however it was loaded.

    Args:
        source: hub id or directory name to record; by default read from the model. Of a path only its last component
            is recorded.
        revision: commit to record; by default the one transformers noted when it loaded from the hub (not all
            versions do).

    Raises:
        UnsupportedModelError: the model belongs to no supported family.
    """
    family = family_of(model)
    text = text_config(model.config)
    return ModelFingerprint(
        source=public_source(source or model.name_or_path or family.architecture),
        family=family.name,
        model_type=family.model_type,
        architecture=type(model).__name__,
        revision=revision or getattr(model.config, "_commit_hash", None),
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim(text),
        hidden_size=text.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=text._attn_implementation,
        config_sha256=config_sha256(model.config),
        weights_sha256=weights_sha256(model),
    )


def public_source(source: str) -> str:
    """`source` without anything of this machine: ``pocket``, a hub id, or the name of a directory."""
    pocket = pocket_checkpoint()
    if source == POCKET or (pocket is not None and Path(source) == pocket):
        return POCKET
    if HUB_ID.fullmatch(source) and not Path(source).is_dir():
        return source
    return Path(source).resolve().name


def head_dim(text: Any) -> int:
    """Width of one attention head of a text configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def config_sha256(config: PreTrainedConfig) -> str:
    """Hash of the fields that decide what is computed; see the module's description."""
    text = text_config(config)
    rope = dict(getattr(text, "rope_parameters", None) or {})
    described = {
        "model": _present(config, _TOP_FIELDS),
        "text": _present(text, _TEXT_FIELDS) | {"head_dim": head_dim(text)},
        "rope": {field: rope[field] for field in _ROPE_FIELDS if rope.get(field) is not None},
        "vision": _present(getattr(config, "vision_config", None), _VISION_FIELDS),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _present(config: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {field: value for field in fields if (value := getattr(config, field, None)) is not None}


@torch.no_grad()
def weights_sha256(model: torch.nn.Module) -> str | None:
    """Hash of up to 16 values of every parameter; None if one is out of reach; see the module's description."""
    parameters = sorted(model.named_parameters())
    if any(parameter.is_meta or hasattr(parameter, "device_mesh") for _, parameter in parameters):
        return None
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        samples = flat[:: max(1, flat.numel() // (_SAMPLES + 1))][:_SAMPLES]
        by_device[parameter.device].append((name, samples.to(torch.bfloat16)))
    values: dict[str, bytes] = {}
    for samples in by_device.values():
        # One transfer per device: a 72B model has about a thousand parameters.
        words = torch.cat([sample for _, sample in samples]).cpu().view(torch.int16).numpy().astype("<i2")
        start = 0
        for name, sample in samples:
            values[name] = words[start : start + sample.numel()].tobytes()
            start += sample.numel()
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(json.dumps([name, list(parameter.shape)], separators=(",", ":")).encode() + b"\n" + values[name])
    return digest.hexdigest()
