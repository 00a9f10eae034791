"""The families flowmm can compress, found by the model type in a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from flowmm.errors import UnsupportedModelError
from flowmm.models.messages import Conversation
from flowmm.models.qwen25vl import Qwen25VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    class GenerativeModel(PreTrainedModel):
        """What the model of every family is; for type checkers only, which cannot match ``generate(**inputs)``."""

        def generate(self, *args: Any, **inputs: Any) -> Any: ...


class Family(Protocol):
    """What flowmm needs to know about one model family; implementations hold no state."""

    name: str
    model_type: str
    architecture: str

    def load_weights(self, source: str, **options: Any) -> tuple[GenerativeModel, dict[str, Any]]:
        """The model and transformers' loading report (missing and mismatched keys)."""
        ...

    def load_image_processor(self, source: str, **options: Any) -> Any:
        """Image processor of the checkpoint, working without torchvision."""
        ...

    def check_parts(self, config: PreTrainedConfig, tokenizer: Any, image_processor: Any) -> None:
        """Raise ModelLoadError when tokenizer, image processor and model do not belong together."""
        ...

    def build_inputs(
        self,
        config: PreTrainedConfig,
        tokenizer: Any,
        image_processor: Any,
        conversations: Sequence[Conversation],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
    ) -> dict[str, torch.Tensor]:
        """Left-padded model inputs of a batch, on the CPU."""
        ...


_FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen25VL(),)}


def family_of(model_or_config: Any) -> Family:
    """The family of a model, of its configuration, or of the dictionary read from a ``config.json``.

    Raises:
        UnsupportedModelError: no family has this model type; the message names it and the supported ones.
    """
    config = getattr(model_or_config, "config", model_or_config)
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if found not in _FAMILIES:
        supported = ", ".join(f"{family.model_type} ({family.architecture})" for family in _FAMILIES.values())
        raise UnsupportedModelError(
            f"model type {found!r} is not supported; expected {supported}; `flowmm models` lists known models"
        )
    return _FAMILIES[found]
