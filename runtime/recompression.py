"""Compressing a conversation again: merged entries and the tokens that came after them, down to the budget of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmm.errors import FlowmmError
from flowmm.plans import MethodParameters
from flowmm.plans.method import PROXY_RULES, parse_rule
from flowmm.runtime.compression import CompressedLayer, compress_layer
from flowmm.runtime.layer import ENTRIES, FlowLayer
from flowmm.runtime.prompt import PromptLayout, Proxies
from flowmm.runtime.rotary import Rotary


@dataclass(frozen=True)
class Conversation:
    """What the tokens behind a layer's entries are.

    Attributes:
        visual: ``[B, seen]`` bool, visual tokens among all tokens fed so far.
        cross: ``[B]`` bool, the layer's mode, decided in the first prefill.
        rotary: of all tokens, where the method needs it.
    """

    visual: Tensor
    cross: Tensor
    rotary: Rotary | None


def remembered_queries(method: MethodParameters) -> int:
    """Queries of the latest tokens that a later compression needs."""
    _, number = parse_rule(method.proxies, PROXY_RULES)
    return int(number or 1)


def recompress_layer(
    layer: FlowLayer,
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
    conversation: Conversation,
    method: MethodParameters,
    scaling: float,
    index: int,
) -> None:
    """Compress a layer's entries again; each pivot may be an entry that absorbed others before.

    An entry counts with the attention it receives, its logit bias included; what merges adds its bias to the result,
    weighted as its key. KV heads hold different tokens, so each is compressed as a row of a batch of its own. The
    proxies are the latest tokens; queries of older rows are gone, so column means give way to them.

    Args:
        layer: keys, values, bias and the latest queries.
        lengths: entries held now in each row of the batch.
        counts: entries to keep in each row, at most `lengths`.
        index: of the layer, for seeds.
    """
    keys, values = layer.first_entries(layer.kept)
    if layer.recent is None:
        raise FlowmmError("compressing again needs the latest queries; the cache was made without recompress_every")
    batch, heads, held = keys.shape[:3]
    bias = keys.new_zeros(keys.shape[:3]) if layer.bias is None else layer.bias
    order = _empty_slots_first(bias)
    positions = layer.all_positions().gather(2, order)
    keys, values = (states.gather(2, order[..., None].expand_as(states)) for states in (keys, values))
    bias = bias.gather(2, order)
    layout = PromptLayout(
        visual=_fold(conversation.visual[:, None].expand(-1, heads, -1).gather(2, positions))[:, 0],
        valid=_fold(bias > float("-inf"))[:, 0],
        lengths=tuple(length for length in lengths for _ in range(heads)),
    )
    compressed = compress_layer(
        query=_at_the_end(layer.recent, heads, held),
        key=_fold(keys),
        value=_fold(values),
        layout=layout,
        proxies=_latest(layout, layer.recent.shape[2], method),
        counts=tuple(count for count in counts for _ in range(heads)),
        cross=conversation.cross.repeat_interleave(heads) & layout.mixed,
        method=_without_column_means(method),
        scaling=scaling,
        rotary=None if conversation.rotary is None else conversation.rotary.at(positions.flatten(0, 1)),
        layer=index,
        bias=_fold(bias.masked_fill(bias == float("-inf"), 0.0)),
    )
    layer.replace_all(_unfolded(compressed, batch), positions.gather(2, compressed.positions.view(batch, heads, -1)))


def _fold(per_head: Tensor) -> Tensor:
    """``[B, H, n, ...]`` to ``[B * H, 1, n, ...]``."""
    return per_head.flatten(0, 1)[:, None]


def _unfolded(compressed: CompressedLayer, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    entries = compressed.entries
    keys, values = (states[:, 0].unflatten(0, (batch, -1)) for states in (entries.keys, entries.values))
    return keys, values, None if entries.bias is None else entries.bias[:, 0].unflatten(0, (batch, -1))


def _empty_slots_first(bias: Tensor) -> Tensor:
    """``[B, Hkv, n]`` long: empty slots, then entries in their order, so that rows look like left-padded prompts."""
    return (bias > float("-inf")).long().sort(dim=-1, stable=True).indices


def _at_the_end(recent: Tensor, heads: int, held: int) -> Tensor:
    """Queries ``[B, Hq, P, D]`` as the last rows of ``[B * Hkv, Hq / Hkv, held, D]``; zeros before them."""
    grouped = recent.unflatten(1, (heads, -1)).flatten(0, 1)
    return torch.nn.functional.pad(grouped, (0, 0, held - recent.shape[ENTRIES], 0))


def _latest(layout: PromptLayout, count: int, method: MethodParameters) -> Proxies:
    """The last `count` entries of each row, without visual ones where the rule says so and text is among them."""
    length = layout.valid.shape[1]
    index = torch.arange(length - count, length, device=layout.valid.device).expand(len(layout.lengths), count)
    used = layout.valid[:, -count:]
    text = used & ~layout.visual[:, -count:]
    if method.proxies.startswith("last_text"):
        used = torch.where(text.any(-1, keepdim=True), text, used)
    return Proxies(index, used)


def _without_column_means(method: MethodParameters) -> MethodParameters:
    parts = ["proxy" if part.startswith("column_mean") else part for part in method.selector.split("+")]
    return method.model_copy(update={"selector": "+".join(dict.fromkeys(parts)), "mass": "proxy"})
