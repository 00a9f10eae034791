"""The one attention function flowmm gives to transformers, and how it is put on a model and taken off again.

transformers calls an attention function with a layer's rotated queries, keys and values after the cache took them in.
Ours hands that call to a *flow*: the compressed cache in generation, a recorder while profiling. The flow travels as a
keyword argument that a forward pre-hook adds, so nothing is stored on a module or in a global.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowmm.errors import UnsupportedModelError

FLOW = "flowmm_flow"
# Flash kernels return neither masses nor take a bias; a flash model is asked to load with sdpa instead.
BASES = ("sdpa", "eager")


class Flow(Protocol):
    """What an attention call of a text layer is handed to."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        base: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output ``[B, L, Hq, D]`` and optional weights.

        `base` runs the host's own attention: of this call, or of the query, key, value and mask it is given.
        """
        ...


def _make_attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def flowmm_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        flow: Flow | None = kwargs.pop(FLOW, None)

        def run_base(
            query: Tensor = query, key: Tensor = key, value: Tensor = value, mask: Tensor | None = attention_mask
        ) -> tuple[Tensor, Tensor | None]:
            attend = _eager_of(module) if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
            return attend(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

        layer = getattr(module, "layer_idx", None)
        if flow is None or layer is None:
            return run_base()
        return flow.attend(layer, query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5, run_base)

    return flowmm_attention


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines `module`; transformers keeps it out of its registry."""
    return sys.modules[type(module).__module__].eager_attention_forward


for _base in BASES:
    AttentionInterface.register(f"flowmm_{_base}", _make_attention(_base))
    # Without a mask function of the same name transformers passes no mask at all, and padding would be attended.
    AttentionMaskInterface.register(f"flowmm_{_base}", ALL_MASK_ATTENTION_FUNCTIONS[_base])


@contextmanager
def attached(
    model: Any,
    pick_flow: Callable[[dict[str, Any]], Flow | None],
    see_rotary: Callable[[Tensor, Tensor], None] | None = None,
) -> Generator[None]:
    """Route the text layers of `model` through a flow for the duration of the block.

    Args:
        model: a transformers vision-language model.
        pick_flow: given the keyword arguments of a forward call of `model`, the flow that sees its layers, or ``None``
            to leave that call alone. Of nested blocks the innermost is asked first.
        see_rotary: called with cosine and sine of every forward call, before its first layer.

    Raises:
        UnsupportedModelError: the text layers use an attention implementation other than sdpa or eager.
    """
    text_config = model.config.get_text_config(decoder=True)
    before = text_config._attn_implementation
    base = before.removeprefix("flowmm_")
    if base not in BASES:
        raise UnsupportedModelError(
            f"the text layers use attn_implementation={base!r}; flowmm needs one of {', '.join(BASES)}: "
            "load the model with attn_implementation='sdpa'"
        )

    def add_flow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        flow = None if FLOW in kwargs else pick_flow(kwargs)
        return args, (kwargs if flow is None else kwargs | {FLOW: flow})

    handles = [model.register_forward_pre_hook(add_flow, with_kwargs=True, prepend=True)]
    if see_rotary is not None:
        embedding = _rotary_embedding(model, text_config)
        handles.append(embedding.register_forward_hook(lambda _module, _args, angles: see_rotary(*angles)))
    try:
        _set_text_attention(model, f"flowmm_{base}")
        yield
    finally:
        for handle in handles:
            handle.remove()
        _set_text_attention(model, before)


def _rotary_embedding(model: nn.Module, text_config: Any) -> nn.Module:
    """The module that turns positions of the text layers into cosine and sine."""
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and getattr(module, "config", None) is text_config:
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no rotary embedding for its text layers, which this method's selector or key "
        "space needs; choose selector='proxy' and key_space='post_rope'"
    )


def _set_text_attention(model: Any, implementation: str) -> None:
    """Change the text layers only: the vision tower keeps its own kernels."""
    text_config = model.config.get_text_config(decoder=True)
    for key in model.config.sub_configs:
        if getattr(model.config, key) is text_config:
            model.set_attn_implementation({key: implementation})
            return
    model.set_attn_implementation(implementation)


def attend_compressed(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of new tokens over a compressed layer and over themselves.

    Args:
        query: ``[B, Hq, q, D]``, the newest tokens.
        key, value: ``[B, Hkv, n, D]`` whose last ``q`` entries belong to the queries; every earlier one is visible.
        bias: ``[B, Hkv, n]`` additive logit bias, -inf on empty slots, or ``None``.
        scaling: softmax scale.

    Returns:
        ``[B, q, Hq, D]``. The GQA group is folded into the query axis, so keys are never repeated.
    """
    batch, q_heads, new, dim = query.shape
    kv_heads, entries = key.shape[1:3]
    group = q_heads // kv_heads
    mask = None if bias is None else bias[:, :, None].to(query.dtype)
    if new > 1:
        hidden = query.new_full((new, new), float("-inf")).triu(1)
        causal = nn.functional.pad(hidden, (entries - new, 0))
        mask = causal[None, None] if mask is None else mask + causal
        mask = mask.expand(batch, kv_heads, new, entries)[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    elif mask is not None:
        mask = mask.expand(batch, kv_heads, group, entries)
    folded = query.reshape(batch, kv_heads, group * new, dim)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, q_heads, new, dim).transpose(1, 2)
