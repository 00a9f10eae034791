"""Importance of every cache entry from the attention of a few proxy rows (eq. 8)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowmm.runtime.prompt import PromptLayout, Proxies

GqaReduce = Literal["mean", "max", "sum"]
# Rows of a short prompt are taken together until they make so many logits: a matrix product is worth its start.
LOGITS_AT_A_TIME = 2**18


def rows_attention(
    query: Tensor, key: Tensor, rows: Tensor, valid: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """Causal softmax attention of chosen prompt rows, in fp32.

    Args:
        query: ``[B, Hq, L, D]`` after RoPE.
        key: ``[B, Hkv, L, D]`` after RoPE.
        rows: ``[B, R]`` long, columns of the rows asked for.
        valid: ``[B, L]`` bool, False on padding.
        scaling: softmax scale, usually ``D ** -0.5``.
        bias: ``[B, Hkv, L]``, finite, added to the logits.

    Returns:
        ``[B, Hkv, G, R, L]``, each row of a valid token sums to 1.
    """
    return _causal_logits(query, key, rows, valid, scaling, bias).softmax(-1)


def reduce_group(per_query_head: Tensor, reduce: GqaReduce) -> Tensor:
    """``[B, Hkv, G, L]`` to ``[B, Hkv, L]`` over the query heads of a KV head."""
    match reduce:
        case "mean":
            return per_query_head.mean(2)
        case "max":
            return per_query_head.amax(2)
        case "sum":
            return per_query_head.sum(2)


def attention_received(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    counted: Tensor,
    valid: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Column sums of :func:`rows_attention` over the counted rows, without ever normalising a row.

    Shapes as there; `counted` ``[B, R]`` bool. Returns ``[B, Hkv, G, L]`` fp32.
    """
    logits = _causal_logits(query, key, rows, valid, scaling, bias)
    exponentials = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    # A row's sum divides its weight instead of its entries, so that one product normalises and adds up.
    weights = torch.where(counted[:, None, None], exponentials.sum(-1).reciprocal(), 0.0)
    return (weights[..., None, :] @ exponentials).squeeze(-2)


def _causal_logits(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    valid: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    seen_by_all: int = 0,
) -> Tensor:
    """Logits ``[B, Hkv, G, R, L]`` fp32 of chosen rows, -inf where a row does not see a column.

    Arguments as for :func:`rows_attention`. The first `seen_by_all` columns are visible to each of the rows, which the
    caller knows without looking.
    """
    batch, q_heads, _, dim = query.shape
    kv_heads, length, count = key.shape[1], key.shape[2], rows.shape[1]
    picked = query.gather(2, rows[:, None, :, None].expand(batch, q_heads, count, dim)).float() * scaling
    logits = picked.reshape(batch, kv_heads, -1, dim) @ key.float().transpose(-1, -2)
    logits = logits.view(batch, kv_heads, -1, count, length)
    if bias is not None:
        logits += bias[:, :, None, None].float()
    columns = torch.arange(seen_by_all, length, device=key.device)
    visible = (columns <= rows[..., None]) & valid[:, None, seen_by_all:]
    # Added, because filling through a mask that is spread over heads costs several times as much.
    hidden = logits.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    logits[..., seen_by_all:] += hidden[:, None, None]
    return logits


def proxy_importance(
    query: Tensor,
    key: Tensor,
    proxies: Proxies,
    valid: Tensor,
    scaling: float,
    reduce: GqaReduce = "mean",
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each entry receives from the proxy rows, eq. 8: ``I[h, i] = sum_j A[h, j, i]``.

    Shapes as in :func:`rows_attention`. Returns ``[B, Hkv, L]`` fp32, 0 on padding; summed over a row of the prompt
    it equals the number of proxies (for ``mean``).
    """
    received = attention_received(query, key, proxies.index, proxies.used, valid, scaling, bias)
    return torch.where(valid[:, None, :], reduce_group(received, reduce), 0.0)


def spread_rows(layout: PromptLayout, rows: int | None) -> tuple[Tensor, Tensor]:
    """Evenly spaced rows of each prompt, its last one included; spread over its own tokens, so padding changes nothing.

    Returns:
        index ``[B, R]`` long and counted ``[B, R]`` bool with ``R = min(rows, L)`` (``None``: L).
    """
    length = layout.valid.shape[-1]
    own = layout.valid.sum(-1, keepdim=True)
    used = own.clamp(max=length if rows is None else rows)
    turn = torch.arange(1, min(length, rows or length) + 1, device=own.device)[None]
    index = (turn * own).div(used, rounding_mode="floor").clamp(max=own) - 1 + length - own
    return index, turn <= used


def column_mean(
    query: Tensor,
    key: Tensor,
    layout: PromptLayout,
    scaling: float,
    reduce: GqaReduce = "mean",
    rows: int | None = None,
    block: int | None = None,
) -> Tensor:
    """Mean attention that each entry receives from the rows that can see it, in blocks of rows.

    Args:
        query: ``[B, Hq, L, D]``; key: ``[B, Hkv, L, D]``.
        rows: use this many evenly spaced rows, the last one included; ``None``: all.
        block: rows at a time; memory is ``O(B * Hq * block * L)``. ``None``: at least 8, more for short prompts.

    Returns:
        ``[B, Hkv, L]`` fp32, 0 on padding.
    """
    batch, heads, length = *key.shape[:2], key.shape[2]
    if block is None:
        block = max(8, LOGITS_AT_A_TIME // query[..., 0].numel())
    index, counted_rows = spread_rows(layout, rows)
    total = torch.zeros(batch, heads, length, device=key.device)
    parts = zip(index.split(block, 1), counted_rows.split(block, 1), strict=True)
    for number, (part, counted) in enumerate(parts, start=1):
        # No row of this block sees a column behind its last row, wherever that is in the rows of the batch.
        width = max(_spread_row(number * block, own, length, rows) for own in layout.lengths) + 1
        first = 0 if layout.padded else _spread_row((number - 1) * block + 1, length, length, rows)
        logits = _causal_logits(query, key[:, :, :width], part, layout.valid[:, :width], scaling, seen_by_all=first)
        # Of many rows, whole logits do not fit a core's cache, but one row does: softmax goes through it once.
        received = counted[:, None, None, None].float() @ logits.softmax(-1)
        total[..., :width] += reduce_group(received.squeeze(-2), reduce)
    rows_at = torch.zeros(batch, length, device=key.device).scatter_add_(1, index, counted_rows.float())
    seen = rows_at.flip(-1).cumsum(-1).flip(-1)
    return torch.where(layout.valid[:, None], total / seen.clamp(min=1)[:, None], 0.0)


def _spread_row(turn: int, own: int, length: int, rows: int | None) -> int:
    """What :func:`spread_rows` gives for one turn, on the host."""
    used = min(own, rows or length)
    return min(turn * own // used, own) - 1 + length - own
