"""The one attention function flowmm gives to transformers, and how it is put on a model and taken off again.

transformers calls an attention function with a layer's rotated queries, keys and values after the cache took them in.
Ours hands that call to a *flow*: the compressed cache in generation, a recorder while profiling. The flow travels as a
keyword argument that a forward pre-hook adds, so nothing is stored on a module or in a global.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flowmm.errors import UnsupportedModelError

FLOW = "flowmm_flow"
# Flash kernels return neither masses nor take a bias; a flash model is asked to load with sdpa instead.
BASES = ("sdpa", "eager")
PREFIX = "flowmm_"
# Blocks of several threads may open and close on one model at a time.
_lock = threading.Lock()


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
    AttentionInterface.register(PREFIX + _base, _make_attention(_base))
    # Without a mask function of the same name transformers passes no mask at all, and padding would be attended.
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


@dataclass(frozen=True, eq=False)
class _Watcher:
    """What one block wants to hear of a model's forward calls."""

    pick_flow: Callable[[dict[str, Any]], Flow | None]
    see_rotary: Callable[[Tensor, Tensor], None] | None
    after: Callable[[dict[str, Any]], None] | None
    last_row_suffices: Callable[[], bool] | None


class _Attachment:
    """The hooks on a model, shared by all its open blocks.

    Hooks come and go with the first and the last block alone: torch walks through them during a forward call, which
    another thread may be in the middle of.
    """

    def __init__(self, model: Any, base: str) -> None:
        self._model, self._base = model, base
        self._watchers: list[_Watcher] = []
        self._handles: list[Any] = []

    @classmethod
    def of(cls, model: Any, base: str) -> _Attachment:
        """The one already on the model, or a fresh one."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), cls(model, base))

    def open(self, watcher: _Watcher) -> None:
        """Add a block's watcher.

        Raises:
            UnsupportedModelError: it wants rotary angles of a model without them.
        """
        embedding = _rotary_embedding(self._model)
        if watcher.see_rotary is not None and embedding is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has no rotary embedding for its text layers, which this method's "
                "selector or key space needs; choose selector='proxy' and key_space='post_rope'"
            )
        if not self._watchers:
            self._handles = [
                self._model.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True),
                self._model.register_forward_hook(self.after_forward, with_kwargs=True),
            ]
            if embedding is not None:
                self._handles.append(embedding.register_forward_hook(self.after_rotary))
            last_mlp = _last_mlp(self._model)
            if last_mlp is not None:
                self._handles.append(last_mlp.register_forward_pre_hook(self.before_last_mlp))
            _set_text_attention(self._model, PREFIX + self._base)
        self._watchers = [watcher, *self._watchers]

    def close(self, watcher: _Watcher) -> None:
        """Remove a block's watcher."""
        self._watchers = [other for other in self._watchers if other is not watcher]
        if not self._watchers:
            for handle in self._handles:
                handle.remove()
            _set_text_attention(self._model, self._base)

    def before_forward(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Hand the flow that a block picks down to the attention calls; the innermost block is asked first."""
        for watcher in self._watchers:
            flow = watcher.pick_flow(kwargs)
            if flow is not None:
                return args, kwargs | {FLOW: flow}
        return args, kwargs

    def after_forward(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """Tell the blocks that a forward call is over."""
        for watcher in self._watchers:
            if watcher.after is not None:
                watcher.after(kwargs)

    def after_rotary(self, _module: nn.Module, _args: Any, angles: tuple[Tensor, Tensor]) -> None:
        """Show the blocks cosine and sine of a forward call."""
        for watcher in self._watchers:
            if watcher.see_rotary is not None:
                watcher.see_rotary(*angles)

    def before_last_mlp(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pass on the last token alone where a block knows that the others go unread.

        The layer adds the result to all tokens, so its output keeps its shape, and is wrong but for the last one.
        """
        # Compiled code decodes one token at a time and has nothing to decide here.
        if args[0].shape[1] == 1:
            return None
        asked = [watcher.last_row_suffices for watcher in self._watchers if watcher.last_row_suffices is not None]
        return (args[0][:, -1:], *args[1:]) if any(suffices() for suffices in asked) else None


@contextmanager
def attached(
    model: Any,
    pick_flow: Callable[[dict[str, Any]], Flow | None],
    see_rotary: Callable[[Tensor, Tensor], None] | None = None,
    after: Callable[[dict[str, Any]], None] | None = None,
    last_row_suffices: Callable[[], bool] | None = None,
) -> Generator[None]:
    """Route the text layers of `model` through a flow for the duration of the block.

    Args:
        model: a transformers vision-language model.
        pick_flow: given the keyword arguments of a forward call of `model`, the flow that sees its layers, or ``None``
            to leave that call alone. Of nested blocks the innermost is asked first.
        see_rotary: called with cosine and sine of every forward call, before its first layer.
        after: called with the keyword arguments of every forward call once it is over.
        last_row_suffices: asked once in every forward call of several tokens, after the last layer's attention: may
            the rest of that layer be computed for the last token alone?

    Blocks may overlap; the model has its own attention again when the last one is left.

    Raises:
        UnsupportedModelError: the text layers use an attention implementation other than sdpa or eager.
    """
    base = model.config.get_text_config(decoder=True)._attn_implementation.removeprefix(PREFIX)
    if base not in BASES:
        raise UnsupportedModelError(
            f"the text layers use attn_implementation={base!r}; flowmm needs one of {', '.join(BASES)}: "
            "load the model with attn_implementation='sdpa'"
        )
    watcher = _Watcher(pick_flow, see_rotary, after, last_row_suffices)
    with _lock:
        attachment = _Attachment.of(model, base)
        attachment.open(watcher)
    try:
        yield
    finally:
        with _lock:
            attachment.close(watcher)


def flow_of(model: Any, kwargs: dict[str, Any]) -> Flow | None:
    """What a forward call of `model` with these keyword arguments would hand down to its layers."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _Attachment):
            return owner.before_forward(model, (), kwargs)[1].get(FLOW)
    return None


def _rotary_embedding(model: Any) -> nn.Module | None:
    """The module that turns positions of the text layers into cosine and sine."""
    text_config = model.config.get_text_config(decoder=True)
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and getattr(module, "config", None) is text_config:
            return module
    return None


def _last_mlp(model: Any) -> nn.Module | None:
    """What the last text layer computes for each token on its own, after its attention; None: not found."""
    text_config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        attention = getattr(module, "self_attn", None)
        if (
            getattr(attention, "config", None) is text_config
            and getattr(attention, "layer_idx", None) == text_config.num_hidden_layers - 1
        ):
            return getattr(module, "mlp", None)
    return None


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


def attend_one_token(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """:func:`attend_compressed` of one token per row, for compiled code on a CPU.

    There the fused kernel takes about four times as long as reading keys and values. The compiler makes one loop of the
    sums below, which reads a key once for all query heads of its group.

    Args:
        query: ``[B, Hq, 1, D]``.
        key, value, bias, scaling: as there.

    Returns:
        ``[B, 1, Hq, D]``.
    """
    batch, q_heads, _, dim = query.shape
    kv_heads = key.shape[1]
    query = (query * scaling).reshape(batch, kv_heads, q_heads // kv_heads, 1, dim)
    # Heads are picked one by one: with several readers, the compiler stores the rotated queries before the loop over
    # keys instead of rotating them again for every key.
    logits = torch.stack([(query[:, :, head] * key).sum(-1) + bias for head in range(query.shape[2])], dim=2)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    channels = value.transpose(2, 3)
    sums = [(weights[:, :, head, None] * channels).sum(-1) for head in range(weights.shape[2])]
    # Divided last, or the compiler divides every weight again for every channel.
    return (torch.stack(sums, dim=2) / weights.sum(-1, keepdim=True)).reshape(batch, 1, q_heads, dim)
