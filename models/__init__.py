"""Models: load a vision-language model, build its prompts, say which tokens are visual, identify it.

The catalogue (:func:`known_models`, :func:`resolve_source`) needs neither torch nor transformers; every other name
loads its module on first use. One file per family: ``qwen25vl.py``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ModelCard": "flowmm.models.catalogue",
    "known_models": "flowmm.models.catalogue",
    "resolve_source": "flowmm.models.catalogue",
    "open_image": "flowmm.models.images",
    "build_messages": "flowmm.models.messages",
    "text_config": "flowmm.models.visual",
    "visual_mask": "flowmm.models.visual",
    "Family": "flowmm.models.families",
    "family_of": "flowmm.models.families",
    "fingerprint_model": "flowmm.models.fingerprint",
    "LoadedModel": "flowmm.models.loading",
    "load_model": "flowmm.models.loading",
}

__all__ = [
    "Family",
    "LoadedModel",
    "ModelCard",
    "build_messages",
    "family_of",
    "fingerprint_model",
    "known_models",
    "load_model",
    "open_image",
    "resolve_source",
    "text_config",
    "visual_mask",
]

if TYPE_CHECKING:
    from flowmm.models.catalogue import ModelCard, known_models, resolve_source
    from flowmm.models.families import Family, family_of
    from flowmm.models.fingerprint import fingerprint_model
    from flowmm.models.images import open_image
    from flowmm.models.loading import LoadedModel, load_model
    from flowmm.models.messages import build_messages
    from flowmm.models.visual import text_config, visual_mask


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flowmm.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
