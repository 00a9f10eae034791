"""Importance of every cache entry from the attention of a few proxy rows (eq. 8)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowmm.runtime.prompt import Proxies

GqaReduce = Literal["mean", "max", "sum"]


def rows_attention(query: Tensor, key: Tensor, rows: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Causal softmax attention of chosen prompt rows, in fp32.

    Args:
        query: ``[B, Hq, L, D]`` after RoPE.
        key: ``[B, Hkv, L, D]`` after RoPE.
        rows: ``[B, R]`` long, columns of the rows asked for.
        valid: ``[B, L]`` bool, False on padding.
        scaling: softmax scale, usually ``D ** -0.5``.

    Returns:
        ``[B, Hkv, G, R, L]``, each row of a valid token sums to 1.
    """
    batch, q_heads, length, dim = query.shape
    kv_heads, count = key.shape[1], rows.shape[1]
    picked = query.gather(2, rows[:, None, :, None].expand(batch, q_heads, count, dim))
    folded = picked.reshape(batch, kv_heads, -1, dim)
    scores = (folded.float() @ key.float().transpose(-1, -2)).mul_(scaling)
    scores = scores.view(batch, kv_heads, -1, count, length)
    columns = torch.arange(length, device=key.device)
    visible = (columns <= rows[..., None]) & valid[:, None, :]
    return scores.masked_fill_(~visible[:, None, None], float("-inf")).softmax(-1)


def reduce_group(per_query_head: Tensor, reduce: GqaReduce) -> Tensor:
    """``[B, Hkv, G, L]`` to ``[B, Hkv, L]`` over the query heads of a KV head."""
    match reduce:
        case "mean":
            return per_query_head.mean(2)
        case "max":
            return per_query_head.amax(2)
        case "sum":
            return per_query_head.sum(2)


def proxy_importance(
    query: Tensor, key: Tensor, proxies: Proxies, valid: Tensor, scaling: float, reduce: GqaReduce = "mean"
) -> Tensor:
    """Attention that each entry receives from the proxy rows, eq. 8: ``I[h, i] = sum_j A[h, j, i]``.

    Shapes as in :func:`rows_attention`. Returns ``[B, Hkv, L]`` fp32, 0 on padding; summed over a row of the prompt
    it equals the number of proxies (for ``mean``).
    """
    attention = rows_attention(query, key, proxies.index, valid, scaling)
    counted = torch.where(proxies.used[:, None, None, :, None], attention, 0.0).sum(3)
    return torch.where(valid[:, None, :], reduce_group(counted, reduce), 0.0)
