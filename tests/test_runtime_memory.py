"""Compressing a layer takes at most twice the memory of its keys and values beyond them."""

from __future__ import annotations

import pytest
import torch

from flowmm.plans import PRESETS, MethodParameters
from flowmm.runtime.compression import compress_layer
from flowmm.runtime.peak_memory import PeakMemory
from flowmm.runtime.pivots import entries_at
from flowmm.runtime.prompt import PromptLayout, find_proxies
from flowmm.runtime.rotary import Rotary

Q_HEADS, KV_HEADS, DIM = 8, 2, 64


def as_a_host_lays_them_out(heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, length, heads, DIM).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("preset", PRESETS)
def test_extra_peak_is_at_most_twice_the_layer(preset: str, length: int) -> None:
    method = MethodParameters.from_preset(preset)
    query = as_a_host_lays_them_out(Q_HEADS, length)
    key, value = as_a_host_lays_them_out(KV_HEADS, length), as_a_host_lays_them_out(KV_HEADS, length)
    visual = (torch.arange(length) % 1000 >= 200)[None]
    layout = PromptLayout.from_masks(visual, torch.ones_like(visual))
    angles = torch.rand(1, length, DIM)
    with PeakMemory(key.device) as peak:
        compressed = compress_layer(
            query,
            key,
            value,
            layout,
            find_proxies(layout, method.proxies),
            (length // 5,),
            torch.tensor([True]),
            method,
            DIM**-0.5,
            Rotary(angles.cos(), angles.sin()),
        )
    held = compressed.entries.keys.nbytes + compressed.entries.values.nbytes
    assert held < peak.extra <= 2 * (key.nbytes + value.nbytes)


@pytest.mark.parametrize("batch", [1, 3])
def test_entries_are_found_in_either_layout(batch: int) -> None:
    states = torch.randn(batch, 4, 9, 5)
    index = torch.randint(0, 9, (batch, 4, 6))
    expected = states.gather(2, index[..., None].expand(-1, -1, -1, 5))
    by_token = states.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (states, by_token, states.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(entries_at(layout, index), expected)
