"""Nothing waits for the device between the first layer of a prefill and the last decoded token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_runtime_oracle import PROMPT, uneven_plan
from tiny import tiny_inputs, tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import flowmm
from flowmm.plans import PRESETS, MethodParameters
from flowmm.runtime.attention import attend_compressed
from flowmm.runtime.compression import compress_layer
from flowmm.runtime.layer import FlowLayer
from flowmm.runtime.prompt import PromptLayout, Proxies
from flowmm.runtime.rotary import Rotary

WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal"}


class Waits(TorchDispatchMode):
    """Counts operations whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITING or boolean_index:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_counts() -> None:
    with Waits() as waits:
        tensor = torch.arange(4)
        tensor.sum().item()
        tensor[tensor > 1]
        bool((tensor > 1).any())
    assert sum(waits.found.values()) >= 3


@torch.no_grad()
def test_decoding_waits_no_more_than_the_host_does() -> None:
    model = tiny_model()
    inputs, token = tiny_inputs(PROMPT), torch.tensor([[7]])

    def waits_while_decoding(cache: Any) -> Counter[str]:
        model(**inputs, past_key_values=cache)
        with Waits() as waits:
            for _ in range(3):
                model(input_ids=token, past_key_values=cache)
        return waits.found

    plain = waits_while_decoding(DynamicCache())
    with flowmm.compress(model, uneven_plan(model), budget=0.3) as run:
        assert waits_while_decoding(run.new_cache()) == plain


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
@pytest.mark.parametrize("preset", PRESETS)
def test_compressing_and_decoding_read_nothing_from_the_device(preset: str, padded: bool) -> None:
    """Fake tensors have shapes but no content: whoever asks for content gets an exception."""
    method = MethodParameters.from_preset(preset)
    batch, heads, length, dim = 2, 2, 96, 16
    lengths, counts = ((60, 96), (15, 24)) if padded else ((96, 96), (24, 24))
    with FakeTensorMode():
        layout = PromptLayout(
            torch.zeros(batch, length, dtype=torch.bool), torch.ones(batch, length, dtype=torch.bool), lengths
        )
        proxies = Proxies(torch.zeros(batch, 4, dtype=torch.long), torch.ones(batch, 4, dtype=torch.bool))
        key, value = torch.randn(batch, heads, length, dim), torch.randn(batch, heads, length, dim)
        layer = FlowLayer()
        layer.update(key, value)
        compressed = compress_layer(
            torch.randn(batch, 2 * heads, length, dim),
            key,
            value,
            layout,
            proxies,
            counts,
            torch.ones(batch, dtype=torch.bool),
            method,
            scaling=0.25,
            rotary=Rotary(torch.randn(batch, length, dim), torch.randn(batch, length, dim)),
        )
        layer.replace_prompt(compressed, length)
        for _ in range(3):
            keys, values = layer.update(torch.randn(batch, heads, 1, dim), torch.randn(batch, heads, 1, dim))
            attend_compressed(torch.randn(batch, 2 * heads, 1, dim), keys, values, layer.bias, 0.25)
    assert layer.kept == 27
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1).item()
